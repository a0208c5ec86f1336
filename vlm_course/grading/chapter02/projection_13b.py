"""Exercise: the same bridge for the 13B model."""

import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.grading.chapter02.vision_projection import Functional, bridge
from vlm_course.grading.exercise import Case, Exercise, Mistake, ModuleInterface, Shape, Tensors

VISION, LLM, FEED_FORWARD = 1024, 5120, 13824


def parameters(_construct: dict) -> dict[str, Shape]:
    return {
        "mlp.0.weight": (LLM, VISION),
        "mlp.0.bias": (LLM,),
        "mlp.2.weight": (LLM, LLM),
        "mlp.2.bias": (LLM,),
    }


def oracle(values: Tensors, _construct: dict, features: torch.Tensor) -> torch.Tensor:
    """The two matrix products in double precision; vision_projection checks the same arithmetic number by number."""
    hidden = features.double() @ values["mlp.0.weight"].T + values["mlp.0.bias"]  # [B, N, 1024] -> [B, N, 5120]
    return F.gelu(hidden) @ values["mlp.2.weight"].T + values["mlp.2.bias"]  # [B, N, 5120] -> [B, N, 5120]


def cases(seed: int) -> list[Case]:
    return [Case({"features": torch.randn(1, 2, VISION, generator=torch.Generator().manual_seed(seed))})]


def two_layers(first: int, middle: int, last: int, **options):
    return lambda: bridge(nn.Linear(first, middle, **options), nn.GELU(), nn.Linear(middle, last, **options))


VISION_PROJECTION_13B = Exercise(
    name="vision_projection_13b",
    chapter="02",
    title="Build It: the bridge of the 13B model",
    difficulty="easy",
    minutes=5,
    points=2,
    attribute="build_projection_13b",
    twin="vlm_course.costs:build_projection_13b",
    interface=ModuleInterface(
        constructor={},
        parameters=parameters,
        call={"features": "tensor [B, N, 1024]"},
        returns="tensor [B, N, 5120]",
        positional=True,
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "the 7B bridge": Mistake(
            "This is the bridge of the 7B model: Vicuna-13B's embeddings are 5120 wide, not 4096.",
            two_layers(VISION, 4096, 4096),
        ),
        "middle of 4096": Mistake(
            "Your middle width is 4096: in LLaVA-1.5 both layers give the language model's width, 5120 here.",
            two_layers(VISION, 4096, LLM),
        ),
        "back to 4096": Mistake(
            "Your output is 4096 wide: it has to stand beside embeddings of 5120.", two_layers(VISION, LLM, 4096)
        ),
        "feed-forward width": Mistake(
            "13824 is the width inside Vicuna-13B's feed-forward nets: embeddings are 5120 wide.",
            two_layers(VISION, FEED_FORWARD, FEED_FORWARD),
        ),
        "5120 in": Mistake(
            "Your bridge starts from 5120: CLIP ViT-L/14 gives 1024 numbers a patch.", two_layers(LLM, LLM, LLM)
        ),
        "widths exchanged": Mistake(
            "Your widths are exchanged: the vision tower's 1024 come first.", two_layers(LLM, VISION, VISION)
        ),
        "middle of 1024": Mistake(
            "Your middle width is 1024: the first layer already goes to 5120.", two_layers(VISION, VISION, LLM)
        ),
        "768 from the image embedding": Mistake(
            "768 is the width of CLIP's image embedding: the patches are 1024 wide.", two_layers(768, LLM, LLM)
        ),
        "one layer": Mistake(
            "This is a single linear map: LLaVA-1.5 has two, with a GELU between.",
            lambda: bridge(nn.Linear(VISION, LLM)),
        ),
        "no biases": Mistake(
            "Your layers have no biases: both linear maps of LLaVA-1.5 have one.",
            two_layers(VISION, LLM, LLM, bias=False),
        ),
        "no activation": Mistake(
            "This is what you get without the GELU: two linear maps in a row are only one linear map.",
            lambda: bridge(nn.Linear(VISION, LLM), nn.Linear(LLM, LLM)),
        ),
    },
    also_correct={
        "layers in a row": two_layers(VISION, LLM, LLM),
        "layers and F.gelu": lambda: Functional(VISION, LLM),
    },
)
