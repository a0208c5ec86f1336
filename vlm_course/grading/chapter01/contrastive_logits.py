"""Exercise: how well every image fits every caption."""

import math

import torch
import torch.nn.functional as F

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(images: torch.Tensor, captions: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Pair by pair."""
    scale = min(math.exp(float(logit_scale)), 100.0)
    out = torch.zeros(len(images), len(captions), dtype=torch.float64)
    for i, image in enumerate(images.double()):
        for j, caption in enumerate(captions.double()):
            dot = sum(float(a) * float(b) for a, b in zip(image, caption, strict=True))
            lengths = math.sqrt(sum(float(a) ** 2 for a in image)) * math.sqrt(sum(float(b) ** 2 for b in caption))
            out[i, j] = scale * dot / lengths
    return out


def cases(seed: int) -> list[Case]:
    draw = torch.Generator().manual_seed(seed)

    def case(images: int, captions: int, width: int, logit_scale: float) -> Case:
        stretch = 1 + 3 * torch.rand(images, 1, generator=draw)  # images are longer than captions, each by its own
        return Case(
            {
                "images": stretch * torch.randn(images, width, generator=draw),
                "captions": 0.3 * torch.randn(captions, width, generator=draw),
                "logit_scale": torch.tensor(logit_scale),
            }
        )

    # CLIP's start, a low one, and one above ln 100 = 4.605, which has to be clipped.
    return [case(3, 3, 4, math.log(1 / 0.07)), case(4, 2, 5, 0.4), case(2, 5, 6, 5.5)]


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def scaled(x, y, s, scale=lambda s: s.clamp(max=math.log(100)).exp()):
    return scale(s) * unit(x) @ unit(y).T


CONTRASTIVE_LOGITS = Exercise(
    name="contrastive_logits",
    chapter="01",
    title="Build It: the logits of CLIP",
    difficulty="medium",
    minutes=10,
    points=3,
    attribute="contrastive_logits",
    twin="vlm_course.contrastive:contrastive_logits",
    interface=FunctionInterface(
        {
            "images": "tensor [B, E]",
            "captions": "tensor [B', E]",
            "logit_scale": "tensor [], logarithm of the factor",
        },
        "tensor [B, B'], rows images",
        driver="vlm_course.grading.gradients:kept",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "not normalised": Mistake(
            "You compare vectors of any length: bring images and captions to length 1 first, then it is the angle.",
            lambda x, y, s: s.clamp(max=math.log(100)).exp() * x @ y.T,
        ),
        "dot products": Mistake(
            "You scale plain dot products: bring both to length 1 first, and keep the factor at or below 100.",
            lambda x, y, s: x @ y.T * s.exp(),
        ),
        "images not normalised": Mistake(
            "You brought only the captions to length 1: the images need it too.",
            lambda x, y, s: s.clamp(max=math.log(100)).exp() * x @ unit(y).T,
        ),
        "captions not normalised": Mistake(
            "You brought only the images to length 1: the captions need it too.",
            lambda x, y, s: s.clamp(max=math.log(100)).exp() * unit(x) @ y.T,
        ),
        "normalised across the batch": Mistake(
            "You normalised along the batch: each vector has length 1 along its own dimension, dim=-1.",
            lambda x, y, s: s.clamp(max=math.log(100)).exp() * F.normalize(x, dim=0) @ F.normalize(y, dim=0).T,
        ),
        "no exp": Mistake(
            "You multiply by logit_scale itself: it is a logarithm, so take exp first.",
            lambda x, y, s: scaled(x, y, s, lambda s: s.clamp(max=math.log(100))),
        ),
        "divided": Mistake(
            "You divide by the factor: exp(logit_scale) is one over the temperature, so it multiplies.",
            lambda x, y, s: scaled(x, y, s, lambda s: 1 / s.clamp(max=math.log(100)).exp()),
        ),
        "not clipped": Mistake(
            "You do not clip the factor: CLIP keeps it at or below 100, which is ln 100 for its logarithm.",
            lambda x, y, s: scaled(x, y, s, lambda s: s.exp()),
        ),
        "clipped after exp": Mistake(
            "You clip the factor at ln 100 = 4.6: that is the limit of its logarithm; the factor's own is 100.",
            lambda x, y, s: scaled(x, y, s, lambda s: s.exp().clamp(max=math.log(100))),
        ),
        "no scale": Mistake(
            "These are the cosines alone: multiply by the learned factor.", lambda x, y, s: unit(x) @ unit(y).T
        ),
        "transposed": Mistake(
            "Your rows are captions: rows are images, columns are captions.", lambda x, y, s: scaled(y, x, s)
        ),
        "softmax too": Mistake(
            "You applied a softmax: logits come before it, and the loss has its own.",
            lambda x, y, s: scaled(x, y, s).softmax(-1),
        ),
        "factor cut off": Mistake(
            "Your factor is cut off from logit_scale by .item() or float(): stay with tensors, or it is never learned.",
            lambda x, y, s: scaled(x, y, s, lambda s: math.exp(min(s.item(), math.log(100)))),
        ),
    },
    also_correct={
        "clipped after exp, at 100": lambda x, y, s: scaled(x, y, s, lambda s: s.exp().clamp(max=100)),
        "cosine_similarity": lambda x, y, s: (
            min(s.exp(), torch.tensor(100.0)) * F.cosine_similarity(x[:, None], y[None], dim=-1)
        ),
        "einsum": lambda x, y, s: torch.einsum("ie,je->ij", unit(x), unit(y)) * torch.clip(s, max=math.log(100)).exp(),
    },
)
