"""What the shipped model can do, measured: accuracy on fresh scenes and on easy-VQA, always beside its controls.

An accuracy alone says little about seeing. Four controls answer the same questions:

- blind: the same model looks at a black image;
- swapped: it looks at the image of another scene;
- any object: what naming a random object of the right scene would score (no binding of words to places);
- majority: always the most frequent answer.

Greedy decoding, exact match of the whole answer; boxes by intersection over union, points by falling into the box.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from .generation import generate
from .llava import Llava
from .tokenizer import WordTokenizer
from .worlds import dialogs as dialog_world
from .worlds.dialogs import KINDS, Dialogs, Turns
from .worlds.scenes import IMAGE_SIZE, Scenes, held_out_table, render, sample

FRESH_SEED = (
    2_000_000_000  # far from the seeds of training, which are below 100 million for every seed of a run under 10
)


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


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes row by row: xyxy [B, 4] each -> [B]; 0 where a box has no area."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    both = (high - low).clamp(min=0).prod(1)
    area = lambda box: (box[:, 2:] - box[:, :2]).clamp(min=0).prod(1)  # noqa: E731
    union = area(a) + area(b) - both
    return torch.where(union > 0, both / union.clamp(min=1e-9), 0.0)


def read_numbers(answers: Tensor, tokenizer: WordTokenizer, count: int, marks: str) -> Tensor:
    """The numbers of "[ 1 2 3 4 ]" or "( 1 2 )" in pixels: ids [B, L] -> [B, count], NaN in a row of another form."""
    first, (open_, close) = tokenizer.id_of("0"), (tokenizer.id_of(m) for m in marks)
    values = answers[:, 1 : 1 + count] - first
    good = (
        (answers[:, 0] == open_)
        & (answers[:, 1 + count] == close)
        & (answers[:, 2 + count :] == tokenizer.pad_id).all(1)
    )
    good &= ((values >= 0) & (values < dialog_world.LOCATIONS)).all(1)
    return torch.where(good[:, None], dialog_world.from_grid(values), torch.nan)


def _score(kind: str, given: Tensor, turns: Turns, scenes: Scenes, tokenizer: WordTokenizer) -> dict[str, Tensor]:
    """Scores of every row, by measure."""
    box = scenes.box[torch.arange(len(scenes), device=scenes.device), turns.target]
    if kind == "box":
        iou = box_iou(read_numbers(given, tokenizer, 4, "[]"), box).nan_to_num(0.0)
        return {"box_iou": iou, "box_iou>.5": (iou > 0.5).float()}
    if kind == "point":
        point = read_numbers(given, tokenizer, 2, "()")
        return {"point": ((point >= box[:, :2]) & (point <= box[:, 2:])).all(1).float()}
    width = min(given.shape[1], turns.answer.shape[1])  # past the longest right answer both hold only <pad>
    right = (given[:, :width] == turns.answer[:, :width]).all(1) & (given[:, width:] == tokenizer.pad_id).all(1)
    return {kind: right.float()}


def _any_object(kind: str, turns: Turns, scenes: Scenes) -> dict[str, float]:
    """What naming, or pointing to, a random object of the scene would score, in expectation."""
    rows = torch.arange(len(scenes), device=scenes.device)
    present, valid = scenes.present.float(), turns.valid
    share = present / present.sum(1, keepdim=True)
    mean = lambda per_object: (share * per_object).sum(1)[valid].mean().item()  # noqa: E731
    if kind in ("colour", "shape", "size"):
        values = getattr(scenes, kind)
        return {kind: mean((values == values[rows, turns.target][:, None]).float())}
    if kind in ("box", "point"):
        box = scenes.box
        mine = box[rows, turns.target]
        n, k = box.shape[:2]
        if kind == "point":
            centre = (box[..., :2] + box[..., 2:]) / 2
            return {kind: mean(((centre >= mine[:, None, :2]) & (centre <= mine[:, None, 2:])).all(2).float())}
        iou = box_iou(box.flatten(0, 1), mine[:, None].expand(n, k, 4).flatten(0, 1)).view(n, k)
        return {"box_iou": mean(iou), "box_iou>.5": mean((iou > 0.5).float())}
    return {}


def evaluate_scenes(
    model: Llava,
    tokenizer: WordTokenizer,
    *,
    n: int = 2000,
    seed: int = FRESH_SEED,
    batch: int = 250,
    kinds: tuple[str, ...] = KINDS,
    controls: bool = True,
    held_out: bool = True,
) -> dict[str, dict[str, float]]:
    """One question of every kind about each of `n` fresh scenes of one to six objects.

    Returns:
        measure -> column -> value, the columns being "model" and, with `controls`, "blind", "swapped", "any object"
        and "majority". The measures "held-out colour" and "held-out shape" ask about objects of a pair of shape and
        colour that no training image showed.

    Raises:
        ValueError: n below 2 (nothing to swap with).
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, since images are swapped; got {n}")
    device = next(model.parameters()).device
    world = Dialogs(tokenizer, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    scenes = sample(n, generator=generator, device=device)
    images = {"model": render(scenes, generator=generator)}
    if controls:
        images |= {"blind": torch.full_like(images["model"], -1.0), "swapped": images["model"].roll(1, 0)}
    features = {name: _encode(model, pixels, batch) for name, pixels in images.items()}
    table: dict[str, dict[str, float]] = {}
    for kind in kinds:
        turns = world.ask(scenes, kind, generator=generator)
        for column, seen in features.items():
            scores = _run(model, tokenizer, seen, turns, scenes, kind, batch)
            for measure, values in scores.items():
                table.setdefault(measure, {})[column] = values[turns.valid].mean().item()
        if controls:
            for measure, value in _any_object(kind, turns, scenes).items():
                table[measure]["any object"] = value
            if kind not in ("box", "point"):
                answers = Counter(map(tuple, turns.answer[turns.valid].tolist()))
                table[kind]["majority"] = answers.most_common(1)[0][1] / int(turns.valid.sum())
    if held_out:
        table |= _held_out(model, tokenizer, world, n, seed + 1, batch)
    return table


def _encode(model: Llava, pixels: Tensor, batch: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.encode_images(part) for part in pixels.split(batch)])


