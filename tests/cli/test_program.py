"""The program's surface: quick help, exit codes, no tracebacks for what a user can cause."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from vlm_course import cli

COMMANDS = ("lab", "update", "doctor", "ask", "trace", "check", "progress", "build", "train", "evaluate", "finetune")


def program(*arguments, cwd=None):
    command = [sys.executable, "-m", "vlm_course", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys, vlm_course.cli as c\n"
        "try: c.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'timm', 'matplotlib', 'numpy', 'PIL', 'jupyterlab'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert all(command in run.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["trace", "llava-9"],
        ["evaluate", "--suite", "imagenet"],
        ["evaluate", "-n", "0"],
        ["lab", "--port", "70000"],
        ["no-such-command"],
        ["train", "large"],
        ["check", "77"],
        ["check", "02", "--exercise", "no_such_exercise"],
        ["check", "02", "--file", "no_such_file.py"],
    ],
)
def test_what_cannot_be_used_is_exit_code_2_without_a_traceback(arguments, tmp_path):
    run = program(*arguments, cwd=tmp_path)
    assert run.returncode == 2, run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    assert (run.stdout + run.stderr).strip()


@pytest.mark.parametrize("model", ["small", "llava-1.5-7b", "llava-1.5-13b"])
def test_trace_lists_the_tensors_of_a_model_that_is_not_allocated(model):
    result = CliRunner().invoke(cli.app, ["trace", model, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)
    assert {"stage", "name", "shape", "dtype", "meaning"} <= set(rows[0])
    bridge = [row["shape"] for row in rows if row["stage"] == "bridge"]
    width = {"small": 256, "llava-1.5-7b": 4096, "llava-1.5-13b": 5120}[model]
    assert bridge[-1][-1] == width
    assert "meaning" in CliRunner().invoke(cli.app, ["trace", model]).output


def test_progress_answers_before_anything_was_answered(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_COURSE_HOME", str(tmp_path))
    run = program("progress", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
