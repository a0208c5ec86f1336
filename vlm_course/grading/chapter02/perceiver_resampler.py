"""Exercise (bonus): a Perceiver resampler, any number of tokens in and a fixed number out."""

import math

import torch

from vlm_course.grading.chapter02.resampler_answers import MISTAKES, ByHand, OneClass, latents_first
from vlm_course.grading.exercise import Case, Exercise, ModuleInterface, Shape, Tensors, as_declared, transposed


def parameters(construct: dict) -> dict[str, Shape]:
    dim, width = construct["dim"], construct["heads"] * construct["head_dim"]
    wide = construct["mlp_ratio"] * dim
    shapes: dict[str, Shape] = {"latents": (construct["queries"], dim)}
    for i in range(construct["depth"]):
        shapes |= {
            f"layers.{i}.norm_{part}.{kind}": (dim,) for part in ("media", "latents") for kind in ("weight", "bias")
        }
        shapes |= {f"layers.{i}.to_{part}.weight": (width, dim) for part in "qkv"}
        shapes |= {f"layers.{i}.to_out.weight": (dim, width)}
        shapes |= {f"layers.{i}.feed_forward.0.{kind}": (dim,) for kind in ("weight", "bias")}
        shapes |= {f"layers.{i}.feed_forward.1.weight": (wide, dim), f"layers.{i}.feed_forward.3.weight": (dim, wide)}
    return shapes | {"norm.weight": (dim,), "norm.bias": (dim,)}


def fused_keys_and_values(values: Tensors) -> Tensors:
    """Keys and values as the two halves of one matrix, as in the first published code."""
    fused = {}
    for name, value in values.items():
        if ".to_k." in name:
            value = torch.cat([value, values[name.replace(".to_k.", ".to_v.")]])
            name = name.replace(".to_k.", ".to_kv.")
        if ".to_v." not in name:
            fused[name] = value
    return fused


def _norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean()
    return centred / math.sqrt(float((centred**2).mean()) + 1e-5) * scale + shift


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([h * 0.5 * (1 + math.erf(h / math.sqrt(2))) for h in x.tolist()], dtype=torch.float64)


def oracle(values: Tensors, construct: dict, media: torch.Tensor) -> torch.Tensor:
    """One image, one latent, one head at a time."""
    heads, head_dim = construct["heads"], construct["head_dim"]
    images = []
    for image in media.double():
        latents = list(values["latents"])
        for i in range(construct["depth"]):
            layer = {name.removeprefix(f"layers.{i}."): value for name, value in values.items()}
            seen = [_norm(x, layer["norm_media.weight"], layer["norm_media.bias"]) for x in image]
            own = [_norm(x, layer["norm_latents.weight"], layer["norm_latents.bias"]) for x in latents]
            for m, latent in enumerate(own):
                read = []
                for h in range(heads):
                    rows = slice(h * head_dim, (h + 1) * head_dim)
                    query = layer["to_q.weight"][rows] @ latent
                    scores = [float(query @ (layer["to_k.weight"][rows] @ x)) / math.sqrt(head_dim) for x in seen + own]
                    weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                    seen_values = [layer["to_v.weight"][rows] @ x for x in seen + own]
                    read.append(sum(w * v for w, v in zip(weights, seen_values, strict=True)))
                latents[m] = latents[m] + layer["to_out.weight"] @ torch.cat(read)
            for m, latent in enumerate(latents):
                inside = _norm(latent, layer["feed_forward.0.weight"], layer["feed_forward.0.bias"])
                inside = layer["feed_forward.3.weight"] @ _gelu(layer["feed_forward.1.weight"] @ inside)
                latents[m] = latent + inside
        images.append(torch.stack([_norm(x, values["norm.weight"], values["norm.bias"]) for x in latents]))
    return torch.stack(images)


def cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(tokens: int, batch: int, **construct: int) -> Case:
        # Off centre and wide, so that a missing norm shows.
        media = 1 + 2 * torch.randn(batch, tokens, construct["dim"], generator=generator)
        return Case({"media": media}, construct)

    # heads * head_dim is never dim, and heads never head_dim: equal numbers hide exchanged ones.
    return [
        case(9, 2, dim=6, queries=4, depth=1, heads=2, head_dim=5, mlp_ratio=3),
        case(5, 3, dim=8, queries=7, depth=2, heads=3, head_dim=4, mlp_ratio=2),
        case(16, 2, dim=6, queries=3, depth=2, heads=4, head_dim=2, mlp_ratio=4),
    ]


PERCEIVER_RESAMPLER = Exercise(
    name="perceiver_resampler",
    chapter="02",
    title="Bonus Build It: a Perceiver resampler",
    difficulty="hard",
    minutes=45,
    points=5,
    attribute="PerceiverResampler",
    twin="vlm_course.bridges:PerceiverResampler",
    forbidden=("vlm_course.bridges:PerceiverLayer",),
    interface=ModuleInterface(
        constructor=dict.fromkeys(("dim", "queries", "depth", "heads", "head_dim", "mlp_ratio"), "integer"),
        parameters=parameters,
        call={"media": "tensor [B, N, dim]"},
        returns="tensor [B, queries, dim]",
        layouts=(as_declared, transposed, fused_keys_and_values),
    ),
    oracle=oracle,
    cases=cases,
    mistakes=MISTAKES,
    # The order of media and latents among the keys makes no difference to attention, so it is not a mistake.
    also_correct={"one class, keys and values fused": OneClass, "by hand": ByHand, "latents first": latents_first},
)
