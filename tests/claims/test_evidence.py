"""Every claim of the lesson has a verdict, a kind of evidence and, wherever it can be computed, a test."""

import pytest

from vlm_course import claims as module
from vlm_course.claims import KINDS, chapters, claims, kinds_by_claim, marks, summary

# Claims that the lesson makes, chapter by chapter: 183.
LESSON = {0: 7, 1: 20, 2: 17, 3: 22, 4: 13, 5: 18, 6: 19, 7: 11, 8: 17, 9: 39}
ENOUGH, MOST_ARITHMETIC = 110, 30


@pytest.mark.parametrize("chapter", chapters())
def test_no_claim_of_the_chapter_is_missing(chapter):
    rows = claims(chapter)
    assert [row.id for row in rows] == [f"{chapter}-{number:02d}" for number in range(1, LESSON[chapter] + 1)]
    assert all(row.claim and row.truth and row.source and row.kind in KINDS for row in rows)


def test_every_mark_names_a_claim_and_says_what_would_make_it_fail():
    known = {row.id for chapter in chapters() for row in claims(chapter)}
    assert sorted({mark.id for mark in marks()} - known) == []
    assert [mark.test for mark in marks() if not mark.reason] == []


def test_enough_claims_are_tested_and_few_by_a_sum_alone():
    kinds = kinds_by_claim(marks())
    if sum(LESSON[chapter] for chapter in chapters()) == sum(LESSON.values()):
        assert len(kinds) >= ENOUGH
    assert sum(found == {"arithmetic"} for found in kinds.values()) <= MOST_ARITHMETIC


def test_the_summary_adds_up():
    header, *lines, last = summary().splitlines()
    assert header.split()[:2] == ["chapter", "rows"]
    columns = [list(map(int, line.split()[1:])) for line in lines]
    assert list(map(int, last.split()[1:])) == [sum(column) for column in zip(*columns, strict=True)]
    assert int(last.split()[1]) == sum(LESSON[chapter] for chapter in chapters())


@pytest.mark.parametrize(
    ("mark", "message"),
    [('"9-01"', "one id and one kind"), ('"9-01", "9-02", kind="model"', "one id"), ('"9-01", kind="luck"', "luck")],
)
def test_a_mark_of_another_form_is_refused(tmp_path, mark, message):
    (tmp_path / "test_x.py").write_text(f"@pytest.mark.claim({mark})\ndef test_x():\n    pass\n")
    with pytest.raises(ValueError, match=message):
        module.marks(tmp_path)
