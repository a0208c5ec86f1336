"""The comparison of stored outputs passes on what the build wrote, and fails where a result has changed."""

import importlib.util
import subprocess
from pathlib import Path

import nbformat

spec = importlib.util.spec_from_file_location("notebook_runner", Path(__file__).parent / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


def compare(home, *notebooks):
    command = run.nbval_command(list(notebooks))
    return subprocess.run(command, env=run.offline_environment(home), capture_output=True, text=True)


def test_both_notebooks_pass_as_they_were_built(built_course, tmp_path):
    chapter = built_course.chapters()[0]
    result = compare(tmp_path, chapter.solved, chapter.student)
    assert result.returncode == 0 and "18 passed" in result.stdout, result.stdout


def test_another_result_fails_and_another_address_does_not(course, tmp_path):
    path = course.chapters()[0].solved
    notebook = nbformat.read(path, as_version=4)
    address = next(cell for cell in notebook.cells if cell.source == "print(object())").outputs[0]
    address.text = address.text.replace("0x0", "0x7f12ab34cd56")
    nbformat.write(notebook, path)
    assert compare(tmp_path, path).returncode == 0
    address.text = address.text.replace("object object", "dict object")
    nbformat.write(notebook, path)
    result = compare(tmp_path, path)
    assert result.returncode == 1 and "1 failed, 8 passed" in result.stdout, result.stdout
