"""The small tokenizer of the course's own models: whole words, numbers to 255, and letters for what it does not know.

A real checkpoint brings its own tokenizer (byte-pair encoding, tens of thousands of pieces). Ours has a few hundred
entries, so that a learner can read the whole vocabulary, yet no text is unrepresentable: an unknown word is spelled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>", "<unk>")
NUMBERS = tuple(str(n) for n in range(256))
PUNCTUATION = (".", ",", "?", "!", ":", ";", "'", "-", "(", ")", "[", "]")
LETTERS = tuple("##" + c for c in "abcdefghijklmnopqrstuvwxyz0123456789")

_PIECES = re.compile(r"<[a-z]+>|[a-z]+|[0-9]+|[^\sa-z0-9]")
_VOCABULARY = Path(__file__).parent / "pretrained" / "vocabulary.json"


class WordTokenizer:
    """Lower-case words in, integers out, and back.

    Args:
        words: the words beside the special tokens, numbers, punctuation marks and letters; order fixes the ids.

    Raises:
        ValueError: a word occurs twice or is not a single lower-case word.
    """

    pad_id, bos_id, eos_id, image_id, user_id, assistant_id, unk_id = range(len(SPECIAL))

    def __init__(self, words: Iterable[str]):
        words = list(words)
        for word in words:
            if _PIECES.findall(word) != [word]:
                raise ValueError(f"{word!r} is not a single lower-case word")
        self.words = words
        self.pieces = [*SPECIAL, *NUMBERS, *PUNCTUATION, *LETTERS, *words]
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        if len(self._ids) != len(self.pieces):
            twice = sorted({w for w in words if self.pieces.count(w) > 1})
            raise ValueError(f"these words stand twice in the vocabulary: {twice}")

    @classmethod
    def small(cls) -> WordTokenizer:
        """The tokenizer of the shipped model."""
        return _small()

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def id_of(self, piece: str) -> int:
        """The id of one piece of the vocabulary.

        Raises:
            KeyError: the piece is not in the vocabulary.
        """
        return self._ids[piece]

    def knows(self, word: str) -> bool:
        """Whether a lower-case word is one entry of the vocabulary (not spelled)."""
        return word in self._ids

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text: "A red zebra!" -> ["a", "red", "##z", "##e", "##b", "##r", "##a", "!"]."""
        out: list[str] = []
        for piece in _PIECES.findall(text.lower()):
            if piece in self._ids:
                out.append(piece)
            elif piece.isascii() and piece.isalnum():
                out.extend("##" + c for c in piece)
            else:
                out.append("<unk>")
        return out

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Text to ids, without <bos> or <eos>.

        Args:
            special: recognise special tokens such as "<image>" written in the text. With False, for text that somebody
                typed, they come out as <unk>: nobody can smuggle in an image or the end of a turn.
        """
        ids = [self._ids[piece] for piece in self.tokenize(text)]
        return ids if special else [self.unk_id if i < len(SPECIAL) else i for i in ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Ids (a list or a 1-D tensor) to text; <pad>, <bos>, <eos> are dropped when `skip_special`.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        text, spelling = "", False
        for i in (int(i) for i in ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocab_size}")
            if skip_special and i in (self.pad_id, self.bos_id, self.eos_id):
                continue
            piece = self.pieces[i]
            letter = piece.startswith("##")
            glued = (
                (letter and spelling) or piece in (".", ",", "?", "!", ":", ";", ")", "]") or text[-1:] in ("(", "[")
            )
            text += ("" if glued or not text else " ") + (piece[2:] if letter else piece)
            spelling = letter
        return text


@lru_cache(maxsize=1)
def _small() -> WordTokenizer:
    return WordTokenizer(json.loads(_VOCABULARY.read_text(encoding="utf-8")))
