"""Records -> batches: conversations as ids in the model's own template, answers as labels, images as pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from ..chat import IGNORE, pad_rows
from ..image_files import ImageFileError, load_image
from ..images import clip_preprocess, pad_to_square, small_preprocess
from ..llava import SMALL, LlavaConfig
from ..packed import pack as pack_documents
from ..validation import counts, require_count
from .data import Record, Records
from .tokenizers import TokenizerAdapter

TOO_LONG = "too long"


@dataclass(frozen=True)
class Batch:
    """What a training step reads.

    Attributes:
        ids: [B, T], <image> expanded, padded on the right.
        labels: [B, T], unshifted: the ids of answers and of what ends them, -100 everywhere else.
        pixels: [I, 3, H, W] in the order in which the images stand in the rows, or None where there is none.
        positions, documents: [B, T] of packed rows (`packed.Packed`), else None: a row is one conversation.
        images: of every row, how many of the pixels are its own; None means one each.
        lengths: of every row, its tokens without the padding; None means T each.
        first: the column of the first label in any row, if it is known: logits before it are not needed.
        sizes: `sizes_of` labels and documents, if it is known: who must ask a GPU for it waits until it is idle.
    """

    ids: Tensor
    labels: Tensor
    pixels: Tensor | None = None
    positions: Tensor | None = None
    documents: Tensor | None = None
    images: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    first: int | None = None
    sizes: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer_tokens(self) -> int:
        """How many tokens the loss is a mean over: labels behind the first position. Waits for the device."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def part(self, start: int, stop: int) -> Batch:
        """The rows from `start` to `stop`, with their images, and no more padding than these rows need.

        Packed rows keep their length: it is the same in every batch.
        """
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"rows {start} to {stop} were asked of a batch of {len(self)}")
        images = self._images()
        before = sum(images[:start])
        length = self.ids.shape[1]
        if self.documents is None and self.lengths is not None:
            length = max(self.lengths[start:stop])
        cut = {
            name: _rows(getattr(self, name), start, stop, length)
            for name in ("ids", "labels", "positions", "documents")
        }
        count = sum(images[start:stop])
        learned = (cut["labels"] != IGNORE).any(dim=0).nonzero() if self.labels.device.type == "cpu" else ()
        return Batch(
            **cut,
            first=int(learned[0]) if len(learned) else self.first,
            pixels=self.pixels[before : before + count] if count else None,
            images=images[start:stop],
            lengths=None if self.lengths is None else self.lengths[start:stop],
        )

    def micro(self, size: int) -> list[Batch]:
        """The batch in parts of at most `size` rows."""
        require_count(size, "size")
        return [self.part(at, min(at + size, len(self))) for at in range(0, len(self), size)]

    def to(self, device: torch.device | str, *, dtype: torch.dtype | None = None) -> Batch:
        """On another device, pixels in `dtype`; from pinned memory without waiting, and with its `sizes`."""
        names = ("ids", "labels", "pixels", "positions", "documents")
        moved = {name: x.to(device, non_blocking=True) for name in names if (x := getattr(self, name)) is not None}
        if dtype is not None and self.pixels is not None:
            moved["pixels"] = moved["pixels"].to(dtype)
        known = sizes_of(self.labels, self.documents) if self.labels.device.type == "cpu" else self.sizes
        return replace(self, **moved, sizes=known)

    def pinned(self) -> Batch:
        """In memory that a GPU can read by itself while the program goes on."""
        names = ("ids", "labels", "pixels", "positions", "documents")
        return replace(self, **{name: x.pin_memory() for name in names if (x := getattr(self, name)) is not None})

    def _images(self) -> tuple[int, ...]:
        images = self.images
        if images is None:
            images = (0,) * len(self) if self.pixels is None else (1,) * len(self)
        have = 0 if self.pixels is None else len(self.pixels)
        if len(images) != len(self) or sum(images) != have:
            raise ValueError(
                f"{len(self)} rows name {sum(images)} images, but there are {have}: give `images`, one a row"
            )
        return images


