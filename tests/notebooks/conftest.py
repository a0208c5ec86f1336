"""A course of one small chapter, built once, for the tests of the build."""

import shutil
from pathlib import Path

import pytest

from vlm_course.build import build
from vlm_course.build.course import Course

FIXTURES = Path(__file__).parent / "fixtures"
SLUG = "90_fixture"


@pytest.fixture(scope="session")
def built_course(tmp_path_factory) -> Course:
    """Do not change it; `course` is a copy for that."""
    root = tmp_path_factory.mktemp("course")
    shutil.copytree(FIXTURES, root, dirs_exist_ok=True)
    course = Course(root)
    build(course=course, say=lambda line: None)
    return course


@pytest.fixture
def course(built_course, tmp_path) -> Course:
    """A built course that a test may break."""
    shutil.copytree(built_course.root, tmp_path / "course")
    return Course(tmp_path / "course")


@pytest.fixture
def edit(course):
    """Replace text in the source of the small chapter; fails where the text is not there."""

    def replace(old: str, new: str) -> None:
        path = course.chapters()[0].source
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1
        path.write_text(text.replace(old, new), encoding="utf-8")

    return replace
