"""Are two trainings from one seed the same weights, bit for bit? python -m benchmarks.repeat_training

Both run at the same time, in processes and with compiler caches of their own, for a share of the recipe's steps; then
every tensor of every stage's checkpoint is compared.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vlm_course.pretrained.recipe import STAGES

TRAIN = "import sys; from vlm_course.pretrained.recipe import train_small as t; t(sys.argv[1], **eval(sys.argv[2]))"


def differing(one: Path, other: Path) -> dict[str, tuple[int, int]]:
    """Stage -> how many of its tensors are not the same bits in the two folders, and how many there are.

    Raises FileNotFoundError when a stage's checkpoint is missing.
    """
    found = {}
    for stage in STAGES:
        states = [torch.load(folder / f"{stage.name}.pt", map_location="cpu")["model"] for folder in (one, other)]
        first, second = states
        if first.keys() != second.keys():
            raise ValueError(
                f"{stage.name} has {len(first)} and {len(second)} tensors: were both trained by one recipe?"
            )
        apart = sum(not torch.equal(first[name], second[name]) for name in first)
        found[stage.name] = apart, len(first)
    return found


def train(folder: Path, options: dict) -> subprocess.Popen:
    """A training in a process of its own, which compiles everything for itself."""
    caches = {name: str(folder / name.lower()) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    command = [sys.executable, "-c", TRAIN, str(folder), repr(options)]
    return subprocess.Popen(command, env=os.environ | caches, stdout=subprocess.DEVNULL)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when all is equal, 1 when not, 2 when a training failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repeat_training", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=0.006, help="share of the recipe's steps")
    parser.add_argument("--batch", type=int, default=None, help="images a step; by default the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    where = torch.cuda.get_device_name() if options["device"] == "cuda" else "CPU"
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("one", "other")]
        codes = [process.wait() for process in [train(folder, options) for folder in folders]]  # side by side
        if any(codes):
            print("a training failed; its error stands above")
            return 2
        found = differing(*folders)
    for stage, (apart, tensors) in found.items():
        print(f"{stage:<12} {apart:>3} of {tensors} tensors differ   ({where}, torch {torch.__version__})")
    return int(any(apart for apart, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
