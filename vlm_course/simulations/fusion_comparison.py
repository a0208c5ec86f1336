"""Chapter 3's simulation: four ways to bring an image into a language model, each with the mask that it really runs
under and with the attention of a model that was trained so.

Sources: LLaVA (Liu et al. 2023), section 4.1; Flamingo (Alayrac et al. 2022), section 2; the trained models are those
of `vlm_course.studies.fusion_strategies`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from vlm_course import chat
from vlm_course.attention import causal_mask, media_attention_mask
from vlm_course.attention_maps import attention_maps
from vlm_course.fusion import media_mask
from vlm_course.pretrained import Small
from vlm_course.simulations import figures
from vlm_course.simulations.interactive import Frame, Simulation
from vlm_course.studies.fusion_strategies import logits, placeholders
from vlm_course.worlds.dialogs import Dialogs
from vlm_course.worlds.scenes import Scenes, render, sample

WORDS = {
    "early": "Early fusion",
    "cross-attention": "Cross-attention",
    "resampler": "Resampler, then early fusion",
    "interleaved": "Interleaved",
}


@dataclass(frozen=True)
class Reading:
    """What one strategy does with one question.

    Rows and columns of `mask` and `attention` are queries and keys. `looks` is where the last token looks, the one that
    writes the answer, traced back to the patches of every image of the row.
    """

    strategy: str
    ids: Tensor  # [T] the sequence of the language model
    mask: Tensor  # [T, S] bool, True = may attend; S is T, or the patches where text reads them from outside
    attention: Tensor  # [T, S] mean over heads and blocks
    looks: Tensor  # [n_images, N], sums to the share of its attention that the answering token gives to images
    inside: Tensor  # [N] bool, the patches of the object asked about, in the last image
    words: str  # the question
    says: str  # the model's answer
    true: str
    on_others: float | None = None  # of "best" heads: what the best head for another object has on that one, on average

    @property
    def on_images(self) -> float:
        """Share of the answering token's attention that goes to visual tokens."""
        return self.looks.sum().item()

    @property
    def on_object(self) -> float:
        """Of its attention to the last image, the share on the patches of the object asked about."""
        last = self.looks[-1]
        return (last[self.inside].sum() / last.sum().clamp(min=1e-9)).item()

    @property
    def object_area(self) -> float:
        """The share of that object among the patches: what attention spread evenly would give it."""
        return self.inside.float().mean().item()


