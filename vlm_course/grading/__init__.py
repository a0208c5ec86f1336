"""Checks, named mistakes and quizzes. Notebooks use `check`, `part` and `question`."""

from vlm_course.grading.notebook import AnswerError, NotAttempted, check, part
from vlm_course.grading.quiz import question
from vlm_course.grading.registry import exercise

__all__ = ["AnswerError", "NotAttempted", "check", "exercise", "part", "question"]
