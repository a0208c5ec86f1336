"""What a fine-tuning did, in numbers that can be checked: before and after, controls, speed, memory, dollars.

Everything here is read off what was measured (`engine.Report`, the log, `exams.grade`, `flops.Floors`), and comes out
in the form that `stored.StoredRun` keeps and prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from vlm_course.finetune.checkpoint import read_log
from vlm_course.finetune.engine import Report
from vlm_course.finetune.exams import Exam
from vlm_course.finetune.flops import Floors, step_flops
from vlm_course.finetune.plan import FinetunePlan
from vlm_course.llava import LlavaConfig
from vlm_course.measures import Table
from vlm_course.validation import checks, counts, require_count, require_number

CONTROLS = ("blind", "swapped", "majority")  # columns of `exams.grade` beside "model"


def _check_price(seconds: float, price_per_hour: float) -> None:
    require_number(seconds, "seconds", low=0)
    require_number(price_per_hour, "price_per_hour", low=0)


@checks(_check_price)
def dollars(seconds: float, price_per_hour: float) -> float:
    """What a run costs on a rented machine, whose price in dollars an hour is the caller's to cite."""
    return seconds / 3600 * price_per_hour


def price_notes(price_per_hour: float | None) -> tuple[str, ...]:
    """What a reader must know about a run's dollars; nothing where there are none."""
    if price_per_hour is None:
        return ()
    return (f"dollars at {price_per_hour:g} an hour, which is assumed: put in what your machine costs",)


def learning_parameters(model: nn.Module) -> int:
    """How many numbers of the model learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _check_numbers(report, plan, config, *, learning, tokens, floors=None, price_per_hour=None) -> None:
    require_number(tokens, "tokens", above=0)


@counts(learning=1)
@checks(_check_numbers)
def numbers(
    report: Report,
    plan: FinetunePlan,
    config: LlavaConfig,
    *,
    learning: int,
    tokens: float,
    floors: Floors | None = None,
    price_per_hour: float | None = None,
) -> dict[str, float]:
    """A run's numbers under the names of `stored.UNITS`.

    Args:
        learning: from `learning_parameters`.
        tokens: of a conversation in the mean, visual ones included and padding not: padding is no work done.
        floors: the machine's peak, measured in the same run; without it there is no share of it.
        price_per_hour: of the machine, in dollars; without it there is no cost.
    """
    found = {
        "steps": report.step,
        "batch": plan.batch,
        "parameters that learn": learning,
        "minutes": report.seconds / 60,
        "samples_per_s": report.samples_per_s,
    }
    if report.memory:
        found["memory_gb"] = report.memory / 10**9
    if floors is not None:
        # a mean row need not have a whole number of tokens: a thousand rows' worth, and the towers of a thousand rows
        operations = step_flops(config, plan.mode, 1, round(1000 * tokens), images=1000) / 1000
        found["share_of_peak"] = floors.share(operations * report.samples_per_s, 1.0)
    if price_per_hour is not None:
        found["dollars"] = dollars(report.seconds, price_per_hour)
    return found


def accuracy(before: Table, after: Table, **more: Table) -> dict[str, dict[str, float]]:
    """Tables of `exams.grade` about one exam -> kind -> {"before", "after", blind, swapped, and so on}.

    The controls are those of the trained model. `more` adds models trained as controls, one column each by its name
    (underscores become spaces): random_tower=table.
    Raises ValueError when the tables are about different kinds of question.
    """
    for name, table in {"after": after, **more}.items():
        if table.keys() != before.keys():
            other = sorted(table.keys() ^ before.keys())
            raise ValueError(f"before and {name} differ in {len(other)} kinds of question ({other[0]}): sit one exam")
    rows = {}
    for kind in after:
        rows[kind] = {"before": before[kind]["model"], "after": after[kind]["model"]}
        rows[kind] |= {name: after[kind][name] for name in CONTROLS if name in after[kind]}
        rows[kind] |= {name.replace("_", " "): table[kind]["model"] for name, table in more.items()}
    return rows


def side_by_side(
    exam: Exam, before: Sequence[str], after: Sequence[str], which: Sequence[int] | None = None
) -> tuple[dict[str, str], ...]:
    """Questions with their truth and both models' answers, by default one of every kind.

    Raises ValueError when there are not as many answers as questions.
    """
    if not len(before) == len(after) == len(exam):
        raise ValueError(f"{len(exam)} questions have {len(before)} answers before and {len(after)} after: one each")
    return tuple(
        {"question": exam.question[n], "truth": exam.answer[n], "before": before[n], "after": after[n]}
        for n in (exam.few() if which is None else which)
    )


def losses(*folders: Path | str, most: int = 120) -> tuple[tuple[int, float], ...]:
    """(optimizer step, loss) of the logs of one or several stages, counted on from stage to stage.

    Every point is the mean of the steps that it stands for, so that about `most` points tell the whole curve.
    Raises ValueError when there is no step in any of the logs.
    """
    require_count(most, "most", 2)
    curve, before = [], 0
    for folder in folders:
        lines = read_log(folder)
        curve += [(before + line["step"], line["loss"]) for line in lines]
        before = curve[-1][0] if curve else 0
    if not curve:
        raise ValueError(f"the logs of {len(folders)} folders hold 0 steps: was nothing trained there?")
    size = -(-len(curve) // most)
    parts = [curve[at : at + size] for at in range(0, len(curve), size)]
    return tuple((part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts)
