"""Two modalities in one space, computed from a real model: the simulations of chapter 0.

`two_towers_simulation`: images and captions as points of CLIP's shared space; which caption is nearest to a scene?
`merging_simulation`: patches and words inside the language model; after which layer does the picture reach the words?

Sources: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.3 (the
shared space); Liu et al. 2023, "Visual Instruction Tuning", section 4.1 (visual tokens in the space of the word
embeddings).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm_course.simulations import figures
from vlm_course.simulations.figures import BLACK, GREY, TEXT, TEXT_LIGHT, VISION, VISION_LIGHT
from vlm_course.simulations.interactive import Frame, Simulation

if TYPE_CHECKING:
    from vlm_course.contrastive import ContrastiveModel
    from vlm_course.llava import Llava
    from vlm_course.tokenizer import WordTokenizer


def principal_plane(*groups: Tensor) -> tuple[list[Tensor], float]:
    """The flat map that loses least: every group [n_i, D] -> [n_i, 2], and the share of the variance that it keeps.

    All groups are centred and rotated together, so distances between groups mean something. The sign of each axis is
    fixed: the largest loading is positive. Raises ValueError where the widths differ, since such vectors have no common
    space.
    """
    widths = {group.shape[-1] for group in groups}
    if len(widths) > 1:
        raise ValueError(
            f"vectors of widths {sorted(widths)} share no space: was one group taken before its projection?"
        )
    points = torch.cat([group.detach().double() for group in groups])  # [sum n_i, D]
    centred = points - points.mean(0)
    _, singular, axes = torch.linalg.svd(centred, full_matrices=False)  # axes [min(n, D), D]
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
    flat = (centred @ axes.T).float()  # [sum n_i, D] -> [sum n_i, 2]
    kept = (singular[:2].square().sum() / singular.square().sum()).item()
    return list(flat.split([len(group) for group in groups])), kept


def untrained(model: ContrastiveModel, seed: int = 0) -> ContrastiveModel:
    """New towers of the same shapes as before the first training step: the control for what training did."""
    from vlm_course.contrastive import ContrastiveModel, TextTower
    from vlm_course.vit import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision, text = VisionTransformer(model.vision.config), TextTower(model.text.config)
        return ContrastiveModel(vision, text, model.image_projection.out_features).eval()


@dataclass(frozen=True)
class TwoTowers:
    """`n` scenes and their captions as unit vectors of one space."""

    images: Tensor  # [n, E]
    texts: Tensor  # [n, E]

    @property
    def similarity(self) -> Tensor:
        """Cosines, rows images, columns captions: [n, n]."""
        return self.images @ self.texts.T

    def rank_of_own(self) -> Tensor:
        """How many captions come before a scene's own one, plus 1: [n]. A 1 means that the scene finds its caption."""
        own = self.similarity.diagonal()[:, None]
        return (self.similarity > own).sum(1) + 1


@torch.inference_mode()
def two_towers(model: ContrastiveModel, pixels: Tensor, caption_ids: Tensor) -> TwoTowers:
    """Encode pixels [n, 3, H, W] and right-padded captions [n, T] with the two towers of a contrastive model."""
    if len(pixels) != len(caption_ids):
        raise ValueError(f"{len(pixels)} images but {len(caption_ids)} captions: every scene needs its own caption")
    return TwoTowers(model.encode_image(pixels), model.encode_text(caption_ids))


