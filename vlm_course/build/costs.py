"""What a chapter costs to run, measured by the build and kept in `solutions/costs.json`.

An entry changes only when it is missing or when the build is told to measure, and then only if the new figures differ
by more than 30 %: otherwise no two builds would give the same notebook.
"""

import json
from math import floor, log10
from pathlib import Path

from vlm_course.build.course import REPOSITORY

TOLERANCE = 1.3


def measured(slug: str, *, path: Path = REPOSITORY / "solutions" / "costs.json") -> str:
    """One sentence for the head of a chapter: run time and memory as they were measured, rounded."""
    cost = read_costs(path).get(slug)
    if cost is None:
        return "The run time of this chapter is not measured yet."
    cores = "1 core" if cost["cores"] == 1 else f"{cost['cores']} cores"
    gigabytes = max(0.1, round(cost["peak_mb"] / 1000, 1))
    return f"Measured on {cores}: about {_coarse(cost['seconds'])} s and {gigabytes:g} GB of memory."


def read_costs(path: Path) -> dict[str, dict]:
    """The entries by slug: seconds, peak_mb (resident, kernel with its children), cores."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def renewed(old: dict | None, seconds: float, peak_mb: float, cores: int) -> dict:
    """The old entry unless the new figures are far from it."""
    if old and old["cores"] == cores and _near(old["seconds"], seconds) and _near(old["peak_mb"], peak_mb):
        return old
    return {"seconds": round(seconds, 1), "peak_mb": round(peak_mb), "cores": cores}


def write_costs(path: Path, costs: dict[str, dict]) -> None:
    """Write the entries, sorted, so that a change is one line of a diff."""
    lines = [f"  {json.dumps(slug)}: {json.dumps(costs[slug])}" for slug in sorted(costs)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _near(a: float, b: float) -> bool:
    return max(a, b) <= TOLERANCE * min(a, b)


def _coarse(seconds: float) -> int:
    """Two significant digits, the second 0 or 5."""
    step = 5 * 10 ** (floor(log10(max(seconds, 10))) - 1)
    return max(step, step * round(seconds / step))
