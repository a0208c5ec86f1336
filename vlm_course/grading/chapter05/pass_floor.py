"""Exercise (derivation): the least time that a pass through a language model takes on a GPU."""

import random
from fractions import Fraction

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(weights, tokens, peak_flops, bandwidth):
    """Both sides as exact fractions, in seconds; the slower one in milliseconds."""
    operations, read = Fraction(0), Fraction(0)
    for _ in range(tokens):
        operations += 2 * weights
    read += 2 * weights
    sides = sorted([operations / Fraction(peak_flops), read / Fraction(bandwidth)])
    return float(sides[-1] * 1000)


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    rows = [(6_738_149_376, 626, 312e12, 2.039e12), (6_738_149_376, 1, 312e12, 2.039e12)] if seed == 0 else []
    for share in (0.3, 0.6, 4.0):  # of the tokens at which both sides take equally long
        weights, balance, bandwidth = draw.randint(10**8, 10**11), draw.randint(100, 400), draw.randint(3, 50) * 1e11
        rows.append((weights, round(share * balance), balance * bandwidth, bandwidth))
    names = ("weights", "tokens", "peak_flops", "bandwidth")
    return [Case(dict(zip(names, row, strict=True))) for row in rows]


def sides(weights, tokens, peak, bandwidth):
    return 1000 * 2 * weights * tokens / peak, 1000 * 2 * weights / bandwidth


def with_if(weights, tokens, peak_flops, bandwidth):
    """Compares tokens with the machine's operations a byte."""
    if tokens > peak_flops / bandwidth:
        return 2e3 * weights * tokens / peak_flops
    return 2e3 * weights / bandwidth


PASS_FLOOR = Exercise(
    name="pass_floor_ms",
    chapter="05",
    title="Derivation: the floor of a pass",
    difficulty="easy",
    minutes=10,
    points=2,
    attribute="pass_floor_ms",
    twin="vlm_course.gpu_times:pass_floor_ms",
    interface=FunctionInterface(
        {
            "weights": "integer",
            "tokens": "integer",
            "peak_flops": "number, operations a second",
            "bandwidth": "number, bytes a second",
        },
        "number, milliseconds",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "sum": Mistake(
            "You add the two times: arithmetic and memory work at the same time, so the slower one is the floor.",
            lambda *a: sum(sides(*a)),
        ),
        "the faster one": Mistake(
            "You take the faster of the two: a pass is not over before both are.", lambda *a: min(sides(*a))
        ),
        "arithmetic alone": Mistake(
            "You count arithmetic alone: with one token the weights still have to come from memory.",
            lambda *a: sides(*a)[0],
        ),
        "memory alone": Mistake(
            "You count memory alone: with many tokens the multiplications take longer.", lambda *a: sides(*a)[1]
        ),
        "seconds": Mistake(
            "This is the time in seconds: the answer is in milliseconds.", lambda *a: max(sides(*a)) / 1000
        ),
        "one operation": Mistake(
            "You count one operation for each weight and token: a multiply-add is two.",
            lambda w, t, p, b: max(1000 * w * t / p, 2000 * w / b),
        ),
        "one byte": Mistake(
            "You count one byte for each weight: 16 bits are two bytes.",
            lambda w, t, p, b: max(2000 * w * t / p, 1000 * w / b),
        ),
        "sixteen bytes": Mistake(
            "You count 16 bytes for each weight: 16 bits are two bytes.",
            lambda w, t, p, b: max(2000 * w * t / p, 16000 * w / b),
        ),
        "weights read for every token": Mistake(
            "You read the weights once for each token: a pass reads them once for all its tokens.",
            lambda w, t, p, b: max(2000 * w * t / p, 2000 * w * t / b),
        ),
    },
    also_correct={
        "the larger of a list": lambda w, t, p, b: sorted([w * t / p, w / b])[1] * 2 * 1e3,
        "a comparison": with_if,
    },
)
