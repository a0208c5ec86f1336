"""The worlds as a learner's own data would look: a folder of PNGs and a LLaVA-Instruct-style JSON about them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vlm_course.finetune.data import IMAGE
from vlm_course.finetune.folders import written_whole
from vlm_course.images import to_pil
from vlm_course.pretrained.recipe import MIX
from vlm_course.tokenizer import WordTokenizer
from vlm_course.validation import counts
from vlm_course.worlds.dialogs import KINDS, Dialogs
from vlm_course.worlds.scenes import render, sample


@counts(n=1, turns=1, seed=0)
def write_scene_records(folder: Path | str, n: int, *, turns: int = 4, seed: int = 0, replace: bool = False) -> Path:
    """Draw `n` scenes with `turns` questions each; returns the folder, complete or not there.

    It holds conversations.json and images/scene_00000.png and so on: what `data.read_records` reads.
    Raises FileExistsError when it exists and `replace` is not given.
    """
    words = WordTokenizer.small()
    generator = torch.Generator().manual_seed(seed)
    scenes = sample(n, generator=generator)
    weights = torch.tensor([MIX[kind] for kind in KINDS])
    talk = Dialogs(words).several(scenes, turns, weights, generator=generator)
    pixels = render(scenes, generator=generator)
    records = []
    with written_whole(folder, replace=replace) as part:
        (part / "images").mkdir()
        for row in range(n):
            name, messages = f"scene_{row:05}.png", []
            to_pil(pixels[row]).save(part / "images" / name)
            for number, turn in enumerate(talk):
                question, answer = words.decode(turn.question[row]), words.decode(turn.answer[row])
                value = f"{IMAGE}\n{question}" if number == 0 else question
                messages += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
            records.append({"id": f"scene_{row:05}", "image": name, "conversations": messages})
        text = ",\n".join(json.dumps(record) for record in records)
        (part / "conversations.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
    return Path(folder)
