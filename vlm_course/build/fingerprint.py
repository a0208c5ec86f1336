"""A hash of everything that can change what a chapter prints: its source, the part of the package it reaches, its
weights.

What a chapter reaches is found without running it, by `vlm_course.build.reach`.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

from vlm_course.build.reach import reached_files


def fingerprint(notebook, chapter: str, cost: dict | None, package: Path) -> str:
    """Hash of a chapter's cells, of the package files that it reaches and of the measured cost that it prints.

    `chapter` is its number, such as "02".
    """
    cells = [[cell.cell_type, cell.source, cell.metadata] for cell in notebook.cells]
    digest = hashlib.sha256(json.dumps([cells, cost], sort_keys=True).encode())
    for path in reached_files(code_of(notebook), chapter, package):
        digest.update(f"{path.relative_to(package).as_posix()} {_file_hash(path, path.stat().st_mtime_ns)}\n".encode())
    return digest.hexdigest()


def code_of(notebook) -> str:
    """The code cells of a notebook, one after the other."""
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


@cache
def _file_hash(path: Path, modified: int) -> str:
    """`modified` keeps the cached hash of a file that was changed since from being used."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
