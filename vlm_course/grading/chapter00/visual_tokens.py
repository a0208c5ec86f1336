"""Exercise: how many visual tokens an image becomes."""

import math
import random

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(height: int, width: int, patch_size: int) -> int:
    count = 0
    for top in range(0, height, patch_size):
        for left in range(0, width, patch_size):
            fits = top + patch_size <= height and left + patch_size <= width
            count += fits
    return count


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    square = draw.choice([8, 14, 16])
    rows, columns = draw.sample(range(4, 20), 2)
    patch = draw.choice([12, 14, 16])
    known = [(336, 336, 14)] if seed == 0 else []
    drawn = [
        (square * rows, square * rows, square),
        (square * rows, square * columns, square),
        # Remainders above half a patch: rounding and rounding up agree here, and one whole patch is lost by area.
        (patch * rows + draw.randint(patch // 2 + 1, patch - 1), patch * columns + patch - 1, patch),
        # Remainders below half a patch: rounding is right here, rounding up is not.
        (patch * columns + 1, patch * rows + draw.randint(1, patch // 2 - 1), patch),
    ]
    return [Case({"height": h, "width": w, "patch_size": p}) for h, w, p in known + drawn]


def one_side(height, width, patch_size):
    return height // patch_size


def by_reshape(height, width, patch_size):
    rows, columns = divmod(height, patch_size)[0], divmod(width, patch_size)[0]
    return len([(i, j) for i in range(rows) for j in range(columns)])


VISUAL_TOKENS = Exercise(
    name="visual_tokens",
    chapter="00",
    title="Count the visual tokens",
    difficulty="easy",
    minutes=5,
    points=2,
    attribute="visual_tokens",
    twin="vlm_course.costs:visual_tokens",
    interface=FunctionInterface({"height": "integer", "width": "integer", "patch_size": "integer"}, "integer"),
    oracle=oracle,
    cases=cases,
    mistakes={
        "class token counted": Mistake(
            "One too many: the class token is not a patch, and LLaVA drops it before the bridge.",
            lambda h, w, p: (h // p) * (w // p) + 1,
        ),
        "rounded up": Mistake(
            "You round up: a strip narrower than a patch is dropped, so round down on each side.",
            lambda h, w, p: math.ceil(h / p) * math.ceil(w / p),
        ),
        "rounded to nearest": Mistake(
            "You round to the nearest number of patches: a strip narrower than a patch is always dropped.",
            lambda h, w, p: round(h / p) * round(w / p),
        ),
        "area divided": Mistake(
            "You divide the area by the area of a patch: leftover strips do not add up to patches.",
            lambda h, w, p: (h * w) // (p * p),
        ),
        "height squared": Mistake(
            "You squared the count along the height: the image need not be square.", lambda h, w, p: (h // p) ** 2
        ),
        "width squared": Mistake(
            "You squared the count along the width: the image need not be square.", lambda h, w, p: (w // p) ** 2
        ),
        "sides added": Mistake(
            "You add the counts of the two sides: patches form a grid, so the counts multiply.",
            lambda h, w, p: h // p + w // p,
        ),
        "one side only": Mistake("This counts the patches along the height alone: the grid has two sides.", one_side),
        "no rounding": Mistake(
            "You divide without rounding down: only whole patches become tokens.", lambda h, w, p: (h / p) * (w / p)
        ),
        "channels counted": Mistake(
            "Three times too many: a patch holds all three colour channels and is still one token.",
            lambda h, w, p: 3 * (h // p) * (w // p),
        ),
    },
    also_correct={
        "int of a quotient": lambda h, w, p: int(h / p) * int(w / p),
        "divmod and a list": by_reshape,
        "after cropping": lambda h, w, p: ((h - h % p) * (w - w % p)) // p**2,
    },
)
