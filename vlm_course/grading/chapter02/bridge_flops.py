"""Exercise (derivation): how much a linear and an MLP bridge calculate."""

import random

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(kind: str, tokens: int, vision_dim: int, llm_dim: int) -> int:
    """Runs the layers on the meta device under torch's own counter."""
    layers = [nn.Linear(vision_dim, llm_dim, device="meta")]
    if kind == "mlp":
        layers += [nn.GELU(), nn.Linear(llm_dim, llm_dim, device="meta")]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        nn.Sequential(*layers)(torch.empty(tokens, vision_dim, device="meta"))
    return counter.get_total_flops()


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    rows = [("linear", 256, 1024, 5120), ("mlp", 576, 1024, 4096)] if seed == 0 else []
    for kind in ("linear", "mlp", "mlp"):
        rows.append((kind, draw.randint(60, 300), 16 * draw.randint(8, 30), 16 * draw.randint(35, 60)))
    names = ("kind", "tokens", "vision_dim", "llm_dim")
    return [Case(dict(zip(names, row, strict=True))) for row in rows]


def layers(kind, v, d):
    return [(v, d)] if kind == "linear" else [(v, d), (d, d)]


def flops(kind, n, v, d):
    return sum(2 * n * a * b for a, b in layers(kind, v, d))


def guarded(kind, tokens, vision_dim, llm_dim):
    total = tokens * vision_dim * llm_dim
    if kind == "mlp":
        total += tokens * llm_dim**2
    return total + total


BRIDGE_FLOPS = Exercise(
    name="bridge_flops",
    chapter="02",
    title="Derivation: what a bridge calculates",
    difficulty="medium",
    minutes=10,
    points=2,
    attribute="bridge_flops",
    twin="vlm_course.costs:bridge_flops",
    interface=FunctionInterface(
        {"kind": "text, linear or mlp", "tokens": "integer", "vision_dim": "integer", "llm_dim": "integer"}, "integer"
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "multiply-adds": Mistake(
            "You counted multiply-adds: each is two operations, a multiplication and an addition.",
            lambda k, n, v, d: flops(k, n, v, d) // 2,
        ),
        "tokens forgotten": Mistake(
            "You counted one token: every token goes through the bridge.", lambda k, n, v, d: flops(k, 1, v, d)
        ),
        "class token": Mistake(
            "You counted one token more than there are: the class token does not go over the bridge.",
            lambda k, n, v, d: flops(k, n + 1, v, d),
        ),
        "kind ignored, always linear": Mistake(
            "You count one layer for both kinds: the MLP has a second one.", lambda k, n, v, d: flops("linear", n, v, d)
        ),
        "kind ignored, always MLP": Mistake(
            "You count two layers for both kinds: the linear bridge has one.", lambda k, n, v, d: flops("mlp", n, v, d)
        ),
        "second like the first": Mistake(
            "You counted the MLP's first layer twice: the second goes from llm_dim to llm_dim.",
            lambda k, n, v, d: flops("linear", n, v, d) * (2 if k == "mlp" else 1),
        ),
        "tokens squared": Mistake(
            "You squared the number of tokens, as attention does: a bridge treats each token by itself.",
            lambda k, n, v, d: flops(k, n * n, v, d),
        ),
        "biases counted": Mistake(
            "You counted the biases: only the matrix products are asked for.",
            lambda k, n, v, d: flops(k, n, v, d) + n * d * len(layers(k, v, d)),
        ),
        "parameters": Mistake(
            "This is the number of parameters: a parameter is used twice for every token.",
            lambda k, n, v, d: sum((a + 1) * b for a, b in layers(k, v, d)),
        ),
        "backward too": Mistake(
            "You counted the backward pass too: the question is one forward pass.",
            lambda k, n, v, d: 3 * flops(k, n, v, d),
        ),
    },
    also_correct={"a sum over layers": flops, "multiply-adds doubled": guarded, "torch's own counter": oracle},
)
