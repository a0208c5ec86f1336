"""A later chapter takes the reader's own part where it is right, and the package's where it is not."""

import json

import pytest

from vlm_course.bridges import VisionProjection
from vlm_course.grading.earlier import earlier

RIGHT = """
from torch import nn
print("not shown")
class VisionProjection(nn.Module):
    def __init__(self, vision_dim, llm_dim):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(vision_dim, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))
    def forward(self, x):
        return self.layers(x)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(source):
        (tmp_path / "work").mkdir(exist_ok=True)
        cells = [{"cell_type": "code", "source": source, "metadata": {}, "outputs": []}]
        (tmp_path / "work" / "02_projection_bridge.ipynb").write_text(json.dumps({"cells": cells}))

    return write


def test_ones_own_part_is_taken_and_said_to_be(work, capsys):
    work(RIGHT)
    found = earlier("VisionProjection")
    assert found is not VisionProjection and hasattr(found(3, 4), "layers")
    assert capsys.readouterr().out == "VisionProjection: yours, from 02_projection_bridge.ipynb.\n"


@pytest.mark.parametrize(
    "source",
    [
        RIGHT.replace("GELU", "ReLU"),
        RIGHT.replace("self.layers(x)", "undefined(x)"),
        "class VisionProjection:\n    def __init__(self, *a): raise NotImplementedError",
        "x = (",
        "",
        None,
        "from vlm_course.bridges import VisionProjection",
    ],
)
def test_a_wrong_or_missing_one_is_replaced_by_the_packages(work, capsys, source):
    if source is not None:
        work(source)
    assert earlier("vision_projection") is VisionProjection
    assert "the package's, until yours passes its check in chapter 2" in capsys.readouterr().out


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match="no exercise 'wings'"):
        earlier("wings")
