"""A fine-tuning that a laptop can do: the shipped model learns to say that a thing is not there.

Asked for the colour of an absent shape it names some colour (chapter 5): in its training a question about a colour
always had an object to be about. The data here are records in the published format, half of the questions about
shapes that the scene does not hold, and the exam asks the same of scenes that were never shown.

    python -m vlm_course.finetune.absent --steps 40      trains on this machine and keeps the run (path 3)
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from ..tokenizer import WordTokenizer
from ..validation import counts
from ..worlds.dialogs import Dialogs
from ..worlds.scenes import COLOURS, SHAPES, Scenes, render, sample
from .exams import Exam, grade, scene_exam, together
from .stored import FOLDER, StoredRun, keep

PRESENT, ABSENT = "shape that is there", "shape that is not"
KEPT = ("count", "existence", "relation")  # what the model knew before and should not forget
MIXED = ("count", "existence", "size")  # asked among the new questions when they are mixed; "relation" stays out
_TEST_SEED = 9_000_001  # training seeds are small


def questions(scenes: Scenes, row: int, generator: torch.Generator, each: int) -> list[tuple[str, str, str]]:
    """Up to `each` questions of both kinds about one scene, in random order: (kind, question, answer).

    Shapes that occur twice are not asked for, since they may have two colours.
    """
    here = scenes.present[row]
    shapes, colours = scenes.shape[row][here].tolist(), scenes.colour[row][here].tolist()
    once = [(shape, colour) for shape, colour in zip(shapes, colours, strict=True) if Counter(shapes)[shape] == 1]
    away = [number for number in range(len(SHAPES)) if number not in shapes]
    pick = lambda items: [items[k] for k in torch.randperm(len(items), generator=generator)[:each].tolist()]  # noqa: E731
    asked = [(PRESENT, SHAPES[shape], COLOURS[colour]) for shape, colour in pick(once)]
    asked += [(ABSENT, SHAPES[shape], f"there is no {SHAPES[shape]}") for shape in pick(away)]
    order = torch.randperm(len(asked), generator=generator).tolist()
    return [(kind, f"what color is the {shape}?", answer) for kind, shape, answer in (asked[k] for k in order)]


@counts(scenes=1, each=1, seed=0)
def write_records(folder: Path | str, scenes: int, *, each: int = 2, seed: int = 0, mixed: bool = False) -> Path:
    """Draw scenes and write them as PNG files and a `train.json` beside them; returns the JSON's path.

    `mixed` adds a question of each kind of `MIXED`, behind the new ones.
    """
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = sample(scenes, generator=generator)
    words = WordTokenizer.small()
    known = [Dialogs(words).ask(drawn, kind, generator=generator) for kind in MIXED] if mixed else []
    records = []
    for row, pixels in enumerate(render(drawn, generator=generator)):
        name = f"scene{row}.png"
        Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(folder / name)
        turns: list[dict[str, str]] = []
        asked = [(question, answer) for _, question, answer in questions(drawn, row, generator, each)]
        asked += [(words.decode(k.question[row]), words.decode(k.answer[row])) for k in known if k.valid[row]]
        for question, answer in asked:
            turns.append({"from": "human", "value": question if turns else f"<image>\n{question}"})
            turns.append({"from": "gpt", "value": answer})
        records.append({"id": f"scene{row}", "image": name, "conversations": turns})
    path = folder / "train.json"
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


@counts(scenes=2, kept=0)
def exam(scenes: int, *, kept: int = 0) -> Exam:
    """One question of each kind about fresh scenes; `kept` > 1 adds as many scenes with questions it knew before."""
    generator = torch.Generator().manual_seed(_TEST_SEED)
    drawn = sample(scenes, generator=generator)
    asked = [(row, *one) for row in range(scenes) for one in questions(drawn, row, generator, 1)]
    row, kind, question, answer = zip(*asked, strict=True)
    new = Exam(render(drawn, generator=generator), row, kind, question, answer, torch.full((len(asked), 4), torch.nan))
    return together(new, scene_exam(kept, kinds=KEPT)) if kept else new


def run(steps: int, *, batch: int = 8, scenes: int = 2000, asked: int = 60, mixed: bool = False) -> StoredRun:
    """Train for `steps` and report: what `vlm_course.finetune.stored` keeps."""
    from ..pretrained import load_small
    from .checkpoint import read_log
    from .collate import Collator
    from .data import read_records
    from .engine import Trainer
    from .loader import Loader
    from .plan import FinetunePlan
    from .tokenizers import for_small

    small, words, test = load_small(), for_small(), exam(asked, kept=max(2, asked // 2))
    model = copy.deepcopy(small.model)
    plan = FinetunePlan(mode="lora", steps=steps, batch=batch, lora_rank=8, lr=3e-3, bridge_lr=3e-4)
    with tempfile.TemporaryDirectory() as folder:
        data = read_records(write_records(Path(folder) / "data", scenes, mixed=mixed))
        trainer = Trainer(model, plan, Loader(data, Collator(words, model.config), batch), Path(folder) / "run")
        report = trainer.run()
        losses = tuple((line["step"], round(line["loss"], 4)) for line in read_log(Path(folder) / "run"))
    before, said = grade(small.model, words, test, controls=False)
    after, says = grade(model, words, test)
    table = {
        kind: {"before": before[kind]["model"], "after": row["model"]}
        | {name: row[name] for name in ("blind", "swapped", "majority") if name in row}
        for kind, row in after.items()
    }
    shown = [n for n in range(len(test)) if test.kind[n] in (PRESENT, ABSENT)][:8]
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return StoredRun(
        path=3,
        model="the shipped small model",
        work=f"LoRA of rank {plan.lora_rank} and the bridge, {report.step} steps of {batch} conversations"
        + (", old questions among the new" if mixed else ", new questions only"),
        numbers={
            "steps": report.step,
            "batch": batch,
            "parameters that learn": learning,
            "minutes": report.seconds / 60,
            "samples_per_s": report.samples_per_s,
        },
        losses=losses,
        accuracy=table,
        answers=tuple(
            {"question": test.question[n], "truth": test.answer[n], "before": said[n], "after": says[n]} for n in shown
        ),
        notes=(f"{asked} fresh scenes for the new questions, {max(2, asked // 2)} for those it knew before",),
    )


def main(arguments: list[str] | None = None) -> int:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m vlm_course.finetune.absent", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--mixed", action="store_true", help="with questions among the new ones that it knew before")
    parser.add_argument("--folder", type=Path, default=None, help="where the run is kept; by default in the package")
    chosen = parser.parse_args(arguments)
    found = run(chosen.steps, mixed=chosen.mixed)
    file = keep(found, chosen.folder or FOLDER, variant="mixed" if chosen.mixed else "")
    print(
        "\n\n".join(
            [found.title, found.numbers_table(), found.accuracy_table(), found.answers_text(), f"kept in {file.name}"]
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
