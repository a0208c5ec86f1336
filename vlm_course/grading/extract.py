"""Taking an answer out of a notebook or a Python file: the definition itself and what it needs, nothing else.

Cells that train, plot or print are not run, so checking a whole chapter's notebook takes no longer than its exercises.
"""

import ast
import json
from dataclasses import dataclass
from pathlib import Path


class SourceError(ValueError):
    """The file cannot be read as a notebook or a Python file; its text is one sentence."""


@dataclass(frozen=True)
class Piece:
    """A cell of a notebook, or a whole Python file. `label` names it in messages."""

    label: str
    text: str


@dataclass(frozen=True)
class Statement:
    """A top-level statement: where it stands, which names it binds and which it uses."""

    piece: Piece
    node: ast.stmt
    binds: frozenset[str]
    uses: frozenset[str]

    @property
    def defines(self) -> bool:
        """Whether it is a function or a class, as opposed to an assignment or an import."""
        return isinstance(self.node, ast.FunctionDef | ast.ClassDef)


def read(path: Path) -> list[Piece]:
    """The code of a notebook (.ipynb) or a Python file (.py). SourceError says what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SourceError(f"There is no file {path.name}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path.name} cannot be read: {type(error).__name__}.") from None
    if path.suffix == ".py":
        return [Piece(path.name, text)]
    if path.suffix != ".ipynb":
        raise SourceError(f"{path.name} is neither a notebook (.ipynb) nor a Python file (.py).")
    try:
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        sources = [cell["source"] for cell in cells]
    except (ValueError, KeyError, TypeError):
        raise SourceError(f"{path.name} is not a notebook: it may have been saved in part.") from None
    joined = ["".join(source) if isinstance(source, list) else source for source in sources]
    return [Piece(f"code cell {number} of {path.name}", _without_magics(text)) for number, text in enumerate(joined, 1)]


def _without_magics(text: str) -> str:
    if text.lstrip().startswith("%%"):
        return ""
    return "\n".join("" if line.lstrip()[:1] in ("%", "!") else line for line in text.split("\n"))


def statements(pieces: list[Piece]) -> tuple[list[Statement], list[tuple[Piece, SyntaxError]]]:
    """All top-level statements, and the pieces that are not Python."""
    found, broken = [], []
    for piece in pieces:
        try:
            tree = ast.parse(piece.text)
        except (SyntaxError, ValueError) as error:
            broken.append((piece, error if isinstance(error, SyntaxError) else SyntaxError(str(error))))
            continue
        found += [Statement(piece, node, _binds(node), _uses(node)) for node in tree.body]
    return found, broken


def _uses(node: ast.AST) -> frozenset[str]:
    """Names that the node reads from outside: a function's arguments and own variables are not among them."""
    inner = frozenset().union(*map(_uses, ast.iter_child_nodes(node)))
    if isinstance(node, ast.Name):
        return frozenset({node.id}) if isinstance(node.ctx, ast.Load) else inner
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        local = {n.arg for n in ast.walk(node.args) if isinstance(n, ast.arg)}
        body = node.body if isinstance(node.body, list) else [node.body]
        local |= {
            n.id for part in body for n in ast.walk(part) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        return inner - local
    return inner


def _binds(node: ast.stmt) -> frozenset[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return frozenset({node.name})
    if isinstance(node, ast.For | ast.While | ast.With):
        return frozenset()  # such statements train, plot and print; definitions do not come from them
    names: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in inner.names}
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            names.add(inner.id)
        elif isinstance(inner, ast.FunctionDef | ast.ClassDef):
            names.add(inner.name)
    return frozenset(names)


def needed(found: list[Statement], name: str) -> list[Statement]:
    """The last definition of `name` and everything above it that it leans on, in the file's order.

    A later `name = part(...)` is not the answer: the function or class is, where there is one.
    """
    binding = [i for i, statement in enumerate(found) if name in statement.binds]
    definitions = [i for i in binding if found[i].defines]
    if not binding:
        return []
    target = (definitions or binding)[-1]
    chosen, waiting = {target}, set(found[target].uses)
    seen = {name}
    while waiting:
        wanted = waiting.pop()
        if wanted in seen:
            continue
        seen.add(wanted)
        for i, statement in enumerate(found):
            if wanted in statement.binds and i not in chosen:
                chosen.add(i)
                waiting |= statement.uses
    return [found[i] for i in sorted(chosen, key=lambda i: (i == target, i))]