def _draw_two_towers(
    pixels: Tensor, captions: Sequence[str], spaces: Mapping[str, TwoTowers], scene: int, tower: str
) -> Frame:
    space = spaces[tower]
    similarity, rank = space.similarity[scene], int(space.rank_of_own()[scene])
    own = similarity[scene].item()
    wrong = similarity.clone().index_fill_(0, torch.tensor([scene]), -2)
    rival, found, n = int(wrong.argmax()), int((space.rank_of_own() == 1).sum()), len(captions)
    (image_points, text_points), kept = principal_plane(space.images, space.texts)

    figure, (left, middle, right) = figures.axes(1, 3, width=8.4, height=2.9, width_ratios=(1, 1.35, 1.2))
    figures.draw_scene(left, pixels[scene], f"scene {scene}")
    middle.scatter(*image_points.T, s=16, color=VISION_LIGHT, label="images")
    middle.scatter(*text_points.T, s=16, marker="s", color=TEXT_LIGHT, label="captions")
    middle.plot(*torch.stack([image_points[scene], text_points[scene]]).T, color=BLACK, linewidth=1)
    middle.scatter(*image_points[scene], s=55, color=VISION)
    middle.scatter(*text_points[scene], s=55, marker="s", color=TEXT)
    middle.set(title=f"shared space ({kept:.0%} of variance)", xticks=[], yticks=[])
    middle.legend(loc="best")
    order = similarity.argsort(descending=True).tolist()
    right.bar(range(n), similarity[order].tolist(), color=[TEXT if caption == scene else GREY for caption in order])
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set(
        xlabel="captions, nearest first",
        title="cosine with this scene",
        ylim=(min(-0.2, similarity.min().item()), 1.05),
        xticks=[],
    )

    text = (
        f"Scene {scene}, {tower} towers. Its own caption is number {rank} of {n}.\n"
        f"Cosine with its own caption {own:.2f}: {captions[scene]}\n"
        f"Cosine with the nearest wrong one {wrong[rival]:.2f}: {captions[rival]}\n"
        f"All scenes: {found} of {n} find their own caption first; guessing finds 1."
    )
    alt = (
        f"Left, scene {scene}. Middle, {n} images and {n} captions as points of the flattened space of the {tower} "
        f"towers, a line joins the scene and its caption. Right, bars of the scene's cosine with every caption, "
        f"its own caption number {rank} of {n}."
    )
    return Frame(figure, alt, text)


def two_towers_simulation(pixels: Tensor, captions: Sequence[str], spaces: Mapping[str, TwoTowers]) -> Simulation:
    """Images and captions as points of the spaces of one or more pairs of towers, such as trained and untrained ones.

    pixels [n, 3, H, W] in [-1, 1]; captions n strings; spaces name -> their vectors. Controls: `scene` and `tower`.
    """
    import ipywidgets

    controls = {
        "scene": ipywidgets.IntSlider(max=len(captions) - 1, description="scene", continuous_update=False),
        "tower": ipywidgets.ToggleButtons(options=list(spaces), description="towers"),
    }
    return Simulation(partial(_draw_two_towers, pixels, captions, spaces), controls, title="Two towers, one space")


@dataclass(frozen=True)
class Journey:
    """One spliced sequence on its way through the language model.

    patches  [layers + 1, M, D]: the visual tokens in the residual stream, before the first block and after every block
    texts    [layers + 1, W, D]: the same for the W words after the picture
    words    the W words
    effect   [layers + 1, W]: how far the vector of a word is from the one after the control picture, as a share of its
             own length. 0: the same vector. 1: the difference is as long as the vector itself.
    answers  layers + 1 words: what the head reads from the last word's vector at that depth ("logit lens")
    """

    patches: Tensor
    texts: Tensor
    words: tuple[str, ...]
    effect: Tensor
    answers: tuple[str, ...]


@torch.inference_mode()
def journey(model: Llava, tokenizer: WordTokenizer, ids: Tensor, pixels: Tensor, control: Tensor) -> Journey:
    """Follow ids [T] (placeholders expanded) with pixels [3, H, W] through the decoder, and again with a control
    picture.

    Raises ValueError where ids hold no placeholder, or no word after the last one: such words cannot see the picture.
    """
    image_id = model.config.image_id
    states, other = (_residual_stream(model, ids[None], image[None]) for image in (pixels, control))  # [L + 1, T, D]
    visual = ids == image_id
    if not visual.any():
        raise ValueError(
            f"no token of {len(ids)} is the image placeholder {image_id}: was the chat encoded without a picture?"
        )
    after = torch.arange(len(ids)) > int(visual.nonzero()[-1])  # [T] bool
    if not after.any():
        raise ValueError(f"no word follows the picture among {len(ids)} tokens: a causal model shows it to none")
    moved = (states[:, after] - other[:, after]).norm(dim=-1) / states[:, after].norm(dim=-1)  # [L + 1, W]
    first_words = model.decoder.head(model.decoder.norm(states[:, -1])).argmax(-1)  # [L + 1, D] -> [L + 1]
    words, answers = (
        tuple(tokenizer.decode([word], skip_special=False) for word in row.tolist())
        for row in (ids[after], first_words)
    )
    return Journey(states[:, visual], states[:, after], words, moved, answers)


