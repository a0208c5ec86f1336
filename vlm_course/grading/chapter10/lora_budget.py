"""Exercise (derivation): what learns with LoRA and what the optimizer keeps, against full fine-tuning."""

import random

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake

NAMES = ("width", "kv_width", "mlp_width", "layers", "rank")


def oracle(width: int, kv_width: int, mlp_width: int, layers: int, rank: int) -> tuple[int, int, int, int]:
    """Counts matrix by matrix and block by block."""
    lora = full = 0
    for _ in range(layers):
        for inputs, outputs in (
            (width, width),  # query
            (width, kv_width),  # key
            (width, kv_width),  # value
            (width, width),  # out
            (width, mlp_width),  # gate
            (width, mlp_width),  # up
            (mlp_width, width),  # down
        ):
            lora += rank * inputs  # A
            lora += outputs * rank  # B
            full += inputs * outputs
    moments = 4 + 4  # bytes: AdamW's mean and mean square, in float32
    return lora, full, moments * lora, moments * full


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    rows = [(4096, 4096, 11008, 32, 128)] if seed == 0 else []  # the language model of LLaVA-1.5 7B
    for share in (2, 4):
        width = 64 * draw.randint(4, 40)
        rows.append((width, width // share, width * 2 + 32 * draw.randint(1, 20), draw.randint(3, 40), 2**share))
    rows.append((576, 192, 1536, 30, draw.choice([8, 12, 24])))  # SmolLM2-135M
    return [Case(dict(zip(NAMES, row, strict=True))) for row in rows]


def counts(w, kv, m, layers, r, *, maps=None, one=lambda r, i, o: r * (i + o), lora_bytes=8, full_bytes=8):
    """The four numbers with some of the steps exchanged."""
    maps = [(w, w), (w, kv), (w, kv), (w, w), (w, m), (w, m), (m, w)] if maps is None else maps(w, kv, m)
    lora, full = layers * sum(one(r, i, o) for i, o in maps), layers * sum(i * o for i, o in maps)
    return lora, full, lora_bytes * lora, full_bytes * full


def wrong(says: str, **changes) -> Mistake:
    return Mistake(says, lambda *sizes: counts(*sizes, **changes))


def in_closed_form(width, kv_width, mlp_width, layers, rank):
    sides = 7 * width + 2 * kv_width + 3 * mlp_width + 2 * width
    areas = 2 * width**2 + 2 * width * kv_width + 3 * width * mlp_width
    return layers * rank * sides, layers * areas, 8 * layers * rank * sides, 8 * layers * areas


def from_meta_tensors(width, kv_width, mlp_width, layers, rank):
    """Builds the layers without their numbers and counts."""
    from torch import nn

    sides = [(width, width)] * 2 + [(width, kv_width)] * 2 + [(width, mlp_width)] * 3
    blocks = [nn.Linear(i, o, bias=False, device="meta") for i, o in sides]
    full = sum(layer.weight.numel() for layer in blocks)
    lora = sum(rank * sum(layer.weight.shape) for layer in blocks)
    return tuple(layers * number for number in (lora, full, 8 * lora, 8 * full))


LORA_BUDGET = Exercise(
    name="lora_budget",
    chapter="10",
    title="Derivation: what LoRA saves",
    difficulty="easy",
    minutes=15,
    points=3,
    attribute="lora_budget",
    twin="vlm_course.finetune.lora:lora_budget",
    interface=FunctionInterface(
        dict.fromkeys(NAMES, "integer"), "four integers: parameters of LoRA and of full tuning, bytes of each"
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "A alone": wrong("You counted A alone: B has rank numbers for every output.", one=lambda r, i, o: r * i),
        "B alone": wrong("You counted B alone: A has rank numbers for every input.", one=lambda r, i, o: r * o),
        "product of the sides": wrong(
            "You counted rank * in * out: A and B are thin, rank * in and rank * out, and they add up.",
            one=lambda r, i, o: r * i * o,
        ),
        "rank squared": wrong(
            "You counted a square matrix between A and B: there is none.", one=lambda r, i, o: r * (i + o) + r * r
        ),
        "one layer": Mistake(
            "You counted one block: every one of the `layers` blocks has its own matrices.",
            lambda w, kv, m, layers, r: counts(w, kv, m, 1, r),
        ),
        "keys as wide as queries": wrong(
            "You took keys and values to be as wide as queries: they have kv_width outputs.",
            maps=lambda w, kv, m: [(w, w)] * 4 + [(w, m)] * 3,
        ),
        "gate forgotten": wrong(
            "You counted two maps in the feed-forward net: gate, up and down are three.",
            maps=lambda w, kv, m: [(w, w)] * 2 + [(w, kv)] * 2 + [(w, m)] * 2,
        ),
        "queries and values alone": wrong(
            "You adapted queries and values alone, as the paper's first experiments do: here it is every linear map.",
            maps=lambda w, kv, m: [(w, w), (w, kv)],
        ),
        "out forgotten": wrong(
            "You left out the attention's output map: query, key, value and out are four.",
            maps=lambda w, kv, m: [(w, w)] + [(w, kv)] * 2 + [(w, m)] * 3,
        ),
        "one moment": wrong(
            "You counted 4 bytes a parameter: AdamW keeps two moments, a mean and a mean square.",
            lora_bytes=4,
            full_bytes=4,
        ),
        "16-bit moments": wrong(
            "You counted 2 bytes a parameter: two moments in float32 are 8 bytes.", lora_bytes=2, full_bytes=2
        ),
        "weights and moments": wrong(
            "You counted the weights among the moments: asked is what AdamW keeps beside them, 8 bytes a parameter.",
            lora_bytes=12,
            full_bytes=12,
        ),
        "moments of everything": Mistake(
            "You gave LoRA the moments of the whole model: AdamW keeps none for parameters that are frozen.",
            lambda *sizes: (*counts(*sizes)[:3][:2], 8 * sum(counts(*sizes)[:2]), counts(*sizes)[3]),
        ),
    },
    also_correct={"closed form": in_closed_form, "layers without numbers": from_meta_tensors},
)
