"""Several conversations in one row that do not see each other: no padding to compute, no leak to learn from.

Two things keep documents apart. The mask hides every other document; the first label of a document is dropped, since
the position that would predict it is the last token of its neighbour. Positions restart as well, so that a document
reads as it would alone, whatever kind of position the model uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_course.attention import block_mask
from vlm_course.chat import IGNORE
from vlm_course.fusion import splice_image_features
from vlm_course.validation import checks


def _row_rule(ids, labels):
    if len(ids) != len(labels):
        raise ValueError(f"there are {len(ids)} documents but labels of {len(labels)}: each needs its own")
    for number, (tokens, targets) in enumerate(zip(ids, labels, strict=True)):
        if not tokens:
            raise ValueError(f"document {number} of {len(ids)} is empty: leave it out")
        if len(tokens) != len(targets):
            raise ValueError(
                f"document {number} has {len(tokens)} ids but {len(targets)} labels: labels are unshifted, one a token"
            )


@checks(_row_rule)
def pack_row(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Documents one behind the other -> (ids, labels, document numbers from 0, positions), four lists of one length.

    Labels stay unshifted; the first of every document becomes -100. Positions restart at 0 with every document.
    Source: the same as transformers' `DataCollatorWithFlattening`.
    """
    row, targets, documents, positions = [], [], [], []
    for number, (tokens, learned) in enumerate(zip(ids, labels, strict=True)):
        row += tokens
        targets += [IGNORE, *learned[1:]]
        documents += [number] * len(tokens)
        positions += range(len(tokens))
    return row, targets, documents, positions


@dataclass(frozen=True)
class Packed:
    """Rows of packed documents; padding has document number -1.

    `order` lists the documents as they stand, row after row; `image_order` does so for the images: features [I, M, D]
    in the order of the documents that went in belong into the rows as `features[image_order]`.
    """

    ids: Tensor  # [B, T]
    labels: Tensor  # [B, T], unshifted
    documents: Tensor  # [B, T], number of the document that went in, -1 for padding
    positions: Tensor  # [B, T]
    order: list[int]
    image_order: list[int]

    @property
    def mask(self) -> Tensor:
        """Causal within a document, nothing beyond it: [B, 1, T, T]."""
        return block_mask(self.documents)

    @property
    def filled(self) -> float:
        """Share of the positions that hold a token."""
        return (self.documents >= 0).float().mean().item()


def pack(
    documents: Sequence[tuple[Sequence[int], Sequence[int]]],
    length: int,
    *,
    pad_id: int,
    image_id: int | None = None,
    visual_tokens: int = 0,
) -> Packed:
    """Put documents (ids, labels) into rows of `length` tokens, the longest first, each into the first row with room.

    Give `image_id` and `visual_tokens` where documents hold images, so that `image_order` can count them.
    Raises ValueError when a document does not fit into a row, or holds a part of an image.
    """
    if not documents:
        raise ValueError("there are 0 documents: give at least one to pack")
    images, total = [], 0
    for number, (ids, _) in enumerate(documents):
        if len(ids) > length:
            raise ValueError(f"document {number} has {len(ids)} tokens but a row has room for {length}")
        placeholders = 0 if image_id is None else list(ids).count(image_id)
        if placeholders and (visual_tokens < 1 or placeholders % visual_tokens):
            raise ValueError(
                f"document {number} has {placeholders} placeholders but an image takes {visual_tokens}: "
                "was it cut inside the image?"
            )
        count = placeholders // visual_tokens if placeholders else 0
        images.append(list(range(total, total + count)))
        total += count
    rows: list[list[int]] = []
    for number in sorted(range(len(documents)), key=lambda n: -len(documents[n][0])):
        size = len(documents[number][0])
        row = next((r for r in rows if sum(len(documents[n][0]) for n in r) + size <= length), None)
        if row is None:
            rows.append([number])
        else:
            row.append(number)
    padded = []
    for row in rows:
        ids, labels, local, positions = pack_row([documents[n][0] for n in row], [documents[n][1] for n in row])
        gap = length - len(ids)
        own = [row[place] for place in local]
        padded.append((ids + [pad_id] * gap, labels + [IGNORE] * gap, own + [-1] * gap, positions + [0] * gap))
    tensors = [torch.tensor(values, dtype=torch.long) for values in zip(*padded, strict=True)]
    order = [number for row in rows for number in row]
    return Packed(*tensors, order=order, image_order=[image for number in order for image in images[number]])


def packed_logits(model, packed: Packed, image_features: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of a `Llava` for packed rows; image_features [I, M, D] in the order of the documents.

    `mask` replaces the packed rows' own, to see what another one would do.
    """
    embeds = model.decoder.embed(packed.ids)  # [B, T] -> [B, T, D]
    if image_features is not None:
        if len(image_features) != len(packed.image_order):
            raise ValueError(f"{len(image_features)} images were given, the rows hold {len(packed.image_order)}")
        features = image_features[torch.tensor(packed.image_order, device=image_features.device)]
        embeds = splice_image_features(embeds, packed.ids, features, model.config.image_id)
    return model.decoder(embeds, mask=packed.mask if mask is None else mask, positions=packed.positions)
