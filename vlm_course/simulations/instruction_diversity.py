"""Chapter 4's simulation: every kind of instruction, put to real models, with the image, without it, or with another.

The questions have exact answers, so each answer is judged. The models are the shipped one and, where they are given,
those that chapter 4's study tuned on captions only, on short questions only and on all instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vlm_course.llava import Llava
from vlm_course.measures import answer, encode_in_batches, read_numbers
from vlm_course.simulations import figures
from vlm_course.simulations.interactive import Frame, Simulation
from vlm_course.studies.instruction_mix import NEW, count_by_size, right
from vlm_course.tokenizer import WordTokenizer
from vlm_course.worlds.dialogs import KINDS, Dialogs, Turns
from vlm_course.worlds.scenes import Scenes, render, sample

IMAGES = ("this image", "another scene's image", "an empty ground", "a black image")
LONGEST = 32


@dataclass(frozen=True)
class Reply:
    """One answer to one instruction: the words, whether they are right, and what the first word might have been."""

    kind: str
    question: str
    wanted: str
    says: str
    right: bool
    first: tuple[tuple[str, float], ...]  # the likeliest first tokens and their probabilities
    place: tuple[float, ...]  # the numbers of a box (4) or a point (2) in pixels; empty for words
    true_box: tuple[float, float, float, float]


@dataclass
class InstructionExperiment:
    """Scenes, the instructions about them, and the answers of some models, computed when they are first asked for.

    Args:
        models: by name; the first is the one shown at first.
        scenes: how many scenes to draw, from a seed that no training uses.
    """

    models: Mapping[str, Llava]
    tokenizer: WordTokenizer
    scenes: int = 8
    seed: int = 2_000_000_404
    objects: tuple[int, int] = (2, 4)
    world: Scenes = field(init=False)
    pixels: Tensor = field(init=False)  # [B, 3, 96, 96]
    empty: Tensor = field(init=False)  # [B, 3, 96, 96], the same grounds without an object
    turns: dict[str, Turns] = field(init=False)
    _tokens: dict = field(init=False, default_factory=dict)
    _replies: dict = field(init=False, default_factory=dict)

    def __post_init__(self):
        if self.scenes < 2:
            raise ValueError(f"scenes is {self.scenes}: another scene's image needs at least 2")
        generator = torch.Generator().manual_seed(self.seed)
        self.world = self._where_every_kind_applies(generator)
        self.pixels = render(self.world, generator=generator)
        nothing = torch.zeros_like(self.world.present)
        self.empty = render(replace(self.world, present=nothing), generator=generator)
        dialogs = Dialogs(self.tokenizer, canonical=True)
        self.turns = {kind: dialogs.ask(self.world, kind, generator=generator) for kind in KINDS}
        question, wanted = count_by_size(self.world, self.tokenizer, generator)
        rows = torch.arange(self.scenes)
        self.turns[NEW] = Turns(rows, question, wanted, torch.zeros_like(rows), rows >= 0)

    def _where_every_kind_applies(self, generator: torch.Generator) -> Scenes:
        drawn = sample(20 * self.scenes, generator=generator, objects=self.objects)
        dialogs = Dialogs(self.tokenizer, canonical=True)
        valid = torch.stack([dialogs.ask(drawn, kind, generator=generator).valid for kind in KINDS]).all(0)
        return drawn[valid.nonzero()[: self.scenes, 0]]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.turns)

    def seen(self, scene: int, image: str) -> Tensor:
        """The pixels that a model looks at: [3, 96, 96]."""
        if image not in IMAGES:
            raise ValueError(f"image is {image!r}, expected one of {', '.join(IMAGES)}")
        if image == "an empty ground":
            return self.empty[scene]
        if image == "a black image":
            return torch.full_like(self.pixels[scene], -1.0)
        return self.pixels[scene if image == IMAGES[0] else (scene + 1) % self.scenes]

    @torch.no_grad()
    def _visual(self, model: str, scene: int, image: str) -> Tensor:
        key = (model, scene, image)
        if key not in self._tokens:
            self._tokens[key] = encode_in_batches(self.models[model], self.seen(scene, image)[None], 1)
        return self._tokens[key]

    @torch.no_grad()
    def reply(self, model: str, scene: int, kind: str, image: str = IMAGES[0]) -> Reply:
        """What the model answers. Computed once for every setting, then remembered."""
        key = (model, scene, kind, image)
        if key not in self._replies:
            self._replies[key] = self._ask(*key)
        return self._replies[key]

    def _ask(self, model: str, scene: int, kind: str, image: str) -> Reply:
        tok, turn, llava = self.tokenizer, self.turns[kind], self.models[model]
        visual = self._visual(model, scene, image)  # [1, M, D]
        question = turn.question[scene][turn.question[scene] != tok.pad_id]  # [L]
        given = answer(llava, tok, visual, question[None], max_new_tokens=LONGEST)
        head = [tok.bos_id] + [tok.image_id] * visual.shape[1] + [tok.user_id, *question.tolist(), tok.assistant_id]
        logits = llava(torch.tensor([head]), image_features=visual, logits_to_keep=1)[0, -1]  # [V]
        best = logits.softmax(-1).topk(5)
        box = self.world.box[scene, turn.target[scene]]
        place: Tensor = torch.empty(0)
        if kind in ("box", "point"):
            place = read_numbers(given, tok, *((4, "[]") if kind == "box" else (2, "()")))[0]
        return Reply(
            kind=kind,
            question=tok.decode(question),
            wanted=tok.decode(turn.answer[scene]),
            says=tok.decode(given[0]) or "(nothing)",
            right=bool(right(kind, given, turn.answer[scene][None], box[None], tok)[0]),
            first=tuple((tok.pieces[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)),
            place=tuple(place.tolist()) if place.isfinite().all() else (),
            true_box=tuple(box.tolist()),
        )


def diversity_simulation(experiment: InstructionExperiment, *, scene: int = 0, kind: str = "colour") -> Simulation:
    """Four controls: the instruction, the scene, what the model looks at, and which model answers."""
    import ipywidgets

    controls = {
        "kind": ipywidgets.Dropdown(options=list(experiment.kinds), value=kind, description="Instruction"),
        "scene": ipywidgets.IntSlider(
            value=scene, min=0, max=experiment.scenes - 1, description="Scene", continuous_update=False
        ),
        "image": ipywidgets.Dropdown(options=list(IMAGES), value=IMAGES[0], description="Looks at"),
        "model": ipywidgets.Dropdown(
            options=list(experiment.models), value=next(iter(experiment.models)), description="Model"
        ),
    }

    def draw(kind: str, scene: int, image: str, model: str) -> Frame:
        return diversity_frame(experiment, experiment.reply(model, scene, kind, image), model, scene, image)

    return Simulation(draw, controls, title="Instruction diversity")


def diversity_frame(experiment: InstructionExperiment, reply: Reply, model: str, scene: int, image: str) -> Frame:
    """Left what the model looks at, with the place it answers; right how sure it was of its first word."""
    figure, (left, bars) = figures.axes(1, 2, width=6.8, height=2.6, width_ratios=(1, 1.5))
    figures.draw_scene(left, experiment.seen(scene, image), title=image)
    if reply.kind in ("box", "point") and image == IMAGES[0]:
        figures.draw_box(left, reply.true_box, "true", colour=figures.GREY, dashed=True)
    if len(reply.place) == 4:
        figures.draw_box(left, reply.place, "answer")
    elif reply.place:
        left.plot(*reply.place, "o", color=figures.TEXT, markeredgecolor="white", markersize=8)
    words, shares = zip(*reply.first, strict=True)
    bars.barh(range(len(words)), shares, color=[figures.TEXT, *[figures.TEXT_LIGHT] * (len(words) - 1)])
    bars.set(yticks=range(len(words)), yticklabels=words, xlim=(0, 1), xlabel="probability")
    bars.set_title("First token of the answer")
    bars.invert_yaxis()
    says = reply.says if len(reply.says) <= 90 else reply.says[:90] + " ..."
    judged = "right" if reply.right else f"wrong, true is: {reply.wanted}"
    text = (
        f"Instruction ({reply.kind}): {reply.question}\n"
        f"The {model} model, looking at {image}, answers: {says}\n"
        f"That is {judged}. It gave its first token {shares[0]:.0%}, the next likeliest, {words[1]!r}, {shares[1]:.0%}."
    )
    shown = ", ".join(experiment.world.describe(scene)) if image == IMAGES[0] else "not the scene that is asked about"
    alt = (
        f"Left, {image}: {shown}. Right, probabilities of the first token of the answer: {words[0]} {shares[0]:.0%}, "
        f"then {words[1]} {shares[1]:.0%}."
    )
    return Frame(figure, alt, text)
