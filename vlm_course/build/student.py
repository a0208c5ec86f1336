"""Make the student notebook with nbgrader's own preprocessors."""

import copy

from vlm_course.build.errors import BuildError, cell_name
from vlm_course.build.source import MARKER, checked_exercise

CODE_STUB = {"python": 'raise NotImplementedError("Write your solution here.")'}
RAISES = "raises-exception"


def make_student(notebook, slug: str):
    """The notebook that learners get: solutions, hidden tests and outputs removed, graded cells locked.

    These are the steps of `nbgrader generate_assignment` but for those that write its database. Check cells carry
    `raises-exception`, so that Run All passes over an exercise that is not solved yet.
    """
    from nbgrader.preprocessors import (
        CheckCellMetadata,
        ClearHiddenTests,
        ClearMarkScheme,
        ClearOutput,
        ClearSolutions,
        ComputeChecksums,
        LockCells,
    )
    from traitlets.config import Config

    config = Config({"ClearSolutions": {"code_stub": CODE_STUB}})
    student, resources = copy.deepcopy(notebook), {}
    for step in (
        LockCells,
        ClearSolutions,
        ClearOutput,
        ClearHiddenTests,
        ClearMarkScheme,
        ComputeChecksums,
        CheckCellMetadata,
    ):
        student, resources = step(config=config).preprocess(student, resources)
    for position, cell in enumerate(student.cells, start=1):
        if MARKER.search(cell.source):
            raise BuildError(
                f"{slug}, {cell_name(cell, position)}: a solution or hidden test is left in the student notebook"
            )
        if checked_exercise(cell):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), RAISES]
    return student


def unsolved_problems(executed, slug: str) -> list[str]:
    """What is wrong with a student notebook that was executed unsolved.

    Exactly the check cells must raise, and they must raise NotImplementedError: anything else would either stop Run All
    or give points for an empty answer.
    """
    from vlm_course.build.execute import error_of

    problems = []
    for position, cell in enumerate(executed.cells, start=1):
        error, name = error_of(cell), f"{slug}, {cell_name(cell, position)}"
        if checked_exercise(cell):
            if error is None:
                problems.append(f"{name}: the check passes although nothing is solved")
            elif error.ename != "NotImplementedError":
                problems.append(
                    f"{name}: the check of an empty answer must raise NotImplementedError; "
                    f"it raised {error.ename}: {error.evalue}"
                )
        elif error is not None and error.ename == "NotImplementedError":
            problems.append(
                f"{name}: only check cells may raise unsolved; "
                "let later cells use part(...) and put the region inside a function"
            )
        elif error is not None:
            problems.append(f"{name}: the unsolved notebook stops with {error.ename}: {error.evalue}")
    return problems
