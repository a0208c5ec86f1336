"""What real GPUs take for LLaVA-1.5, measured and stored with machine and date, beside the lesson's timing table.

The lower bounds of `budget.py` say what no program can beat; the measurements say what programs reach.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Measured:
    """One time on a real machine, in milliseconds; `low` and `high` are the range over machines, equal for one."""

    stage: str  # "vision tower", "bridge", "prefill" or "decode"
    model: str  # "7B" or "13B"
    settings: str
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Stored:
    """All stored times and where they come from."""

    machine: str
    date: str
    source: str
    conditions: str
    rows: tuple[Measured, ...]

    def find(self, stage: str, model: str, settings: str = "plain script") -> Measured | None:
        """The row for a stage of a model, None where nothing was measured."""
        wanted = stage, model, settings
        return next((row for row in self.rows if (row.stage, row.model, row.settings) == wanted), None)


@cache
def stored() -> Stored:
    """The measurements that come with the course."""
    record = json.loads(files("vlm_course").joinpath("gpu_times.json").read_text(encoding="utf-8"))
    rows = tuple(Measured(**row) for row in record.pop("rows"))
    return Stored(rows=rows, **record)


# The lesson's table for LLaVA with Vicuna-13B, 626 tokens in and 100 out, in milliseconds. It names no machine.
LESSON = {"preprocessing": 5.0, "vision tower": 15.0, "bridge": 0.1, "prefill": 30.0, "decode": 20.0}


def pass_floor_ms(weights: int, tokens: int, peak_flops: float, bandwidth: float) -> float:
    """No pass of `tokens` tokens through `weights` 16-bit weights can be faster: milliseconds.

    Every weight is multiplied and added once for each token, and read from memory once; the slower of the two counts.
    peak_flops in operations/s, bandwidth in bytes/s. Source: the roofline model (Williams et al. 2009).
    """
    arithmetic = 2 * weights * tokens / peak_flops
    traffic = 2 * weights / bandwidth
    return 1000 * max(arithmetic, traffic)
