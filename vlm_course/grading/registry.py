"""Every exercise and check question, by name. Chapters are imported when they are first asked for."""

import functools
import importlib
import pkgutil

from vlm_course import grading
from vlm_course.grading.exercise import Exercise
from vlm_course.grading.quiz import Question


@functools.cache
def exercises() -> dict[str, Exercise]:
    """All exercises, chapter by chapter, in the order in which the chapter has them."""
    return {item.name: item for chapter in _chapters() for item in chapter.EXERCISES}


@functools.cache
def questions() -> dict[str, Question]:
    """All check questions, chapter by chapter."""
    return {item.name: item for chapter in _chapters() for item in chapter.QUESTIONS}


def _chapters() -> list:
    names = sorted(info.name for info in pkgutil.iter_modules(grading.__path__) if info.name.startswith("chapter"))
    return [importlib.import_module(f"{grading.__name__}.{name}") for name in names]


def exercise(name: str) -> Exercise:
    """The exercise called `name`, or the one whose answer is defined under that name. Else ValueError."""
    known = exercises()
    if name in known:
        return known[name]
    by_attribute = {item.attribute: item for item in known.values()}
    if name in by_attribute:
        return by_attribute[name]
    raise ValueError(f"There is no exercise {name!r}. Known: {', '.join(known)}.")


def question(name: str) -> Question:
    """The check question called `name`. Else ValueError."""
    known = questions()
    if name not in known:
        raise ValueError(f"There is no question {name!r}. Known: {', '.join(known)}.")
    return known[name]


def twin(item: Exercise):
    """The package's own definition of what the exercise asks for."""
    module, attribute = item.twin.split(":")
    return getattr(importlib.import_module(module), attribute)
