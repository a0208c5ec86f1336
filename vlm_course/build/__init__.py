"""From one percent-format source a chapter, the executed solved notebook and the student notebook.

`solutions/NN_slug.py` is the only file that a person edits. `build` makes and executes both notebooks; `check` proves
without executing anything that the committed notebooks belong to their sources. Jupyter, jupytext and nbgrader are
imported inside the functions that need them.
"""

from collections.abc import Sequence

from vlm_course.build.errors import BuildError

__all__ = ["BuildError", "build", "check", "main"]


def build(chapters: Sequence[str] | None = None, *, measure: bool = False, course=None, say=print) -> None:
    """Execute and write both notebooks of the named chapters (all of them by default).

    `chapters` holds numbers ("02") or slugs; `measure` renews `solutions/costs.json`. Raises BuildError, with the cell
    named, and then writes nothing for that chapter.
    """
    from vlm_course.build.pipeline import build_chapters

    build_chapters(chapters, measure=measure, course=course, say=say)


def check(chapters: Sequence[str] | None = None, *, course=None) -> list[str]:
    """Compare the committed notebooks with their sources without executing; returns one sentence for each problem."""
    from vlm_course.build.pipeline import check_chapters

    return check_chapters(chapters, course=course)


def main(chapters: Sequence[str] | None = None, check: bool = False, measure: bool = False) -> int:
    """What `vlm-course build` runs: prints, and returns the exit status."""
    from vlm_course.build.pipeline import build_chapters, check_chapters

    try:
        if not check:
            build_chapters(chapters, measure=measure)
            return 0
        problems = check_chapters(chapters)
    except BuildError as error:
        problems = str(error).splitlines()
    for problem in problems:
        print(problem)
    if not problems:
        print("The notebooks belong to their sources.")
    return 1 if problems else 0
