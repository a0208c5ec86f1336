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

from .easy_vqa import evaluate_easy_vqa
from .llava import Llava
from .measures import Table, answer, box_iou, encode_in_batches, format_table, read_numbers
from .tokenizer import WordTokenizer
from .worlds.dialogs import KINDS, Dialogs, Turns
from .worlds.scenes import Scenes, held_out_table, render, sample

__all__ = [
    "FRESH_SEED",
    "answer",
    "box_iou",
    "evaluate_easy_vqa",
    "evaluate_scenes",
    "format_table",
    "main",
    "read_numbers",
]

# Far from the seeds of training, which are below 100 million for every seed of a run under 10.
FRESH_SEED = 2_000_000_000


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
) -> Table:
    """One question of every kind about each of `n` fresh scenes of one to six objects.

    Returns:
        measure -> column -> value, the columns being "model" and, with `controls`, "blind", "swapped", "any object"
        and "majority". The measures "held-out colour" and "held-out shape" ask about objects of a pair of shape and
        colour that no training image showed. A measure that no scene admits (possible for a few scenes) is left out.

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
    features = {name: encode_in_batches(model, pixels, batch) for name, pixels in images.items()}
    table: Table = {}
    for kind in kinds:
        turns = world.ask(scenes, kind, generator=generator)
        if not turns.valid.any():
            continue
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


def _run(model, tokenizer, features, turns: Turns, scenes: Scenes, kind: str, batch: int) -> dict[str, Tensor]:
    longest = int((turns.answer != tokenizer.pad_id).sum(1).max()) + 1
    given = [
        answer(model, tokenizer, f, q, max_new_tokens=longest)
        for f, q in zip(features.split(batch), turns.question.split(batch), strict=True)
    ]
    return _score(kind, torch.cat(given), turns, scenes, tokenizer)


def _held_out(model, tokenizer, world: Dialogs, n: int, seed: int, batch: int) -> Table:
    """Colour and shape of objects whose pair was never shown, among `n` scenes that hold one each."""
    device = world.device
    generator = torch.Generator(device).manual_seed(seed)
    scenes = sample(n, generator=generator, device=device, split="held_out")
    features = encode_in_batches(model, render(scenes, generator=generator), batch)
    rows, out = torch.arange(n, device=device), {}
    for kind in ("colour", "shape"):
        turns = world.ask(scenes, kind, generator=generator)
        mine = held_out_table(device)[scenes.shape[rows, turns.target], scenes.colour[rows, turns.target]] & turns.valid
        if not mine.any():
            continue
        scores = _run(model, tokenizer, features, turns, scenes, kind, batch)[kind]
        out[f"held-out {kind}"] = {"model": scores[mine].mean().item(), "questions": int(mine.sum())}
    return out


def main(
    suite: str,
    *,
    json_file: Path | str | None = None,
    n: int | None = None,
    device: str = "cpu",
    folder: Path | str | None = None,
    tuned: bool = False,
) -> dict:
    """Measure the shipped model, print the table, and write it to `json_file` where one is given.

    Args:
        suite: "scenes" or "easy-vqa".
        n: scenes, or questions of easy-VQA; 2,000 and all by default.
        folder: weights elsewhere than in the package.
        tuned: with the bridge that was tuned on easy-VQA.

    Raises:
        ValueError: an unknown suite.
    """
    from .pretrained import FOLDER, load_small
    from .pretrained.easy_vqa_tuning import load_tuned

    if suite not in ("scenes", "easy-vqa"):
        raise ValueError(f'suite must be "scenes" or "easy-vqa", not {suite!r}')
    small = (load_tuned if tuned else load_small)(device, folder=folder or FOLDER)
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
