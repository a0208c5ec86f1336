"""Folders that are whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def written_whole(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a new folder beside `folder`; what is written there appears as `folder` at the end, complete.

    When the body raises, or the process dies, `folder` is as it was before. With `replace` an older folder is moved
    aside first and deleted last, so that the moment without one is that between two renames.
    Raises FileExistsError when `folder` exists and `replace` is not given.
    """
    folder = Path(folder)
    if folder.exists() and not replace:
        raise FileExistsError(f"{folder} exists: name another folder, or pass replace=True to write it anew")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.part")
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        if replace and folder.exists():
            before = part.with_suffix(".before")
            folder.rename(before)
            part.rename(folder)
            shutil.rmtree(before)
        else:
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
