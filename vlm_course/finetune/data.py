"""Conversations about images as they are published: LLaVA-Instruct's JSON, checked before a GPU is paid for.

A record is {"id": ..., "image": "name.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
{"from": "gpt", "value": "A cat."}, ...]}; one without "image" is plain text. Source: Liu et al. 2023, "Visual
Instruction Tuning", section 3, and the files of its repository, docs/Finetune_Custom_Data.md.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from ..image_files import ImageFileError, load_image
from ..validation import require_one_of
from .reading import CORRUPT, Place, RecordError, is_text, read_json

IMAGE = "<image>"
ROLES = ("human", "gpt")
REASONS = (
    CORRUPT,
    "wrong fields",
    "wrong roles",
    "text without <image>",
    "<image> without an image",
    "image without a question",
    "empty question",
    "empty answer",
    "missing image",
    "unreadable image",
)
_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation: `turns` of (question, answer) without <image>, about `image` if there is one.

    `file` and `place` say where it was read, for errors that show only later.
    """

    id: str
    image: Path | None
    turns: tuple[tuple[str, str], ...]
    file: Path
    place: Place

    @property
    def where(self) -> str:
        """The file and the line, as errors name them."""
        return f"{self.file.name}, {self.place}"


@dataclass(frozen=True)
class Records(Sequence):
    """What `read_records` found.

    Attributes:
        items: the records that can be used, in the order of the file.
        skipped: how many were left out, by reason (one of `REASONS`).
        examples: the first sentence about each of these reasons.
        unasked: images of the folder that no record names (only looked for when a folder was read).
    """

    items: tuple[Record, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    unasked: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place):
        return self.items[place]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.items)

    @cached_property
    def fingerprint(self) -> int:
        """Differs when a record was changed, added or moved; the same on another machine."""
        value = 0
        for record in self.items:
            name = record.image.name if record.image else ""
            value = zlib.crc32(repr((record.id, name, record.turns)).encode(), value)
        return value

    def __str__(self) -> str:
        turns, images = sum(len(r.turns) for r in self.items), sum(r.image is not None for r in self.items)
        lines = [f"{len(self):,} conversations with {turns:,} questions, {images:,} of them about an image"]
        if self.skipped:
            total = sum(self.skipped.values())
            lines.append(f"{total:,} records skipped: " + ", ".join(f"{n:,} {why}" for why, n in self.skipped.items()))
            lines += [f"  {example}" for example in self.examples.values()]
        if self.unasked:
            lines.append(f"{len(self.unasked):,} images have no record, the first {self.unasked[0].name!r}")
        return "\n".join(lines)


def read_records(
    path: Path | str, *, images: Path | str | None = None, skip_bad: bool = False, check: str = "decode"
) -> Records:
    """Read conversations and make sure that each can be trained on.

    Args:
        path: a JSON array or JSONL file of records, or a folder of images with exactly one such file in it.
        images: the folder that the records' image names start from; by default the folder of the file, or `images` in
            it.
        skip_bad: leave out bad records and count them by reason, instead of stopping at the first.
        check: "decode" reads every image once (in threads, at a small scale), "exists" only looks whether it is there.

    Raises:
        RecordError: a ValueError that names file, line and what to do, for the first bad record.
        ValueError: there is no file or no usable record.
    """
    require_one_of(check, "check", ("decode", "exists"))
    source = _source(Path(path).expanduser())
    folders = _image_folders(source, images)
    good: list[Record] = []
    bad: list[RecordError] = []
    for place, value in read_json(source):
        try:
            if isinstance(value, RecordError):
                raise value
            good.append(_record(value, source, place, folders))
        except RecordError as error:
            if not skip_bad:
                raise
            bad.append(error)
    if check == "decode":
        files = dict.fromkeys(record.image for record in good if record.image is not None)
        damage = _damaged(files, stop=not skip_bad)
        for record in good:
            if record.image in damage:
                bad.append(RecordError(source, record.place, "unreadable image", damage[record.image]))
                if not skip_bad:
                    raise bad[-1]
        good = [record for record in good if record.image not in damage]
    bad.sort(key=lambda error: error.place)
    if not good:
        said = f"; the first: {bad[0]}" if bad else ""
        raise ValueError(f"{source.name} has 0 usable records of {len(bad)}, expected at least 1{said}")
    examples = {error.reason: str(error) for error in reversed(bad)}
    counted = Counter(error.reason for error in bad)
    skipped = {reason: counted[reason] for reason in REASONS if counted[reason]}
    unasked = _unasked(Path(path), good) if Path(path).is_dir() else ()
    return Records(tuple(good), skipped, {reason: examples[reason] for reason in skipped}, unasked)


