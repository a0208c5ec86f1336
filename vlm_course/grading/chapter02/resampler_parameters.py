"""Exercise (derivation): which new parameters a resampler needs."""

import math
import random

from vlm_course.grading.chapter02.perceiver_resampler import parameters
from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake

NAMES = ("dim", "queries", "depth", "heads", "head_dim", "mlp_ratio")


def oracle(dim: int, queries: int, depth: int, heads: int, head_dim: int, mlp_ratio: int) -> int:
    """Adds up the shapes of all parameters, one by one."""
    construct = dict(zip(NAMES, (dim, queries, depth, heads, head_dim, mlp_ratio), strict=True))
    return sum(math.prod(shape) for shape in parameters(construct).values())


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    rows = [(1024, 64, 1, 8, 64, 4), (1536, 64, 6, 16, 128, 4)] if seed == 0 else []
    for depth in (1, draw.randint(2, 5)):
        rows.append((8 * draw.randint(20, 40), draw.randint(10, 70), depth, draw.randint(3, 6), 8, draw.choice([2, 3])))
    rows.append((8 * draw.randint(41, 60), draw.randint(80, 99), 6, 7, 16, 5))
    return [Case(dict(zip(NAMES, row, strict=True))) for row in rows]


def total(d, q, depth, h, e, r, *, latents=1, maps=4, norms=3, last=1, wide=2, inner=None, bias=0, every=None):
    width = h * e if inner is None else inner(d, h, e)
    layer = 2 * norms * d + maps * d * width + wide * r * d * d + bias
    return (
        (latents * q * d + depth * layer + last * 2 * d) if every is None else every(latents * q * d, layer, depth, d)
    )


def wrong(says: str, **changes) -> Mistake:
    return Mistake(says, lambda *sizes: total(*sizes, **changes))


def piece_by_piece(dim, queries, depth, heads, head_dim, mlp_ratio):
    count = dim * queries
    for _ in range(depth):
        for _ in ("q", "k", "v", "out"):
            count += dim * heads * head_dim
        for _ in ("media", "latents", "feed-forward"):
            count += dim + dim
        count += dim * (dim * mlp_ratio) + (dim * mlp_ratio) * dim
    return count + dim + dim


RESAMPLER_PARAMETERS = Exercise(
    name="resampler_parameters",
    chapter="02",
    title="Derivation: the parameters of a Perceiver resampler",
    difficulty="medium",
    minutes=15,
    points=3,
    attribute="resampler_parameters",
    twin="vlm_course.costs:resampler_parameters",
    interface=FunctionInterface(dict.fromkeys(NAMES, "integer"), "integer"),
    oracle=oracle,
    cases=cases,
    mistakes={
        "latents forgotten": wrong("You left out the latents: the queries are learned, dim numbers each.", latents=0),
        "depth ignored": Mistake(
            "You counted one layer: each of the `depth` layers has parameters of its own.",
            lambda d, q, depth, h, e, r: total(d, q, 1, h, e, r),
        ),
        "latents in every layer": wrong(
            "You counted the latents once a layer: they are learned once, at the start.",
            every=lambda latents, layer, depth, d: depth * (latents + layer) + 2 * d,
        ),
        "output map forgotten": wrong(
            "You counted three attention maps: queries, keys, values and output are four.", maps=3
        ),
        "norms forgotten": wrong("You left out the layers' LayerNorms: each has a scale and a shift.", norms=0),
        "one norm before attention": wrong(
            "You counted one LayerNorm before the attention: media and latents each have their own.", norms=2
        ),
        "last norm forgotten": wrong("You left out the LayerNorm at the end.", last=0),
        "no feed-forward": wrong(
            "You left out the feed-forward nets: each layer ends with one, two linear maps.", wide=0
        ),
        "half a feed-forward": wrong(
            "You counted one linear map in the feed-forward net: it widens, then narrows.", wide=1
        ),
        "width is dim": wrong(
            "You took dim for the width of attention: it is heads * head_dim, whatever dim is.", inner=lambda d, h, e: d
        ),
        "one head": wrong("You counted one head: the width of attention is heads * head_dim.", inner=lambda d, h, e: e),
        "biases in attention": Mistake(
            "You counted biases in the linear maps: here only the LayerNorms have any.",
            lambda d, q, depth, h, e, r: total(d, q, depth, h, e, r, bias=3 * h * e + d + r * d + d),
        ),
        "norms without shift": Mistake(
            "You counted a LayerNorm's scale and forgot its shift: it has 2 * dim parameters.",
            lambda d, q, depth, h, e, r: total(d, q, depth, h, e, r) - d * (3 * depth + 1),
        ),
    },
    also_correct={"piece by piece": piece_by_piece, "in one expression": total, "from the shapes": oracle},
)
