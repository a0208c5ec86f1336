"""Every item of the lesson is counted, and a chapter that is declared finished leaves none out."""

import json
from pathlib import Path

from vlm_course.build.course import Course
from vlm_course.build.coverage import coverage_problems, coverage_table, covered_items
from vlm_course.build.source import parse_source, read_source

ITEMS = json.loads((Path(__file__).parents[1] / "lesson_items.json").read_text(encoding="utf-8"))
SOURCE = '# %% [markdown] covers=["0-idea-1", "0-idea-2"]\n# Text\n\n# %% covers=["0-idea-1"]\n1\n'


def test_items_are_well_formed():
    assert len({item["id"] for item in ITEMS}) == len(ITEMS) == 108
    assert {item["chapter"] for item in ITEMS} == set(range(10))


def test_the_course_covers_what_it_declares_finished(capsys):
    covered = covered_items({chapter.slug: read_source(chapter.source) for chapter in Course().chapters()})
    with capsys.disabled():
        print("\n" + coverage_table(ITEMS, covered))
    assert coverage_problems(ITEMS, covered) == []


def test_cells_that_cover_an_item_are_listed():
    covered = covered_items({"00_x": parse_source(SOURCE, "00_x")})
    assert covered["0-idea-1"] == ['00_x, cell 1 ("Text")', '00_x, cell 2 ("1")']
    assert set(covered) == {"0-idea-1", "0-idea-2"}


def test_unknown_ids_and_gaps_of_finished_chapters_are_problems():
    covered = {"0-idea-1": ["a"], "9-dream-1": ["b"]}
    unknown = "b: the lesson has no item 9-dream-1"
    assert coverage_problems(ITEMS, covered, finished=()) == [unknown]
    found = coverage_problems(ITEMS, covered, finished=("00",))
    assert len(found) == sum(item["chapter"] == 0 for item in ITEMS) - 1 + 1
    assert (
        "chapter 00 is declared finished, but no cell covers 0-idea-2 (VLM = vision encoder + language model + bridge)"
        in found
    )


def test_the_table_counts_by_chapter():
    table = coverage_table(ITEMS, {"0-idea-1": ["a"]})
    assert "chapter 00: 1 of 6 items covered" in table and "all chapters: 1 of 108" in table
    assert "    uncovered 0-idea-2:" in table and "uncovered 0-idea-1" not in table
