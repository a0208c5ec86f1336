"""What people ask about a scene, as templates over slots, and their encoding as integer tables.

A template is a string of words and slots: "what color is the {size} {shape} ?". Encoded, a word is its id and slot
number s is -1 - s, so that filling a whole batch of questions is one gather (`fill`). A slot may be empty (id 0,
<pad>); `compact` closes the gaps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tokenizer import WordTokenizer
from .scenes import COLOURS, SHAPES, SIZES

SLOTS = ("size", "colour", "shape", "size2", "colour2", "shape2", "noun", "direction", "n", "x1", "y1", "x2", "y2")
DIRECTIONS = ("left", "right", "above", "below")
PLURALS = ("circles", "rectangles", "triangles", "diamonds", "crosses", "stars")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")

# The first template of a kind is its canonical form.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour": (
        "what color is the {size} {shape} ?",
        "what is the color of the {size} {shape} ?",
        "which color does the {size} {shape} have ?",
        "what color does the {size} {shape} have ?",
        "tell me the color of the {size} {shape} .",
        "the {size} {shape} is what color ?",
        "which color is the {size} {shape} ?",
        "name the color of the {size} {shape} .",
    ),
    "shape": (
        "what shape is the {size} {colour} {noun} ?",
        "what is the shape of the {size} {colour} {noun} ?",
        "which shape does the {size} {colour} {noun} have ?",
        "tell me the shape of the {size} {colour} {noun} .",
        "what is the {size} {colour} {noun} ?",
        "what kind of shape is the {size} {colour} {noun} ?",
        "name the shape of the {size} {colour} {noun} .",
    ),
    "only shape": (  # for a scene of one object
        "what shape is in the image ?",
        "what shape is present ?",
        "what shape does the image contain ?",
        "which shape do you see ?",
    ),
    "size": (
        "what size is the {colour} {shape} ?",
        "is the {colour} {shape} small or large ?",
        "how big is the {colour} {shape} ?",
        "what is the size of the {colour} {shape} ?",
        "tell me the size of the {colour} {shape} .",
        "is the {colour} {shape} large or small ?",
    ),
    "count": (
        "how many {colour} {noun} are there ?",
        "how many {colour} {noun} are in the image ?",
        "how many {colour} {noun} do you see ?",
        "count the {colour} {noun} .",
        "what is the number of {colour} {noun} ?",
        "how many {colour} {noun} does the image contain ?",
    ),
    "existence": (
        "is there a {colour} {shape} ?",
        "is there a {colour} {shape} in the image ?",
        "does the image contain a {colour} {shape} ?",
        "is a {colour} {shape} present ?",
        "do you see a {colour} {shape} ?",
        "can you see a {colour} {shape} in the image ?",
    ),
    "absence": (
        "is there not a {colour} {shape} ?",
        "is there not a {colour} {shape} in the image ?",
        "does the image not contain a {colour} {shape} ?",
        "is no {colour} {shape} present ?",
        "is there no {colour} {shape} ?",
    ),
    "relation": (
        "where is the {colour} {shape} relative to the {colour2} {shape2} ?",
        "is the {colour} {shape} left of , right of , above or below the {colour2} {shape2} ?",
        "on which side of the {colour2} {shape2} is the {colour} {shape} ?",
        "where is the {colour} {shape} compared to the {colour2} {shape2} ?",
    ),
    "beside": (
        "is the {colour} {shape} {direction} of the {colour2} {shape2} ?",
        "is the {colour} {shape} to the {direction} of the {colour2} {shape2} ?",
    ),
    "over": (
        "is the {colour} {shape} {direction} the {colour2} {shape2} ?",
        "do you see the {colour} {shape} {direction} the {colour2} {shape2} ?",
    ),
    "point": (
        "point to the {colour} {shape} .",
        "point at the {colour} {shape} .",
        "where is the center of the {colour} {shape} ?",
        "give a point on the {colour} {shape} .",
    ),
    "box": (
        "give the box of the {colour} {shape} .",
        "where is the {colour} {shape} ?",
        "locate the {colour} {shape} .",
        "find the {colour} {shape} .",
        "draw a box around the {colour} {shape} .",
        "what is the box of the {colour} {shape} ?",
    ),
    "caption": (
        "describe the image .",
        "what is in the image ?",
        "list the objects .",
        "what do you see ?",
        "what does the image show ?",
        "describe the scene .",
    ),
}
ANSWERS: dict[str, str] = {
    "colour": "{colour}",
    "shape": "{shape}",
    "size": "{size}",
    "count": "{n}",
    "relation": "{direction}",
    "point": "( {x1} {y1} )",
    "box": "[ {x1} {y1} {x2} {y2} ]",
}
OBJECT = "a {size} {colour} {shape}"
PLACED_OBJECT = "{size} {colour} {shape} {direction} {noun} ,"  # for contrastive texts: with the row and the column


def vocabulary() -> list[str]:
    """Every word of this world, sorted: the word list of the shipped tokenizer."""
    texts = [t for group in QUESTIONS.values() for t in group] + [OBJECT]
    words = {w for text in texts for w in text.split() if w.isalpha()}
    words |= {*SHAPES, *COLOURS, *SIZES, *PLURALS, *DIRECTIONS, *ROWS, *COLUMNS}
    return sorted(words | {"yes", "no", "object", "objects", "shape", "shapes", "an", "and", "any", "image", "picture"})


def encode(template: str, tokenizer: WordTokenizer) -> list[int]:
    """One template to ids, slots as negative numbers."""
    return [-1 - SLOTS.index(w[1:-1]) if w.startswith("{") else tokenizer.id_of(w) for w in template.split()]


def table(templates: Sequence[str], tokenizer: WordTokenizer, device=None) -> Tensor:
    """Templates to a padded table: [n_templates, longest]."""
    rows = [encode(t, tokenizer) for t in templates]
    longest = max(map(len, rows))
    return torch.tensor([r + [tokenizer.pad_id] * (longest - len(r)) for r in rows], device=device)


def fill(template: Tensor, slots: Tensor) -> Tensor:
    """Put slot values into encoded templates: [B, L] and [B, slots] -> [B, L]."""
    values = slots.gather(1, (-1 - template).clamp(min=0))
    return torch.where(template < 0, values, template)


def compact(ids: Tensor, *others: Tensor, pad_id: int = 0) -> tuple[Tensor, ...]:
    """Move every <pad> to the end of its row and keep the order of the rest; `others` move along: [B, L] each."""
    order = (ids == pad_id).long().argsort(dim=1, stable=True)
    return tuple(t.gather(1, order) for t in (ids, *others))
