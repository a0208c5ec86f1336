"""Checks in a notebook. They run in the reader's own kernel, so they are advice; marks are given elsewhere."""

import contextlib
import io
import warnings
from collections.abc import MutableMapping

from vlm_course.grading import registry
from vlm_course.grading.answers import LocalAnswer, stopped
from vlm_course.grading.examine import examine
from vlm_course.grading.exercise import Exercise, Verdict
from vlm_course.grading.quiz import Question, answer_of

_OWN = "_vlm_course_own"  # in the notebook's namespace: what the reader wrote under names that `part` has rebound


class AnswerError(AssertionError):
    """A wrong answer. Its text is the verdict; a notebook shows that and no stack."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class NotAttempted(NotImplementedError):
    """An exercise that still is the stub."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


# A notebook's output keeps the name of an error's class alone, and the build tells unsolved cells by that name.
NotAttempted.__name__ = NotAttempted.__qualname__ = "NotImplementedError"


def check(name: str, namespace: MutableMapping, *, seed: int = 0) -> None:
    """Check the reader's answer to an exercise or question and print the verdict.

    `namespace` is the notebook's globals(). Another `seed` draws other inputs. Raises NotAttempted (a
    NotImplementedError) for a stub, AnswerError (an AssertionError) for a wrong answer, ValueError for an unknown name.
    """
    item = registry.find(name)
    verdict = _judge(item, namespace) if isinstance(item, Question) else _examine(item, namespace, seed)
    if not verdict.attempted:
        raise NotAttempted(f"{item.title}: not attempted yet.")
    if not verdict.passed:
        raise AnswerError(str(verdict))
    if seed:
        print(f"Correct on other inputs too (draw {seed}).")
        return
    says = verdict.says if isinstance(item, Question) else f"Correct: {item.title}."
    print(
        f"{says} {item.points} point{'s' * (item.points != 1)}." + (f"\n{verdict.details}" if verdict.details else "")
    )


def part(name: str, namespace: MutableMapping):
    """The reader's own definition when its check passes, else the package's; prints which.

    `name` is the exercise's or the definition's. Never raises for a wrong or missing answer.
    """
    item = registry.exercise(name)
    own = _own(item, namespace)
    if own is not None and _examine(item, namespace, 0).passed:
        print(f"{item.attribute}: yours.")
        return own
    twin = registry.twin(item)
    namespace.setdefault(_OWN, {})[item.attribute] = own
    print(f"{item.attribute}: the package's, until yours passes its check.")
    return twin


def _own(item: Exercise, namespace: MutableMapping):
    """What the reader defined, even after `name = part(...)` put the package's in its place."""
    current = namespace.get(item.attribute)
    replaced = namespace.get(_OWN, {}).get(item.attribute)
    return replaced if replaced is not None and current is registry.twin(item) else current


def _judge(item: Question, namespace: MutableMapping) -> Verdict:
    try:
        return item.judge(answer_of(namespace.get(item.name)))
    except Exception as error:
        failure = stopped(error)
        return Verdict(False, failure.says, attempted=failure.kind != "not_attempted")


def _examine(item: Exercise, namespace: MutableMapping, seed: int) -> Verdict:
    own = _own(item, namespace)
    if own is None:
        return Verdict(False, f"There is no {item.attribute} yet: run the cell that defines it.")
    if not callable(own):
        return Verdict(False, f"{item.attribute} should be a function or a class; it is a {type(own).__name__}.")
    # A warning printed beside a right answer would count as an error where notebooks are graded.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return examine(item, LocalAnswer(own, item.off_limits, item.driver), seed)
