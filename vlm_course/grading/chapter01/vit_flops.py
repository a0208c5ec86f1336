"""Exercise (derivation): what the blocks of a vision transformer calculate."""

import random

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(tokens: int, width: int, layers: int, mlp_width: int) -> tuple[int, int]:
    """Runs the products of one block on the meta device under torch's own counter."""
    x = torch.empty(tokens, width, device="meta")
    with FlopCounterMode(display=False) as linear:
        for n_in, n_out in ((width, width),) * 4 + ((width, mlp_width), (mlp_width, width)):
            torch.empty(tokens, n_in, device="meta") @ torch.empty(n_in, n_out, device="meta")
    with FlopCounterMode(display=False) as attention:
        (x @ x.T).softmax(-1) @ x
    return layers * linear.get_total_flops(), layers * attention.get_total_flops()


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    rows = [(577, 1024, 24, 4096), (2305, 1024, 24, 4096)] if seed == 0 else []
    for _ in range(3):
        width = 16 * draw.randint(12, 90)
        rows.append((draw.randint(50, 900), width, draw.randint(3, 40), 16 * draw.randint(100, 300)))
    names = ("tokens", "width", "layers", "mlp_width")
    return [Case(dict(zip(names, row, strict=True))) for row in rows]


def parts(n, d, m, *, projections=4, maps=2, products=2, factor=2):
    return factor * n * (projections * d * d + maps * d * m), factor * products * n * n * d


def times(pair, layers):
    return tuple(layers * part for part in pair)


def weight_by_weight(n, d, layers, m):
    weights = layers * (d * 3 * d + d * d + d * m + m * d)
    return 2 * weights * n, layers * (2 * n * n * d + 2 * n * n * d)


def by_layers(n, d, layers, m):
    linear = attention = 0
    for _ in range(layers):
        for a, b in ((d, d), (d, d), (d, d), (d, d), (d, m), (m, d)):
            linear += n * a * b * 2
        attention += 4 * n**2 * d
    return linear, attention


VIT_FLOPS = Exercise(
    name="vit_flops",
    chapter="01",
    title="Derivation: what a vision transformer calculates",
    difficulty="medium",
    minutes=15,
    points=3,
    attribute="vit_flops",
    twin="vlm_course.encoders:vit_flops",
    interface=FunctionInterface(
        {"tokens": "integer", "width": "integer", "layers": "integer", "mlp_width": "integer"},
        "two integers: linear maps, attention between tokens",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "multiply-adds": Mistake(
            "You counted multiply-adds: each is two operations, a multiplication and an addition.",
            lambda n, d, k, m: times(parts(n, d, m, factor=1), k),
        ),
        "scores alone": Mistake(
            "You counted the scores alone: the weighted sum of the values takes as many operations again.",
            lambda n, d, k, m: times(parts(n, d, m, products=1), k),
        ),
        "entries": Mistake(
            "You counted the entries of the attention matrix: each score is a dot product, over all heads D products.",
            lambda n, d, k, m: (times(parts(n, d, m), k)[0], k * n * n),
        ),
        "attention linear": Mistake(
            "Your attention grows with N, not with its square: every token looks at every token.",
            lambda n, d, k, m: (times(parts(n, d, m), k)[0], 4 * k * n * d),
        ),
        "one layer": Mistake("You counted one block: there are `layers` of them.", lambda n, d, k, m: parts(n, d, m)),
        "no output map": Mistake(
            "You counted three linear maps in the attention: after query, key and value comes the output.",
            lambda n, d, k, m: times(parts(n, d, m, projections=3), k),
        ),
        "no feed-forward": Mistake(
            "The feed-forward net is missing: two maps, from width to mlp_width and back.",
            lambda n, d, k, m: times(parts(n, d, m, maps=0), k),
        ),
        "half the feed-forward": Mistake(
            "You counted one map of the feed-forward net: it goes to mlp_width and back.",
            lambda n, d, k, m: times(parts(n, d, m, maps=1), k),
        ),
        "attention maps missing": Mistake(
            "The linear maps of the attention are missing: query, key, value and output, each D to D.",
            lambda n, d, k, m: times(parts(n, d, m, projections=0), k),
        ),
        "always four times": Mistake(
            "You took 4 * width for the feed-forward net: use mlp_width, which other towers choose otherwise.",
            lambda n, d, k, m: times(parts(n, d, 4 * d), k),
        ),
        "class token": Mistake(
            "You counted one token more: `tokens` already holds the class token.",
            lambda n, d, k, m: times(parts(n + 1, d, m), k),
        ),
        "exchanged": Mistake(
            "You exchanged the two numbers: linear maps first, then attention.",
            lambda n, d, k, m: times(parts(n, d, m), k)[::-1],
        ),
        "one number": Mistake(
            "You return the sum: return both numbers, the point is how differently they grow.",
            lambda n, d, k, m: sum(times(parts(n, d, m), k)),
        ),
    },
    also_correct={
        "the weights, twice for each token": weight_by_weight,
        "in loops": by_layers,
        "torch's own counter": oracle,
    },
)
