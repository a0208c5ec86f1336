"""Stored runs: what is kept comes back, what cannot be is refused, and what is missing is said."""

import json

import pytest

from vlm_course.finetune.stored import FOLDER, PATHS, StoredRun, keep, machine, missing, not_yet, stored_run

RUN = StoredRun(
    path=2,
    model="SmolLM2-135M behind the course's tower",
    work="LoRA of rank 8, 10 steps of 4",
    numbers={"steps": 10, "samples_per_s": 12.345, "share_of_peak": 0.654, "memory_gb": 3.25},
    losses=((1, 5.5), (10, 0.25)),
    accuracy={"colour": {"before": 0.0, "after": 0.75, "blind": 0.25}, "shape": {"after": 1.0, "majority": 0.5}},
    answers=({"question": "what colour?", "truth": "red", "before": "I see.", "after": "red"},),
    notes=("random weights",),
)


def test_a_kept_run_comes_back(tmp_path):
    file = keep(RUN, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file.name] == ["path2.json"]
    assert stored_run(2, tmp_path) == RUN and stored_run(1, tmp_path) is None
    assert missing(tmp_path) == [1]
    assert RUN.machine == machine() and RUN.machine in RUN.title and RUN.date in RUN.title


def test_tables():
    assert RUN.numbers_table().splitlines() == [
        "          10 optimizer steps",
        "        12.3 conversations a second",
        "        65 % of the matrix peak",
        "        3.25 GB of GPU memory",
    ]
    head, colour, shape = RUN.accuracy_table().splitlines()
    assert head.split() == ["exact", "answers", "before", "after", "blind", "majority"]
    assert colour.split() == ["colour", "0.000", "0.750", "0.250"]
    assert shape.split() == ["shape", "1.000", "0.500"] and shape.index("1.000") == colour.index("0.750")
    assert RUN.answers_text().splitlines() == ["what colour?  (true: red)", "  before  I see.", "  after   red"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": 4}, "path is 4"),
        ({"numbers": {"speed": 1.0}}, "'speed'"),
        ({"numbers": {"steps": float("nan")}}, "steps is nan"),
        ({"losses": ((3, float("inf")),)}, "the loss of step 3 is inf"),
        ({"accuracy": {"colour": {"after": 75.0}}}, "colour, after is 75.0"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError) as error:
        StoredRun(**({"path": 1, "model": "m", "work": "w", "numbers": {}} | changes))
    assert words in str(error.value)


def test_a_spoilt_file_is_named(tmp_path):
    file = keep(RUN, tmp_path)
    for text in ("{", "{}", json.dumps(json.loads(file.read_text()) | {"more": 1})):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"path2\.json is no stored run"):
            stored_run(2, tmp_path)
    keep(RUN, tmp_path).rename(tmp_path / "path1.json")
    with pytest.raises(ValueError, match="a run of path 2, expected 1"):
        stored_run(1, tmp_path)


def test_what_ships_is_from_a_gpu():
    """Nothing typed by hand can be told from nothing measured, but a CPU's run is no GPU's."""
    assert {file.name for file in FOLDER.glob("*.json")} <= {"path1.json", "path2.json"}
    for path in (1, 2):
        run = stored_run(path)
        if run is None:
            assert "not run yet" in not_yet(path) and PATHS[path] in not_yet(path)
        else:
            assert "CPU" not in run.machine and run.numbers["samples_per_s"] > 0