@dataclass
class FusionExperiment:
    """Trained models of the four strategies, and scenes with one question about the colour of an object each.

    Args:
        small: its vision tower and tokenizer are used.
        models: strategy -> trained model, from `fusion_strategies.load`.
        count: scenes to choose from; the scene after is the first image where two are interleaved.
    """

    small: Small
    models: Mapping[str, nn.Module]
    count: int = 6
    seed: int = 5
    scenes: Scenes = field(init=False)
    pixels: Tensor = field(init=False)  # [count, 3, 96, 96]
    patches: Tensor = field(init=False)  # [count, N, D_vision]

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.scenes = sample(self.count, generator=generator, objects=(3, 4))
        self.pixels = render(self.scenes, generator=generator)
        turns = Dialogs(self.small.tokenizer, canonical=True).ask(self.scenes, "colour", generator=generator)
        decode = self.small.tokenizer.decode
        self.questions = [decode(row) for row in turns.question]
        self.answers = [decode(row) for row in turns.answer]
        self.target = turns.target.tolist()
        tower, layer = self.small.model.vision, self.small.model.config.feature_layer
        with torch.no_grad():
            self.patches = tower.patch_features(self.pixels, layer=layer)

    def object_patches(self, scene: int, slot: int | None = None) -> Tensor:
        """Patches whose middle lies in the object asked about, or in that of `slot`: [N] bool."""
        config = self.small.model.config.vision
        slot = self.target[scene] if slot is None else slot
        place = torch.arange(config.n_patches)
        middle = (torch.stack([place % config.grid[1], place // config.grid[1]], -1) + 0.5) * config.patch_size
        far = (middle - self.scenes.centre[scene, slot]).abs().amax(-1)
        return far < self.scenes.radius[scene, slot] + config.patch_size / 4

    def prompt(self, strategy: str, scene: int) -> tuple[Tensor, Tensor]:
        """The sequence [1, T] up to the answer, and the patches that go with it, [n_images, N, D_vision]."""
        tokenizer, visual = self.small.tokenizer, placeholders(strategy, self.small)
        ids, _ = chat.encode_chat(tokenizer, [(self.questions[scene], None)], visual)
        rows = [scene]
        if strategy == "interleaved":
            first = (scene + 1) % self.count
            told = (self.questions[first], self.answers[first])
            ids = chat.encode_chat(tokenizer, [told], visual)[0] + ids
            rows = [first, scene]
        return torch.tensor([ids]), self.patches[rows]

    @torch.no_grad()
    def read(self, strategy: str, scene: int, *, heads: str = "mean") -> Reading:
        """Run the model once and note who looked at whom.

        heads: "mean" over all heads of all blocks that can see an image, or "best", the one of them whose answering
        token looks at the object most. Raises ValueError for another word.
        """
        if heads not in ("mean", "best"):
            raise ValueError(f"heads is {heads!r}, expected 'mean' or 'best'")
        model, (ids, patches) = self.models[strategy], self.prompt(strategy, scene)
        with attention_maps(model) as maps:
            out = logits(model, ids, patches)
        image_id, inside = self.small.tokenizer.image_id, self.object_patches(scene)
        if strategy == "cross-attention":
            mask = media_attention_mask(media_mask(ids, image_id, 1), patches.shape[1])[0, 0]  # [T, N]
            every = torch.cat([value[0] for name, value in maps.items() if name.startswith("cross.")])  # [L*H, T, N]
            looks = every[:, -1][:, None]  # [L*H, 1, N]
        else:
            mask = causal_mask(ids.shape[1])
            every = torch.cat([value[0] for name, value in maps.items() if name.startswith("decoder.")])  # [L*H, T, T]
            seen = every[:, -1][:, ids[0] == image_id]  # [L*H, n_images * M]
            if strategy == "resampler":  # back through the queries: which patches made these tokens?
                own = maps["bridge.resampler.layers.0"][0].mean(0)[:, : patches.shape[1]]  # [M, N]
                seen = seen @ (own / own.sum(-1, keepdim=True))
            looks = seen.unflatten(-1, (len(patches), -1))  # [L*H, n_images, N]
        others = None
        if heads == "mean":
            attention, looks = every.mean(0), looks.mean(0)
        else:
            others = self._best_on_others(looks[:, -1], scene)
            best = looks[:, -1, inside].sum(-1).argmax()
            attention, looks = every[best], looks[best]
        says = self.small.tokenizer.decode(out[0, -1:].argmax(-1), skip_special=False)
        return Reading(
            strategy, ids[0], mask, attention, looks, inside, self.questions[scene], says, self.answers[scene], others
        )

    def _best_on_others(self, looks: Tensor, scene: int) -> float:
        """The control of "best": looks [heads, N], the head chosen anew for each object that is not asked about.

        Among many heads one looks at any place; only what the asked object has beyond this is for its sake.
        """
        shares = []
        for slot in self.scenes.present[scene].nonzero()[:, 0].tolist():
            inside = self.object_patches(scene, slot)
            if slot != self.target[scene] and inside.any():
                head = looks[looks[:, inside].sum(-1).argmax()]
                shares.append((head[inside].sum() / head.sum().clamp(min=1e-9)).item())
        return sum(shares) / len(shares)


def fusion_simulation(experiment: FusionExperiment, *, strategy: str = "early", scene: int = 0) -> Simulation:
    """Three controls: the strategy, the scene, and whether to average all heads or to show the one that finds most."""
    import ipywidgets

    names = [(WORDS[name], name) for name in experiment.models]
    controls = {
        "strategy": ipywidgets.Dropdown(options=names, value=strategy, description="Strategy"),
        "scene": ipywidgets.IntSlider(
            value=scene, min=0, max=experiment.count - 1, description="Scene", continuous_update=False
        ),
        "heads": ipywidgets.ToggleButtons(options=[("mean of all heads", "mean"), ("best head", "best")]),
    }
    read = lru_cache(maxsize=64)(experiment.read)

    def draw(strategy: str, scene: int, heads: str) -> Frame:
        return fusion_frame(experiment, read(strategy, scene, heads=heads), scene, heads)

    return Simulation(draw, controls, title="Fusion comparison")


def fusion_frame(experiment: FusionExperiment, reading: Reading, scene: int, heads: str) -> Frame:
    """The mask, the attention under it, and the image as the answering token sees it."""
    shown = list(range(len(reading.looks)))
    ratios = [1.15, 1.15] + [1.0] * len(shown)
    figure, panels = figures.axes(1, 2 + len(shown), width=4.6 + 1.9 * len(shown), height=2.6, width_ratios=ratios)
    _draw_mask(panels[0], experiment, reading)
    _draw_attention(panels[1], reading)
    rows = [(scene + 1) % experiment.count, scene][-len(shown) :]
    for number, (panel, row) in enumerate(zip(panels[2:], rows, strict=True)):
        last = number == len(shown) - 1
        title = "Where the answer looks" if last else "The image before it"
        _draw_looks(panel, experiment.pixels[row], reading.looks[number], reading.looks.max(), title)
    return Frame(figure, _alt(reading), _text(experiment, reading, heads))


def _kinds(experiment: FusionExperiment, reading: Reading) -> Tensor:
    """True for keys that are visual tokens or patches: [S]."""
    if reading.mask.shape[0] != reading.mask.shape[1]:
        return torch.ones(reading.mask.shape[1], dtype=torch.bool)
    return reading.ids == experiment.small.tokenizer.image_id


def _draw_mask(ax, experiment: FusionExperiment, reading: Reading) -> None:
    from matplotlib.colors import ListedColormap

    value = torch.where(_kinds(experiment, reading), 1, 2)[None] * reading.mask  # 0 hidden, 1 visual, 2 text
    colours = ListedColormap(["white", figures.VISION_LIGHT, figures.TEXT_LIGHT])
    ax.imshow(value.numpy(), cmap=colours, vmin=0, vmax=2, interpolation="nearest", aspect="auto")
    ax.set(title="May read", xlabel=_keys(reading), ylabel="who reads")


def _draw_attention(ax, reading: Reading) -> None:
    ax.imshow(reading.attention.clamp(min=1e-4).log10().numpy(), cmap=figures.SEQUENTIAL, vmin=-4, vmax=0,
              interpolation="nearest", aspect="auto")  # fmt: skip
    ax.set(title="Does read (log scale)", xlabel=_keys(reading), yticks=[])


def _keys(reading: Reading) -> str:
    return "patches" if reading.mask.shape[0] != reading.mask.shape[1] else "what is read"


def _draw_looks(ax, pixels: Tensor, looks: Tensor, top: Tensor, title: str) -> None:
    side = int(len(looks) ** 0.5)
    figures.draw_scene(ax, pixels, title)
    alpha = (looks / top.clamp(min=1e-9)).view(side, side)
    size = pixels.shape[-1]
    dark = torch.zeros(side, side, 4)
    dark[..., 3] = 0.75 * (1 - alpha.sqrt())
    ax.imshow(dark.numpy(), extent=(-0.5, size - 0.5, size - 0.5, -0.5), interpolation="nearest")


def _text(experiment: FusionExperiment, reading: Reading, heads: str) -> str:
    visual = int((reading.ids == experiment.small.tokenizer.image_id).sum())
    outside = reading.strategy == "cross-attention"
    places = "marker, its patches stay outside" if outside else "visual tokens"
    pairs = f"{int(reading.mask.sum()):,} of {reading.mask.numel():,} pairs may be read"
    which = "mean of all heads" if heads == "mean" else "the head that looks at the object most"
    first = ""
    if len(reading.looks) > 1:
        first = (
            f" ({reading.looks[0].sum():.0%} to the image before, {reading.looks[1].sum():.0%} to the one asked about)"
        )
    of = "cross-attention (it has no text to read)" if outside else "attention"
    control = ""
    if reading.on_others is not None:
        control = f"\nThe other objects, each with the head that looks at it most: {reading.on_others:.0%} on average."
    return (
        f"{WORDS[reading.strategy]}: {len(reading.ids)} places in the sequence, {visual} of them {places}; {pairs}.\n"
        f'"{reading.words}" The model says: {reading.says}. True: {reading.true}.\n'
        f"The answering token, {which}: {reading.on_images:.0%} of its {of} goes to images{first}.\n"
        f"Of its attention to this image {reading.on_object:.0%} is on the object asked about, "
        f"which covers {reading.object_area:.0%}.{control}"
    )


def _alt(reading: Reading) -> str:
    form = "text rows by patch columns" if reading.strategy == "cross-attention" else "a triangle, all tokens by all"
    return (
        f"{WORDS[reading.strategy]}. Left, the mask: {form}. Middle, the trained model's attention under that mask. "
        f"Right, the image, bright where the answering token looks: {reading.on_object:.0%} of that is on the object."
    )
