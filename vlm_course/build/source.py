"""Read a chapter's percent-format source into a notebook with nbgrader's metadata.

A cell header takes a few short keys, whose values are JSON:

    # %% [markdown] covers=["2-idea-1"]
    # %% locked="imports"
    # %% exercise="vision_projection" twin="vlm_course.bridges.VisionProjection" covers=["2-build-1"]
    # %% check="vision_projection" points=4
    # %% tags=["nbval-ignore-output"] folded=true

An exercise is a solution cell with `### BEGIN SOLUTION` / `### END SOLUTION` regions; a check is a locked cell with
points. A second check of one exercise is called `check="vision_projection/shapes"`.
"""

import hashlib
import re
from pathlib import Path

from vlm_course.build.errors import BuildError, cell_name

KEYS = {"exercise", "check", "points", "locked", "covers", "twin", "tags", "folded"}
TAGS = {"nbval-ignore-output"}
NAME = re.compile(r"[a-z][a-z0-9_]*")
CHECK_NAME = re.compile(r"[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)?")
REGION = re.compile(r"^\s*### (BEGIN|END) (SOLUTION|HIDDEN TESTS)\s*$")
MARKER = re.compile(r"\b(BEGIN|END) (SOLUTION|HIDDEN TESTS|MARK SCHEME)\b")

NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
    },
}


def read_source(path: Path):
    """The notebook of `solutions/NN_slug.py`, without outputs, with nbgrader's metadata and stable cell ids.

    Raises BuildError that lists every malformed cell.
    """
    return parse_source(path.read_text(encoding="utf-8"), path.stem)


def parse_source(text: str, slug: str):
    """`read_source` for text; `slug` enters the cell ids and the messages."""
    import jupytext

    parsed = jupytext.reads(text, fmt="py:percent")
    problems, cells = [], []
    for position, cell in enumerate(parsed.cells, start=1):
        header = {
            key: value
            for key, value in cell.metadata.items()
            if key not in ("lines_to_next_cell", "lines_to_end_of_cell_marker")
        }
        cell.metadata = _metadata(header)
        problems += [f"{slug}, {cell_name(cell, position)}: {problem}" for problem in _problems(cell, header)]
        cells.append(cell)
    problems += [f"{slug}, {problem}" for problem in _duplicates(cells) + _strangers(cells)]
    if problems:
        raise BuildError("\n".join(problems))
    return _notebook(cells, slug)


def checked_exercise(cell) -> str | None:
    """The exercise that a check cell belongs to, None for any other cell."""
    return cell.metadata.get("vlm_course", {}).get("check")


def _metadata(header: dict) -> dict:
    metadata, ours = {}, {}
    graded = {"grade": False, "solution": False, "locked": False, "task": False, "schema_version": 3}
    if "exercise" in header:
        metadata["nbgrader"] = graded | {"grade_id": str(header["exercise"]), "solution": True}
        ours["exercise"] = header["exercise"]
    elif "check" in header:
        name = str(header["check"])
        metadata["nbgrader"] = graded | {"grade_id": "check_" + name.replace("/", "_"), "grade": True, "locked": True}
        metadata["nbgrader"]["points"] = header.get("points")
        ours["check"] = name.split("/")[0]
    elif "locked" in header:
        metadata["nbgrader"] = graded | {"grade_id": str(header["locked"]), "locked": True}
    if "covers" in header:
        ours["covers"] = header["covers"]
    if "twin" in header:
        ours["twin"] = [header["twin"]] if isinstance(header["twin"], str) else header["twin"]
    if ours:
        metadata["vlm_course"] = ours
    if header.get("folded"):
        metadata["jupyter"] = {"source_hidden": True}
    if "tags" in header:
        metadata["tags"] = header["tags"]
    from nbformat import from_dict

    return from_dict(metadata)


