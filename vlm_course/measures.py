"""What every measurement shares: answers taken from a model in batches, numbers read out of them, a table to print."""

from __future__ import annotations

import torch
from torch import Tensor

from .generation import generate
from .grounding.metrics import intersection_and_union, share
from .llava import Llava
from .tokenizer import WordTokenizer
from .validation import checks, counts, require_same_device, require_shape
from .worlds.dialogs import LOCATIONS, from_grid

Table = dict[str, dict[str, float]]  # measure -> column -> value


def _require_questions(model: Llava, features: Tensor, questions: Tensor, rows: str) -> None:
    require_shape(
        features, "features", "B N D", D=model.config.text.width, hint="visual tokens, as the decoder reads them"
    )
    require_shape(questions, "questions", f"{rows} L", floating=False, **({"B": len(features)} if rows == "B" else {}))
    require_same_device(features=features, questions=questions)


@counts(batch=1)
@checks(lambda model, pixels, batch: require_shape(pixels, "pixels", "B C H W"))
@torch.no_grad()
def encode_in_batches(model: Llava, pixels: Tensor, batch: int) -> Tensor:
    """Visual tokens of many images, `batch` at a time: [B, 3, H, W] -> [B, M, D]."""
    return torch.cat([model.encode_images(part) for part in pixels.split(batch)])


def _check_answer(
    model: Llava, tokenizer: WordTokenizer, features: Tensor, questions: Tensor, *, max_new_tokens: int
) -> None:
    _require_questions(model, features, questions, "B")


@counts(max_new_tokens=1)
@checks(_check_answer)
@torch.no_grad()
def answer(
    model: Llava, tokenizer: WordTokenizer, features: Tensor, questions: Tensor, *, max_new_tokens: int
) -> Tensor:
    """Greedy answers to one question an image.

    Args:
        features: [B, M, D] from `model.encode_images`.
        questions: [B, L] ids, padded with <pad> at the end.

    Returns:
        [B, max_new_tokens] ids, <pad> from the first <eos> on.
    """
    tok, n = tokenizer, len(questions)
    mark = lambda token, times=1: questions.new_full((n, times), token)  # noqa: E731
    ids = [
        mark(tok.bos_id),
        mark(tok.image_id, features.shape[1]),
        mark(tok.user_id),
        questions,
        mark(tok.assistant_id),
    ]
    ids = torch.cat(ids, 1)
    real = ids != tok.pad_id
    order = real.long().argsort(dim=1, stable=True)  # padding to the left
    ids, real = ids.gather(1, order), real.gather(1, order)
    longest = int(real.sum(1).max())
    new = generate(
        model,
        ids[:, -longest:],
        image_features=features,
        attention_mask=real[:, -longest:],
        max_new_tokens=max_new_tokens,
        eos_id=tok.eos_id,
    )
    new = torch.nn.functional.pad(new, (0, max_new_tokens - new.shape[1]), value=tok.eos_id)
    ended = (new == tok.eos_id).cumsum(1) > 0
    return new.masked_fill(ended, tok.pad_id)


def _check_answer_many(
    model: Llava, tokenizer: WordTokenizer, features: Tensor, image: Tensor, questions: Tensor, **rest: int
) -> None:
    _require_questions(model, features, questions, "Q")
    require_shape(image, "image", "Q", floating=False, Q=len(questions), hint="the picture of each question")
    require_same_device(features=features, image=image)
    low, high = (int(end) for end in image.aminmax())
    if low < 0 or high >= len(features):
        raise ValueError(f"the questions are about images {low} to {high}, expected 0 to {len(features) - 1}")


