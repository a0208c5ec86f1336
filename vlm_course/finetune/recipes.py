"""What path 2 learns from: scenes drawn while training and easy-VQA's training split, in any adapter's template.

The two stages are LLaVA's: align (the bridge alone, on captions) and instruct (bridge and language model, all kinds of
question, several an image). A batch follows from (seed, step) alone and is made on the device.
Source of the stages: Liu et al. 2023 (LLaVA, arXiv 2304.08485), section 4.2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from threading import Lock

import torch
from torch import Tensor

from vlm_course.chat import IGNORE
from vlm_course.finetune.collate import Batch
from vlm_course.finetune.tokenizers import Frame, TokenizerAdapter
from vlm_course.finetune.wording import Wording
from vlm_course.llava import LlavaConfig
from vlm_course.pretrained.recipe import MIX
from vlm_course.tokenizer import WordTokenizer
from vlm_course.validation import require_count, require_number
from vlm_course.worlds.dialogs import KINDS, Dialogs
from vlm_course.worlds.scenes import IMAGE_SIZE, render, sample
from vlm_course.worlds.templates import compact

Pairs = Sequence[tuple[Tensor, Tensor]]  # questions and answers as ids, [B, L] each, padded


def conversations(
    frame: Frame, pairs: Pairs, *, image_id: int, pad_id: int, visual_tokens: int, length: int
) -> tuple[Tensor, Tensor]:
    """Rows of several turns about one image each -> ids and labels [B, length], cut or padded at the end.

    Labels are unshifted: answers and their ends, -100 elsewhere.
    Raises ValueError when the image alone does not fit.
    """
    if length <= visual_tokens + len(frame.opening):
        raise ValueError(f"rows of {length} tokens have no room behind an image of {visual_tokens}: make them longer")
    rows = pairs[0][0].shape[0]

    def repeated(ids: list[int]) -> Tensor:
        return pairs[0][0].new_tensor(ids).expand(rows, -1)

    parts = [(repeated([*frame.opening, *[image_id] * visual_tokens, *frame.asking]), False)]
    for number, (question, answer) in enumerate(pairs):
        parts += [(repeated(frame.again), False)] if number else []
        parts += [(question, False), (repeated(frame.answering), False), (answer, True), (repeated(frame.ending), True)]
    ids = torch.cat([part for part, _ in parts], dim=1)
    learn = torch.cat([torch.full_like(part, learned, dtype=torch.bool) for part, learned in parts], dim=1)
    ids, learn = compact(ids, learn, pad_id=pad_id)
    gap = max(0, length - ids.shape[1])
    ids = torch.nn.functional.pad(ids, (0, gap), value=pad_id)[:, :length]
    learn = torch.nn.functional.pad(learn, (0, gap))[:, :length] & (ids != pad_id)
    return ids, torch.where(learn, ids, IGNORE)


def _frame(adapter: TokenizerAdapter) -> Frame:
    frame = getattr(adapter, "frame", None)
    if frame is None:
        raise ValueError(
            f"{type(adapter).__name__} has no frame, since its template runs words and marks together: write records "
            "with `examples.write_scene_records` and read them with `read_records`"
        )
    return frame


class _Source:
    """What both sources of data share: rows, length, the generator of a step, the share of a process."""

    def __init__(
        self, adapter: TokenizerAdapter, config: LlavaConfig, *, rows: int, turns: int, length: int, seed: int, device
    ):
        for value, name in ((rows, "rows"), (turns, "turns"), (length, "length")):
            require_count(value, name)
        require_count(seed, "seed", 0)
        size = config.vision.image_hw
        if size != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"the tower takes images of {size[0]} x {size[1]}, the worlds are {IMAGE_SIZE} x {IMAGE_SIZE}"
            )
        self.rows, self.turns, self.length, self.seed, self.device = rows, turns, length, seed, torch.device(device)
        self.adapter, self.config, self.frame = adapter, config, _frame(adapter)

    @property
    def batch(self) -> int:
        """Rows a step, as the engine asks for it."""
        return self.rows

    @property
    def asked(self) -> int:
        """Questions a batch."""
        return self.rows * self.turns

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed * 1_000_000 + step)

    def made(self, pairs: Pairs, pixels: Tensor) -> Batch:
        ids, labels = conversations(
            self.frame,
            pairs,
            image_id=self.config.image_id,
            pad_id=self.adapter.pad_id,
            visual_tokens=self.config.visual_tokens,
            length=self.length,
        )
        return Batch(ids, labels, pixels, first=self.first)

    @property
    def first(self) -> int:
        """No label stands before this column: what comes first in every row is the image and a word of a question."""
        frame = self.frame
        return len(frame.opening) + self.config.visual_tokens + len(frame.asking) + 1 + len(frame.answering)


class SceneBatches(_Source):
    """`batches(step)`: `rows` fresh scenes with `turns` questions each; `weights` says how often each kind is asked.

    Args:
        length: tokens of every row; what is longer is cut at the end, so give it room (`shown` measures that).
        weights: by kind of `worlds.dialogs.KINDS`; by default those that the shipped model was trained with.
    """

    def __init__(
        self,
        adapter: TokenizerAdapter,
        config: LlavaConfig,
        *,
        rows: int,
        turns: int = 8,
        length: int = 384,
        weights: dict[str, float] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        draw: Callable = render,
    ):
        super().__init__(adapter, config, rows=rows, turns=turns, length=length, seed=seed, device=device)
        weights = MIX if weights is None else weights
        unknown = sorted(weights.keys() - set(KINDS))
        if unknown or not weights:
            raise ValueError(f"weights name {len(unknown)} unknown kinds {unknown}; known are {', '.join(KINDS)}")
        for kind, weight in weights.items():
            require_number(weight, f"the weight of {kind}", low=0)
        self.weights = torch.tensor([float(weights.get(kind, 0.0)) for kind in KINDS], device=device)
        words = WordTokenizer.small()
        self.world, self.wording = Dialogs(words, device=device), Wording(words, adapter, device=device)
        self.draw, self.lock = draw, Lock()

    def __call__(self, step: int) -> Batch:
        generator = self.generator(step)
        scenes = sample(self.rows, generator=generator, device=self.device)
        with self.lock:  # the world remembers whose numbers it draws, and threads may read ahead
            turns = self.world.several(scenes, self.turns, self.weights, generator=generator)
        pairs = [(self.wording(turn.question), self.wording(turn.answer)) for turn in turns]
        return self.made(pairs, self.draw(scenes, generator=generator))

    @property
    def fingerprint(self) -> str:
        kinds = ",".join(f"{w:g}" for w in self.weights.tolist())
        return (
            f"scenes, {self.rows} rows of {self.length} tokens, {self.turns} turns of kinds {kinds}, seed {self.seed}"
        )


class EasyVqaBatches(_Source):
    """`batches(step)`: `rows` images of easy-VQA's training split, `turns` of their own questions each.

    All 4,000 images are kept on the device as bytes (111 MB). Raises ModuleNotFoundError without the package easy-vqa.
    """

    def __init__(
        self,
        adapter: TokenizerAdapter,
        config: LlavaConfig,
        *,
        rows: int,
        turns: int = 8,
        length: int = 384,
        seed: int = 0,
        device: torch.device | str = "cpu",
        images: int | None = None,
    ):
        super().__init__(adapter, config, rows=rows, turns=turns, length=length, seed=seed, device=device)
        from vlm_course.easy_vqa import easy_vqa_images, easy_vqa_questions, pad_sequences

        numbers = sorted(easy_vqa_images("train"))[:images]
        self.pixels = _easy_vqa_pixels(tuple(numbers)).to(self.device)  # [I, 3, 96, 96], bytes
        questions, answers, about = easy_vqa_questions("train")
        wanted, mine, kept = set(numbers), defaultdict(list), []
        for place, number in enumerate(about):
            if number in wanted:
                mine[number].append(len(kept))
                kept.append(place)
        encode, pad = cache(adapter.encode), adapter.pad_id  # 38,575 questions, of a few hundred wordings
        self.questions = pad_sequences([encode(questions[place]) for place in kept], pad).to(self.device)  # [Q, L]
        self.answers = pad_sequences([encode(answers[place]) for place in kept], pad).to(self.device)
        most = max(len(mine[number]) for number in numbers)
        table = [mine[number] + [-1] * (most - len(mine[number])) for number in numbers]
        self.about = torch.tensor(table, device=self.device)  # [I, most], -1 where an image has fewer questions

    def __call__(self, step: int) -> Batch:
        generator = self.generator(step)
        image = torch.randint(len(self.pixels), (self.rows,), generator=generator, device=self.device)
        known = self.about[image]  # [B, most]
        score = torch.rand(known.shape, generator=generator, device=self.device).masked_fill(known < 0, -1.0)
        order = score.argsort(dim=1, descending=True)  # questions without a repetition, the missing ones last
        have = (known >= 0).sum(1, keepdim=True)
        places = torch.arange(self.turns, device=self.device) % have  # [B, turns]: again from the first if too few
        chosen = known.gather(1, order.gather(1, places))
        pairs = [(self.questions[turn], self.answers[turn]) for turn in chosen.unbind(1)]
        return self.made(pairs, self.pixels[image].float() / 127.5 - 1)

    @property
    def fingerprint(self) -> str:
        return f"easy-VQA, {self.rows} rows of {self.length} tokens, {self.turns} turns, seed {self.seed}"


@lru_cache(maxsize=1)
def _easy_vqa_pixels(numbers: tuple[int, ...]) -> Tensor:
    """Pictures of the training split as bytes, [I, 3, 96, 96]; kept, since reading all 4,000 takes seconds."""
    from PIL import Image

    from vlm_course.easy_vqa import easy_vqa_images
    from vlm_course.images import small_preprocess

    paths = easy_vqa_images("train")
    pixels = [((small_preprocess(Image.open(paths[n])) + 1) * 127.5).round().to(torch.uint8) for n in numbers]
    return torch.stack(pixels)


class Together:
    """`batches(step)`: the rows of several sources, one behind the other. All sources need the same length."""

    def __init__(self, *sources: _Source):
        lengths = {source.length for source in sources}
        if len(lengths) != 1:
            raise ValueError(f"the sources have rows of {sorted(lengths)} tokens, expected one length")
        self.sources = sources
        self.length, self.adapter = sources[0].length, sources[0].adapter
        self.rows = self.batch = sum(source.rows for source in sources)
        self.asked = sum(source.asked for source in sources)

    def __call__(self, step: int) -> Batch:
        parts = [source(step) for source in self.sources]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "labels", "pixels")}
        return Batch(**joined, first=min(part.first for part in parts))

    @property
    def fingerprint(self) -> str:
        return "; ".join(source.fingerprint for source in self.sources)


@dataclass(frozen=True)
class Shown:
    """What a source's rows hold: turns that end inside the row, of all turns; tokens that are no padding, of all."""

    turns: float
    filled: float


