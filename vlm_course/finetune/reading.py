"""JSON and JSONL files read record by record, each with the line it begins on, also past a record that is broken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a record begins: the line, from 1, and in an array (which may be one long line) the how-manieth it is."""

    line: int
    number: int | None = None

    def __str__(self) -> str:
        return f"line {self.line}" + (f", record {self.number}" if self.number else "")


class RecordError(ValueError):
    """One record that cannot be used. The message is a sentence that names the file, the line and what to do.

    Attributes:
        reason: its kind in a few words, under which it is counted.
        place: where it begins.
    """

    def __init__(self, file: Path, place: Place, reason: str, what: str):
        super().__init__(f"{file.name}, {place}: {what}")
        self.reason, self.place = reason, place


CORRUPT = "corrupt JSON"
_KEY = "conversations"  # what a record has and the objects inside it do not
_BEFORE, _AFTER = re.compile(r"\s*"), re.compile(r"\s*(,\s*|\]\s*)")


def read_json(path: Path) -> Iterator[tuple[Place, Any]]:
    """Every record of a JSON array or of a JSONL file -> (place, value), or (place, RecordError) where it is broken.

    Which of the two it is says the first character, not the name. Bytes that are no UTF-8 come out as lone
    surrogates, which `is_text` finds: only the record that holds them is lost.

    Raises:
        ValueError: the file is empty.
    """
    with path.open("rb") as file:
        start = next((text for line in file if (text := line.removeprefix(b"\xef\xbb\xbf").strip())), b"")
    if not start:
        raise ValueError(f"{path.name} is empty: 0 records, expected at least 1")
    return _array(path) if start.startswith(b"[") else _lines(path)


def is_text(value: Any) -> bool:
    """Whether a value is a string that can be written as UTF-8: without halves of characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _decoded(data: bytes) -> str:
    return data.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")


def _lines(path: Path) -> Iterator[tuple[Place, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if text := _decoded(line).strip():
                try:
                    yield Place(number), json.loads(text)
                except (ValueError, RecursionError) as error:
                    yield Place(number), _broken(path, Place(number), error)


def _array(path: Path) -> Iterator[tuple[Place, Any]]:
    text = _decoded(path.read_bytes())
    decode = json.JSONDecoder().raw_decode
    line, counted, number = 1, 0, 0

    def broken(what: Exception | str) -> tuple[Place, RecordError]:
        here = Place(line, number)
        if isinstance(what, json.JSONDecodeError) and what.pos < last:
            here = Place(what.lineno, number)
        return here, _broken(path, here, what)

    last = len(text.rstrip())
    at: int | None = _BEFORE.match(text, text.index("[") + 1).end()
    ended = text.startswith("]", at)
    while not ended and at is not None:
        number, line, counted = number + 1, line + text.count("\n", counted, at), at
        try:
            value, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            yield broken(error)
            at = _next_record(text, at + 1)
            continue
        yield Place(line, number), value
        gap = _AFTER.match(text, end)
        if gap is not None:
            at, ended = gap.end(), "]" in gap.group()
            continue
        line, counted = line + text.count("\n", counted, end), end
        if end >= last:
            yield broken("the list is not closed: was the file cut off")
            return
        yield broken("the record is not followed by a comma")
        at = _next_record(text, end)
    if at is not None and text[at:].strip(" \t\r\n]"):
        line += text.count("\n", counted, at)
        yield broken("there is text behind the end of the list")


def _next_record(text: str, at: int) -> int | None:
    """Where, from `at` on, the next object begins that reads as a record."""
    decode = json.JSONDecoder().raw_decode
    for found in re.compile(r"\{").finditer(text, at):
        try:
            value, _ = decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and _KEY in value:
            return found.start()
    return None


def _broken(path: Path, place: Place, error: Exception | str) -> RecordError:
    if isinstance(error, json.JSONDecodeError):
        error = f"{error.msg[0].lower()}{error.msg[1:]}, column {error.colno}"
    elif isinstance(error, RecursionError):
        error = "nested too deeply"
    return RecordError(path, place, CORRUPT, f"not valid JSON ({error}): correct it, or copy the file again")