def _source(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"there is no file {str(path)!r}: give a .json or .jsonl of conversations, or its folder")
    found = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:4]) or "none"
        raise ValueError(f"{str(path)!r} holds {len(found)} .json or .jsonl files ({names}), expected 1: name the file")
    return found[0]


def _image_folders(source: Path, images: Path | str | None) -> tuple[Path, ...]:
    if images is None:
        return (source.parent, source.parent / "images")
    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder of images {str(folder)!r}: give the one that image names start from")
    return (folder,)


def _record(value: Any, file: Path, place: Place, folders: tuple[Path, ...]) -> Record:
    def bad(reason: str, what: str) -> RecordError:
        return RecordError(file, place, reason, what)

    if not isinstance(value, dict):
        raise bad("wrong fields", f"a record is a {type(value).__name__}, expected an object with conversations")
    talk, name = value.get("conversations"), value.get("image")
    if not isinstance(talk, list) or not talk:
        have = ", ".join(map(repr, list(value)[:6])) or "nothing"
        raise bad("wrong fields", f"the record has {have}, expected a list 'conversations' of at least 2 messages")
    if name is not None and not (is_text(name) and name):
        raise bad("wrong fields", f"'image' is {str(name)[:80]!r}, expected the name of one file, or no image at all")
    texts = []
    for number, turn in enumerate(talk):
        if not isinstance(turn, dict) or not is_text(turn.get("from")) or not is_text(turn.get("value")):
            what = f"message {number + 1} of {len(talk)} is not a 'from' and a 'value' with text in UTF-8: correct it"
            raise bad("wrong fields", what)
        if turn["from"] != (role := ROLES[number % 2]):
            what = f"message {number + 1} of {len(talk)} is from {turn['from'][:40]!r}, expected {role!r}"
            raise bad("wrong roles", f"{what}: human and gpt take turns, human first")
        texts.append(turn["value"])
    return Record(str(value.get("id", place)), _find(name, folders, bad), _turns(texts, name, bad), file, place)


def _turns(texts: list[str], image: str | None, bad: Callable) -> tuple[tuple[str, str], ...]:
    """The texts as (question, answer), with <image> taken out of the first question, as LLaVA does."""
    marks = [text.count(IMAGE) for text in texts]
    if image is None and any(marks):
        what = f"{IMAGE} stands {sum(marks)} times in the text but the record names 0 images: name its file in 'image'"
        raise bad("<image> without an image", what)
    if image is not None and (marks[0] != 1 or any(marks[1:])):
        have = f"{IMAGE} stands {marks[0]} times in the first question and {sum(marks[1:])} times after it"
        raise bad("text without <image>", f"{have}, expected 1 and 0 for the image {image!r}: correct the text")
    if image is not None:
        texts = [texts[0].replace(IMAGE, "").strip(), *texts[1:]]
        if not texts[0]:
            what = f"the image {image!r} comes without a question: write one behind {IMAGE}"
            raise bad("image without a question", what)
    for number, text in enumerate(texts):
        if not text.strip():
            kind = ("question", "answer")[number % 2]
            what = f"message {number + 1} of {len(texts)}, the {kind}, is empty: write it, or remove the turn"
            raise bad(f"empty {kind}", what)
    if len(texts) % 2:
        what = f"message {len(texts)} of {len(texts)}, a question, has no answer behind it: add one, or remove it"
        raise bad("empty answer", what)
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _find(name: str | None, folders: tuple[Path, ...], bad: Callable) -> Path | None:
    if name is None:
        return None
    try:
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    except (OSError, ValueError):  # too long for a name, or a null character in it
        path = None
    if path is None:
        what = f"there is no image {name[:200]!r} in {str(folders[0])!r}: copy it there, or name another folder"
        raise bad("missing image", what)
    return path


def _damaged(files: Iterable[Path], *, stop: bool) -> dict[Path, str]:
    """What is wrong with each image that cannot be decoded; with `stop` only the first few are looked for."""
    damage: dict[Path, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = iter(files)
        while chunk := list(islice(waiting, 4096)):  # so that a million files are not a million tasks at once
            damage |= {file: what for file, what in zip(chunk, pool.map(_damage, chunk), strict=True) if what}
            if damage and stop:
                break
    return damage


def _damage(file: Path) -> str:
    try:
        load_image(file, max_side=64)
    except ImageFileError as error:
        return f"the image {str(error).rstrip('.')}"
    return ""


def _unasked(folder: Path, records: list[Record]) -> tuple[Path, ...]:
    named = {record.image for record in records}
    return tuple(f for f in sorted(folder.rglob("*")) if f.suffix.lower() in _SUFFIXES and f not in named)
