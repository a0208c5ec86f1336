"""Questions with known answers for a model of any tokenizer, and its answers beside the controls.

An accuracy alone says little about seeing (`vlm_course.evaluation`): the same questions are asked about a black image
("blind"), about another question's image ("swapped"), and the most frequent answer is counted ("majority"). The fifth
control, a model trained alike behind a random tower, needs its own training: `grade` that model and name the column.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_course.chat import pad_rows
from vlm_course.evaluation import FRESH_SEED
from vlm_course.finetune.tokenizers import TokenizerAdapter
from vlm_course.generation import generate
from vlm_course.grounding.metrics import intersection_and_union, share
from vlm_course.llava import Llava, LlavaConfig
from vlm_course.measures import Table
from vlm_course.tokenizer import WordTokenizer
from vlm_course.validation import counts, require_one_of
from vlm_course.worlds.dialogs import KINDS, Dialogs, from_grid
from vlm_course.worlds.scenes import render, sample

LOCATED = ("box", "point")  # answers that are places: right when they overlap by half, or fall into the box


@dataclass(frozen=True)
class Exam:
    """Questions about images: one entry a question in each of the sequences.

    Attributes:
        pixels: [I, 3, H, W], of every picture once.
        image: the row of `pixels` that each question is about.
        kind, question, answer: in words.
        boxes: xyxy in pixels of the object asked for, [Q, 4]; NaN where a question is about no single object.
    """

    pixels: Tensor
    image: tuple[int, ...]
    kind: tuple[str, ...]
    question: tuple[str, ...]
    answer: tuple[str, ...]
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.question)

    @property
    def kinds(self) -> list[str]:
        """In the order in which they first occur."""
        return list(dict.fromkeys(self.kind))

    def few(self, each: int = 1) -> list[int]:
        """Numbers of the first `each` questions of every kind, to be shown."""
        return [n for kind in self.kinds for n in [n for n, k in enumerate(self.kind) if k == kind][:each]]


@counts(n=2)
def scene_exam(
    n: int, *, seed: int = FRESH_SEED, kinds: Sequence[str] = KINDS, split: str = "train", device: str = "cpu"
) -> Exam:
    """One question of every kind about each of `n` fresh scenes, where the kind applies.

    The same scenes, wordings and rules as `evaluation.evaluate_scenes`; no training seed below ten comes near `seed`.
    Raises ValueError for an unknown kind or split.
    """
    words = WordTokenizer.small()
    generator = torch.Generator(device).manual_seed(seed)
    world = Dialogs(words, device=device)
    scenes = sample(n, generator=generator, device=device, split=split)
    pixels = render(scenes, generator=generator)
    image, kind, question, answer, boxes = [], [], [], [], []
    for name in kinds:
        turns = world.ask(scenes, name, generator=generator)
        box = scenes.box[torch.arange(n, device=scenes.device), turns.target]
        asked, right = turns.question.tolist(), turns.answer.tolist()  # once: reading word by word waits for the device
        for row in turns.valid.nonzero()[:, 0].tolist():
            image.append(row)
            kind.append(name)
            question.append(words.decode(asked[row]))
            answer.append(words.decode(right[row]))
            boxes.append(box[row] if name in LOCATED else torch.full_like(box[row], torch.nan))
    return Exam(pixels, tuple(image), tuple(kind), tuple(question), tuple(answer), torch.stack(boxes))


def easy_vqa_exam(*, limit: int | None = None, device: str = "cpu") -> Exam:
    """The test split of easy-VQA, word for word; `limit` takes that many questions, evenly spread over the split.

    Raises ModuleNotFoundError without the package easy-vqa, ValueError when `limit` is below 1.
    """
    from PIL import Image

    from vlm_course.easy_vqa import easy_vqa_images, easy_vqa_questions
    from vlm_course.images import small_preprocess

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 question, got {limit}")
    questions, answers, about = easy_vqa_questions("test")
    step = max(1, len(questions) // (limit or len(questions)))
    chosen = range(0, len(questions), step)[:limit]
    numbers = sorted({about[place] for place in chosen})
    paths, row = easy_vqa_images("test"), {number: row for row, number in enumerate(numbers)}
    pixels = torch.stack([small_preprocess(Image.open(paths[number])) for number in numbers]).to(device)
    kind = ["yes/no" if answers[n] in ("yes", "no") else "shape" if answers[n] in _SHAPES else "colour" for n in chosen]
    return Exam(
        pixels,
        tuple(row[about[place]] for place in chosen),
        tuple(f"easy-VQA {name}" for name in kind),
        tuple(questions[place] for place in chosen),
        tuple(answers[place] for place in chosen),
        torch.full((len(chosen), 4), torch.nan, device=device),
    )


_SHAPES = ("circle", "rectangle", "triangle")


def together(*exams: Exam) -> Exam:
    """Several exams as one."""
    image, before = [], 0
    for exam in exams:
        image += [before + row for row in exam.image]
        before += len(exam.pixels)
    joined = {name: sum((getattr(exam, name) for exam in exams), ()) for name in ("kind", "question", "answer")}
    pixels, boxes = (torch.cat([getattr(exam, name) for exam in exams]) for name in ("pixels", "boxes"))
    return Exam(pixels=pixels, image=tuple(image), boxes=boxes, **joined)


@counts(batch=1)
@torch.no_grad()
def encode(model: Llava, pixels: Tensor, *, batch: int = 256) -> Tensor:
    """Visual tokens of pictures: [I, 3, H, W] -> [I, M, D_llm], on the model's device."""
    like = next(model.vision.parameters())
    with torch.autocast(like.device.type, dtype=torch.bfloat16, enabled=like.device.type == "cuda"):
        return torch.cat([model.encode_images(part.to(like.device, like.dtype)) for part in pixels.split(batch)])


