"""Exercise (checkpoint): tokens, and what each of them has to hold."""

import random
from fractions import Fraction

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(image_size: int, patch_size: int, width: int) -> dict[str, int | float]:
    """Counts by walking over the image."""
    tokens = sum(1 for _ in range(0, image_size, patch_size) for _ in range(0, image_size, patch_size))
    pixels = sum(1 for _ in range(patch_size) for _ in range(patch_size))
    values = sum(pixels for _channel in ("red", "green", "blue"))
    return {
        "tokens": tokens,
        "pixels": pixels,
        "values": values,
        "values_per_number": float(Fraction(values, width)),
    }


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    rows = [(672, 14, 1024), (672, 28, 1024)] if seed == 0 else []
    for _ in range(3):
        patch = draw.choice([6, 7, 9, 11, 13])
        rows.append((patch * draw.randint(14, 40), patch, 32 * draw.randint(5, 50) + 1))
    return [Case({"image_size": s, "patch_size": p, "width": w}) for s, p, w in rows]


def budget(s, p, w, **changes):
    right = {"tokens": (s // p) ** 2, "pixels": p * p, "values": 3 * p * p, "values_per_number": 3 * p * p / w}
    return right | changes


def step_by_step(image_size, patch_size, width):
    side, rest = divmod(image_size, patch_size)
    assert rest == 0
    pixels = patch_size**2
    values = pixels + pixels + pixels
    return {"values_per_number": values / width, "values": values, "pixels": pixels, "tokens": side * side}


PATCH_BUDGET = Exercise(
    name="patch_budget",
    chapter="01",
    title="Checkpoint: tokens and what each has to hold",
    difficulty="easy",
    minutes=8,
    points=2,
    attribute="patch_budget",
    twin="vlm_course.encoders:patch_budget",
    interface=FunctionInterface(
        {"image_size": "integer", "patch_size": "integer", "width": "integer"},
        "dict with the keys tokens, pixels, values, values_per_number",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "class token": Mistake(
            "You counted the class token: here only patches count.",
            lambda s, p, w: budget(s, p, w, tokens=(s // p) ** 2 + 1),
        ),
        "one side": Mistake(
            "Your tokens are those along one side: the image has as many rows.",
            lambda s, p, w: budget(s, p, w, tokens=s // p),
        ),
        "values called pixels": Mistake(
            "You call the values pixels: a patch of 14 x 14 has 196 pixels, and 588 values.",
            lambda s, p, w: budget(s, p, w, pixels=3 * p * p),
        ),
        "one channel": Mistake(
            "You counted one value a pixel: there are three, red, green and blue.",
            lambda s, p, w: budget(s, p, w, values=p * p, values_per_number=p * p / w),
        ),
        "pixels per number": Mistake(
            "You divided the pixels by the width: it is the values that have to fit.",
            lambda s, p, w: budget(s, p, w, values_per_number=p * p / w),
        ),
        "upside down": Mistake(
            "Your last fraction is upside down: values over width.",
            lambda s, p, w: budget(s, p, w, values_per_number=w / (3 * p * p)),
        ),
        "whole-number division": Mistake(
            "You rounded the last fraction down with //: use /.",
            lambda s, p, w: budget(s, p, w, values_per_number=3 * p * p // w),
        ),
        "always 1024": Mistake(
            "You divide by 1024 whatever the width: other towers have other widths.",
            lambda s, p, w: budget(s, p, w, values_per_number=3 * p * p / 1024),
        ),
        "whole image": Mistake(
            "You spread the whole image's values over one token: each token holds one patch.",
            lambda s, p, w: budget(s, p, w, values_per_number=3 * s * s / w),
        ),
    },
    also_correct={"step by step": step_by_step, "from fractions": oracle},
)