def _residual_stream(model: Llava, ids: Tensor, pixels: Tensor) -> Tensor:
    """Inputs of every decoder block and the output of the last one for one row: [1, T] -> [layers + 1, T, D]."""
    seen: list[Tensor] = []
    blocks = model.decoder.blocks
    hooks = [block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0])) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _, __, output: seen.append(output[0])))
    try:
        model(ids, pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


def _draw_merging(pixels: Tensor, follow: Callable[[int], Journey], layer: int, scene: int) -> Frame:
    here = follow(scene)
    layers, words = len(here.patches) - 1, here.words
    patches, texts = here.patches[layer], here.texts[layer]  # [M, D], [W, D]
    effect, apart = here.effect[layer], torch.cosine_similarity(patches.mean(0), texts.mean(0), dim=0).item()
    # Directions, not lengths: one very long vector would flatten all the others in the plane.
    (patch_points, word_points), kept = principal_plane(
        *(torch.nn.functional.normalize(group, dim=-1) for group in (patches, texts))
    )

    figure, (left, middle, right) = figures.axes(1, 3, width=8.4, height=2.9, width_ratios=(1, 1.35, 1.2))
    figures.draw_scene(left, pixels[scene], f"scene {scene}")
    middle.scatter(
        *patch_points.T, s=10, color=VISION_LIGHT, edgecolor=VISION, linewidth=0.4, label=f"{len(patches)} patch tokens"
    )
    middle.scatter(*word_points.T, s=22, marker="s", color=TEXT, label=f"{len(texts)} word tokens")
    middle.set(title=f"layer {layer} of {layers} ({kept:.0%} of variance)", xticks=[], yticks=[])
    middle.legend(loc="best")
    right.barh(range(len(words)), effect.tolist(), color=TEXT)
    right.set(title="moved by the picture", xlabel="share of the vector's length")
    right.set(xlim=(0, max(1.0, here.effect.max().item())), yticks=range(len(words)), yticklabels=words)
    right.invert_yaxis()

    place = "before the first block" if layer == 0 else f"after block {layer} of {layers}"
    strongest = int(effect.argmax())
    moved = (
        f"The picture moves most: {words[strongest]}." if effect.max() > 0 else "No word depends on the picture yet."
    )
    text = (
        f"Scene {scene}, {place}. {len(patches)} patch tokens and {len(texts)} word tokens, "
        f"all vectors of {patches.shape[-1]} numbers.\n"
        f"After another scene the words differ by {effect.mean():.2f} of their length on average. {moved}\n"
        f"Cosine between the mean patch and the mean word: {apart:.2f}.\n"
        f"The first word of an answer, read here: {here.answers[layer]}"
    )
    alt = (
        f"Left, scene {scene}. Middle, patch tokens and word tokens in the language model {place}, "
        "flattened to two dimensions. "
        f"Right, one bar a word: how much the picture moves it, {effect.mean():.2f} on average."
    )
    return Frame(figure, alt, text)


def merging_simulation(model: Llava, tokenizer: WordTokenizer, pixels: Tensor, prompts: Sequence[Tensor]) -> Simulation:
    """Patch tokens and word tokens on their way through the language model.

    pixels [n, 3, H, W] in [-1, 1]; prompts n tensors of ids [T_i] with expanded placeholders. Controls: `scene` and
    `layer`. The picture that every scene is compared with is the next scene: a black picture, unlike any of the
    training, moves the words further than what is in a scene does.

    Raises ValueError where the numbers of pictures and prompts differ, or a single picture has no other beside it.
    """
    import ipywidgets

    if len(pixels) != len(prompts):
        raise ValueError(f"{len(pixels)} pictures but {len(prompts)} prompts: every scene needs its own question")
    if len(pixels) < 2:
        raise ValueError("1 picture: every scene is compared with the next one, so there must be at least 2")
    others = pixels.roll(-1, dims=0)
    follow = lru_cache(lambda scene: journey(model, tokenizer, prompts[scene], pixels[scene], others[scene]))
    controls = {
        "layer": ipywidgets.IntSlider(max=len(model.decoder.blocks), description="layer", continuous_update=False),
        "scene": ipywidgets.IntSlider(max=len(pixels) - 1, description="scene", continuous_update=False),
    }
    return Simulation(partial(_draw_merging, pixels, follow), controls, title="Patches and words, one stream")
