"""Exercises (derivation): the new weights of Flamingo's gated cross-attention, matrix by matrix."""

import math
import random

from vlm_course.grading.chapter03.gated_cross_attention import parameters
from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake

NAMES = ("text_dim", "media_dim", "heads", "head_dim")
MATRICES = ("to_q", "to_k", "to_v", "to_out")


def _shapes(text_dim: int, media_dim: int, heads: int, head_dim: int) -> dict:
    return parameters({"dim": text_dim, "media_dim": media_dim, "heads": heads, "head_dim": head_dim})


def attention_oracle(text_dim: int, media_dim: int, heads: int, head_dim: int) -> int:
    """Adds up the four matrices of the module."""
    shapes = _shapes(text_dim, media_dim, heads, head_dim)
    return sum(math.prod(shapes[f"{name}.weight"]) for name in MATRICES)


def block_oracle(text_dim: int, media_dim: int, heads: int, head_dim: int) -> int:
    """Adds up everything in the module."""
    return sum(math.prod(shape) for shape in _shapes(text_dim, media_dim, heads, head_dim).values())


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    rows = [(8192, 1024, 64, 128), (8192, 1536, 64, 128)] if seed == 0 else []
    for _ in range(3):
        heads, head_dim = draw.randint(3, 12), 8 * draw.randint(2, 9)
        rows.append((64 * draw.randint(21, 40), 64 * draw.randint(4, 20) + 8, heads, head_dim))
    return [Case(dict(zip(NAMES, row, strict=True))) for row in rows]


def attention(t, m, h, d, *, q=1, k=1, v=1, o=1, width=None, bias=False, keys=None):
    inner = h * d if width is None else width(t, m, h, d)
    key_in = m if keys is None else keys(t, m, h, d)
    total = inner * (q * t + (k + v) * key_in + o * t)
    return total + (3 * inner + t if bias else 0)


def block(t, m, h, d, *, ff=2, ratio=4, norms=2, gates=2, bias=0, times=1):
    return times * (attention(t, m, h, d) + ff * ratio * t * t + norms * 2 * t + gates + bias)


def _attention_mistake(says: str, **changes) -> Mistake:
    return Mistake(says, lambda *sizes: attention(*sizes, **changes))


def _block_mistake(says: str, **changes) -> Mistake:
    return Mistake(says, lambda *sizes: block(*sizes, **changes))


CROSS_ATTENTION_PARAMETERS = Exercise(
    name="cross_attention_parameters",
    chapter="03",
    title="Derivation: the four matrices of cross-attention",
    difficulty="easy",
    minutes=10,
    points=3,
    attribute="cross_attention_parameters",
    twin="vlm_course.flamingo:cross_attention_parameters",
    interface=FunctionInterface(dict.fromkeys(NAMES, "integer"), "integer"),
    oracle=attention_oracle,
    cases=cases,
    mistakes={
        "keys and values from text": _attention_mistake(
            "Your keys and values come from the text: they are made from the vision side, media_dim wide.",
            keys=lambda t, m, h, d: t,
        ),
        "only keys and values": _attention_mistake(
            "You counted W_K and W_V alone: W_Q and W_O are new too, the frozen language model keeps its own.",
            q=0,
            o=0,
        ),
        "no values": _attention_mistake("You counted three matrices: keys and values each have their own.", v=0),
        "no output map": _attention_mistake("W_O is missing: what was read goes back to the text's width.", o=0),
        "one head": _attention_mistake(
            "You counted one head: queries, keys and values are heads * head_dim wide.", width=lambda t, m, h, d: d
        ),
        "width is text_dim": _attention_mistake(
            "You took text_dim for the width inside: it is heads * head_dim, which need not be the same.",
            width=lambda t, m, h, d: t,
        ),
        "biases": _attention_mistake("You counted biases: these four maps have none.", bias=True),
        "everything twice": Mistake(
            "You counted multiply-adds in place of parameters: a weight is one number.",
            lambda *sizes: 2 * attention(*sizes),
        ),
        "64 tokens": Mistake(
            "You multiplied by the number of visual tokens: weights do not depend on how many there are.",
            lambda t, m, h, d: 2 * t * h * d + 2 * 64 * m * h * d,
        ),
        "widths added": Mistake(
            "You added widths: a matrix from n_in to n_out has n_in * n_out weights.",
            lambda t, m, h, d: 4 * h * d + 2 * t + 2 * m,
        ),
    },
    also_correct={
        "in one line": attention,
        "from the shapes": attention_oracle,
        "matrix by matrix": lambda t, m, h, d: sum(n * h * d for n in (t, m, m, t)),
    },
)  # fmt: skip

GATED_BLOCK_PARAMETERS = Exercise(
    name="gated_block_parameters",
    chapter="03",
    title="Derivation: everything in a gated block",
    difficulty="easy",
    minutes=10,
    points=2,
    attribute="gated_block_parameters",
    twin="vlm_course.flamingo:gated_block_parameters",
    interface=FunctionInterface(dict.fromkeys(NAMES, "integer"), "integer"),
    oracle=block_oracle,
    cases=cases,
    mistakes={
        "no feed-forward": _block_mistake("You left out the feed-forward net, the largest part of the block.", ff=0),
        "half a feed-forward": _block_mistake(
            "You counted one matrix of the feed-forward net: it widens, then narrows.", ff=1
        ),
        "three matrices": _block_mistake(
            "You counted three matrices in the feed-forward net, as in SwiGLU: this one has two.", ff=3
        ),
        "not four times as wide": _block_mistake(
            "Your feed-forward net is as wide as the text: inside, it is four times as wide.", ratio=1
        ),
        "norms forgotten": _block_mistake("You left out the two LayerNorms, a scale and a shift each.", norms=0),
        "one norm": _block_mistake("You counted half of the norms: two LayerNorms, each with a shift.", norms=1),
        "gates forgotten": _block_mistake("You left out the gates: two numbers, one for each half.", gates=0),
        "one gate": _block_mistake("You counted one gate: each half has its own.", gates=1),
        "a gate a channel": Mistake(
            "You counted a gate for every channel: each gate is a single number.",
            lambda *s: block(*s, gates=0) + 2 * s[0],
        ),
        "biases": Mistake(
            "You counted biases in the feed-forward net: its maps have none.", lambda *s: block(*s) + 5 * s[0]
        ),
        "attention alone": Mistake(
            "This is the attention alone: the feed-forward net, two norms and two gates are missing.", attention
        ),
    },
    also_correct={
        "in one line": block,
        "from the shapes": block_oracle,
        "step by step": lambda t, m, h, d: 2 * h * d * (t + m) + 8 * t * t + 4 * t + 2,
    },
)  # fmt: skip
