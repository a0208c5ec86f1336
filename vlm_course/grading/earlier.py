"""Parts that the reader wrote in an earlier chapter, for a chapter that puts them together."""

import contextlib
import io
from pathlib import Path

from vlm_course.grading import registry
from vlm_course.grading.answers import Failure, LocalAnswer
from vlm_course.grading.examine import examine
from vlm_course.grading.exercise import Exercise
from vlm_course.grading.extract import SourceError
from vlm_course.grading.runner import learner_notebook
from vlm_course.grading.worker import define


def earlier(name: str):
    """The reader's own definition from its chapter's notebook in work/ when it passes there, else the package's.

    Prints which. `name` is the exercise's or the definition's. Never raises for a wrong or missing answer; ValueError
    for an unknown name.
    """
    item = registry.exercise(name)
    path = learner_notebook(item.chapter)
    own = _own(item, path) if path is not None else None
    if own is None:
        print(f"{item.attribute}: the package's, until yours passes its check in chapter {int(item.chapter)}.")
        return registry.twin(item)
    print(f"{item.attribute}: yours, from {path.name}.")
    return own


def _own(item: Exercise, path: Path):
    """What the notebook defines, None where that is missing, cannot be run or is not right."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            found = define(path, item.attribute)
        except (Failure, SourceError):
            return None
        return found if examine(item, LocalAnswer(found, item.off_limits, item.driver)).passed else None
