"""Runs of chapter 10 on a GPU, kept with machine and date, so that a reader without one sees what it did.

A run is written by the same code that shows it (`keep`, at the end of the chapter when it runs on a GPU); nothing in
these files is typed by hand. Where there is none, the chapter says so in words.

    python -m vlm_course.finetune.stored FILE      keeps the numbers of `python -m benchmarks.finetune all --json FILE`
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch

from ..validation import require_number, require_one_of

FOLDER = Path(__file__).with_name("stored_runs")
PATHS = {
    1: "a LLaVA-1.5 checkpoint on a GPU",
    2: "SmolLM2-135M learns to see, on a GPU",
    3: "two steps of the small model on a CPU",
}
# What a run may say of itself: the unit, and how many digits are shown.
UNITS = {
    "steps": "optimizer steps",
    "batch": "conversations a step",
    "parameters that learn": "",
    "minutes": "minutes",
    "samples_per_s": "conversations a second",
    "share_of_peak": "of the matrix peak",
    "memory_gb": "GB of GPU memory",
    "dollars": "dollars",
}


def machine() -> str:
    """The device that torch uses here, in words: name, number and memory of its GPUs, or the CPU and its threads."""
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        return f"a CPU, {threads} thread{'s' * (threads > 1)}"
    count, properties = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
    gigabytes = properties.total_memory / 2**30
    return (
        f"{count} x {properties.name}, {gigabytes:.0f} GiB" if count > 1 else f"{properties.name}, {gigabytes:.0f} GiB"
    )


@dataclass(frozen=True)
class StoredRun:
    """What one run of the chapter found.

    Attributes:
        path: which of the three (`PATHS`).
        model, work: what was tuned, and how, each in one line.
        numbers: measured, with names of `UNITS`.
        losses: (optimizer step, mean loss of the answer tokens in nats).
        accuracy: kind of question -> {"before", "after", and the controls by name}: shares of exact answers.
        answers: a few questions with "question", "truth", "before" and "after".
        notes: what a reader must know to read the numbers, such as that the weights were random.
        controls: losses like `losses`, of models trained as controls, by name.
        machine, date, software: where and when; filled in by itself.
    """

    path: int
    model: str
    work: str
    numbers: dict[str, float]
    losses: tuple[tuple[int, float], ...] = ()
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    controls: dict[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    machine: str = field(default_factory=machine)
    date: str = field(default_factory=lambda: date.today().isoformat())
    software: str = field(default_factory=lambda: f"torch {torch.__version__.partition('+')[0]}")

    def __post_init__(self) -> None:
        require_one_of(self.path, "path", tuple(PATHS))
        for name, value in self.numbers.items():
            require_one_of(name, "a number's name", tuple(UNITS))
            require_number(value, name)
        for curve in (self.losses, *self.controls.values()):
            for step, loss in curve:
                require_number(loss, f"the loss of step {step}")
        for kind, row in self.accuracy.items():
            for name, share in row.items():
                if not 0 <= share <= 1:
                    raise ValueError(f"{kind}, {name} is {share}, expected a share from 0 to 1")

    @property
    def title(self) -> str:
        """Where the numbers come from, in one line."""
        return f"Stored run on {self.machine}, {self.date}, {self.software}: {self.model}; {self.work}."

    def numbers_table(self) -> str:
        """One line for each number, in the order of `UNITS`."""
        return "\n".join(
            f"{_shown(name, self.numbers[name]):>12s} {unit or name}"
            for name, unit in UNITS.items()
            if name in self.numbers
        )

    def accuracy_table(self) -> str:
        """Kinds of question as rows; before, after and the controls as columns."""
        columns = list(dict.fromkeys(name for row in self.accuracy.values() for name in row))
        lines = [f"{'exact answers':16s}" + "".join(f"{name:>15s}" for name in columns)]
        for kind, row in self.accuracy.items():
            cells = "".join(f"{row[name]:15.3f}" if name in row else f"{'':15s}" for name in columns)
            lines.append(f"{kind:16s}{cells}".rstrip())
        return "\n".join(lines)

    def answers_text(self) -> str:
        """Question, truth, and the answers before and after, three lines each."""
        return "\n".join(
            f"{one['question']}  (true: {one['truth']})\n  before  {one['before']}\n  after   {one['after']}"
            for one in self.answers
        )


def _shown(name: str, value: float) -> str:
    if name == "share_of_peak":
        return f"{100 * value:.0f} %"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"


def _file(path: int, folder: Path, variant: str) -> Path:
    require_one_of(path, "path", tuple(PATHS))
    return folder / (f"path{path}-{variant}.json" if variant else f"path{path}.json")


def keep(run: StoredRun, folder: Path | str = FOLDER, *, variant: str = "") -> Path:
    """Write a run in place of the one before of its path and variant, atomically; returns the file."""
    file = _file(run.path, Path(folder), variant)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(asdict(run), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, file)
    return file


def stored_run(path: int, folder: Path | str = FOLDER, *, variant: str = "") -> StoredRun | None:
    """The kept run of a path (and of a variant of it), None where there is none.

    Raises:
        ValueError: the file is none of these, or it holds what a run cannot have.
    """
    file = _file(path, Path(folder), variant)
    if not file.is_file():
        return None
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        fields["losses"] = _curve(fields["losses"])
        fields["controls"] = {name: _curve(points) for name, points in fields.get("controls", {}).items()}
        fields |= {name: tuple(fields[name]) for name in ("answers", "notes")}
        run = StoredRun(**fields)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file.name} is no stored run ({error}): keep it again with stored.keep") from error
    if run.path != path:
        raise ValueError(f"{file.name} holds a run of path {run.path}, expected {path}: was it renamed?")
    return run


def _curve(points: list) -> tuple[tuple[int, float], ...]:
    return tuple((int(step), float(loss)) for step, loss in points)


def missing(folder: Path | str = FOLDER) -> list[int]:
    """The paths that need a GPU and of which no run is kept."""
    return [path for path in (1, 2) if stored_run(path, folder) is None]


def not_yet(path: int) -> str:
    """What the chapter says where a run is missing."""
    return f"Path {path}, {PATHS[path]}: not run yet for this book. No number is shown for it."


# What a trick is measured by: a row of benchmarks.finetune, and the variants with and without it.
TRICKS = {
    "layers compiled": ("small", "ours", "ours, not compiled"),
    "head and last block only where an answer is learned, 7B": ("projector", "ours, 8 rows", "ours, every position"),
    "the same, 222M": ("small", "ours", "ours, every position"),
    "conversations packed into rows": ("packed", "ours, packed", "ours, grouped and padded"),
    "the engine's choice of attention in place of flash attention": ("full", "ours", "ours, flash attention"),
    "8 blocks computed again, for their memory": ("full", "ours, 8 blocks again", "ours"),
}


def keep_speed(source: Path | str, folder: Path | str = FOLDER) -> Path:
    """Keep what `benchmarks.finetune` measured, without its profiles and without what failed; returns the file.

    Raises:
        ValueError: the file is none of that program's, or no row of it was measured on a GPU.
    """
    try:
        table = json.loads(Path(source).read_text(encoding="utf-8"))
        rows = {
            name: {
                "machine": row["machine"],
                "variants": {
                    key: {k: v for k, v in found.items() if k != "profile"}
                    for key, found in row["variants"].items()
                    if not {"failed", "skipped"} & set(found)
                },
            }
            for name, row in table.items()
            if "variants" in row
        }
        measured = [row["machine"]["gpu"] for row in rows.values()]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{Path(source).name} is not from benchmarks.finetune ({error}): run that with --json"
        ) from error
    if not measured:
        raise ValueError(
            f"{Path(source).name} has 0 measured rows, expected at least 1: run it on a machine with a GPU"
        )
    file = Path(folder) / "speed.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, file)
    return file


def _speed_table(folder: Path | str) -> dict:
    file = Path(folder) / "speed.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


PEER = "transformers"  # variants whose names begin so are what a user would run without the engine

# What a row of benchmarks.finetune is judged by: its name in words, the measure that ranks its variants (the least is
# best, or the most), its unit, and the measure that says how far it is from what the machine could do.
ROWS = {
    "decode": ("a token of a 7B model, batch 1", "decode_ms", min, "ms", "of_floor", "times the floor of memory"),
    "prefill": ("image and 50 words into a 7B model", "prefill_ms", min, "ms", "of_peak", "of the matrix peak"),
    "projector": ("bridge of a 7B model", "samples_per_s", max, "samples/s", "of_peak", "of the matrix peak"),
    "lora": ("LoRA of rank 128, 7B", "samples_per_s", max, "samples/s", "of_peak", "of the matrix peak"),
    "full": ("the whole 7B decoder", "samples_per_s", max, "samples/s", "of_peak", "of the matrix peak"),
    "small": ("222M parameters", "samples_per_s", max, "samples/s", "of_peak", "of the matrix peak"),
}


def row_lines(folder: Path | str = FOLDER) -> list[str]:
    """Each row with its machine and date: our best variant, and the best of a user's usual program in the same run.

    A row that was not measured says so.
    """
    table, lines = _speed_table(folder), []
    for row, (what, measure, best, unit, share, of) in ROWS.items():
        variants = table.get(row, {}).get("variants", {}).items()
        theirs = [v[measure] for name, v in variants if name.startswith(PEER) and measure in v]
        ours = [v for name, v in variants if not name.startswith(PEER) and measure in v and share in v]
        if not ours:
            lines.append(f"{row}, {what}: not run yet")
            continue
        found, machine = best(ours, key=lambda v: v[measure]), table[row]["machine"]
        line = f"{row}, {what}: {_three(found[measure])} {unit}, {found[share]:.2f} {of}"
        if theirs:
            ratio = best(theirs) / found[measure] if best is min else found[measure] / best(theirs)
            line += f"; {PEER} {_three(best(theirs))} {unit}, so ours is {ratio:.2f} times as fast"
        lines.append(f"{line} ({machine['gpu']}, torch {machine['torch'].partition('+')[0]}, {machine['date']})")
    return lines


def _three(value: float) -> str:
    """Three digits, and whole numbers from a hundred on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def speed_lines(folder: Path | str = FOLDER) -> list[str]:
    """What each trick buys, a line each, from the kept measurements; a trick that was not measured says so."""
    table, lines = _speed_table(folder), []
    for trick, (row, with_it, without) in TRICKS.items():
        variants = table.get(row, {}).get("variants", {})
        rates = [variants.get(name, {}).get("samples_per_s") for name in (with_it, without)]
        if None in rates:
            lines.append(f"{trick}: not run yet")
            continue
        machine, (fast, plain) = table[row]["machine"], rates
        where = f"{machine['gpu']}, {machine['date']}"
        rates = f"{_three(fast)} against {_three(plain)} samples/s"
        lines.append(f"{trick}: {fast / plain:.2f} times ({rates}; {where})")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give one file: that of `python -m benchmarks.finetune all --json FILE`")
    try:
        print(keep_speed(sys.argv[1]))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
