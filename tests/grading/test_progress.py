"""Predictions: kept locally, written in one step, revealed honestly."""

import json

import pytest

from vlm_course import progress

OPTIONS = {"a": "the same", "b": "1.5 times"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_COURSE_HOME", str(tmp_path))
    return tmp_path


def test_nothing_is_written_unless_answered(home, capsys):
    progress.predict("p", "How many?", OPTIONS, widget=False)
    progress.reveal("p", "b", because="31 against 21.")
    assert capsys.readouterr().out.splitlines() == [
        "How many?",
        "  a) the same",
        "  b) 1.5 times",
        "The answer is b. 31 against 21.",
        "You made no prediction here.",
    ]
    assert list(home.iterdir()) == []


def test_a_prediction_is_kept_and_compared(home, capsys):
    progress.predict("p", "How many?", OPTIONS, answer="a", confidence=0.9)
    progress.predict("p", "How many?", OPTIONS, answer="b", confidence=0.6)
    progress.reveal("p", "b")
    assert capsys.readouterr().out.splitlines()[-1] == "You predicted b, 60% sure, and so it is."
    progress.predict("p", "How many?", OPTIONS, answer="a", confidence=1.0)
    assert progress.load()["p"].answer == "b", "a revealed prediction must not change"
    assert [p.name for p in home.iterdir()] == ["course-progress.json"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"predictions": {"p": {"answer": 3, "confidence": 2}}}', "\x00"])
def test_a_damaged_file_is_moved_aside(home, capsys, damage):
    (home / "course-progress.json").write_text(damage)
    progress.predict("p", "How many?", OPTIONS, answer="a", confidence=0.9)
    assert "course-progress.damaged.json" in capsys.readouterr().out
    assert (home / "course-progress.damaged.json").read_text() == damage
    assert progress.load()["p"].confidence == 0.9


def test_an_interrupted_write_keeps_the_old_file(home, monkeypatch):
    progress.remember("p", "a", 0.5)
    monkeypatch.setattr(json, "dump", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        progress.remember("q", "a", 0.5)
    assert list(progress.load()) == ["p"]
    assert [p.name for p in home.iterdir()] == ["course-progress.json"]


def test_impossible_predictions_are_refused():
    with pytest.raises(ValueError, match="options are a, b"):
        progress.predict("p", "?", OPTIONS, answer="z")
    with pytest.raises(ValueError, match="from 0 to 1"):
        progress.predict("p", "?", OPTIONS, answer="a", confidence=70)


def test_calibration(capsys):
    assert progress.summary().startswith("No predictions yet")
    assert progress.calibration_plot() is None
    for i in range(4):
        progress.remember(f"p{i}", "a", 0.8)
        progress.reveal(f"p{i}", "a" if i else "b")
    (only,) = progress.calibration()
    assert (only.confidence, only.accuracy, only.count) == (pytest.approx(0.8), 0.75, 4)
    assert "3 of 4 came true (75%); you were 80% sure" in progress.summary()
    import matplotlib

    matplotlib.use("Agg")
    figure = progress.calibration_plot()
    assert figure.axes[0].get_xlabel() == "how sure you were"


def test_the_file_lies_in_the_learners_work(tmp_path, monkeypatch):
    monkeypatch.delenv("VLM_COURSE_HOME")
    (tmp_path / "work").mkdir()
    (tmp_path / "vlm_course").mkdir()
    for folder in (tmp_path, tmp_path / "work"):
        monkeypatch.chdir(folder)
        assert progress.path() == tmp_path / "work" / "course-progress.json"


def test_widget_stores_what_was_clicked(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    progress.predict("p", "How many?", OPTIONS)
    choice, sure, row = shown[0].children
    row.children[0].click()
    assert progress.load() == {}
    choice.value, sure.value = "b) 1.5 times", 0.9
    row.children[0].click()
    assert progress.load()["p"] == progress.Prediction("p", "b", 0.9)
