"""`import vlm_course` is cheap: what a script pays for it beyond torch, and what it does not pull in."""

import statistics
import subprocess
import sys

import pytest

HEAVY = {"transformers", "timm", "matplotlib", "torchvision", "jupytext", "nbformat", "IPython"}


def seconds(statement):
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return float(run.stdout)


@pytest.mark.serial
def test_import_costs_at_most_0_3_s_more_than_torch():
    seconds("import torch, vlm_course")  # fills the disk cache and writes the bytecode
    pairs = [(seconds("import torch"), seconds("import torch, vlm_course")) for _ in range(3)]
    extra = statistics.median(both for _, both in pairs) - statistics.median(torch for torch, _ in pairs)
    print(f"import vlm_course: {extra:+.3f} s beyond torch")
    assert extra <= 0.3


def imported(statement):
    code = f"{statement}; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(run.stdout.split())


def test_import_pulls_in_nothing_heavy():
    assert not HEAVY & imported("import vlm_course")


def test_the_model_needs_torch_alone():
    modules = ("llava", "generation", "bridges", "contrastive", "images", "tokenizer", "grading")
    assert not HEAVY & imported("import " + ", ".join(f"vlm_course.{module}" for module in modules))
