"""What a bridge costs, and how the tokens behind it relate to the words: the measurements of chapter 2.

Costs are counted on the meta device, so that a 13B bridge takes no memory, with torch's own operation counter:
2 FLOPs a multiply-add of matrix products, convolutions and attention; norms, biases, activations, pooling are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlm_course.bridges import CAbstractor, LinearBridge, PerceiverResampler, VisionProjection
from vlm_course.validation import require_shape, require_square

LLAVA_TOKENS, LLAVA_VISION = 576, 1024  # CLIP ViT-L/14 at 336 px: (336 / 14)^2 patches of width 1024


@dataclass(frozen=True)
class BridgeCost:
    """One bridge at one size: trainable parameters, visual tokens it hands on, FLOPs for one image."""

    name: str
    parameters: int
    tokens: int
    flops: int

    @property
    def gigaflops(self) -> float:
        return self.flops / 1e9


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def bridge_cost(name: str, build: Callable[[], nn.Module], *, tokens: int, vision_dim: int) -> BridgeCost:
    """Build a bridge on the meta device, push the features of one image [1, tokens, vision_dim] through, and count."""
    with torch.device("meta"):
        bridge, features = build(), torch.empty(1, tokens, vision_dim)
    with FlopCounterMode(display=False) as counter:
        out = bridge(features)  # [1, N, D_vision] -> [1, M, D_llm]
    return BridgeCost(name, count_parameters(bridge), out.shape[1], counter.get_total_flops())


def reading_flops(decoder: nn.Module, tokens: int) -> int:
    """FLOPs of a decoder's blocks for reading `tokens` visual tokens at once: 2 for each weight and each token.

    Attention scores and the head are left out; at 576 tokens the scores would add 2 % to a 7B model.
    """
    return 2 * tokens * sum(count_parameters(block) for block in decoder.blocks)


@torch.no_grad()
def milliseconds(bridge: nn.Module, features: Tensor, repeats: int = 5) -> float:
    """Time of one forward pass, the fastest of several, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        bridge(features)  # [B, N, D_vision] -> [B, M, D_llm]
        times.append(time.perf_counter() - start)
    return 1000 * min(times[1:])


def resampler_bridge(vision_dim: int, llm_dim: int, **resampler) -> nn.Sequential:
    """A Perceiver resampler at the tower's width, then one linear map to the language model's."""
    return nn.Sequential(PerceiverResampler(dim=vision_dim, **resampler), LinearBridge(vision_dim, llm_dim))


def four_bridges(vision_dim: int = LLAVA_VISION, llm_dim: int = 4096) -> dict[str, Callable[[], nn.Module]]:
    """The bridges that the chapter compares, at the sizes of LLaVA-1.5: name -> constructor without arguments.

    The resampler has Flamingo's 64 queries and 6 layers at the tower's width; the C-Abstractor has Honeybee's sizes
    (Cha et al. 2024, arXiv 2312.06742: hidden 1024, depth 3, MLP depth 2, 144 queries).
    """
    heads = {"heads": 16, "head_dim": vision_dim // 16}
    return {
        "linear": lambda: LinearBridge(vision_dim, llm_dim),
        "MLP": lambda: VisionProjection(vision_dim, llm_dim),
        "Perceiver resampler": lambda: resampler_bridge(vision_dim, llm_dim, queries=64, depth=6, **heads),
        "C-Abstractor": lambda: CAbstractor(vision_dim=vision_dim, llm_dim=llm_dim, queries=144, grid=24),
    }


def rotation(basis: Tensor, degrees: float, planes: int) -> Tensor:
    """The orthogonal matrix [D, D] that turns the first `planes` planes of an orthonormal basis by an angle.

    Columns 2i and 2i + 1 of `basis` [D, D] span plane i. With planes = D / 2 every vector turns by exactly `degrees`.
    Raises ValueError for more planes than the space has.
    """
    width = require_square(basis.numel(), "the number of entries of the basis")
    if not 0 <= planes <= width // 2:
        raise ValueError(f"a space of width {width} has {width // 2} planes at right angles, asked for {planes}")
    angle = torch.deg2rad(torch.tensor(float(degrees), dtype=basis.dtype))
    turn = torch.eye(width, dtype=basis.dtype)
    first, second = torch.arange(0, 2 * planes, 2), torch.arange(1, 2 * planes, 2)
    turn[first, first] = turn[second, second] = angle.cos()
    turn[first, second], turn[second, first] = -angle.sin(), angle.sin()
    return basis @ turn @ basis.T  # [D, D]


def principal_basis(tokens: Tensor) -> Tensor:
    """Orthonormal directions of tokens [n, D] as columns [D, D]: those that carry most squared length come first."""
    require_shape(tokens, "tokens", "n D")
    return torch.linalg.eigh(tokens.T.double() @ tokens.double()).eigenvectors.flip(-1).to(tokens.dtype)


def rotated_bridge(bridge: VisionProjection, turn: Tensor) -> VisionProjection:
    """The bridge with its outputs turned by an orthogonal matrix [D, D]: same class, same sizes, other numbers."""
    last = bridge.mlp[-1]
    rotated = VisionProjection(bridge.mlp[0].in_features, last.out_features)
    rotated.load_state_dict(bridge.state_dict())
    with torch.no_grad():
        rotated.mlp[-1].weight.copy_(turn @ last.weight)  # R (W h + b) = (R W) h + R b
        rotated.mlp[-1].bias.copy_(turn @ last.bias)
    return rotated.requires_grad_(False)


def block_average(tokens: Tensor, block: int) -> Tensor:
    """Give every token of a square grid the mean of its block x block neighbours: [B, N, D] -> [B, N, D].

    The number of tokens stays, so that a decoder sees the positions that it knows; (grid / block)^2 of them differ.
    Raises ValueError when the grid is not square or the block does not divide it.
    """
    require_shape(tokens, "tokens", "B N D")
    side = require_square(tokens.shape[1], "the number of tokens", hint="was the class token left in?")
    if side % block:
        raise ValueError(f"a grid of {side} x {side} tokens cannot be cut into blocks of {block} x {block}")
    grid = tokens.unflatten(1, (side // block, block, side // block, block))  # [B, N, D] -> [B, r, b, r, b, D]
    mean = grid.mean(dim=(2, 4), keepdim=True)  # [B, r, b, r, b, D] -> [B, r, 1, r, 1, D]
    return mean.expand_as(grid).reshape(tokens.shape)  # [B, N, D]


def cosine_table(tokens: Tensor, words: Tensor) -> Tensor:
    """Cosine of every token with every word: [n, D], [V, D] -> [n, V]."""
    unit = nn.functional.normalize
    return unit(tokens, dim=-1) @ unit(words, dim=-1).T
