"""Emu's causal transformer: an image as a short sequence in which each embedding follows from those before it.

A language model that predicts the next element needs an order, which a grid of patches lacks. Learned queries under a
causal mask give it one: the first embedding knows nothing of the second. The net is a T5 decoder.
Sources: Sun et al. 2024 (Emu, ICLR, arXiv 2307.05222), section 2.1; baaivision/Emu at a8bd539, Emu1/models,
causal_former.py (T5-base, without its word embeddings) and modeling_emu.py; Raffel et al. 2020 (T5), section 2.1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.attention import causal_mask
from vlm_course.decoder import RMSNorm
from vlm_course.validation import checks, counts, require_divisible, require_same_device, require_shape


def _check_buckets(length: int, *, buckets: int = 32, max_distance: int = 128) -> None:
    require_divisible(buckets, 2, "buckets", "2", hint="half of them are single distances")
    if max_distance <= buckets // 2:
        raise ValueError(
            f"max_distance is {max_distance}, expected more than the {buckets // 2} distances with buckets of their own"
        )


@counts(length=1, buckets=2, max_distance=2)
@checks(_check_buckets)
def distance_buckets(length: int, *, buckets: int = 32, max_distance: int = 128) -> Tensor:
    """T5's bucket for every pair of a query and an earlier key: [length, length] integers, 0 where the key is later.

    Distances below buckets / 2 have a bucket each, longer ones share buckets that widen logarithmically up to
    `max_distance`, and all beyond it share the last.
    """
    place = torch.arange(length)
    distance = (place[:, None] - place[None, :]).clamp(min=0)  # [T, T]
    exact = buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)  # 0 at exact, 1 at the end
    far = (exact + (far * (buckets - exact)).long()).clamp(max=buckets - 1)
    return torch.where(distance < exact, distance, far)


def _check_attention(self: "T5Attention", x: Tensor, context: Tensor, bias: Tensor | None = None) -> None:
    require_shape(x, "x", "B T D", D=self.to_q.in_features)
    require_shape(context, "context", "B S C", B=x.shape[0], C=self.to_k.in_features)
    require_same_device(x=x, context=context, **{"the layer": self.to_q.weight})
    if bias is not None:
        require_shape(bias, "bias", "H T S", H=self.heads, T=x.shape[1], S=context.shape[1])
        require_same_device(x=x, bias=bias)


def _check_attention_sizes(self, dim: int, context_dim: int, heads: int) -> None:
    require_divisible(dim, heads, "dim", "heads")


@counts(dim=1, context_dim=1, heads=1)
@checks(_check_attention, init=_check_attention_sizes)
class T5Attention(nn.Module):
    """Attention without biases and without division by sqrt(head_dim). forward: x [B, T, D], context [B, S, C],
    bias [H, T, S], which is added to the scores and -inf where a query may not look -> [B, T, D]."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, D] -> [B, H, T, d]
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        scores = q @ k.transpose(-2, -1)  # [B, H, T, d] x [B, H, S, d] -> [B, H, T, S]
        if bias is not None:
            scores = scores + bias
        read = scores.softmax(dim=-1) @ v  # [B, H, T, S] x [B, H, S, d] -> [B, H, T, d]
        return self.to_out(read.transpose(1, 2).flatten(2))  # [B, H, T, d] -> [B, T, D]


def _check_layer(self: "CausalFormerLayer", x: Tensor, features: Tensor, bias: Tensor) -> None:
    _check_attention(self.attention, x, x, bias)
    _check_attention(self.cross_attention, x, features)


def _check_layer_sizes(self, *, dim: int, heads: int, **rest: object) -> None:
    require_divisible(dim, heads, "dim", "heads")


