"""Exercise (derivation): how large the bridge is beside its language model."""

import random
from fractions import Fraction

from vlm_course.grading.chapter02.projection_parameters import oracle as count
from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake

SEVEN_B, THIRTEEN_B = 6_738_415_616, 13_015_864_320  # Llama's parameters with 32,000 tokens, embeddings included


def oracle(vision_dim: int, llm_dim: int, llm_parameters: int) -> float:
    return float(Fraction(count(vision_dim, llm_dim), llm_parameters))


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    known = [(1024, 4096, SEVEN_B), (1024, 5120, THIRTEEN_B)] if seed == 0 else []
    drawn = [
        (16 * draw.randint(20, 60), 16 * draw.randint(70, 200), draw.randint(10, 99) * 10**7 + 7) for _ in range(2)
    ]
    names = ("vision_dim", "llm_dim", "llm_parameters")
    return [Case(dict(zip(names, row, strict=True))) for row in known + drawn]


def exact(v, d):
    return d * (v + d + 2)


PROJECTION_SHARE = Exercise(
    name="projection_share",
    chapter="02",
    title="Derivation: the bridge's share",
    difficulty="easy",
    minutes=5,
    points=2,
    attribute="projection_share",
    twin="vlm_course.costs:projection_share",
    interface=FunctionInterface(
        {"vision_dim": "integer", "llm_dim": "integer", "llm_parameters": "integer"}, "number, a fraction"
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "percentage": Mistake(
            "This is the percentage: give the fraction, without the factor 100.", lambda v, d, n: 100 * exact(v, d) / n
        ),
        "upside down": Mistake(
            "Your fraction is upside down: the bridge is the small part, and goes on top.",
            lambda v, d, n: n / exact(v, d),
        ),
        "whole-number division": Mistake(
            "You divide with //, which rounds down to 0: use /.", lambda v, d, n: exact(v, d) // n
        ),
        "of the whole model": Mistake(
            "You divide by language model and bridge together: compare with the language model alone.",
            lambda v, d, n: exact(v, d) / (n + exact(v, d)),
        ),
        "7B bridge always": Mistake(
            "You always take the 7B model's bridge: with the 13B model it is larger, because llm_dim is.",
            lambda v, d, n: 20_979_712 / n,
        ),
        "always 4096": Mistake(
            "You take 4096 for the width whatever llm_dim is: that is how 0.16 % comes about for the 13B model.",
            lambda v, d, n: exact(v, 4096) / n,
        ),
        "always 13B": Mistake(
            "You divide by 13 billion whatever the language model: use llm_parameters.",
            lambda v, d, n: exact(v, d) / 13e9,
        ),
        "no biases": Mistake(
            "You left out the biases: each layer has one for every output.", lambda v, d, n: (v * d + d * d) / n
        ),
        "one layer": Mistake(
            "You counted the first layer alone: the second, llm_dim to llm_dim, is the larger one.",
            lambda v, d, n: (v * d + d) / n,
        ),
        "rounded": Mistake(
            "You rounded to four digits after the point: return the fraction itself.",
            lambda v, d, n: round(exact(v, d) / n, 4),
        ),
    },
    also_correct={
        "in two steps": lambda v, d, n: ((v + 1) * d + (d + 1) * d) / n,
        "layer by layer": lambda v, d, n: (v * d + d) / n + (d * d + d) / n,
    },
)
