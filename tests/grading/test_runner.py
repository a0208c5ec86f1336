"""Answers in a process of their own: what they may do to it, and what the learner reads then."""

import json

import pytest

from vlm_course.grading.runner import check_file

RIGHT = "def projection_parameters(vision_dim, llm_dim):\n    return llm_dim * (vision_dim + llm_dim + 2)\n"
BODY = "def projection_parameters(vision_dim, llm_dim):\n    {}\n    return llm_dim * (vision_dim + llm_dim + 2)\n"


def run(tmp_path, text, exercise="projection_parameters", name="answer.py", **limits):
    file = tmp_path / name
    file.write_text(text)
    return check_file("02", exercise, file, **limits)


def notebook(*cells):
    return json.dumps({"cells": [{"cell_type": "code", "source": cell} for cell in cells], "nbformat": 4})


def test_right_wrong_and_open(tmp_path):
    wrong = "def projection_share(vision_dim, llm_dim, llm_parameters):\n    return 100\n"
    report = run(tmp_path, RIGHT + wrong + 'q_2_1 = "c"\n', None)
    assert report.exit_code == 1
    assert report.lines[-1] == "4 of 22 points"
    marks = {result.exercise: (result.verdict.passed, result.verdict.attempted) for result in report.results}
    assert marks["projection_parameters"] == (True, True)
    assert marks["projection_share"] == (False, True)
    assert marks["vision_projection"] == (False, False)
    assert all(len(line.splitlines()) == 1 for line in report.lines)


def test_exit_code_0(tmp_path):
    assert run(tmp_path, RIGHT).exit_code == 0


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("while True: pass", "stopped after 3 seconds"),
        ("import os; os._exit(0)", "ended the whole process (exit code 0)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        ("while True: print('x' * 100_000)", "stopped after printing 10 MB"),
        ("x = bytearray(40 << 30)", "more memory than this check allows"),
    ],
)
def test_hostile_answers_are_one_sentence(tmp_path, statement, says):
    report = run(tmp_path, BODY.format(statement), time_limit=3 if "while True: pass" in statement else 30)
    assert report.exit_code == 1
    assert says in report.results[0].verdict.says
    assert "\n" not in report.results[0].verdict.says


def test_errors_are_one_sentence_and_leave_the_process_alone(tmp_path):
    """Five answers, one process."""
    statements = {
        "projection_parameters(a, b)": "import sys; sys.exit()",
        "projection_share(a, b, c)": "return 1 / 0",
        "bridge_flops(a, b, c, d)": "raise KeyError('a')",
        "resampler_parameters(a, b, c, d, e, f)": "return object()",
        "build_projection_13b()": "return 5",
    }
    text = "".join(f"def {signature}:\n    {statement}\n" for signature, statement in statements.items())
    says = {result.exercise: result.verdict.says for result in run(tmp_path, text, None).results}
    assert "calls sys.exit()" in says["projection_parameters"]
    assert says["projection_share"] == "It stops with ZeroDivisionError: division by zero (line 4: return 1 / 0)."
    assert "stops with KeyError" in says["bridge_flops"]
    assert "yours is an object of the class object" in says["resampler_parameters"]
    assert "it makes an object of the class int" in says["vision_projection_13b"]


def test_prints_and_wrong_output_do_not_disturb(tmp_path):
    noisy = BODY.format("import os; print('noise'); os.write(1, b'noise'); os.write(2, b'noise')")
    assert run(tmp_path, noisy).exit_code == 0


def test_only_what_an_answer_needs_is_run(tmp_path):
    cells = [
        "import math\nSPARE = 2",
        "for vision_dim in range(3):\n    projection_parameters(vision_dim, 1)",
        "%matplotlib inline\n!rm nothing",
        "raise RuntimeError('a cell that trains for an hour')",
        "def helper(n):\n    return n + SPARE",
        "def projection_parameters(vision_dim, llm_dim):\n    return llm_dim * helper(vision_dim + llm_dim)",
        "this is not python",
        "projection_parameters = None",
    ]
    assert run(tmp_path, notebook(*cells), name="02_x.ipynb").exit_code == 0


def test_modules_cross_the_process_border(tmp_path):
    text = (
        "from torch import nn\n"
        "class VisionProjection(nn.Module):\n"
        "    def __init__(self, a, b):\n"
        "        super().__init__()\n"
        "        self.mlp = nn.Sequential(nn.Linear(a, b), nn.{}(), nn.Linear(b, b))\n"
        "    def forward(self, x):\n"
        "        return self.mlp(x)\n"
    )
    assert run(tmp_path, text.format("GELU"), "VisionProjection").exit_code == 0
    report = run(tmp_path, text.format("ReLU"), "VisionProjection")
    assert report.results[0].verdict.mistake == "ReLU"
    imported = run(tmp_path, "from vlm_course.bridges import VisionProjection\n", "VisionProjection")
    assert "package's own" in imported.results[0].verdict.says


def test_lists_cross_the_process_border_as_lists(tmp_path):
    text = (
        "import torch\n"
        "def select_features(states, layer, strategy):\n"
        "    layers = layer if isinstance(layer, list) else [layer]\n"
        "    features = torch.cat([states[i] for i in layers], dim=-1)\n"
        '    return features[:, 1:] if strategy == "default" else features\n'
    )
    (tmp_path / "answer.py").write_text(text)
    assert check_file("01", "select_features", tmp_path / "answer.py").exit_code == 0


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "", "neither a notebook"),
        ("a.ipynb", "{", "not a notebook"),
        ("a.ipynb", "[1]", "not a notebook"),
    ],
)
def test_unusable_files(tmp_path, name, text, says):
    report = run(tmp_path, text, name=name)
    assert report.exit_code == 2
    assert says in str(report)


def test_wrong_requests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no file" in str(check_file("02", file=tmp_path / "none.py"))
    assert "vlm-course lab" in str(check_file("02"))
    assert "no exercise 'x'" in str(check_file("02", "x"))
    assert check_file("77").exit_code == 2


def test_broken_syntax_is_located(tmp_path):
    report = run(tmp_path, "def projection_parameters(v, d):\n    return (v\n")
    assert "is not Python" in str(report) and report.exit_code == 1


def test_the_learners_notebook_is_found(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    (work / "02_projection_bridge.ipynb").write_text(notebook(RIGHT))
    for folder in (tmp_path, work):
        monkeypatch.chdir(folder)
        assert check_file("2", "projection_parameters").exit_code == 0


@pytest.mark.parametrize("chapter", ["00", "02"])
def test_the_courses_own_solutions_get_full_marks(chapter):
    from pathlib import Path

    (source,) = (Path(__file__).parents[2] / "solutions").glob(f"{chapter}_*.py")
    report = check_file(chapter, file=source, seeds=(2,), time_limit=60)
    assert report.exit_code == 0, str(report)