def _run(model, tokenizer, features, turns: Turns, scenes: Scenes, kind: str, batch: int) -> dict[str, Tensor]:
    longest = int((turns.answer != tokenizer.pad_id).sum(1).max()) + 1
    given = [
        answer(model, tokenizer, f, q, max_new_tokens=longest)
        for f, q in zip(features.split(batch), turns.question.split(batch), strict=True)
    ]
    return _score(kind, torch.cat(given), turns, scenes, tokenizer)


def _held_out(model, tokenizer, world: Dialogs, n: int, seed: int, batch: int) -> dict[str, dict[str, float]]:
    """Colour and shape of objects whose pair was never shown, among `n` scenes that hold one each."""
    device = world.device
    generator = torch.Generator(device).manual_seed(seed)
    scenes = sample(n, generator=generator, device=device, split="held_out")
    features = _encode(model, render(scenes, generator=generator), batch)
    rows, out = torch.arange(n, device=device), {}
    for kind in ("colour", "shape"):
        turns = world.ask(scenes, kind, generator=generator)
        mine = held_out_table(device)[scenes.shape[rows, turns.target], scenes.colour[rows, turns.target]] & turns.valid
        scores = _run(model, tokenizer, features, turns, scenes, kind, batch)[kind]
        out[f"held-out {kind}"] = {"model": scores[mine].mean().item(), "questions": int(mine.sum())}
    return out


