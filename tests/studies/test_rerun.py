"""The button that trains a study again moves its bar, says what it did, and says why it stopped."""

import pytest

from vlm_course import studies
from vlm_course.studies import rerun as module
from vlm_course.studies.common import Study


@pytest.fixture
def button(monkeypatch, tmp_path):
    def train(variant, lab):
        if variant == "broken":
            raise ValueError("the paint was dry")
        lab.progress(0.5)
        return {"score": 1.0}, None

    plans = {name: Study(name, "?", {name: "one"}, train) for name in ("fine", "broken")}
    monkeypatch.setattr(module, "study", plans.__getitem__)
    return lambda name: module.rerun(name, out=tmp_path, device="cpu")


def test_a_click_trains_and_reports(button):
    widget = button("fine")
    widget.button.click()
    widget.wait()
    assert widget.bar.value == 1.0
    assert "Done. REHEARSAL" in widget.says.value
    assert "vlm-course study fine" in widget._repr_mimebundle_()["text/plain"]


def test_a_failure_is_shown(button):
    widget = button("broken")
    widget.start()
    widget.wait()
    assert "Stopped: the paint was dry" in widget.says.value


def test_every_study_has_a_button():
    for name in studies.STUDIES:
        assert module.rerun(name).study.name == name
