"""Chapter 2's simulation: turn the bridge by degrees and watch the language model lose, then regain, the image.

The bridge is turned by an orthogonal matrix, so that lengths, distances and angles among the visual tokens stay exactly
as they were: whatever the tokens told about the image they still tell. Only their directions are not the decoder's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vlm_course.bridge_study import principal_basis, rotated_bridge, rotation
from vlm_course.llava import Llava
from vlm_course.probe_questions import QuestionSet, Score, score
from vlm_course.simulations import figures
from vlm_course.simulations.interactive import Frame, Simulation
from vlm_course.worlds.scenes import COLOURS

DOTS = {"red": "#d7191c", "green": "#1a9641", "blue": "#2b50d8", "yellow": "#e6c229", "black": "#111111",
        "gray": "#8c8c8c", "teal": "#0f8f8a", "brown": "#8b4a2b",
        "orange": "#f58518", "purple": "#7a1fa2", "pink": "#ec60b0", "cyan": "#35dcf2"}  # fmt: skip


@dataclass(frozen=True)
class Alignment:
    """One setting: mean cosine of a turned token with the trained bridge's own, and the model's answers."""

    degrees: float
    planes: int
    cosine: float
    score: Score


@dataclass
class AlignmentExperiment:
    """A model, questions, the features its bridge gets, and every setting measured so far.

    Args:
        model: Llava with a `VisionProjection` as its bridge; it is read, never changed.
        questions: what the model is asked at every angle.
    """

    model: Llava
    questions: QuestionSet
    features: Tensor = field(init=False)  # [B, N, D_vision]
    tokens: Tensor = field(init=False)  # [B, N, D_llm], as trained
    basis: Tensor = field(init=False)  # [D_llm, D_llm]
    measured: dict[tuple[float, int], Alignment] = field(init=False, default_factory=dict)

    def __post_init__(self):
        layer = self.model.config.feature_layer
        with torch.no_grad():
            self.features = self.model.vision.patch_features(self.questions.pixels, layer=layer)
            self.tokens = self.model.bridge(self.features)  # [B, N, D_vision] -> [B, N, D_llm]
        self.basis = principal_basis(self.tokens.flatten(0, 1))

    @property
    def all_planes(self) -> int:
        return self.basis.shape[0] // 2

    def turned(self, degrees: float, planes: int | None = None) -> Tensor:
        """The visual tokens behind the turned bridge: [B, N, D_llm]."""
        turn = rotation(self.basis, degrees, self.all_planes if planes is None else planes)
        with torch.no_grad():
            return rotated_bridge(self.model.bridge, turn)(self.features)

    def measure(self, degrees: float, planes: int | None = None) -> Alignment:
        """Turn, ask, compare. Measured once for every setting, then remembered."""
        planes = self.all_planes if planes is None else planes
        key = (float(degrees), planes)
        if key not in self.measured:
            tokens = self.turned(*key)
            cosine = torch.cosine_similarity(tokens, self.tokens, dim=-1).mean().round(decimals=4).item() + 0.0
            self.measured[key] = Alignment(*key, cosine, score(self.model, self.questions, tokens))
        return self.measured[key]

    @cached_property
    def other_image(self) -> Score:
        """The control: every question answered from the next scene's tokens, as trained."""
        return score(self.model, self.questions, self.tokens.roll(1, dims=0))

    def patch_objects(self) -> Tensor:
        """The slot of the object that a patch's middle lies well inside, -1 for all other patches: [B, N]."""
        config, scenes = self.model.config.vision, self.questions.scenes
        columns = config.grid[1]
        place = torch.arange(config.n_patches)
        middle = (torch.stack([place % columns, place // columns], -1) + 0.5) * config.patch_size  # [N, 2], (x, y)
        far = (middle[None, :, None] - scenes.centre[:, None]).norm(dim=-1)  # [B, N, K]
        inside = (far < 0.6 * scenes.radius[:, None]) & scenes.present[:, None]
        return torch.where(inside.any(-1), inside.long().argmax(-1), -1)  # [B, N, K] -> [B, N]


def alignment_simulation(experiment: AlignmentExperiment, *, scene: int = 0, degrees: int = 0) -> Simulation:
    """Two controls: the angle, and in how many of the space's planes the bridge is turned."""
    import ipywidgets

    half = experiment.all_planes
    choices = [("every plane", half), ("the 16 main planes", min(16, half)), ("the main plane alone", 1)]
    controls = {
        "degrees": ipywidgets.IntSlider(
            value=degrees, min=0, max=180, step=15, description="Angle", continuous_update=False
        ),
        "planes": ipywidgets.Dropdown(options=choices, value=half, description="Turn in"),
    }
    control = experiment.other_image

    def draw(degrees: int, planes: int) -> Frame:
        return alignment_frame(experiment, experiment.measure(degrees, planes), control, scene)

    return Simulation(draw, controls, title="Projection alignment")


def alignment_frame(experiment: AlignmentExperiment, now: Alignment, control: Score, scene: int) -> Frame:
    """Left the tokens in their main plane, right the accuracy over all angles measured so far."""
    figure, (left, right) = figures.axes(1, 2, width=7.2, height=2.9)
    _draw_plane(left, experiment, now)
    if now.planes != experiment.all_planes:
        right.plot(*_trail(experiment, experiment.all_planes), color=figures.VISION_LIGHT, label="every plane")
    right.plot(
        *_trail(experiment, now.planes),
        "o-",
        color=figures.VISION,
        markersize=4,
        label=_in_words(experiment, now.planes),
    )
    right.legend(loc="upper right")
    right.axhline(control.accuracy(), color=figures.GREY, linestyle="--", linewidth=1)
    right.text(180, control.accuracy() + 0.02, "another image", color=figures.GREY, fontsize=8, ha="right")
    right.plot([now.degrees], [now.score.accuracy()], "o", color=figures.TEXT, markersize=8)
    right.set(xlim=(-6, 186), ylim=(0, 1.05), xlabel="angle of the bridge (degrees)", ylabel="exact answers",
              xticks=range(0, 181, 45), title="What the model answers")  # fmt: skip
    accuracy, base = now.score.accuracy(), control.accuracy()
    asked = experiment.questions.texts[scene][0]
    text = (
        f"Angle {now.degrees:.0f} degrees in {now.planes} of {experiment.all_planes} planes.\n"
        f"Mean cosine with the trained tokens: {now.cosine:.2f}. Lengths and distances among tokens: unchanged.\n"
        f"Exact answers: {accuracy:.0%} (with another scene's image: {base:.0%}). "
        f"Loss: {now.score.loss:.2f} nats a token.\n"
        f'"{asked}" The model says: {now.score.answer(scene, experiment.questions.kinds[0]) or "(nothing)"}. '
        f"True: {_truth(experiment.questions, scene)}."
    )
    alt = (
        f"Left, projected patch tokens as dots in their main plane, turned by {now.degrees:.0f} degrees. "
        f"Right, the share of exact answers against the angle: here {accuracy:.0%}, with another image {base:.0%}."
    )
    return Frame(figure, alt, text)


def _trail(experiment: AlignmentExperiment, planes: int) -> tuple[list[float], list[float]]:
    """Angles measured so far in that many planes, and the share of exact answers at each."""
    trail = sorted((m for m in experiment.measured.values() if m.planes == planes), key=lambda m: m.degrees)
    return [m.degrees for m in trail], [m.score.accuracy() for m in trail]


def _in_words(experiment: AlignmentExperiment, planes: int) -> str:
    if planes == experiment.all_planes:
        return "every plane"
    return "1 plane" if planes == 1 else f"{planes} planes"


def _truth(questions: QuestionSet, scene: int) -> str:
    return questions.tokenizer.decode(questions.labels[scene][questions.turn[scene] == 0])


def _draw_plane(ax, experiment: AlignmentExperiment, now: Alignment) -> None:
    """Tokens of patches inside objects, in their object's colour; hollow dots mark where training had put them."""
    objects = experiment.patch_objects()
    shown = objects >= 0
    colours = experiment.questions.scenes.colour.gather(1, objects.clamp(min=0))  # [B, K] -> [B, N]
    plane = experiment.basis[:, :2]
    turned = experiment.turned(now.degrees, now.planes)
    before, after = experiment.tokens[shown] @ plane, turned[shown] @ plane  # [n, D] x [D, 2] -> [n, 2]
    fill = [DOTS[COLOURS[i]] for i in colours[shown].tolist()]
    ax.scatter(*before.T.tolist(), s=14, facecolors="none", edgecolors=figures.GREY, linewidths=0.5)
    ax.scatter(*after.T.tolist(), s=14, c=fill)
    reach = 1.1 * before.norm(dim=-1).max().item()
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
    ax.set_title("Tokens in their main plane")
    ax.axhline(0, color=figures.GREY, linewidth=0.4)
    ax.axvline(0, color=figures.GREY, linewidth=0.4)
