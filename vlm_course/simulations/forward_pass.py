"""Chapter 5's simulation: one answer of a real LLaVA, token by token, with shapes and times taken by hooks.

The first pass reads the whole prompt, image included; every later pass writes one more word. With a cache a later pass
reads one token, without one it reads everything again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from vlm_course.chat import encode_chat
from vlm_course.llava import Llava
from vlm_course.simulations import figures
from vlm_course.simulations.interactive import Frame, Simulation
from vlm_course.tokenizer import WordTokenizer

# Stage -> the modules whose time belongs to it. The splice, the norms between and Python itself are "the rest".
STAGES = {
    "vision tower": ("vision.patch_embedding", "vision.pre_norm", "vision.blocks."),
    "bridge": ("bridge",),
    "decoder blocks": ("decoder.blocks.",),
    "head": ("decoder.norm", "decoder.head"),
}
REST = "the rest"


@dataclass(frozen=True)
class Stage:
    """One stage of one pass: the shape that it hands on (empty for the rest) and its time in milliseconds."""

    name: str
    shape: tuple[int, ...]
    milliseconds: float


@dataclass(frozen=True)
class Pass:
    """One pass of the model: what it read, what was in the cache, how long each stage took, and what it wrote."""

    read: int
    cached: int
    stages: tuple[Stage, ...]
    milliseconds: float
    candidates: tuple[tuple[str, float], ...]  # the five likeliest next words with their probabilities

    def stage(self, name: str) -> Stage | None:
        """The stage of that name, None where the pass had none."""
        return next((stage for stage in self.stages if stage.name == name), None)


@dataclass(frozen=True)
class Recording:
    """An answer with every pass that made it.

    `prompt` holds a word for every token of the prompt, <image> repeated; `answer` one for every token written.
    """

    question: str
    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    passes: tuple[Pass, ...]
    cached: bool

    @property
    def images(self) -> int:
        """Placeholders in the prompt."""
        return self.prompt.count("<image>")


class _Watch:
    """Hooks on the modules of `STAGES`: when each started and ended, and the shape that came out."""

    def __init__(self, model: nn.Module):
        self.found: dict[str, list[tuple[float, tuple[int, ...]]]] = {}
        self.handles = []
        for name, module in model.named_modules():
            if stage := self._stage(name):
                self.handles.append(module.register_forward_pre_hook(self._start))
                self.handles.append(module.register_forward_hook(self._end(stage)))

    @staticmethod
    def _stage(name: str) -> str | None:
        for stage, places in STAGES.items():
            for place in places:
                whole = name == place or (place.endswith(".") and name.removeprefix(place).isdigit())
                if whole and (not place.endswith(".") or name.startswith(place)):
                    return stage
        return None

    def _start(self, module: nn.Module, inputs: tuple) -> None:
        self.began = time.perf_counter()

    def _end(self, stage: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.found.setdefault(stage, []).append((time.perf_counter() - self.began, tuple(output.shape)))

        return hook

    def take(self, total: float) -> tuple[Stage, ...]:
        """The stages since the last call; `total` seconds are what they and the rest took together."""
        stages = [Stage(name, rows[-1][1], 1000 * sum(row[0] for row in rows)) for name, rows in self.found.items()]
        self.found = {}
        rest = 1000 * total - sum(stage.milliseconds for stage in stages)
        return (*stages, Stage(REST, (), max(rest, 0.0)))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def record(
    model: Llava, tokenizer: WordTokenizer, pixels: Tensor, question: str, *, cached: bool = True, limit: int = 24
) -> Recording:
    """Answer a question about one image [3, H, W] greedily and note every pass.

    Raises ValueError for pixels of another shape. The model is left as it was.
    """
    if pixels.dim() != 3:
        raise ValueError(f"one image is [3, H, W], got {list(pixels.shape)}: is a batch dimension left?")
    prompt, _ = encode_chat(tokenizer, [(question, None)], model.config.visual_tokens)
    ids = torch.tensor([prompt])
    cache = model.new_cache(capacity=len(prompt) + limit) if cached else None
    watch, passes, step, image = _Watch(model), [], ids, pixels[None]
    new: list[int] = []
    try:
        while len(new) < limit and tokenizer.eos_id not in new:
            held = cache.length if cache is not None else 0
            start = time.perf_counter()
            logits = model(step, image, cache=cache)[0, -1]  # [1, T] -> [V]
            total = time.perf_counter() - start
            new.append(int(logits.argmax()))
            passes.append(Pass(step.shape[1], held, watch.take(total), 1000 * total, _candidates(logits, tokenizer)))
            ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
            step, image = (ids[:, -1:], None) if cached else (ids, pixels[None])
    finally:
        watch.close()
    words = lambda tokens: tuple(tokenizer.decode([token], skip_special=False) for token in tokens)  # noqa: E731
    return Recording(question, words(prompt), words(new), tuple(passes), cached)


def _candidates(logits: Tensor, tokenizer: WordTokenizer) -> tuple[tuple[str, float], ...]:
    best = logits.softmax(-1).topk(5)
    words = [tokenizer.decode([token], skip_special=False) for token in best.indices.tolist()]
    return tuple(zip(words, best.values.tolist(), strict=True))


def fastest(recordings: Sequence[Recording]) -> dict[str, float]:
    """Milliseconds of each part of an answer, each the least over the recordings, which disturbances only lengthen.

    "prefill" is the decoder in the first pass, "decode" a whole later pass, on average over an answer.
    """
    first = [recording.passes[0] for recording in recordings]
    tower, bridge = (min(p.stage(name).milliseconds for p in first) for name in ("vision tower", "bridge"))
    prefill = min(p.milliseconds - p.stage("vision tower").milliseconds - p.stage("bridge").milliseconds for p in first)
    later = [[p.milliseconds for p in recording.passes[1:]] for recording in recordings]
    decode = min(sum(times) / len(times) for times in later if times)
    return {"vision tower": tower, "bridge": bridge, "prefill": prefill, "decode": decode}


def forward_simulation(
    model: Llava, tokenizer: WordTokenizer, pixels: Tensor, questions: Sequence[str], *, number: int = 1
) -> Simulation:
    """Three controls: the question, the pass, and whether there is a cache. Every answer is recorded once."""
    import ipywidgets

    @cache
    def recorded(question: str, cached: bool) -> Recording:
        return record(model, tokenizer, pixels, question, cached=cached)

    longest = max(len(recorded(question, True).passes) for question in questions)
    controls = {
        "question": ipywidgets.Dropdown(options=list(questions), description="Question"),
        "number": ipywidgets.IntSlider(value=number, min=1, max=longest, description="Pass", continuous_update=False),
        "cached": ipywidgets.Dropdown(options=[("with a cache", True), ("without", False)], description="Memory"),
    }

    def draw(question: str, number: int, cached: bool) -> Frame:
        return pass_frame(recorded(question, cached), number, pixels)

    return Simulation(draw, controls, title="LLaVA forward pass")


def pass_frame(recording: Recording, number: int, pixels: Tensor) -> Frame:
    """The image, the tokens (full colour: read in this pass), the next word, and where the time went."""
    number = min(number, len(recording.passes))
    now = recording.passes[number - 1]
    figure, (scene, tokens, words, times) = figures.axes(
        1, 4, width=8.4, height=2.6, gridspec_kw={"width_ratios": [1, 1.5, 1, 1.2]}
    )
    figures.draw_scene(scene, pixels, "The image")
    _draw_tokens(tokens, recording, now, number)
    _draw_candidates(words, now)
    _draw_times(times, now)
    written = " ".join(recording.answer[: number - 1]) or "nothing yet"
    shapes = ", ".join(f"{s.name} {list(s.shape)} in {s.milliseconds:.1f} ms" for s in now.stages if s.shape)
    word, probability = now.candidates[0]
    end = f" Pass {number} is the last of {len(recording.passes)}." if number == len(recording.passes) else ""
    text = (
        f'"{recording.question}" Pass {number}. Written so far: {written}.\n'
        f"The decoder reads {now.read} token{'s' * (now.read != 1)}; {now.cached} are in the cache. "
        f"{recording.images} of {len(recording.prompt)} tokens of the prompt are image.\n"
        f"Shapes and times: {shapes}; {now.milliseconds:.1f} ms in all.\n"
        f"Next word: {word}, with probability {probability:.2f}.{end}"
    )
    alt = (
        f"Pass {number} of an answer: the tokens as squares, {now.read} read in this pass and {now.cached} taken from "
        f"the cache; the likeliest next word is {word}; bars show the time of each stage."
    )
    return Frame(figure, alt, text)


def _draw_tokens(ax, recording: Recording, now: Pass, number: int) -> None:
    """A square a token: image blue, words brown, answer black; pale when it comes from the cache."""
    from matplotlib.colors import to_rgb

    kinds = [("image" if word == "<image>" else "word") for word in recording.prompt]
    kinds += ["answer"] * (number - 1)
    full = {"image": figures.VISION, "word": figures.TEXT, "answer": figures.BLACK}
    columns = 18
    rows = -(-len(kinds) // columns)
    grid = torch.ones(rows * columns, 3)
    for place, kind in enumerate(kinds):
        colour = torch.tensor(to_rgb(full[kind]))
        grid[place] = colour if place >= now.cached else 0.3 * colour + 0.7
    ax.imshow(grid.view(rows, columns, 3).numpy(), interpolation="nearest", aspect="equal")
    ax.set_xticks([x - 0.5 for x in range(columns + 1)], minor=True)
    ax.set_yticks([y - 0.5 for y in range(rows + 1)], minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="both", length=0)
    ax.set(xticks=[], yticks=[], title=f"{now.read} read, {now.cached} in the cache")
    ax.spines[:].set_visible(False)
    for kind, place in (("image", 0.0), ("word", 0.36), ("answer", 0.68)):
        ax.text(place, -0.08, f"■ {kind}", color=full[kind], fontsize=8, transform=ax.transAxes, va="top")


def _draw_candidates(ax, now: Pass) -> None:
    words, chances = zip(*now.candidates, strict=True)
    ax.barh(range(len(words)), chances, color=[figures.TEXT, *[figures.TEXT_LIGHT] * (len(words) - 1)])
    ax.set_yticks(range(len(words)), words)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xticks=[0, 0.5, 1], xlabel="probability", title="The next word")


def _draw_times(ax, now: Pass) -> None:
    names = [*STAGES, REST]
    found = [now.stage(name) for name in names]
    colours = [figures.VISION, figures.VISION, figures.TEXT, figures.TEXT, figures.GREY]
    ax.barh(range(len(names)), [stage.milliseconds if stage else 0.0 for stage in found], color=colours)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(xlabel="milliseconds", title="Where the time went")
