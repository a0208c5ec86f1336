"""The shipped model on easy-VQA: images that this project did not make.

The questions are not new to it: `worlds.templates` has wordings of the same form, with the same colours and three of
the same shapes, so "zero-shot" here speaks of the pictures alone.

Source of the data: the package easy-vqa (Victor Zhou 2019), its own test split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor

from .llava import Llava
from .measures import Table, answer_many, encode_in_batches
from .tokenizer import WordTokenizer
from .worlds.scenes import IMAGE_SIZE


def easy_vqa_features(
    model: Llava, split: str, *, only: Collection[int] | None = None, batch: int = 250
) -> tuple[Tensor, dict[int, int]]:
    """Visual tokens of the images of a split of easy-VQA ("train", "test"): [images, M, D], and image id -> row.

    Args:
        only: ids of the images to encode; None encodes all.

    Raises:
        ModuleNotFoundError: the package easy-vqa is not installed.
    """
    from PIL import Image

    from .images import small_preprocess

    paths = easy_vqa_images(split)
    device = next(model.parameters()).device
    out, numbers = [], sorted(paths if only is None else only)
    for start in range(0, len(numbers), batch):
        pixels = [small_preprocess(Image.open(paths[i]).convert("RGB")) for i in numbers[start : start + batch]]
        with torch.no_grad():
            out.append(model.encode_images(torch.stack(pixels).to(device)))
    return torch.cat(out), {number: row for row, number in enumerate(numbers)}


def easy_vqa_images(split: str) -> dict[int, str]:
    """Paths of the images of easy-VQA by id."""
    import easy_vqa

    return {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}[split]()


def easy_vqa_questions(split: str) -> tuple[list[str], list[str], list[int]]:
    """Questions, answers and image ids of easy-VQA, as the package gives them."""
    import easy_vqa

    return {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]()


def evaluate_easy_vqa(model: Llava, tokenizer: WordTokenizer, *, limit: int | None = None, batch: int = 100) -> Table:
    """All questions of easy-VQA's test split, word for word, with the controls.

    Args:
        limit: only the first so many questions, for a quick look.

    Returns:
        "all", "yes/no", "shape", "colour" -> {"model", "blind", "swapped", "majority", "questions"}, without groups of
        no question.

    Raises:
        ValueError: limit below 1.
        ModuleNotFoundError: the package easy-vqa is not installed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 question, got {limit}")
    questions, answers, numbers = easy_vqa_questions("test")
    questions, answers, numbers = questions[:limit], answers[:limit], numbers[:limit]
    everything = sorted(easy_vqa_images("test"))
    after = dict(zip(everything, everything[1:] + everything[:1], strict=True))  # the image that stands in when swapped
    needed = {*numbers, *(after[i] for i in numbers)}
    features, rows = easy_vqa_features(model, "test", only=needed, batch=batch)
    device = features.device
    encoded = pad_sequences([tokenizer.encode(q) for q in questions]).to(device)
    wanted = torch.tensor([tokenizer.id_of(a) for a in answers], device=device)
    image = torch.tensor([rows[i] for i in numbers], device=device)
    other = torch.tensor([rows[after[i]] for i in numbers], device=device)
    black = torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), -1.0, device=device)
    looks = {
        "model": (features, image),
        "blind": (encode_in_batches(model, black, 1), torch.zeros_like(image)),
        "swapped": (features, other),
    }
    right = {}
    for column, (seen, row) in looks.items():
        given = answer_many(model, tokenizer, seen, row, encoded, max_new_tokens=2, batch=batch)
        right[column] = ((given[:, 0] == wanted) & (given[:, 1] == tokenizer.pad_id)).float()
    groups = {
        "all": [True] * len(answers),
        "yes/no": [a in ("yes", "no") for a in answers],
        "shape": [a in ("circle", "rectangle", "triangle") for a in answers],
    }
    groups["colour"] = [not (b or c) for b, c in zip(groups["yes/no"], groups["shape"], strict=True)]
    table = {}
    for name, members in groups.items():
        chosen = torch.tensor(members, device=device)
        mine = [a for a, m in zip(answers, members, strict=True) if m]
        if not mine:
            continue
        table[name] = {column: hits[chosen].mean().item() for column, hits in right.items()}
        table[name] |= {"majority": Counter(mine).most_common(1)[0][1] / len(mine), "questions": len(mine)}
    return table


def pad_sequences(rows: list[list[int]], pad_id: int = 0) -> Tensor:
    """Lists of ids to one tensor, padded at the end: [rows, longest]."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