@counts(max_new_tokens=1, batch=1)
@checks(_check_answer_many)
@torch.no_grad()
def answer_many(
    model: Llava,
    tokenizer: WordTokenizer,
    features: Tensor,
    image: Tensor,
    questions: Tensor,
    *,
    max_new_tokens: int,
    batch: int = 250,
) -> Tensor:
    """The answers of `answer` to many questions about few images; every image goes through the decoder only once.

    Args:
        features: [I, M, D] from `model.encode_images`.
        image: [Q] the row of `features` that each question is about.
        questions: [Q, L] ids, padded with <pad> at the end.
        batch: images, and questions, at a time.

    Returns:
        [Q, max_new_tokens] ids, <pad> from the first <eos> on.
    """
    tok = tokenizer
    out = questions.new_full((len(questions), max_new_tokens), tok.pad_id)
    lengths = (questions != tok.pad_id).sum(1)  # questions of one length need no padding
    for start in range(0, len(features), batch):
        seen = features[start : start + batch]
        head = [tok.bos_id] + [tok.image_id] * seen.shape[1]
        prefix = questions.new_tensor(head).expand(len(seen), -1)
        read = model.new_cache()
        model(prefix, image_features=seen, cache=read, logits_to_keep=1)
        here = (image >= start) & (image < start + batch)
        for length in lengths[here].unique().tolist():
            for rows in (here & (lengths == length)).nonzero()[:, 0].split(batch):
                ids = torch.nn.functional.pad(questions[rows, :length], (1, 0), value=tok.user_id)
                ids = torch.nn.functional.pad(ids, (0, 1), value=tok.assistant_id)
                cache = read.select(image[rows] - start, room=ids.shape[1] + max_new_tokens)
                for place in range(max_new_tokens):
                    ids = model(ids, cache=cache, logits_to_keep=1)[:, -1:].argmax(-1)  # [n, T] -> [n, 1]
                    out[rows, place] = ids[:, 0]
    ended = (out == tok.eos_id).cumsum(1) > 0
    return out.masked_fill(ended, tok.pad_id)


def _check_boxes(a: Tensor, b: Tensor) -> None:
    hint = "each row is a box x1, y1, x2, y2"
    require_shape(a, "a", "B four", four=4, empty=True, hint=hint)
    require_shape(b, "b", "B four", four=4, B=a.shape[0], empty=True, hint=hint)


@checks(_check_boxes)
def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of answers and truth, row by row: xyxy [B, 4] each -> [B].

    A model may answer with no box at all: NaN, or corners in the wrong order, overlap nothing. For boxes that must be
    boxes, and for all against all, there is `grounding.box_iou`, with the same arithmetic.
    """
    return share(*intersection_and_union(a, b), 0.0)


def _check_numbers(answers: Tensor, tokenizer: WordTokenizer, count: int, marks: str) -> None:
    require_shape(answers, "answers", "B L", floating=None, empty=True)
    if len(marks) != 2:
        raise ValueError(f"marks is {marks!r}, expected two characters, such as '[]'")


@counts(count=1)
@checks(_check_numbers)
def read_numbers(answers: Tensor, tokenizer: WordTokenizer, count: int, marks: str) -> Tensor:
    """The numbers of "[ 1 2 3 4 ]" or "( 1 2 )" in pixels: ids [B, L] -> [B, count], NaN in a row of another form."""
    first, (open_, close) = tokenizer.id_of("0"), (tokenizer.id_of(m) for m in marks)
    short = max(0, 2 + count - answers.shape[1])
    answers = torch.nn.functional.pad(answers, (0, short), value=tokenizer.pad_id)
    values = answers[:, 1 : 1 + count] - first
    good = (
        (answers[:, 0] == open_)
        & (answers[:, 1 + count] == close)
        & (answers[:, 2 + count :] == tokenizer.pad_id).all(1)
    )
    good &= ((values >= 0) & (values < LOCATIONS)).all(1)
    return torch.where(good[:, None], from_grid(values), torch.nan)


def _check_table(table: Table) -> None:
    if not table:
        raise ValueError("the table has 0 rows, expected at least 1")


@checks(_check_table)
def format_table(table: Table) -> str:
    """The table as aligned text, a row a measure."""
    columns = list(dict.fromkeys(c for row in table.values() for c in row))
    lines = [f"{'':<16}" + "".join(f"{c:>12}" for c in columns)]
    for measure, row in table.items():
        cells = (
            ("" if c not in row else f"{row[c]:.4f}" if isinstance(row[c], float) else f"{row[c]:,}") for c in columns
        )
        lines.append(f"{measure:<16}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)