def shown(source: _Source | Together, *, steps: int = 1) -> Shown:
    """Measures whether `length` is right: 1.0 turns means that nothing is cut, `filled` what is not padding."""
    ended = real = total = 0
    for step in range(steps):
        batch = source(step)
        ended += int((batch.labels == source.adapter.eos_id).sum())
        real += int((batch.ids != source.adapter.pad_id).sum())
        total += batch.ids.numel()
    return Shown(turns=ended / (steps * source.asked), filled=real / total)


def align_batches(adapter: TokenizerAdapter, config: LlavaConfig, *, rows: int, **options) -> SceneBatches:
    """Stage 1: one caption an image. options: seed, device, draw, length (by default 200)."""
    options = {"length": 200} | options
    return SceneBatches(adapter, config, rows=rows, turns=1, weights={"caption": 1.0}, **options)


def instruct_batches(
    adapter: TokenizerAdapter,
    config: LlavaConfig,
    *,
    rows: int,
    easy_vqa: int = 0,
    images: int | None = None,
    **options,
) -> SceneBatches | Together:
    """Stage 2: all kinds of question, several an image; `easy_vqa` of the rows show easy-VQA's images instead.

    images: only the first so many of easy-VQA's, for a quick look. options: turns, length, seed, device, draw.
    Raises ValueError when no row is left for the scenes.
    """
    if not 0 <= easy_vqa < rows:
        raise ValueError(f"{easy_vqa} of {rows} rows cannot be easy-VQA's: from 0 to {rows - 1}")
    scenes = SceneBatches(adapter, config, rows=rows - easy_vqa, **options)
    if not easy_vqa:
        return scenes
    options.pop("draw", None)
    return Together(scenes, EasyVqaBatches(adapter, config, rows=easy_vqa, images=images, **options))
