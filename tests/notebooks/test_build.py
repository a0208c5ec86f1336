"""Building: two notebooks, the same bytes again, and every failure with its cell."""

import json
import re

import nbformat
import pytest

from vlm_course.build import BuildError, build, check, main
from vlm_course.build.course import Course


def build_quietly(course):
    build(course=course, say=lambda line: None)


def read(path):
    return nbformat.read(path, as_version=4)


def test_a_rebuild_gives_the_same_bytes(course):
    chapter = course.chapters()[0]
    before = [path.read_bytes() for path in (chapter.solved, chapter.student)]
    chapter.solved.unlink()
    chapter.student.unlink()
    build_quietly(course)
    assert [path.read_bytes() for path in (chapter.solved, chapter.student)] == before


def test_the_solved_notebook_is_executed_and_says_nothing_of_the_run(built_course):
    notebook = read(built_course.chapters()[0].solved)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert code[0].outputs[0].text.startswith("Measured on"), "the head of the chapter tells what this build measured"
    assert "<object object at 0x0>" in code[-3].outputs[0].text
    assert notebook.metadata.widgets, "the state of the slider belongs in the notebook"
    assert not re.search(r"\d{4}-\d\d-\d\dT", nbformat.writes(notebook))
    nbformat.validate(notebook)


def test_the_student_notebook_has_stubs_no_outputs_and_tagged_checks(built_course):
    notebook = read(built_course.chapters()[0].student)
    text = nbformat.writes(notebook)
    assert not re.search("SOLUTION|HIDDEN|672|image //", text)
    assert text.count("raise NotImplementedError") == 3
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
        is_check = cell.metadata.get("nbgrader", {}).get("grade", False)
        assert ("raises-exception" in cell.metadata.get("tags", [])) == is_check
        if is_check:
            assert cell.metadata.editable is False and cell.metadata.deletable is False


def test_both_notebooks_have_the_same_cell_ids(built_course):
    chapter = built_course.chapters()[0]
    assert [cell.id for cell in read(chapter.solved).cells] == [cell.id for cell in read(chapter.student).cells]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("if count(336) != 576:", "if count(336) == 576:", r"\(check_token_count\): .* stops with AssertionError"),
        ("print(object())", "print(undefined)", r'cell 9 \("print\(undefined\)"\): .* stops with NameError'),
        ("print(object())", "import sys; sys.stderr.write('careful')", r"cell 9 .*: writes to stderr: careful"),
        ("print(object())", "print(grid_side(336, 14))", r"cell 9 .*: only check cells may raise unsolved"),
        (
            "        ### BEGIN SOLUTION\n        self.patch",
            "        self.patch",
            r"\(token_count\): END SOLUTION without",
        ),
        ("verify(grid_side, ((336, 14), 24), ((96, 8), 12))", "pass", r"\(check_grid_side\): the check passes"),
        (
            "count = TokenCount(14)",
            "count = TokenCount.missing if TokenCount(14) else 0",
            r"\(check_token_count\): .* stops with Attr",
        ),
        (
            '# %% exercise="token_count"\n',
            '# %% exercise="token_count"\nside = grid_side(96, 8)\n\n',
            r"\(token_count\): only check cells may raise unsolved",
        ),
        ("print(object())", "import os; os._exit(1)", r"cell 9 .*killed the kernel"),
        ("print(object())", "print(__import__('tempfile').gettempdir() + '/x')", r"cell 9 .*prints the path"),
    ],
)
def test_failures_name_the_cell_and_write_nothing(course, edit, old, new, message):
    chapter = course.chapters()[0]
    before = chapter.solved.read_bytes(), chapter.student.read_bytes()
    edit(old, new)
    with pytest.raises(BuildError, match=message):
        build_quietly(course)
    assert (chapter.solved.read_bytes(), chapter.student.read_bytes()) == before


def test_check_accepts_what_the_build_made(built_course):
    assert check(course=built_course) == []


def test_check_sees_a_changed_source(course, edit):
    edit("print(object())", "print(1)")
    problems = check(course=course)
    assert len(problems) == 2 and all(
        'cell 9 ("print(1)") differs from the source in its source' in problem for problem in problems
    )


@pytest.mark.parametrize("which", ["solved", "student"])
def test_check_sees_an_edited_notebook(course, which):
    path = getattr(course.chapters()[0], which)
    notebook = read(path)
    notebook.cells[3].metadata.nbgrader.points = 1000
    nbformat.write(notebook, path)
    assert any(
        "cell 4 (check_grid_side) differs from the source in its metadata" in problem
        for problem in check(course=course)
    )


def test_check_sees_outputs_in_a_student_notebook(course):
    path = course.chapters()[0].student
    notebook = read(path)
    notebook.cells[1].execution_count = 1
    nbformat.write(notebook, path)
    assert any("not the bytes" in problem for problem in check(course=course))


def test_check_sees_missing_and_orphaned_notebooks(course):
    chapter = course.chapters()[0]
    chapter.student.rename(chapter.student.with_name("91_gone.ipynb"))
    problems = check(course=course)
    assert "notebooks/90_fixture.ipynb: missing; run `vlm-course build 90`" in problems
    assert "notebooks/91_gone.ipynb: no source makes this notebook; delete it" in problems


def test_check_sees_another_measured_cost(course):
    path = course.root / "solutions" / "costs.json"
    costs = json.loads(path.read_text())
    costs["90_fixture"]["seconds"] += 100
    path.write_text(json.dumps(costs))
    assert any("built from another state" in problem for problem in check(course=course))


def test_measuring_again_rewrites_only_what_changed_much(course):
    path = course.root / "solutions" / "costs.json"
    far = {"90_fixture": {"seconds": 1000.0, "peak_mb": 1, "cores": 2}}
    path.write_text(json.dumps(far))
    build_quietly(course)
    assert json.loads(path.read_text()) == far, "an ordinary build measures only what is not measured yet"
    build(course=course, measure=True, say=lambda line: None)
    cost = json.loads(path.read_text())["90_fixture"]
    assert cost["seconds"] < 300 and cost["peak_mb"] > 30
    assert check(course=course) == []


def test_unknown_chapter_is_named(built_course):
    with pytest.raises(BuildError, match="There is no chapter 77"):
        build(["77"], course=built_course)
    assert main(["77"], check=True) == 1


def test_wanted_chapters_by_number_and_slug(tmp_path):
    (tmp_path / "solutions").mkdir()
    for slug in ("02_b", "00_a", "10_c"):
        (tmp_path / "solutions" / f"{slug}.py").touch()
    course = Course(tmp_path)
    assert [chapter.slug for chapter in course.chapters()] == ["00_a", "02_b", "10_c"]
    assert [chapter.slug for chapter in course.chapters(["10", "00_a", "00"])] == ["00_a", "10_c"]
