"""`make test-oldest`: the pins of its environment, every declared dependency at the lower bound of its range.

    python tests/oldest.py > constraints of the oldest environment

What these bring is pinned as in constraints.txt, but for what torch decides itself. Standard library only: it runs in
an environment that is still empty.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_TO_TORCH = re.compile(r"triton|setuptools|nvidia-.*|cuda-.*")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lower_bounds(project: dict) -> dict[str, str]:
    """Lower bound by canonical name, of the dependencies and of every extra of pyproject.toml's `project`.

    Raises:
        ValueError: a dependency has no lower bound, or two of them.
    """
    bounds: dict[str, str] = {}
    for text in sum(project.get("optional-dependencies", {}).values(), project["dependencies"]):
        match = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", text)
        if match is None:
            raise ValueError(f"{text!r} starts no range: write NAME>=VERSION, the oldest release that was tested.")
        name, bound = canonical(match[1]), match[2]
        if bounds.setdefault(name, bound) != bound:
            raise ValueError(f"{name} starts at {bounds[name]} and at {bound}: write the same bound in every extra.")
    return bounds


def oldest_pins(project: dict, constraints: str) -> list[str]:
    """Lines of a constraints file: the lower bounds, then the lines of `constraints` about anything else."""
    bounds = lower_bounds(project)
    rest = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    kept = [line for line in rest if not decided_elsewhere(canonical(line.split("==")[0]), bounds)]
    return [f"{name}=={bound}" for name, bound in sorted(bounds.items())] + kept


def decided_elsewhere(name: str, bounds: dict[str, str]) -> bool:
    return name in bounds or LEFT_TO_TORCH.fullmatch(name) is not None


if __name__ == "__main__":
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print("\n".join(oldest_pins(declared, (ROOT / "constraints.txt").read_text(encoding="utf-8"))))
