"""What each command hands to its module, and what becomes of the answer: exit codes, messages, choices left open."""

import time
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from vlm_course import build, cli, evaluation, lab, studies
from vlm_course.pretrained import recipe
from vlm_course.studies import common


@pytest.fixture
def calls(monkeypatch):
    """replace(module, name, answer): the function notes its arguments in calls and gives `answer`."""
    noted = []

    def replace(module, name, answer=None):
        def stand_in(*args, **kwargs):
            noted.append((name, args, kwargs))
            return answer(*args, **kwargs) if callable(answer) else answer

        monkeypatch.setattr(module, name, stand_in)

    noted_and_replace = SimpleNamespace(noted=noted, replace=replace)
    return noted_and_replace


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def test_lab_says_what_it_copied_and_ends_with_jupyters_exit_code(calls, tmp_path):
    calls.replace(lab, "course_root", tmp_path)
    calls.replace(lab, "copy_notebooks", lab.Report(copied=["00_two_modalities.ipynb"]))
    calls.replace(lab, "start", 3)
    result = run("lab", "--no-browser", "--port", "9000")
    assert result.exit_code == 3
    assert "copied into work/: 00_two_modalities.ipynb" in result.output
    assert calls.noted[-1] == ("start", (tmp_path,), {"browser": False, "port": 9000})
    run("lab")
    assert calls.noted[-1] == ("start", (tmp_path,), {"browser": None, "port": None})


@pytest.mark.parametrize(
    ("report", "code", "words"),
    [
        (lab.Report(), 0, "up to date"),
        (lab.Report(replaced=["a.ipynb"]), 0, "replaced, since you had not changed them: a.ipynb"),
        (lab.Report(blocked=["a.new.ipynb"]), 1, "rename it"),
    ],
)
def test_update_fails_only_where_a_file_of_the_learner_is_in_the_way(calls, tmp_path, report, code, words):
    calls.replace(lab, "course_root", tmp_path)
    calls.replace(lab, "update_notebooks", report)
    result = run("update")
    assert result.exit_code == code and words in result.output


@pytest.mark.parametrize(
    ("arguments", "chapters", "options"),
    [
        ([], None, {"check": False, "measure": False}),
        (["02", "--check"], ["02"], {"check": True, "measure": False}),
        (["02", "03", "--measure"], ["02", "03"], {"check": False, "measure": True}),
    ],
)
def test_build_takes_chapters_and_ends_with_their_exit_code(calls, arguments, chapters, options):
    calls.replace(build, "main", 1)
    assert run("build", *arguments).exit_code == 1
    assert calls.noted == [("main", (chapters,), options)]


def test_evaluate_hands_on_what_was_asked(calls, tmp_path):
    calls.replace(evaluation, "main")
    file = tmp_path / "table.json"
    assert run("evaluate", "--suite", "easy-vqa", "--json", str(file), "-n", "5", "--tuned").exit_code == 0
    options = {"json_file": file, "n": 5, "device": "cpu", "folder": None, "tuned": True}
    assert calls.noted == [("main", ("easy-vqa",), options)]


@pytest.mark.parametrize("finished", [True, False])
def test_training_that_stopped_in_time_says_how_to_go_on(calls, tmp_path, finished):
    calls.replace(recipe, "train_small", finished)
    result = run("train", "small", "--out", str(tmp_path), "--device", "cpu", "--minutes", "1", "--stage", "align")
    assert result.exit_code == 0
    assert ("goes on from here" in result.output) is not finished
    options = {"device": "cpu", "seed": 0, "stage": "align", "minutes": 1.0, "scale": 1.0}
    assert calls.noted == [("train_small", (tmp_path,), options)]


def test_all_studies_share_the_minutes(calls, tmp_path, monkeypatch):
    """`all` runs them one after the other, each with the time that is left, and stops at the first unfinished one."""
    names = list(studies.STUDIES)
    assert len(names) >= 3
    clock = iter([0.0, 0.0, 60.0, 90.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock, 90.0))
    done = iter([{}, {}, None])
    calls.replace(studies, "study", lambda name: name)
    calls.replace(common, "run_study", lambda *args, **kwargs: next(done))
    result = run("study", "all", "--device", "cpu", "--minutes", "3", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    runs = [(args[0], kwargs["minutes"]) for name, args, kwargs in calls.noted if name == "run_study"]
    assert runs == [(names[0], 3.0), (names[1], 2.0), (names[2], 1.5)]
    assert "goes on from here" in result.output


def test_one_study_without_a_limit(calls, tmp_path):
    calls.replace(studies, "study", lambda name: name)
    calls.replace(common, "run_study", {})
    name = next(iter(studies.STUDIES))
    result = run("study", name, "--seeds", "2", "--scale", "0.01", "--out", str(tmp_path), "--device", "cpu")
    assert result.exit_code == 0 and result.output == ""
    options = {"device": "cpu", "seeds": 2, "out": tmp_path, "minutes": None, "scale": 0.01}
    assert calls.noted[-1] == ("run_study", (name,), options)


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_training_takes_the_fastest_device_there_is(calls, monkeypatch, tmp_path, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    calls.replace(recipe, "train_small", True)
    run("train", "small", "--out", str(tmp_path))
    assert calls.noted[0][2]["device"] == device


def test_an_author_may_ask_where_an_error_came_from(monkeypatch, capsys):
    def broken():
        raise ValueError("3 patches, expected 4")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.delenv("VLM_COURSE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and capsys.readouterr().err == "vlm-course: 3 patches, expected 4\n"
    monkeypatch.setenv("VLM_COURSE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="3 patches"):
        cli.main()
