"""Exercise (derivation): how many parameters the bridge has."""

import random

import torch
from torch import nn

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(vision_dim: int, llm_dim: int) -> int:
    """Builds the layers, without numbers, and counts."""
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(vision_dim, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))
    return sum(parameter.numel() for parameter in layers.parameters())


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    known = [(1024, 4096), (1024, 5120)] if seed == 0 else []
    drawn = [
        (16 * draw.randint(20, 60), 16 * draw.randint(70, 200)),
        (16 * draw.randint(70, 200), 16 * draw.randint(20, 60)),
    ]
    return [Case({"vision_dim": vision, "llm_dim": llm}) for vision, llm in known + drawn]


def by_layer(vision_dim, llm_dim):
    total = 0
    for fan_in, fan_out in [(vision_dim, llm_dim), (llm_dim, llm_dim)]:
        total += (fan_in + 1) * fan_out
    return total


PROJECTION_PARAMETERS = Exercise(
    name="projection_parameters",
    chapter="02",
    title="Derivation: the parameters of the bridge",
    difficulty="easy",
    minutes=10,
    points=3,
    attribute="projection_parameters",
    twin="vlm_course.costs:projection_parameters",
    interface=FunctionInterface({"vision_dim": "integer", "llm_dim": "integer"}, "integer"),
    oracle=oracle,
    cases=cases,
    mistakes={
        "no biases": Mistake(
            "You left out the biases: each layer has one for every output.", lambda v, d: v * d + d * d
        ),
        "first bias only": Mistake(
            "You left out the second layer's bias: each layer has one for every output.", lambda v, d: v * d + d + d * d
        ),
        "first layer only": Mistake(
            "You counted the first layer alone: the second, llm_dim to llm_dim, is the larger one.",
            lambda v, d: v * d + d,
        ),
        "second layer only": Mistake(
            "You counted the second layer alone: the first goes from vision_dim to llm_dim.", lambda v, d: d * d + d
        ),
        "second like the first": Mistake(
            "You counted the first layer twice: the second starts from llm_dim.", lambda v, d: 2 * (v * d + d)
        ),
        "narrow middle": Mistake(
            "You took vision_dim for the middle width: the first layer already goes to llm_dim.",
            lambda v, d: v * v + v + v * d + d,
        ),
        "bias per input": Mistake(
            "You counted a bias for every input: a layer has one for every output.", lambda v, d: v * d + v + d * d + d
        ),
        "always 4096": Mistake(
            "You calculate with 4096: use llm_dim, which is 5120 for the 13B model.",
            lambda v, d: v * 4096 + 4096 + 4096 * 4096 + 4096,
        ),
        "middle of 4096": Mistake(
            "Your middle width is 4096: both layers give llm_dim, whichever the model.",
            lambda v, d: v * 4096 + 4096 + 4096 * d + d,
        ),
        "the 7B count": Mistake(
            "This is the 7B model's number whatever the widths: calculate it from vision_dim and llm_dim.",
            lambda v, d: 20_979_712,
        ),
        "tokens counted": Mistake(
            "You multiplied by 576 tokens: all tokens share the same parameters.",
            lambda v, d: 576 * (v * d + d + d * d + d),
        ),
        "GELU counted": Mistake(
            "You gave the GELU parameters of its own: it has none.", lambda v, d: v * d + d + d * d + d + d
        ),
    },
    also_correct={
        "factored": lambda v, d: d * (v + d + 2),
        "layer by layer": by_layer,
        "counted on the meta device": oracle,
    },
)