@counts(max_new_tokens=1, batch=1)
@torch.no_grad()
def ask(
    model: Llava,
    adapter: TokenizerAdapter,
    features: Tensor,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 48,
    batch: int = 256,
) -> list[str]:
    """Greedy answers, one question an image: visual tokens [B, M, D_llm] (see `encode`), B questions -> B texts.

    Raises ValueError unless there are as many images as questions.
    """
    if len(features) != len(questions):
        raise ValueError(f"there are {len(features)} images and {len(questions)} questions: one each")
    device, out = features.device, []
    for start in range(0, len(questions), batch):
        asked = questions[start : start + batch]
        rows = [adapter.encode_chat([(question, None)], model.config.visual_tokens)[0] for question in asked]
        ids, mask = (x.to(device) for x in pad_rows(rows, adapter.pad_id, side="left"))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            new = generate(
                model,
                ids,
                image_features=features[start : start + batch],
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_id=adapter.eos_id,
            )
        out += [adapter.decode(_until(row, adapter.eos_id)).strip() for row in new.tolist()]
    return out


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row


def rows_at_once(config: LlavaConfig, *, most: int = 256, cache_bytes: float = 4e9) -> int:
    """How many questions are answered together: `most`, or as many as keep their keys and values in `cache_bytes`.

    256 rows of a 7B model would take 86 GB in 16 bits. A question and its answer count as 64 tokens.
    """
    text = config.text
    row = 2 * 2 * text.layers * text.kv_heads * text.head_dim * (config.visual_tokens + 64)  # keys and values, 16 bits
    return max(1, min(most, int(cache_bytes // row)))


def answers(
    model: Llava, adapter: TokenizerAdapter, exam: Exam, *, look: str = "model", batch: int | None = None
) -> list[str]:
    """The model's answers to an exam. look: "model" sees each question's image, "blind" a black one, "swapped" the next
    image's. batch: questions at once, by default `rows_at_once`. Raises ValueError for another look.
    """
    require_one_of(look, "look", ("model", "blind", "swapped"))
    batch = rows_at_once(model.config) if batch is None else batch
    pixels, rows = exam.pixels, torch.tensor(exam.image)
    if look == "blind":
        pixels, rows = torch.full_like(pixels[:1], -1.0), torch.zeros_like(rows)
    elif look == "swapped":
        rows = (rows + 1) % len(pixels)
    was, out = model.training, [""] * len(exam)
    model.eval()
    features = encode(model, pixels, batch=batch)
    rows = rows.to(features.device)
    for kind in exam.kinds:  # questions of one kind are of about one length, and so are their answers
        mine = [n for n, k in enumerate(exam.kind) if k == kind]
        room = 2 + max(len(adapter.encode(exam.answer[n])) for n in mine)
        asked = [exam.question[n] for n in mine]
        given = ask(model, adapter, features[rows[mine]], asked, max_new_tokens=room, batch=batch)
        for n, text in zip(mine, given, strict=True):
            out[n] = text
    model.train(was)
    return out


def scores(exam: Exam, given: Sequence[str]) -> Tensor:
    """1 for a right answer, 0 for a wrong one: [Q]. Words must be the same, boxes overlap by more than half (IoU), and
    points fall into the object's box."""
    if len(given) != len(exam):
        raise ValueError(f"there are {len(given)} answers to {len(exam)} questions: one each")
    right = []
    for n, text in enumerate(given):
        if exam.kind[n] == "box":
            box = _numbers(text, r"\[(\d+) (\d+) (\d+) (\d+)\]")
            overlap = share(*intersection_and_union(box[None], exam.boxes[n : n + 1].cpu()), 0.0)
            right.append(float(overlap.nan_to_num(0.0) > 0.5))
        elif exam.kind[n] == "point":
            x, y = _numbers(text, r"\((\d+) (\d+)\)").tolist()
            x1, y1, x2, y2 = exam.boxes[n].tolist()
            right.append(float(x1 <= x <= x2 and y1 <= y <= y2))
        else:
            right.append(float(text == exam.answer[n]))
    return torch.tensor(right)


def _numbers(text: str, form: str) -> Tensor:
    """Places on the 0..255 grid in pixels; NaN when the text has another form, or a number that is not on the grid."""
    found = re.fullmatch(form, text)
    values = torch.tensor([int(number) for number in found.groups()] if found else [-1] * form.count("d+"))
    return from_grid(values) if bool(((values >= 0) & (values < 256)).all()) else torch.full(values.shape, torch.nan)


def by_kind(exam: Exam, right: Tensor) -> dict[str, float]:
    """Mean score of every kind, and of all questions under "all"."""
    kinds = {kind: [n for n, k in enumerate(exam.kind) if k == kind] for kind in exam.kinds}
    return {kind: right[mine].mean().item() for kind, mine in kinds.items()} | {"all": right.mean().item()}


def majority(exam: Exam) -> dict[str, float]:
    """What always giving the most frequent answer of a kind would score; not for places, where it has no meaning."""
    out, total = {}, 0
    for kind in exam.kinds:
        if kind not in LOCATED:
            given = Counter(a for a, k in zip(exam.answer, exam.kind, strict=True) if k == kind)
            out[kind] = given.most_common(1)[0][1] / given.total()
            total += given.most_common(1)[0][1]
    return out | {"all": total / len(exam)}


def grade(
    model: Llava, adapter: TokenizerAdapter, exam: Exam, *, controls: bool = True, batch: int | None = None
) -> tuple[Table, list[str]]:
    """A model's exam -> (kind -> {"model", "blind", "swapped", "majority", "questions"}, its answers).

    Without `controls` only "model" and "questions" are filled.
    """
    given = answers(model, adapter, exam, batch=batch)
    columns = {"model": by_kind(exam, scores(exam, given))}
    if controls:
        for look in ("blind", "swapped"):
            columns[look] = by_kind(exam, scores(exam, answers(model, adapter, exam, look=look, batch=batch)))
        columns["majority"] = majority(exam)
    asked = Counter(exam.kind) | {"all": len(exam)}
    table = {
        kind: {c: column[kind] for c, column in columns.items() if kind in column} for kind in [*exam.kinds, "all"]
    }
    return {kind: row | {"questions": asked[kind]} for kind, row in table.items()}, given
