"""What holds for every chapter of the course, without executing any."""

import re
from statistics import median

import nbformat
import pytest

from vlm_course.build import check
from vlm_course.build.costs import read_costs
from vlm_course.build.course import Course
from vlm_course.build.source import read_source
from vlm_course.build.twins import twin_problems
from vlm_course.grading.registry import exercises

# A decimal number that stands alone: not a version, not part of a name.
DECIMAL = re.compile(r"(?<!arXiv )(?<![\w.])(\d+)\.(\d+)(?:e[+-]?\d+)?(?![\w.]*\w)")
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


@CHAPTERS
def test_cells_are_short(chapter):
    cells = read_source(chapter.source).cells
    lines = [sum(map(bool, map(str.strip, cell.source.splitlines()))) for cell in cells if cell.cell_type == "code"]
    words = [len(cell.source.split()) for cell in cells if cell.cell_type == "markdown"]
    assert median(lines) <= 12
    assert 15 <= median(words) <= 60


HEADING = re.compile(
    r"^### (.+?) {1,2}· {1,2}(easy|medium|hard) {1,2}· {1,2}about (\d+) minutes {1,2}· {1,2}(\d+) points?", re.MULTILINE
)
HINT = re.compile(r"<details><summary>Hint (\d)</summary>(.+?)</details>", re.DOTALL)


@CHAPTERS
def test_every_exercise_is_announced_with_three_hints(chapter):
    """Title, difficulty, minutes and points as its grader has them; the hints stand in the notebook alone."""
    written, text = {e.name: e for e in exercises().values() if e.chapter == chapter.slug[:2]}, ""
    for cell in read_source(chapter.source).cells:
        name = cell.metadata.get("vlm_course", {}).get("exercise")
        if cell.cell_type == "markdown":
            text += cell.source + "\n"
        elif name in written:
            item, (*_, said) = written.pop(name), HEADING.finditer(text)
            assert said.groups()[1:] == (item.difficulty, str(item.minutes), str(item.points)), name
            hints = HINT.findall(text[said.end() :])
            assert [number for number, _ in hints] == ["1", "2", "3"], name
            assert len({hint for _, hint in hints}) == 3, name
            text = ""
    assert not written


def long_decimals(text: str) -> list[str]:
    """The numbers with a decimal point that show more than four significant digits."""
    found = DECIMAL.finditer(text)
    return [match.group() for match in found if len((match.group(1) + match.group(2)).lstrip("0")) > 4]


def test_significant_digits_are_counted():
    text = "0.00123 12.34 99.9% torch 2.14.1 x1.23456 576.0 1.234e-05 v0.12345"
    assert long_decimals(text) == []
    assert long_decimals("0.12345, 123.45 (1.2345e-05) 1024.0.") == ["0.12345", "123.45", "1.2345e-05", "1024.0"]


@CHAPTERS
def test_printed_numbers_are_the_same_on_other_processors(chapter):
    found = []
    for cell in nbformat.read(chapter.solved, as_version=4).cells:
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            continue
        for output in cell.get("outputs", []):
            found += long_decimals(output.get("text", "") + output.get("data", {}).get("text/plain", ""))
    assert found == [], "print at most four significant digits: more differ from one machine to another"
