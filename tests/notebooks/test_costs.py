"""Measured costs change only when they really changed."""

import json

import pytest

from vlm_course.build.costs import measured, read_costs, renewed, write_costs

OLD = {"seconds": 20.0, "peak_mb": 1000, "cores": 2}


@pytest.mark.parametrize(
    ("seconds", "peak_mb", "kept"),
    [(25.9, 1000, True), (15.5, 780, True), (26.1, 1000, False), (20, 1301, False), (15, 1000, False)],
)
def test_an_entry_stays_within_thirty_per_cent(seconds, peak_mb, kept):
    assert (renewed(OLD, seconds, peak_mb, 2) == OLD) == kept


def test_another_number_of_cores_is_another_measurement():
    assert renewed(OLD, 20.0, 1000, 1) == OLD | {"cores": 1}
    assert renewed(None, 12.345, 678.9, 2) == {"seconds": 12.3, "peak_mb": 679, "cores": 2}


def test_the_sentence_is_rounded(tmp_path):
    path = tmp_path / "costs.json"
    write_costs(path, {"02_b": OLD | {"seconds": 23.4, "peak_mb": 1234}, "00_a": OLD | {"seconds": 134}})
    assert measured("02_b", path=path) == "Measured on 2 cores: about 25 s and 1.2 GB of memory."
    assert measured("00_a", path=path) == "Measured on 2 cores: about 150 s and 1 GB of memory."
    assert measured("01_c", path=path) == "The run time of this chapter is not measured yet."
    assert list(json.loads(path.read_text())) == ["00_a", "02_b"] and read_costs(path)["00_a"]["seconds"] == 134
