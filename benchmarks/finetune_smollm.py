"""python -m benchmarks.finetune_smollm --json FILE: on one GPU, SmolLM2-135M learns to see, with every control.

One command: floors of the machine, the exam before, both stages of path 2, the exam after (with black and swapped
images), the same training behind a tower with random weights, a checkpoint that transformers loads with equal logits.
The number of steps follows from `--minutes`, by the speed of a few steps measured first; the second training takes as
many as the first. All of it is written to one JSON, whose "stored" part is what `vlm_course.finetune.stored` keeps.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from vlm_course.convert.llava import load_llava
from vlm_course.finetune import exams, path_two, published, report, smollm
from vlm_course.finetune.engine import Trainer
from vlm_course.finetune.flops import Floors, measure_floors
from vlm_course.finetune.path_two import ALIGN, INSTRUCT, Stages, on_cpu
from vlm_course.finetune.recipes import shown
from vlm_course.finetune.stored import StoredRun, keep
from vlm_course.finetune.tokenizers import TokenizerAdapter, for_smollm
from vlm_course.llava import Llava
from vlm_course.pretrained import load_small

OTHER_WORK = 150.0  # seconds beside both trainings: loading, compiling, five exams, saving
LEAST, MOST = 100, 4000  # steps of the second stage


@dataclass(frozen=True)
class Setting:
    """What a run is asked to do, by the options of the command line."""

    minutes: float
    batch: int
    micro_batch: int | None
    scenes: int
    easy_vqa: int
    steps: int | None
    align_steps: int
    lr: float
    price: float | None
    seed: int
    device: str


def fresh(folder: Path, *, trained_tower: bool, seed: int, device: str) -> Llava:
    """SmolLM2 behind a tower, with the same first bridge whatever the tower."""
    torch.manual_seed(seed)
    small = load_small(device)
    model = smollm.smollm_llava(small, folder=folder)
    if not trained_tower:
        model.vision = path_two.random_tower(model.vision, seed=seed)
    return model


def plans(setting: Setting) -> tuple:
    """Both stages' plans, but for the steps of the second."""
    options = {"batch": setting.batch, "micro_batch": setting.micro_batch}
    both = replace(ALIGN, steps=setting.align_steps, **options), replace(INSTRUCT, lr=setting.lr, **options)
    return both if setting.device == "cuda" else tuple(map(on_cpu, both))


def affordable_steps(setting: Setting, folder: Path, adapter: TokenizerAdapter, began: float) -> tuple[int, float]:
    """How many steps of the second stage fit into the minutes twice, and the samples a second that say so."""
    align, instruct = plans(setting)
    trial = replace(instruct, steps=24 if setting.device == "cuda" else 3, log_every=8)
    model = fresh(folder, trained_tower=True, seed=setting.seed, device=setting.device)
    with tempfile.TemporaryDirectory() as scratch:
        batches = path_two.data(model, adapter, align, trial, seed=setting.seed, device=setting.device)[1]
        speed = Trainer(model, trial, batches, scratch, device=setting.device, log=lambda _: None).run().samples_per_s
    left = 60 * setting.minutes - OTHER_WORK - (time.monotonic() - began)
    aligned = 2 * setting.align_steps * setting.batch / (3 * speed)  # shorter rows, and nothing of the decoder learns
    return max(LEAST, min(MOST, int((left / 2 - aligned) * speed / setting.batch))), speed


