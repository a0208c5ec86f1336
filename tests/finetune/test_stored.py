"""Stored runs: what is kept comes back, what cannot be is refused, and what is missing is said."""

import json
from pathlib import Path

import pytest

from vlm_course.finetune.stored import (
    FOLDER,
    PATHS,
    ROWS,
    TRICKS,
    StoredRun,
    keep,
    keep_speed,
    machine,
    missing,
    not_yet,
    row_lines,
    speed_lines,
    stored_run,
)

RUN = StoredRun(
    path=2,
    model="SmolLM2-135M behind the course's tower",
    work="LoRA of rank 8, 10 steps of 4",
    numbers={"steps": 10, "samples_per_s": 12.345, "share_of_peak": 0.654, "memory_gb": 3.25},
    losses=((1, 5.5), (10, 0.25)),
    accuracy={"colour": {"before": 0.0, "after": 0.75, "blind": 0.25}, "shape": {"after": 1.0, "majority": 0.5}},
    answers=({"question": "what colour?", "truth": "red", "before": "I see.", "after": "red"},),
    notes=("random weights",),
    controls={"random tower": ((1, 6.5), (10, 1.25))},
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
    assert {file.name for file in FOLDER.glob("*.json")} <= {
        f"{n}.json" for n in ("path1", "path2", "path3", "path3-mixed", "speed")
    }
    for path in (1, 2):
        run = stored_run(path)
        if run is None:
            assert "not run yet" in not_yet(path) and PATHS[path] in not_yet(path)
        else:
            assert "CPU" not in run.machine and run.numbers["samples_per_s"] > 0


def test_speed_is_kept_without_profiles_and_what_is_missing_is_said(tmp_path):
    assert all(line.endswith("not run yet") for line in speed_lines(tmp_path)) and len(speed_lines(tmp_path)) == len(
        TRICKS
    )
    machine_ = {"gpu": "a GPU", "date": "2026-01-02"}
    rows = {
        "small": {
            "machine": machine_,
            "variants": {
                "ours": {"samples_per_s": 300.0, "profile": [["kernel", 1.0, 2]]},
                "ours, not compiled": {"samples_per_s": 200.0},
                "ours, every position": {"failed": "OutOfMemoryError"},
            },
        },
        "two-gpus": {"skipped": "1 GPU"},
    }
    (tmp_path / "all.json").write_text(json.dumps(rows))
    file = keep_speed(tmp_path / "all.json", tmp_path)
    assert "profile" not in file.read_text()
    lines = speed_lines(tmp_path)
    assert lines[0] == "layers compiled: 1.50 times (300 against 200 samples/s; a GPU, 2026-01-02)"
    assert sum(line.endswith("not run yet") for line in lines) == len(TRICKS) - 1
    assert "OutOfMemoryError" not in file.read_text()


def test_the_best_variant_of_a_row_is_said_with_its_machine(tmp_path):
    machine_ = {"gpu": "a GPU", "torch": "2.11.0+cu130", "date": "2026-01-02"}
    decode = {"slow": {"decode_ms": 9.0, "of_floor": 2.0}, "fast": {"decode_ms": 5.04, "of_floor": 1.128}, "parts": {}}
    decode |= {"transformers, tuned": {"decode_ms": 10.08, "of_floor": 2.3}, "transformers, plain": {"decode_ms": 30.0}}
    lora = {"8 rows": {"samples_per_s": 22.0, "of_peak": 0.63}, "16 rows": {"samples_per_s": 23.6, "of_peak": 0.66}}
    rows = {"decode": {"machine": machine_, "variants": decode}, "lora": {"machine": machine_, "variants": lora}}
    (tmp_path / "all.json").write_text(json.dumps(rows))
    keep_speed(tmp_path / "all.json", tmp_path)
    lines = {line.partition(",")[0]: line for line in row_lines(tmp_path)}
    told = ": 5.04 ms, 1.13 times the floor of memory; transformers 10.1 ms, so ours is 2.00 times as fast"
    assert lines["decode"].endswith(f"{told} (a GPU, torch 2.11.0, 2026-01-02)")
    assert "23.6 samples/s, 0.66 of the matrix peak" in lines["lora"]
    assert sorted(lines) == sorted(ROWS) and lines["full"].endswith("not run yet")


@pytest.mark.parametrize(
    ("text", "words"), [("[", "not from"), ('{"a": {"variants": 3}}', "not from"), ("{}", "0 measured")]
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        keep_speed(tmp_path / "x.json", tmp_path)
    assert not (tmp_path / "speed.json").exists()


def test_every_trick_is_a_variant_of_the_benchmark():
    """Where the repository is there: a variant that was renamed would silently never be measured."""
    folder = Path(__file__).parents[2] / "benchmarks"
    for row, *variants in TRICKS.values():
        body = (folder / f"finetune_{'packed' if row == 'packed' else 'training'}.py").read_text(encoding="utf-8")
        if row != "packed":
            body = body[body.index(f"\ndef {row}(") :]
            body = body[: body.index("\n\n\n")]
        assert all(f'"{variant}"' in body for variant in variants), (row, variants)
