"""Which chapter's graders hold which exercise and check question.

Read from their source, so that whoever asks for one exercise imports its own chapter and no other, and so that the
build knows, without running anything, whose graders a chapter asks for.
"""

import ast
from pathlib import Path

KINDS = ("Exercise", "Question")


def homes(folder: Path) -> dict[str, str]:
    """Name of an exercise, of what its answer defines, or of a check question -> its chapter's package ("chapter02").

    `folder` is that of `vlm_course.grading`. Raises ValueError for a name that is not written as a plain string, and
    where two chapters use one name.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("chapter*/*.py")):
        text, home = path.read_text(encoding="utf-8"), path.parent.name
        if not any(f"{kind}(" in text for kind in KINDS):
            continue
        for name in _names(ast.parse(text), f"{home}/{path.name}"):
            if found.setdefault(name, home) != home:
                raise ValueError(f"{found[name]} and {home} both have the name {name!r}: a name belongs to one chapter")
    return found


def _names(tree: ast.Module, place: str) -> list[str]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    items = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in KINDS]
    given = [(call, key) for call in items for key in call.keywords if key.arg in ("name", "attribute")]
    for call, key in given:
        if not isinstance(key.value, ast.Constant):
            raise ValueError(f"{place}, line {call.lineno}: {key.arg} must be a plain string, it is read, not run")
    return [key.value.value for _, key in given]