def check_saved(model: Llava, adapter: TokenizerAdapter, exam: exams.Exam, folder: Path) -> dict[str, float]:
    """Save in the published layout, load with transformers and with our own loader, compare logits in float32."""
    from transformers import LlavaForConditionalGeneration

    began = time.monotonic()
    model = copy.deepcopy(model).float().cpu()
    published.save_published(model, folder, adapter=adapter)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_llava(folder)
    ids = torch.tensor([adapter.encode_chat([(exam.question[0], exam.answer[0])], model.config.visual_tokens)[0]])
    pixels = exam.pixels[exam.image[0]][None].float().cpu()
    with torch.no_grad():
        want = model(ids, pixels)
        given = theirs(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
        again = ours(ids, pixels)
    return {
        "largest logit": want.abs().max().item(),
        "largest difference, transformers": (want - given).abs().max().item(),
        "largest difference, loaded back": (want - again).abs().max().item(),
        "gigabytes": sum(file.stat().st_size for file in folder.iterdir()) / 10**9,
        "seconds": time.monotonic() - began,
    }


def saved_note(saved: dict[str, float]) -> str:
    """What `check_saved` found, in a sentence."""
    return (
        f"saved in the published layout; transformers' logits differ by at most "
        f"{saved['largest difference, transformers']:.0e}, the largest being {saved['largest logit']:.0f}"
    )


def train(model, adapter, folder: Path, steps: int, setting: Setting) -> Stages:
    """Both stages, with `steps` in the second."""
    align, instruct = plans(setting)
    options = {"seed": setting.seed, "device": setting.device}
    return path_two.learn_to_see(
        model, adapter, folder, align=align, instruct=replace(instruct, steps=steps), **options
    )


def run(setting: Setting, *, cache: Path | None = None, keep_part: Callable[[dict], None] = lambda part: None) -> dict:
    """Everything that the module's docstring says; `cache` is a folder that `smollm.cached` made.

    keep_part: is given what is known so far after each training, so that a run that is cut off was not for nothing.
    """
    began = time.monotonic()
    clock = lambda: time.monotonic() - began  # noqa: E731
    cuda = setting.device == "cuda"
    size = {} if cuda else {"size": 256, "elements": 1 << 20, "dtype": torch.float32}
    floors: Floors = measure_floors(setting.device, **size)
    folder = smollm.cached() if cache is None else cache
    adapter = for_smollm(folder)
    exam = exams.together(
        exams.scene_exam(setting.scenes, device=setting.device),
        exams.easy_vqa_exam(limit=setting.easy_vqa, device=setting.device),
    )
    print(f"{clock():5.0f} s  {floors.name}: {floors.flops / 1e12:.0f} TFLOP/s; {len(exam)} questions", flush=True)
    steps, speed = setting.steps, None
    if steps is None:
        steps, speed = affordable_steps(setting, folder, adapter, began)
        print(f"{clock():5.0f} s  {speed:,.0f} samples/s in a trial: {steps} steps", flush=True)

    tables, given, stages = {}, {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        model = fresh(folder, trained_tower=True, seed=setting.seed, device=setting.device)
        tables["before"], given["before"] = exams.grade(model, adapter, exam, controls=False)
        print(f"{clock():5.0f} s  before: {tables['before']['all']['model']:.3f}", flush=True)
        stages["trained"] = train(model, adapter, Path(scratch) / "trained", steps, setting)
        learning = report.learning_parameters(model)
        tables["after"], given["after"] = exams.grade(model, adapter, exam)
        print(f"{clock():5.0f} s  after: {tables['after']['all']}", flush=True)
        saved = check_saved(model, adapter, exam, Path(scratch) / "published")
        print(f"{clock():5.0f} s  saved and loaded by transformers: {saved}", flush=True)
        curves = {"trained": report.losses(*stages["trained"].folders)}
        reports = {"trained": [asdict(part) for part in stages["trained"].reports]}
        keep_part({"part": "without the random tower", "tables": tables, "curves": curves, "saved": saved} | reports)
        config = model.config
        del model
        other = fresh(folder, trained_tower=False, seed=setting.seed, device=setting.device)
        stages["random"] = train(other, adapter, Path(scratch) / "random", steps, setting)
        tables["random tower"], given["random tower"] = exams.grade(other, adapter, exam)
        curves["random tower"] = report.losses(*stages["random"].folders)
        print(f"{clock():5.0f} s  random tower: {tables['random tower']['all']}", flush=True)

    done = stages["trained"]
    tokens = shown(done.batches[1], steps=2).filled * done.batches[1].length
    numbers = report.numbers(
        done.reports[1], done.plans[1], config, learning=learning, tokens=tokens, floors=floors,
        price_per_hour=setting.price,
    )  # fmt: skip
    numbers["minutes"] = done.seconds / 60
    if setting.price is not None:
        numbers["dollars"] = report.dollars(done.seconds, setting.price)
    work = f"the bridge, {done.plans[0].steps} steps, then all but the tower, {steps} steps of {setting.batch} images"
    stored = StoredRun(
        path=2,
        model="SmolLM2-135M-Instruct behind the course's tower",
        work=work,
        numbers=numbers,
        losses=curves["trained"],
        accuracy=report.accuracy(tables["before"], tables["after"], random_tower=tables["random tower"]),
        answers=report.side_by_side(exam, given["before"], given["after"]),
        notes=(
            "speed, memory and share of the peak are those of the second stage, minutes and dollars those of both",
            "random tower: the same training, seed and steps behind a tower that was never trained",
            f"{tokens:.0f} tokens a conversation are no padding; the share of the peak counts these alone",
            saved_note(saved),
            *report.price_notes(setting.price),
        ),
        controls={"random tower": curves["random tower"]},
    )
    return {
        "stored": asdict(stored),
        "setting": asdict(setting),
        "plans": [asdict(plan) for plan in done.plans],
        "trial samples_per_s": speed,
        "floors": asdict(floors),
        "tables": tables,
        "curves": curves,
        "saved": saved,
        "reports": {name: [asdict(part) for part in one.reports] for name, one in stages.items()},
        "seconds": clock(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune_smollm", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--keep", action="store_true", help="keep it for the book, too (vlm_course.finetune.stored)")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything; decides the number of steps")
    parser.add_argument("--steps", type=int, help="of the second stage, instead of what the minutes allow")
    parser.add_argument("--align-steps", type=int, default=ALIGN.steps)
    parser.add_argument("--batch", type=int, default=INSTRUCT.batch)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--lr", type=float, default=INSTRUCT.lr, help="of the language model")
    parser.add_argument("--scenes", type=int, default=200, help="of the exam, ten questions each")
    parser.add_argument("--easy-vqa", type=int, default=1000, help="questions of its test split")
    parser.add_argument("--price", type=float, help="dollars an hour of this machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's file, where its package is not installed")
    given = vars(parser.parse_args())
    out, kept, gguf = given.pop("json"), given.pop("keep"), given.pop("gguf")
    cache = smollm.cached(gguf) if gguf else None
    if given["device"] == "cuda":
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64  # five trainings compile the same functions, each for itself
    out.parent.mkdir(parents=True, exist_ok=True)

    def write(found: dict) -> None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    result = run(Setting(**given), cache=cache, keep_part=write)
    write(result)
    stored = StoredRun(**result["stored"])
    print(stored.title, stored.numbers_table(), stored.accuracy_table(), stored.answers_text(), sep="\n\n")
    if kept:
        print(f"kept as {keep(stored).name}")


if __name__ == "__main__":
    main()
