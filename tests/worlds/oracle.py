"""Answers questions about a scene by reading their words: plain Python, nothing shared with how they were made."""

import re
from dataclasses import dataclass

from vlm_course.worlds.scenes import COLOURS, SHAPES, SIZES, Scenes

PLURALS = {"circles": "circle", "rectangles": "rectangle", "triangles": "triangle", "diamonds": "diamond"}
PLURALS |= {"crosses": "cross", "stars": "star", "objects": None, "shapes": None}
_NAME = re.compile(
    rf"\b(?:the|a|no) (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)}|object|shape)\b"
)


@dataclass(frozen=True)
class Object:
    size: str
    colour: str
    shape: str
    x: float
    y: float
    box: tuple[float, ...]


def objects(scenes: Scenes, row: int) -> list[Object]:
    box = scenes.box[row]
    return [
        Object(
            SIZES[scenes.size[row, k]],
            COLOURS[scenes.colour[row, k]],
            SHAPES[scenes.shape[row, k]],
            *scenes.centre[row, k].tolist(),
            tuple(box[k].tolist()),
        )
        for k in range(len(box))
        if scenes.present[row, k]
    ]


def names(question: str) -> list[tuple[str | None, str | None, str | None]]:
    """What a question calls objects: (size, colour, shape), None where it does not say."""
    found = [(s or None, c or None, None if h in ("object", "shape") else h) for s, c, h in _NAME.findall(question)]
    return [name for i, name in enumerate(found) if any(name) or i == len(found) - 1]


def called(name, scene: list[Object]) -> list[Object]:
    """The objects of a scene that a name fits."""
    return [
        o for o in scene if all(w is None or w == v for w, v in zip(name, (o.size, o.colour, o.shape), strict=True))
    ]


def the(name, scene: list[Object]) -> Object:
    fitting = called(name, scene)
    assert len(fitting) == 1, f"{name} fits {len(fitting)} objects of {scene}"
    return fitting[0]


def direction(a: Object, b: Object) -> str:
    """Where a is, seen from b; the axes must differ by at least the factor 1.3."""
    dx, dy = a.x - b.x, a.y - b.y
    assert max(abs(dx), abs(dy)) > 1.3 * min(abs(dx), abs(dy)), "left or above: one could say either"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "below" if dy > 0 else "above"


def answer(kind: str, question: str, scene: list[Object]) -> str | tuple[float, ...]:
    """The right answer in words, or the coordinates in pixels (point, box)."""
    if kind == "caption":
        return ", ".join(f"a {o.size} {o.colour} {o.shape}" for o in scene) + "."
    if kind == "count":
        colour = next((w for w in question.split() if w in COLOURS), None)
        shape = PLURALS[next(w for w in re.findall("[a-z]+", question) if w in PLURALS)]
        return str(len(called((None, colour, shape), scene)))
    found = names(question)
    if kind == "shape" and not found:  # "what shape is in the image?"
        found = [(None, None, None)]
    if kind in ("relation", "check"):
        first, second = (the(name, scene) for name in found)
        if question.startswith("on which side of"):
            first, second = second, first
        where = direction(first, second)
        if kind == "relation":
            return where
        (said,) = set(question.split()) & {"left", "right", "above", "below"}
        return "yes" if said == where else "no"
    (name,) = found
    if kind == "existence":
        negated = bool({"not", "no"} & set(question.split()))
        return "yes" if bool(called(name, scene)) != negated else "no"
    one = the(name, scene)
    if kind == "point":
        x1, y1, x2, y2 = one.box
        return (x1 + x2) / 2, (y1 + y2) / 2
    return one.box if kind == "box" else getattr(one, kind)
