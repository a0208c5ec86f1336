"""Real nbgrader: what it releases is the student notebook, and each exercise is worth its own points and no others."""

import copy
import importlib.util
from pathlib import Path

import pytest

from vlm_course.build.course import Chapter, Course
from vlm_course.build.source import checked_exercise, read_source
from vlm_course.build.student import RAISES, make_student

HERE = Path(__file__).parent


def load(name: str):
    """A module beside this file, whatever folder pytest runs in."""
    spec = importlib.util.spec_from_file_location(f"notebooks_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


classroom, run = load("classroom"), load("run")
CHAPTERS = [Chapter("90_fixture", HERE / "fixtures"), *Course().chapters()]


def points_by_exercise(notebook) -> dict[str, dict[str, int]]:
    """Points of each check cell, by exercise."""
    points: dict[str, dict[str, int]] = {}
    for cell in notebook.cells:
        if checked_exercise(cell):
            graded = cell.metadata.nbgrader
            points.setdefault(checked_exercise(cell), {})[graded.grade_id] = graded.points
    return points


def without_tags(notebook):
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if tag != RAISES]
        cell.metadata.pop("tags", None)
        if tags:
            cell.metadata["tags"] = tags
    return [(cell.id, cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.slug)
def test_each_exercise_gets_its_own_points(chapter, tmp_path):
    solved = read_source(chapter.source)
    student = make_student(solved, chapter.slug)
    room = classroom.Classroom(tmp_path / "class", chapter.slug, run.offline_environment(tmp_path))
    release = room.generate(solved)
    assert without_tags(release) == without_tags(student), "nbgrader would release another notebook than the build made"

    points = points_by_exercise(solved)
    room.submit("solved", classroom.solve(student, solved, points))
    room.submit("unsolved", classroom.solve(student, solved, [], keep_ordinary_cells=False))
    for exercise in points:
        only = classroom.solve(student, solved, [exercise], keep_ordinary_cells=False)
        room.submit(f"only_{exercise}", only)

    nothing = {grade_id: 0 for worth in points.values() for grade_id in worth}
    everything = {grade_id: worth for checks in points.values() for grade_id, worth in checks.items()}
    expected = {"solved": everything, "unsolved": nothing}
    expected |= {f"only_{exercise}": nothing | worth for exercise, worth in points.items()}
    assert room.autograde() == expected
