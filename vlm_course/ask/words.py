"""From the text of a question to words of the lexicon: contractions, fixed phrases, misspellings."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from .lexicon import LEXICON, NOT_TYPOS, REASON_OF

_PHRASES = [
    (r"n['’]t\b", " not"),
    (r"\bcannot\b|\bcan not\b|\bca\b", "can"),
    (r"\b(what|which|where|how|there|it|that|here)['’]?s\b(?<!its)", r"\1 is"),
    (r"\bwhats\b", "what is"),
    (r"['’]s\b", " 's "),
    (r"['’](d|ll|ve|re)\b", " would"),
    (r"[-,;:.?!\"'’()](?!s\b)", " "),
    (r"\s+", " "),
    # A question tag asks whether the statement before it is true.
    (r"^(there .*) (is|are) (not )?(there|it) ?$", r"\1"),
    (r"\b(yes or no|true or false|is it true that|is it the case that|make sure that)\b", "whether"),
    (r"\b(would like|want|wish|need|have) to (know|see)\b", "tell"),
    (r"\bi (would like|want|wish|need)\b", "tell"),
    (r"\b(find out|let me know|work out|make out)\b", "tell"),
    (r"\bshow (me|us)\b|^(please )?show\b", "where"),
    (r"^what is (this|that|it)$", "what is in the image"),
    (r"\bof all (the )?(shapes|objects|things)\b", ""),
    (r"\b(at least|as many as) one\b", "any"),
    (r"\bfree (of|from)\b", "without"),
    (r"\b(plus|cross) (sign|mark)(s?)\b", r"cross"),
    (r"\bhow may\b", "how many"),
    (r"\bmore to the (left|right)\b", r"\1"),
    (r"\bon top of\b", "above"),
]


# "isn't there a star?" expects a yes where there is one; "is there not a star?" asks for absence.
_CONTRACTED = r"^\W*(please )?(is|are|do|does|ca|could|has|have)n['’]t\b", r"\1\2"


def rewrite(question: str) -> list[str]:
    """The words of a question in lower case, without punctuation, with several wordings reduced to one."""
    text = unicodedata.normalize("NFKC", question).lower()
    for pattern, replacement in (_CONTRACTED, *_PHRASES):
        text = re.sub(pattern, replacement, text).strip()
    return text.split()


@dataclass(frozen=True)
class Token:
    """A word of the lexicon, its tag, and for a property its name in the scenes world."""

    word: str
    tag: str
    value: str


class NotUnderstood(Exception):
    """Why a question is refused, as the part of a sentence."""


def lex(words: list[str]) -> list[Token]:
    """Look the words up, small misspellings included.

    Raises:
        NotUnderstood: a word is not in the lexicon.
    """
    tokens = []
    for word in words:
        known = word if word in LEXICON else _misspelled(word)
        if known is None:
            raise NotUnderstood(REASON_OF.get(word) or f"I do not know the word {word[:40]!r}")
        tokens.append(Token(known, *LEXICON[known]))
    return tokens


def _misspelled(word: str) -> str | None:
    """The content word that `word` is one slip away from: a letter more, less, other, or two swapped."""
    if word in NOT_TYPOS or word in REASON_OF or not word.isascii() or not word.isalpha() or len(word) < 3:
        return None
    letters = "abcdefghijklmnopqrstuvwxyz"
    splits = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    swapped = [a + b[1] + b[0] + b[2:] for a, b in splits if len(b) > 1]
    doubled = [a + b[1:] for a, b in splits if len(b) > 1 and b[0] == b[1]]
    slips = [a + c + b for a, b in splits for c in letters]
    slips += [a + b[1:] for a, b in splits if b] + [a + c + b[1:] for a, b in splits if b for c in letters]
    for candidates, shortest in ((doubled, 3), (swapped, 4), (slips, 5), (["many"] if word == "mny" else [], 4)):
        for candidate in candidates:
            if len(candidate) >= shortest and LEXICON.get(candidate, ("filler",))[0] != "filler":
                return candidate
    return None