def easy_vqa_features(model: Llava, split: str, *, batch: int = 250) -> tuple[Tensor, dict[int, int]]:
    """Visual tokens of every image of a split of easy-VQA ("train", "test"): [images, M, D], and image id -> row.

    Raises:
        ModuleNotFoundError: the package easy-vqa is not installed.
    """
    paths = easy_vqa_images(split)
    device = next(model.parameters()).device
    from PIL import Image

    from .images import small_preprocess

    out = []
    numbers = sorted(paths)
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


def evaluate_easy_vqa(
    model: Llava, tokenizer: WordTokenizer, *, limit: int | None = None, batch: int = 250
) -> dict[str, dict[str, float]]:
    """All questions of easy-VQA's test split, word for word, with the controls.

    Args:
        limit: only the first so many questions, for a quick look.

    Returns:
        "all", "yes/no", "colour", "shape" -> {"model", "blind", "swapped", "majority", "questions"}.
    """
    questions, answers, numbers = easy_vqa_questions("test")
    questions, answers, numbers = questions[:limit], answers[:limit], numbers[:limit]
    features, rows = easy_vqa_features(model, "test", batch=batch)
    device = features.device
    encoded = pad_sequences([tokenizer.encode(q) for q in questions]).to(device)
    wanted = torch.tensor([tokenizer.id_of(a) for a in answers], device=device)
    image = torch.tensor([rows[i] for i in numbers], device=device)
    black = torch.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), -1.0, device=device)
    blind = _encode(model, black, 1)
    right = {}
    for column in ("model", "blind", "swapped"):
        hits = []
        for q, w, i in zip(encoded.split(batch), wanted.split(batch), image.split(batch), strict=True):
            seen = {
                "model": features[i],
                "blind": blind.expand(len(i), -1, -1),
                "swapped": features[(i + 1) % len(features)],
            }
            given = answer(model, tokenizer, seen[column], q, max_new_tokens=2)
            hits.append((given[:, 0] == w) & (given[:, 1] == tokenizer.pad_id))
        right[column] = torch.cat(hits).float()
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
        table[name] = {column: hits[chosen].mean().item() for column, hits in right.items()}
        table[name] |= {"majority": Counter(mine).most_common(1)[0][1] / len(mine), "questions": len(mine)}
    return table


def pad_sequences(rows: list[list[int]], pad_id: int = 0) -> Tensor:
    """Lists of ids to one tensor, padded at the end: [rows, longest]."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])


def format_table(table: dict[str, dict[str, float]]) -> str:
    """The table as aligned text, a row a measure."""
    columns = list(dict.fromkeys(c for row in table.values() for c in row))
    lines = [f"{'':<16}" + "".join(f"{c:>12}" for c in columns)]
    for measure, row in table.items():
        cells = (
            ("" if c not in row else f"{row[c]:.4f}" if isinstance(row[c], float) else f"{row[c]:,}") for c in columns
        )
        lines.append(f"{measure:<16}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def main(
    suite: str,
    *,
    json_file: Path | str | None = None,
    n: int | None = None,
    device: str = "cpu",
    folder: Path | str | None = None,
) -> dict:
    """Measure the shipped model, print the table, and write it to `json_file` where one is given.

    Args:
        suite: "scenes" or "easy-vqa".
        n: scenes, or questions of easy-VQA; 2,000 and all by default.
        folder: weights elsewhere than in the package.

    Raises:
        ValueError: an unknown suite.
    """
    from .pretrained import FOLDER, load_small

    if suite not in ("scenes", "easy-vqa"):
        raise ValueError(f'suite must be "scenes" or "easy-vqa", not {suite!r}')
    small = load_small(device, folder=folder or FOLDER)
    began = time.monotonic()
    if suite == "scenes":
        table = evaluate_scenes(small.model, small.tokenizer, n=n or 2000)
    else:
        table = evaluate_easy_vqa(small.model, small.tokenizer, limit=n)
    print(format_table(table))
    result = {"suite": suite, "device": device, "seconds": round(time.monotonic() - began, 1), "table": table}
    if json_file:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result