@counts(dim=1, vision_dim=1, heads=1, mlp_width=1)
@checks(_check_layer, init=_check_layer_sizes)
class CausalFormerLayer(nn.Module):
    """Causal self-attention, cross-attention to the image, a feed-forward net with ReLU; a norm before each.

    forward: x [B, M, D], features [B, N, D_vision], bias [H, M, M] -> [B, M, D].
    """

    def __init__(self, *, dim: int, vision_dim: int, heads: int, mlp_width: int):
        super().__init__()
        self.norm_self, self.norm_cross, self.norm_mlp = (RMSNorm(dim, 1e-6) for _ in range(3))
        self.attention = T5Attention(dim, dim, heads)
        self.cross_attention = T5Attention(dim, vision_dim, heads)
        self.fc1 = nn.Linear(dim, mlp_width, bias=False)
        self.fc2 = nn.Linear(mlp_width, dim, bias=False)

    def forward(self, x: Tensor, features: Tensor, bias: Tensor) -> Tensor:
        y = self.norm_self(x)
        x = x + self.attention(y, y, bias)  # [B, M, D]
        x = x + self.cross_attention(self.norm_cross(x), features)  # [B, M, D], reading [B, N, D_vision]
        return x + self.fc2(F.relu(self.fc1(self.norm_mlp(x))))  # [B, M, D] -> [B, M, hidden] -> [B, M, D]


def _check_forward(self: "CausalFormer", features: Tensor) -> None:
    hint = "was the bridge built for another vision tower?"
    width = self.norm_features.normalized_shape[0]
    require_shape(features, "features", "B N D", D=width, hint=hint)
    require_same_device(features=features, bridge=self.queries)


def _check_sizes(
    self, vision_dim: int, llm_dim: int, *, dim: int = 768, heads: int = 12, buckets: int = 32,
    max_distance: int = 128, **rest: object,
) -> None:  # fmt: skip
    require_divisible(dim, heads, "dim", "heads")
    _check_buckets(1, buckets=buckets, max_distance=max_distance)


@checks(_check_forward, init=_check_sizes)
@counts(vision_dim=1, llm_dim=1, queries=1, dim=1, layers=1, heads=1, mlp_width=1, buckets=2, max_distance=2)
class CausalFormer(nn.Module):
    """`queries` causal visual embeddings of an image. forward: features [B, N, D_vision] -> [B, queries, D_llm].

    The patches have no order here, and are all seen by every query; the queries are ordered, and the relative position
    bias of the first layer serves all. The features are normalised first, as Emu does outside its module. The defaults
    are Emu's: T5-base and 32 queries.
    """

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        *,
        queries: int = 32,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_width: int = 3072,
        buckets: int = 32,
        max_distance: int = 128,
    ):
        super().__init__()
        self.max_distance = max_distance
        self.norm_features = nn.LayerNorm(vision_dim, eps=1e-6)
        self.queries = nn.Parameter(torch.randn(queries, dim) * 0.02)
        self.distance_bias = nn.Embedding(buckets, heads)
        self.layers = nn.ModuleList(
            CausalFormerLayer(dim=dim, vision_dim=vision_dim, heads=heads, mlp_width=mlp_width) for _ in range(layers)
        )
        self.norm = RMSNorm(dim, 1e-6)
        self.project = nn.Linear(dim, llm_dim)

    def self_bias(self) -> Tensor:
        """What is added to the scores of queries among themselves: [H, M, M], -inf for later ones."""
        M = len(self.queries)
        buckets = distance_buckets(M, buckets=self.distance_bias.num_embeddings, max_distance=self.max_distance)
        bias = self.distance_bias(buckets.to(self.queries.device)).permute(2, 0, 1)  # [M, M] -> [M, M, H] -> [H, M, M]
        return bias.masked_fill(~causal_mask(M, device=bias.device), -math.inf)

    def forward(self, features: Tensor) -> Tensor:
        features = self.norm_features(features)  # [B, N, D_vision]
        x = self.queries.expand(len(features), -1, -1)  # [M, D] -> [B, M, D]
        bias = self.self_bias()  # [H, M, M]
        for layer in self.layers:
            x = layer(x, features, bias)  # [B, M, D]
        return self.project(self.norm(x))  # [B, M, D] -> [B, M, D_llm]
