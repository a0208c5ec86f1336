"""The two commands: build executes and writes, check compares and executes nothing."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path

from vlm_course.build.costs import read_costs, renewed, write_costs
from vlm_course.build.course import REPOSITORY, Chapter, Course
from vlm_course.build.errors import BuildError, cell_name
from vlm_course.build.execute import Cost, execute
from vlm_course.build.fingerprint import fingerprint
from vlm_course.build.normalise import keep_times, normalise, output_problems
from vlm_course.build.source import read_source
from vlm_course.build.student import make_student, unsolved_problems

PACKAGE = REPOSITORY / "vlm_course"


def build_chapters(
    wanted: Sequence[str] | None = None, *, measure: bool = False, course: Course | None = None, say=print
) -> None:
    """Build each wanted chapter; the errors of all of them are reported together."""
    course, failures = course or Course(), []
    for chapter in course.chapters(wanted):
        try:
            cost = build_chapter(chapter, measure=measure)
        except BuildError as error:
            failures.append(str(error))
            continue
        say(f"{chapter.slug}: built; {cost.seconds:.0f} s, {cost.peak_mb / 1000:.1f} GB")
    if failures:
        raise BuildError("\n".join(failures))


def build_chapter(chapter: Chapter, *, measure: bool = False) -> Cost:
    """Execute one chapter solved and unsolved, then write both notebooks; on any error nothing is written."""
    import nbformat

    notebook = read_source(chapter.source)
    student = make_student(notebook, chapter.slug)
    executed, cost = _solved(notebook, chapter)
    unsolved, _ = execute(student, chapter.slug, chapter.student.parent)
    problems = unsolved_problems(unsolved, chapter.slug)
    if problems:
        raise BuildError("\n".join(problems))
    if _record(chapter, cost, measure=measure):
        executed, _ = _solved(notebook, chapter)  # the head of the chapter prints the cost, so it has to be run again
    if chapter.solved.exists() and not measure:
        keep_times(executed, nbformat.read(chapter.solved, as_version=4))
    executed.metadata["vlm_course"] = {"fingerprint": _fingerprint(notebook, chapter)}
    _write(executed, chapter.solved)
    _write(student, chapter.student)
    return cost


def check_chapters(wanted: Sequence[str] | None = None, *, course: Course | None = None) -> list[str]:
    """One sentence for each committed notebook that does not belong to its source, package or weights."""
    course = course or Course()
    problems = [problem for chapter in course.chapters(wanted) for problem in check_chapter(chapter)]
    if not wanted:
        problems += [
            f"{path.relative_to(course.root)}: no source makes this notebook; delete it" for path in course.orphans()
        ]
    return problems


def check_chapter(chapter: Chapter) -> list[str]:
    """Compare both notebooks of one chapter: sources, metadata and cell ids, and the fingerprint of the solved one."""
    import nbformat

    try:
        notebook = read_source(chapter.source)
        student = make_student(notebook, chapter.slug)
    except BuildError as error:
        return str(error).splitlines()
    remedy = f"run `vlm-course build {chapter.number}`"
    problems = []
    for path, expected in ((chapter.solved, notebook), (chapter.student, student)):
        name = path.relative_to(chapter.root)
        if not path.exists():
            problems.append(f"{name}: missing; {remedy}")
            continue
        found = nbformat.read(path, as_version=4)
        difference = _difference(found, expected)
        if difference:
            problems.append(f"{name}: {difference}; {remedy}")
        elif path == chapter.student and path.read_text(encoding="utf-8") != _text(expected):
            problems.append(
                f"{name}: not the bytes that the build writes (outputs, or an editor's formatting); {remedy}"
            )
        elif path == chapter.solved:
            if found.metadata.get("vlm_course", {}).get("fingerprint") != _fingerprint(notebook, chapter):
                problems.append(
                    f"{name}: built from another state of the package, the weights or the measured cost; {remedy}"
                )
    return problems


def _difference(found, expected) -> str | None:
    """Where two notebooks first differ in what is not output, None where they agree."""
    for position, (ours, theirs) in enumerate(zip(expected.cells, found.cells, strict=False), start=1):
        for part in ("cell_type", "source", "metadata", "id"):
            if ours.get(part) != theirs.get(part):
                return f"{cell_name(ours, position)} differs from the source in its {part.replace('_', ' ')}"
    if len(found.cells) != len(expected.cells):
        return f"{len(found.cells)} cells, the source makes {len(expected.cells)}"
    return None


def _solved(notebook, chapter: Chapter):
    executed, cost = execute(notebook, chapter.slug, chapter.solved.parent)
    executed = normalise(executed, chapter.slug)
    problems = output_problems(executed, chapter.slug, chapter.root)
    if problems:
        raise BuildError("\n".join(problems))
    return executed, cost


def _fingerprint(notebook, chapter: Chapter) -> str:
    cost = read_costs(_costs_file(chapter)).get(chapter.slug)
    return fingerprint(notebook, chapter.number, cost, PACKAGE)


def _record(chapter: Chapter, cost: Cost, *, measure: bool) -> bool:
    """Keep the cost if it is new or asked for; tells whether the file changed."""
    path = _costs_file(chapter)
    costs = read_costs(path)
    old = costs.get(chapter.slug)
    if old and not measure:
        return False
    cores = min(2, os.cpu_count() or 1)  # kernels get two threads
    new = renewed(old, cost.seconds, cost.peak_mb, cores)
    if new == old:
        return False
    write_costs(path, costs | {chapter.slug: new})
    return True


def _costs_file(chapter: Chapter) -> Path:
    return chapter.source.parent / "costs.json"


def _text(notebook) -> str:
    import nbformat

    return nbformat.writes(copy.deepcopy(notebook), version=4) + "\n"


def _write(notebook, path: Path) -> None:
    """Replace the file in one step, and only if its bytes change."""
    text = _text(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