def sizes_of(labels: Tensor, documents: Tensor | None = None) -> tuple[int, int]:
    """Most positions of a row whose next token is learned, and how many documents all rows hold, padding being one.

    labels [B, T] unshifted, documents [B, T] (0 documents without it). Looks at the device once.
    """
    found = [(labels[:, 1:] != IGNORE).sum(dim=1).max()]
    if documents is not None:
        found.append((documents[:, 1:] != documents[:, :-1]).sum() + len(documents))
    most, *held = torch.stack(found).tolist()
    return most, held[0] if held else 0


def _rows(tensor: Tensor | None, start: int, stop: int, length: int) -> Tensor | None:
    return None if tensor is None else tensor[start:stop, :length]


class Collator:
    """Turns records into a `Batch` for one model.

    Args:
        tokenizer: an adapter of `finetune.tokenizers`, which knows the model's template.
        config: of the model; its visual tokens, image size and longest row are used.
        max_tokens: longest row; answers beyond it are cut, an image never is. By default the model's `max_positions`.
        pack: rows of exactly `max_tokens`, each of several conversations that do not see each other.
        preprocess: PIL image -> [3, H, W]; by default the small model's for its tower, else LLaVA-1.5's.
        pad_to: pads every row to a multiple of this, so that a compiled model meets fewer shapes.
    """

    @counts(max_tokens=2, pad_to=1)
    def __init__(
        self,
        tokenizer: TokenizerAdapter,
        config: LlavaConfig,
        *,
        max_tokens: int | None = None,
        pack: bool = False,
        preprocess: Callable[[Image.Image], Tensor] | None = None,
        pad_to: int = 1,
    ):
        most = config.text.max_positions
        self.max_tokens = most if max_tokens is None else max_tokens
        if self.max_tokens > most:
            raise ValueError(f"max_tokens is {max_tokens}, but the model was made for at most {most} positions")
        if self.max_tokens <= config.visual_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens}, but an image alone takes {config.visual_tokens}: give room for words"
            )
        if tokenizer.image_id != config.image_id:
            raise ValueError(
                f"<image> is {tokenizer.image_id} for the tokenizer and {config.image_id} for the model: "
                "do they belong together?"
            )
        self.tokenizer, self.config, self.pack, self.pad_to = tokenizer, config, pack, pad_to
        self.preprocess = preprocess or default_preprocess(config)

    def encode(self, record: Record) -> tuple[list[int], list[int]]:
        """Ids and labels of one record, cut to `max_tokens`.

        Raises:
            ValueError: names the record's line; the image or every answer lies beyond `max_tokens`, or the text spells
                out a control token of the template.
        """
        visual = self.config.visual_tokens if record.image is not None else 0
        try:
            ids, labels = self.tokenizer.encode_chat(record.turns, visual)
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from error
        kept, learned = ids[: self.max_tokens], labels[: self.max_tokens]
        if kept.count(self.config.image_id) < ids.count(self.config.image_id):
            raise ValueError(
                f"{record.where}: max_tokens={self.max_tokens} would cut the image's {visual} tokens: give more room"
            )
        if all(label == IGNORE for label in learned[1:]):
            raise ValueError(
                f"{record.where}: every answer lies beyond max_tokens={self.max_tokens} of {len(ids)} tokens: "
                "shorten the question, or give more room"
            )
        return kept, learned

    def pixels(self, record: Record) -> Tensor | None:
        """[3, H, W] of the record's image. Raises ValueError, with the line, when the file cannot be read any more."""
        if record.image is None:
            return None
        try:
            return self.preprocess(load_image(record.image))
        except ImageFileError as error:
            raise ValueError(f"{record.where}: the image {error}") from error

    def __call__(self, records: Sequence[Record]) -> Batch:
        """One batch of these records, in their order (packed: longest first)."""
        if not records:
            raise ValueError("there are 0 records to make a batch of, expected at least 1")
        encoded = [self.encode(record) for record in records]
        images = [image for record in records if (image := self.pixels(record)) is not None]
        return self._packed(encoded, images) if self.pack else self._padded(encoded, images, records)

    def _padded(self, encoded: list, images: list[Tensor], records: Sequence[Record]) -> Batch:
        rows, targets = ([row for row, _ in encoded], [row for _, row in encoded])
        lengths = tuple(map(len, rows))
        ids, _ = pad_rows(rows, self.tokenizer.pad_id)  # [B, T]
        labels, _ = pad_rows(targets, IGNORE)
        if gap := min(-ids.shape[1] % self.pad_to, self.max_tokens - ids.shape[1]):
            ids = torch.nn.functional.pad(ids, (0, gap), value=self.tokenizer.pad_id)
            labels = torch.nn.functional.pad(labels, (0, gap), value=IGNORE)
        counts = tuple(int(record.image is not None) for record in records)
        lengths = lengths if self.pad_to == 1 else None
        return Batch(ids, labels, torch.stack(images) if images else None, images=counts, lengths=lengths)

    def _packed(self, encoded: list, images: list[Tensor]) -> Batch:
        visual, image = self.config.visual_tokens, self.config.image_id
        packed = pack_documents(
            encoded, self.max_tokens, pad_id=self.tokenizer.pad_id, image_id=image, visual_tokens=visual
        )
        counts = tuple(((packed.ids == image).sum(dim=1) // visual).tolist())
        pixels = torch.stack([images[number] for number in packed.image_order]) if images else None
        return Batch(packed.ids, packed.labels, pixels, packed.positions, packed.documents, counts)


def default_preprocess(config: LlavaConfig) -> Callable[[Image.Image], Tensor]:
    """The small model's preprocessing for its vision tower; for any other LLaVA-1.5's: padded square, CLIP's norm."""
    height, width = config.vision.image_hw
    if height != width:
        raise ValueError(f"the tower takes images of {height} x {width}, not squares: give `preprocess`")
    if config.vision == SMALL.vision:
        return partial(small_preprocess, size=height)
    return partial(_llava_preprocess, size=height)


def _llava_preprocess(image: Image.Image, *, size: int) -> Tensor:
    return clip_preprocess(pad_to_square(image.convert("RGB")), size=size)


def fitting(records: Records, collator: Collator, *, skip_bad: bool = False) -> Records:
    """The records that `collator` can encode, found before training instead of in the middle of it.

    Only those are tried that could fail: no text has more tokens than bytes, so most are short enough at a glance.
    With `skip_bad` the others are counted under "too long" (or "control token"), else the first raises ValueError.
    """
    kept, skipped, examples = [], Counter(records.skipped), dict(records.examples)
    for record in records:
        try:
            if _doubtful(record.turns, collator):
                collator.encode(record)
        except ValueError as error:
            if not skip_bad:
                raise
            reason = TOO_LONG if "max_tokens" in str(error) else "control token"
            skipped[reason] += 1
            examples.setdefault(reason, str(error))
        else:
            kept.append(record)
    if not kept:
        raise ValueError(f"0 of {len(records)} records can be used; the first: {next(iter(examples.values()))}")
    return Records(tuple(kept), dict(skipped), examples, records.unasked)


def _doubtful(turns: Iterable[tuple[str, str]], collator: Collator) -> bool:
    """Whether a conversation may be too long, or hold something that is spelled like a control token."""
    template = 64  # bytes a turn, more than any template adds; 256 for a system text
    longest = collator.config.visual_tokens + 256
    for question, answer in turns:
        longest += template + len(question.encode()) + len(answer.encode())
        if "<" in question or "<" in answer:
            return True
    return longest > collator.max_tokens
