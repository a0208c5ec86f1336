"""Exercise (derivation): what dividing by the whole sequence does to the loss."""

import random
from fractions import Fraction

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(context_tokens: int, response_tokens: int) -> float:
    return float(Fraction(response_tokens, context_tokens + response_tokens))


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    known = [(626, 50)] if seed == 0 else []
    drawn = [(draw.randint(100, 900), draw.randint(5, 90)) for _ in range(3)]
    return [Case({"context_tokens": c, "response_tokens": r}) for c, r in known + drawn]


DIVISION_FACTOR = Exercise(
    name="division_factor",
    chapter="04",
    title="Derivation: the wrong divisor",
    difficulty="easy",
    minutes=5,
    points=1,
    attribute="division_factor",
    twin="vlm_course.loss:division_factor",
    interface=FunctionInterface({"context_tokens": "integer", "response_tokens": "integer"}, "number"),
    oracle=oracle,
    cases=cases,
    mistakes={
        "upside down": Mistake(
            "Your fraction is upside down: the loss divided by the whole length is the smaller one.",
            lambda c, r: (c + r) / r,
        ),
        "response over context": Mistake(
            "You divide by the context alone: the whole sequence contains the response too.", lambda c, r: r / c
        ),
        "share of the context": Mistake(
            "This is the share of the context: the response's tokens stand on top.", lambda c, r: c / (c + r)
        ),
        "percentage": Mistake("This is the percentage: give the factor.", lambda c, r: 100 * r / (c + r)),
        "whole-number division": Mistake(
            "You divide with //, which rounds down to 0: use /.", lambda c, r: r // (c + r)
        ),
        "always 576 visual tokens": Mistake(
            "You add 576 visual tokens: context_tokens counts them already.", lambda c, r: r / (576 + c + r)
        ),
        "one over the length": Mistake(
            "This is 1 / N: compare it with 1 / T, the right divisor.", lambda c, r: 1 / (c + r)
        ),
        "squared": Mistake(
            "You have the factor twice: the sums are equal, only the divisors differ.", lambda c, r: (r / (c + r)) ** 2
        ),
    },
    also_correct={
        "two divisors": lambda c, r: (1 / (c + r)) / (1 / r),
        "one minus the context": lambda c, r: 1 - c / (c + r),
    },
)
