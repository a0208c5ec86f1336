"""The worlds' questions in another tokenizer's ids, without leaving the device.

`worlds.dialogs` writes questions as ids of the course's own words, in vectorised torch. A byte-pair tokenizer cuts
text at spaces, digits and punctuation before it merges anything, so the ids of a text are those of its words one behind
the other, and a table does what would else be a string operation per question: a GPU draws its own training data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_course.finetune.tokenizers import TokenizerAdapter
from vlm_course.tokenizer import SPECIAL, WordTokenizer
from vlm_course.validation import checks, require_shape
from vlm_course.worlds.templates import compact

# As `WordTokenizer.decode` writes them: no space stands before the first, none behind the second.
_CLOSING, _OPENING = (".", ",", "?", "!", ":", ";", ")", "]"), ("(", "[")


class Wording:
    """call: ids of the course's words [B, L], padded with 0 at the end -> the adapter's ids [B, L'], padded likewise.

    Exactly `adapter.encode(words.decode(row))` for every row whose words the course's vocabulary knows whole and which
    holds no two marks in a row: all that `worlds.dialogs` writes.
    """

    def __init__(self, words: WordTokenizer, adapter: TokenizerAdapter, *, device: torch.device | str = "cpu"):
        self.pad_id = adapter.pad_id
        bare, spaced = [], []
        for number, piece in enumerate(words.pieces):
            text = "" if number < len(SPECIAL) or piece.startswith("##") else piece
            bare.append(adapter.encode(text))
            spaced.append(adapter.encode(" " + text) if text else [])
        longest = max(map(len, bare + spaced))
        rows = [row + [adapter.pad_id] * (longest - len(row)) for row in bare + spaced]
        self.table = torch.tensor(rows, device=device).unflatten(0, (2, -1))  # [2, V, K]: bare, behind a space
        marks = lambda pieces: torch.tensor([words.id_of(piece) for piece in pieces], device=device)  # noqa: E731
        self.closing, self.opening = marks(_CLOSING), marks(_OPENING)

    @checks(lambda self, ids: require_shape(ids, "ids", "B L", floating=False))
    def __call__(self, ids: Tensor) -> Tensor:
        spaced = ~torch.isin(ids, self.closing)
        spaced[:, 1:] &= ~torch.isin(ids[:, :-1], self.opening)
        spaced[:, 0] = False
        pieces = self.table[spaced.long(), ids]  # [B, L] -> [B, L, K]
        return compact(pieces.flatten(1), pad_id=self.pad_id)[0]  # [B, L * K], pads at the end