def _problems(cell, header: dict) -> list[str]:
    """What is wrong with one cell, as ends of a sentence."""
    found = []
    unknown = sorted(set(header) - KEYS)
    if unknown:
        found.append(f"unknown key {', '.join(unknown)} in the header; known are {', '.join(sorted(KEYS))}")
    roles = [key for key in ("exercise", "check", "locked") if key in header]
    if len(roles) > 1:
        found.append(f"{' and '.join(roles)} exclude each other")
    for role in roles:
        pattern = CHECK_NAME if role == "check" else NAME
        if not pattern.fullmatch(str(header[role])):
            found.append(f"{role}={header[role]!r} is not a lower-case name")
    if roles and cell.cell_type != "code":
        found.append(f"{roles[0]} belongs on a code cell, this one is {cell.cell_type}")
    points = header.get("points")
    if "check" in header and (isinstance(points, bool) or not isinstance(points, int) or points < 1):
        found.append(f"a check cell needs points, a whole number above 0; there is {points!r}")
    if "points" in header and "check" not in header:
        found.append("points belong on a check cell")
    if "twin" in header and "exercise" not in header:
        found.append("twin belongs on an exercise cell")
    for key in ("covers", "tags"):
        value = header.get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            found.append(f"{key} must be a JSON list of strings; there is {value!r}")
    unknown_tags = sorted(set(map(str, header.get("tags", []))) - TAGS)
    if unknown_tags:
        found.append(f"tag {', '.join(unknown_tags)} is not written by hand; allowed is {', '.join(sorted(TAGS))}")
    return found + _region_problems(cell.source, header)


def _region_problems(source: str, header: dict) -> list[str]:
    """Regions must be balanced, not nested, not empty, and only where nbgrader empties them."""
    found, regions, opened, inside = [], 0, None, False
    for line in source.splitlines():
        marker = REGION.match(line)
        if marker is None:
            if MARKER.search(line):
                return [f"the line {line.strip()!r} is not exactly a region marker such as '### BEGIN SOLUTION'"]
            inside = inside or bool(line.strip())
            continue
        edge, kind = marker.groups()
        home = "exercise" if kind == "SOLUTION" else "check"
        if home not in header:
            return [f"a {kind} region belongs in a cell with {home}=..."]
        if edge == "BEGIN":
            if opened:
                return [f"BEGIN {kind} inside a region that is still open"]
            opened, inside, regions = kind, False, regions + 1
        else:
            if opened != kind:
                return [f"END {kind} without its BEGIN"]
            if not inside:
                found.append(f"the {kind} region is empty")
            opened = None
    if opened:
        found.append(f"BEGIN {opened} without its END")
    if "exercise" in header and not regions:
        found.append("a solution cell needs a region between ### BEGIN SOLUTION and ### END SOLUTION")
    return found


def _duplicates(cells) -> list[str]:
    seen, found = {}, []
    for position, cell in enumerate(cells, start=1):
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
        if grade_id in seen:
            found.append(f"{cell_name(cell, position)}: the grade id {grade_id} is taken by cell {seen[grade_id]}")
        elif grade_id:
            seen[grade_id] = position
    return found


def _strangers(cells) -> list[str]:
    """Checks without an exercise before them, and exercises that nothing checks."""
    found, known, checked = [], {}, set()
    for position, cell in enumerate(cells, start=1):
        ours = cell.metadata.get("vlm_course", {})
        if "exercise" in ours:
            known.setdefault(ours["exercise"], f"{cell_name(cell, position)}")
        elif "check" in ours:
            checked.add(ours["check"])
            if ours["check"] not in known:
                found.append(f"{cell_name(cell, position)}: there is no exercise {ours['check']} above this check")
    return found + [
        f"{name}: no cell checks the exercise {exercise}" for exercise, name in known.items() if exercise not in checked
    ]


def _notebook(cells, slug: str):
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    taken, made = set(), []
    for cell in cells:
        role = cell.metadata.get("nbgrader", {}).get("grade_id")
        identity = f"grade_id {role}" if role else f"{cell.cell_type}\n{cell.source}"
        new = {"code": new_code_cell, "markdown": new_markdown_cell}.get(cell.cell_type)
        if new is None:
            raise BuildError(
                f"{slug}, {cell_name(cell, len(made) + 1)}: a cell is code or markdown, not {cell.cell_type}"
            )
        made.append(new(source=cell.source, metadata=cell.metadata, id=_cell_id(slug, identity, taken)))
    from nbformat import from_dict

    return new_notebook(cells=made, metadata=from_dict(NOTEBOOK_METADATA), nbformat_minor=5)


def _cell_id(slug: str, identity: str, taken: set[str]) -> str:
    """The same id for the same cell in every build; equal cells are told apart by their order."""
    for occurrence in range(len(taken) + 1):
        digest = hashlib.sha256(f"{slug}\n{occurrence}\n{identity}".encode()).hexdigest()[:12]
        if digest not in taken:
            taken.add(digest)
            return digest
    raise AssertionError("more cell ids taken than cells")
