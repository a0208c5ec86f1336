"""What holds for every chapter of the course, without executing any."""

import nbformat
import pytest

from vlm_course.build import check
from vlm_course.build.costs import read_costs
from vlm_course.build.course import Course
from vlm_course.build.source import read_source
from vlm_course.build.twins import twin_problems

CHAPTERS = pytest.mark.parametrize("chapter", Course().chapters(), ids=lambda chapter: chapter.slug)


def test_the_committed_notebooks_belong_to_their_sources():
    assert check() == []


@CHAPTERS
def test_what_the_learner_writes_is_the_packages_own(chapter):
    assert twin_problems(read_source(chapter.source), chapter.slug) == []


@CHAPTERS
def test_at_most_one_code_cell_in_ten_escapes_comparison(chapter):
    code = [cell for cell in read_source(chapter.source).cells if cell.cell_type == "code"]
    ignored = [cell for cell in code if "nbval-ignore-output" in cell.metadata.get("tags", [])]
    assert 10 * len(ignored) <= len(code)


@CHAPTERS
def test_a_chapter_runs_in_half_a_minute_and_two_and_a_half_gigabytes(chapter):
    cost = read_costs(chapter.source.parent / "costs.json")[chapter.slug]
    assert cost["seconds"] <= 30 and cost["peak_mb"] <= 2500


@CHAPTERS
def test_run_all_stops_only_at_checks(chapter):
    for cell in nbformat.read(chapter.student, as_version=4).cells:
        tagged = "raises-exception" in cell.metadata.get("tags", [])
        assert tagged == bool(cell.metadata.get("nbgrader", {}).get("grade"))
