"""Every exercise and check question, by name.

Whoever asks for one by its name imports the graders of its chapter alone: a chapter does not depend on the others'.
"""

import functools
import importlib
from pathlib import Path

from vlm_course.grading.exercise import Exercise
from vlm_course.grading.index import homes
from vlm_course.grading.quiz import Question

_FOLDER = Path(__file__).parent


@functools.cache
def exercises() -> dict[str, Exercise]:
    """All exercises, chapter by chapter, in the order in which the chapter has them."""
    return {item.name: item for chapter in _chapters() for item in chapter.EXERCISES}


@functools.cache
def questions() -> dict[str, Question]:
    """All check questions, chapter by chapter."""
    return {item.name: item for chapter in _chapters() for item in chapter.QUESTIONS}


def _chapters() -> list:
    return [_chapter(folder.name) for folder in sorted(_FOLDER.glob("chapter*")) if (folder / "__init__.py").is_file()]


def _chapter(home: str):
    return importlib.import_module(f"vlm_course.grading.{home}")


@functools.cache
def _homes() -> dict[str, str]:
    return homes(_FOLDER)


def _of_its_chapter(name: str, kind: str) -> Exercise | Question | None:
    """The item of the list `kind` (EXERCISES or QUESTIONS) called `name`, else the one defined under that name."""
    if name not in _homes():
        return None
    items = getattr(_chapter(_homes()[name]), kind)
    called = [item for item in items if item.name == name]
    return next(iter(called or [item for item in items if getattr(item, "attribute", None) == name]), None)


def exercise(name: str) -> Exercise:
    """The exercise called `name`, or the one whose answer is defined under that name. Else ValueError."""
    item = _of_its_chapter(name, "EXERCISES")
    if item is None:
        raise ValueError(f"There is no exercise {name!r}. Known: {', '.join(exercises())}.")
    return item


def question(name: str) -> Question:
    """The check question called `name`. Else ValueError."""
    item = _of_its_chapter(name, "QUESTIONS")
    if item is None:
        raise ValueError(f"There is no question {name!r}. Known: {', '.join(questions())}.")
    return item


def find(name: str) -> Exercise | Question:
    """The check question called `name`, or else the exercise as `exercise` finds it. Else ValueError."""
    return _of_its_chapter(name, "QUESTIONS") or exercise(name)


def twin(item: Exercise):
    """The package's own definition of what the exercise asks for."""
    module, attribute = item.twin.split(":")
    return getattr(importlib.import_module(module), attribute)
