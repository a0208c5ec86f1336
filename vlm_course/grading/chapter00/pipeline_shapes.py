"""Exercise: the shapes of the whole pipeline."""

import random

import torch
from torch import nn

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(image_size: int, patch_size: int, vision_dim: int, llm_dim: int, text_tokens: int) -> dict:
    """Really sends a tensor through the layers, on the meta device, which holds shapes and no numbers."""
    with torch.device("meta"):
        image = torch.empty(3, image_size, image_size)
        patches = nn.Conv2d(3, vision_dim, patch_size, stride=patch_size)(image)  # [3, S, S] -> [D_vision, S/p, S/p]
        features = patches.flatten(1).T  # [D_vision, S/p, S/p] -> [N, D_vision]
        projected = nn.Linear(vision_dim, llm_dim)(features)  # [N, D_vision] -> [N, D_llm]
        sequence = torch.cat([projected, torch.empty(text_tokens, llm_dim)])  # -> [N+T, D_llm]
    stages = {"image": image, "features": features, "projected": projected, "sequence": sequence}
    return {name: tuple(tensor.shape) for name, tensor in stages.items()}


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    names = ("image_size", "patch_size", "vision_dim", "llm_dim", "text_tokens")
    rows = [(336, 14, 1024, 5120, 50)] if seed == 0 else []
    for patch in draw.sample([8, 14, 16], 2):
        side = patch * draw.randint(5, 12)
        vision, llm = 4 * draw.randint(20, 60), 4 * draw.randint(70, 120)
        rows.append((side, patch, vision, llm, draw.randint(5, 19)))
    return [Case(dict(zip(names, row, strict=True))) for row in rows]


def shapes(s, p, v, d, t, *, extra=0, count=None, **replace):
    n = ((s // p) ** 2 if count is None else count(s, p)) + extra
    found = {"image": (3, s, s), "features": (n, v), "projected": (n, d), "sequence": (n + t, d)}
    return found | {name: replacement(s, n, v, d, t) for name, replacement in replace.items()}


def wrong(says: str, **changes) -> Mistake:
    return Mistake(says, lambda s, p, v, d, t: shapes(s, p, v, d, t, **changes))


def step_by_step(image_size, patch_size, vision_dim, llm_dim, text_tokens):
    side = image_size // patch_size
    result = {"image": torch.Size([3, image_size, image_size])}
    result["features"] = [side * side, vision_dim]
    result["projected"] = [*result["features"][:1], llm_dim]
    result["sequence"] = [result["projected"][0] + text_tokens, llm_dim]
    return result


PIPELINE_SHAPES = Exercise(
    name="pipeline_shapes",
    chapter="00",
    title="Write down the shapes of the pipeline",
    difficulty="easy",
    minutes=10,
    points=3,
    attribute="pipeline_shapes",
    twin="vlm_course.costs:pipeline_shapes",
    interface=FunctionInterface(
        dict.fromkeys(("image_size", "patch_size", "vision_dim", "llm_dim", "text_tokens"), "integer"),
        "dict of four shapes: image, features, projected, sequence",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "class token kept": wrong("You count the class token: only the patches go over the bridge.", extra=1),
        "one side": wrong(
            "You count the patches of one side: the grid has image_size // patch_size of them each way.",
            count=lambda s, p: s // p,
        ),
        "a token a pixel": wrong("You make every pixel a token: a token is a whole patch.", count=lambda s, p: s * s),
        "channels last": wrong(
            "Your image is channels last: in torch the three colour channels come first.",
            image=lambda s, n, v, d, t: (s, s, 3),
        ),
        "features transposed": wrong(
            "Your features are transposed: tokens come first, then their width.",
            features=lambda s, n, v, d, t: (v, n),
        ),
        "features in the wrong width": wrong(
            "Your features already have the language model's width: the tower gives vision_dim, the bridge changes it.",
            features=lambda s, n, v, d, t: (n, d),
        ),
        "bridge skipped": wrong(
            "After the bridge the tokens still have vision_dim: it maps them to llm_dim.",
            projected=lambda s, n, v, d, t: (n, v),
        ),
        "text forgotten": wrong(
            "The sequence lacks the text tokens: both kinds stand in one row.",
            sequence=lambda s, n, v, d, t: (n, d),
        ),
        "text joined too early": wrong(
            "You count the text among the projected tokens: it joins after the bridge.",
            projected=lambda s, n, v, d, t: (n + t, d),
        ),
        "joined along the width": wrong(
            "You joined text and image along the width: they stand one after the other, and the width stays.",
            sequence=lambda s, n, v, d, t: (n, d + t),
        ),
        "4096 everywhere": wrong(
            "You write 4096 whatever the language model: the width is llm_dim, 4096 for the 7B model and 5120 for 13B.",
            projected=lambda s, n, v, d, t: (n, 4096),
            sequence=lambda s, n, v, d, t: (n + t, 4096),
        ),
    },
    also_correct={"lists and torch.Size": step_by_step, "the layers themselves": oracle},
)
