"""Exercise: Flamingo's block, text that reads images through two gates."""

import math

import torch

from vlm_course.grading.chapter03.cross_attention_answers import MISTAKES, Block, Fused, ImageByImage
from vlm_course.grading.exercise import Case, Exercise, ModuleInterface, Shape, Tensors, as_declared, transposed


def parameters(construct: dict) -> dict[str, Shape]:
    dim, media_dim, width = construct["dim"], construct["media_dim"], construct["heads"] * construct["head_dim"]
    return {
        "attention_gate": (1,),
        "feed_forward_gate": (1,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "to_q.weight": (width, dim),
        "to_k.weight": (width, media_dim),
        "to_v.weight": (width, media_dim),
        "to_out.weight": (dim, width),
        "feed_forward.0.weight": (dim,),
        "feed_forward.0.bias": (dim,),
        "feed_forward.1.weight": (4 * dim, dim),
        "feed_forward.3.weight": (dim, 4 * dim),
    }


def scalar_gates(values: Tensors) -> Tensors:
    """Gates as numbers without an axis, keys and values as the halves of one matrix."""
    fused = {name: value[0] if name.endswith("gate") else value for name, value in values.items()}
    fused["to_kv.weight"] = torch.cat([fused.pop("to_k.weight"), fused.pop("to_v.weight")])
    return fused


def _norm(x, scale, shift):
    centred = x - x.mean()
    return centred / math.sqrt(float((centred**2).mean()) + 1e-5) * scale + shift


def _gelu(x):
    return torch.tensor([h * 0.5 * (1 + math.erf(h / math.sqrt(2))) for h in x.tolist()], dtype=torch.float64)


def oracle(
    values: Tensors, construct: dict, text: torch.Tensor, media: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """One row, one token, one head at a time; a token reads the tokens of the images that its mask marks."""
    heads, head_dim = construct["heads"], construct["head_dim"]
    gate, ff_gate = math.tanh(float(values["attention_gate"])), math.tanh(float(values["feed_forward_gate"]))
    out = text.double().clone()
    for b in range(text.shape[0]):
        for t in range(text.shape[1]):
            x = text[b, t].double()
            seen = [token.double() for i, image in enumerate(media[b]) if mask[b, t, i] for token in image]
            if seen:
                normed, read = _norm(x, values["norm.weight"], values["norm.bias"]), []
                for h in range(heads):
                    rows = slice(h * head_dim, (h + 1) * head_dim)
                    query = values["to_q.weight"][rows] @ normed
                    scores = [float(query @ (values["to_k.weight"][rows] @ y)) / math.sqrt(head_dim) for y in seen]
                    weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                    read.append(sum(w * (values["to_v.weight"][rows] @ y) for w, y in zip(weights, seen, strict=True)))
                x = x + gate * (values["to_out.weight"] @ torch.cat(read))
            inside = _norm(x, values["feed_forward.0.weight"], values["feed_forward.0.bias"])
            inside = values["feed_forward.3.weight"] @ _gelu(values["feed_forward.1.weight"] @ inside)
            out[b, t] = x + ff_gate * inside
    return out


def cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(images_seen: list[list[int]], n_images: int, tokens: int, starts: tuple = (), **construct: int) -> Case:
        """`images_seen` gives, for every token, the image that it reads, counted from 1; 0 is none."""
        # Off centre and wide, so that a missing norm shows.
        text = 1 + 2 * torch.randn(len(images_seen), len(images_seen[0]), construct["dim"], generator=generator)
        media = 2 * torch.randn(len(images_seen), n_images, tokens, construct["media_dim"], generator=generator)
        mask = torch.tensor(images_seen)[..., None] == torch.arange(1, n_images + 1)
        return Case({"text": text, "media": media, "mask": mask}, construct, starts=starts)

    # Every width differs from every other, and there are more images than one: equal numbers hide exchanged axes.
    return [
        case([[0, 1, 1, 2, 2], [1, 1, 2, 2, 2]], 2, 3, dim=6, media_dim=5, heads=2, head_dim=4),
        case([[0, 0, 1, 2, 3], [1, 2, 2, 3, 3], [0, 1, 1, 1, 1]], 3, 2, dim=8, media_dim=9, heads=3, head_dim=2),
        case([[0, 1, 1]], 1, 4, dim=5, media_dim=7, heads=1, head_dim=6),
        # A new block must change nothing, whatever its other weights are.
        case([[0, 1, 2]], 2, 2, ("attention_gate", "feed_forward_gate"), dim=6, media_dim=5, heads=2, head_dim=3),
    ]


GATED_CROSS_ATTENTION = Exercise(
    name="gated_cross_attention",
    chapter="03",
    title="Build It: gated cross-attention",
    difficulty="hard",
    minutes=35,
    points=5,
    attribute="GatedCrossAttention",
    twin="vlm_course.fusion:GatedCrossAttention",
    interface=ModuleInterface(
        constructor=dict.fromkeys(("dim", "media_dim", "heads", "head_dim"), "integer"),
        parameters=parameters,
        call={
            "text": "tensor [B, T, dim]",
            "media": "tensor [B, n_images, M, media_dim]",
            "mask": "tensor [B, T, n_images] of booleans",
        },
        returns="tensor [B, T, dim]",
        layouts=(as_declared, transposed, scalar_gates),
    ),
    oracle=oracle,
    cases=cases,
    mistakes=MISTAKES,
    also_correct={
        "written out": Block,
        "keys and values fused, gates as numbers": Fused,
        "image by image": ImageByImage,
    },
)
