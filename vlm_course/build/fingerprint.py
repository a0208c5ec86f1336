"""A hash of everything that can change what a chapter prints: its source, the part of the package it reaches, its
weights.

What a chapter reaches is found without running it: the modules that its cells name, the modules that those name, and so
on, lazy imports and dotted names in strings included. A subpackage counts as a whole, data files too. A cell that
starts `vlm-course` reaches everything.
"""

import ast
import hashlib
import json
import re
from functools import cache
from pathlib import Path

PACKAGE = "vlm_course"
DOTTED = re.compile(r"\bvlm_course(?:\.\w+)+")


def fingerprint(notebook, cost: dict | None, package: Path) -> str:
    """Hash of a chapter's cells, of the package files that it reaches and of the measured cost that it prints."""
    cells = [[cell.cell_type, cell.source, cell.metadata] for cell in notebook.cells]
    digest = hashlib.sha256(json.dumps([cells, cost], sort_keys=True).encode())
    sources = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for path in reached_files(sources, package):
        digest.update(f"{path.relative_to(package).as_posix()} {_file_hash(path, path.stat().st_mtime_ns)}\n".encode())
    return digest.hexdigest()


def reached_files(sources: str, package: Path) -> list[Path]:
    """The files of the package at `package` that the code in `sources` reaches, sorted."""
    if "vlm-course" in sources:
        return _tree(package)
    found, queue = {package / "__init__.py"}, _named(_code(sources), None, package)
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix == ".py":
            parents = [package / part / "__init__.py" for part in _ancestors(path, package)]
            queue += parents + _named(path.read_text(encoding="utf-8"), path, package)
        if path.name == "__init__.py" and path.parent != package:
            queue += _tree(path.parent)
    return sorted(path for path in found if path.is_file())


def _tree(folder: Path) -> list[Path]:
    """What git would track: neither caches nor hidden files."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _ancestors(path: Path, package: Path) -> list[Path]:
    return [parent for parent in path.relative_to(package).parents if parent.parts]


def _code(cells: str) -> str:
    """Cells as Python: magics and shell lines become calls."""
    from IPython.core.inputtransformer2 import TransformerManager

    return TransformerManager().transform_cell(cells)


def _named(code: str, path: Path | None, package: Path) -> list[Path]:
    """Files of the modules that a piece of code imports or names in a string."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, path, package)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.update(DOTTED.findall(node.value))
    return [file for name in names for file in _module_files(name, package)]


def _absolute(node: ast.ImportFrom, path: Path | None, package: Path) -> str:
    if not node.level or path is None:
        return node.module or ""
    parts = (PACKAGE, *path.relative_to(package).parts[:-1])
    return ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])


def _module_files(name: str, package: Path) -> list[Path]:
    """The file of the longest leading part of a dotted name that is a module."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return []
    for length in range(len(parts), 1, -1):
        stem = package.joinpath(*parts[1:length])
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                return [file]
        if stem.is_dir():
            return _tree(stem)
    return []


@cache
def _file_hash(path: Path, modified: int) -> str:
    """`modified` keeps the cached hash of a file that was changed since from being used."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
