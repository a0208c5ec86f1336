"""The Q-Former: learned queries in a BERT that reads the image in every other layer and, in InstructBLIP, the question.

Sources: Li et al. 2023 (BLIP-2, arXiv 2301.12597), section 3.1 and figure 2; Dai et al. 2023 (InstructBLIP,
arXiv 2305.06500), section 2.3 and figure 3, for the instruction that the queries see.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.attention import attend, padding_mask
from vlm_course.validation import (
    checks,
    counts,
    require_count,
    require_divisible,
    require_number,
    require_same_device,
    require_shape,
    takes,
)


def _check_read(self: "PostNormAttention", x: Tensor, context: Tensor, mask: Tensor | None = None) -> None:
    require_shape(x, "x", "B T D", D=self.to_q.in_features)
    require_shape(context, "context", "B S C", B=x.shape[0], C=self.to_k.in_features)
    require_same_device(x=x, context=context, **{"the layer": self.norm.weight})


def _check_attention(self, dim: int, context_dim: int, heads: int, norm_eps: float) -> None:
    require_divisible(dim, heads, "dim", "heads")
    require_number(norm_eps, "norm_eps", low=0)


@counts(dim=1, context_dim=1, heads=1)
@checks(_check_read, init=_check_attention)
class PostNormAttention(nn.Module):
    """BERT's attention: residual first, LayerNorm after it. forward: x [B, T, D], context [B, S, C] -> [B, T, D].

    `mask` is boolean and broadcasts to [B, heads, T, S]. With x itself as context this is self-attention.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, norm_eps: float):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(context_dim, dim)
        self.to_v = nn.Linear(context_dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, D] -> [B, H, T, d]
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        read = attend(q, k, v, mask=mask)  # [B, H, T, d] x [B, H, S, d] -> [B, H, T, d]
        return self.norm(x + self.to_out(read.transpose(1, 2).flatten(2)))  # [B, H, T, d] -> [B, T, D]


def _check_mlp(self, dim: int, hidden: int, norm_eps: float) -> None:
    require_number(norm_eps, "norm_eps", low=0)


@counts(dim=1, hidden=1)
@checks(takes("B T D", lambda self: self.norm.weight), init=_check_mlp)
class PostNormMLP(nn.Module):
    """BERT's feed-forward net: exact GELU, residual, LayerNorm. forward: [B, T, D] -> [B, T, D]."""

    def __init__(self, dim: int, hidden: int, norm_eps: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.fc2(F.gelu(self.fc1(x))))  # [B, T, D] -> [B, T, hidden] -> [B, T, D]


def _check_layer(self: "QFormerLayer", x: Tensor, features: Tensor, queries: int, mask: Tensor | None) -> None:
    require_shape(x, "x", "B T D", D=self.attention.norm.weight.shape[0])
    require_count(queries, "queries")
    if queries > x.shape[1]:
        raise ValueError(f"queries is {queries}, but x has only {x.shape[1]} tokens, queries and words together")
    if self.cross_attention is not None:
        _check_read(self.cross_attention, x, features)


def _check_layer_sizes(self, *, dim: int, heads: int, norm_eps: float, **rest: object) -> None:
    require_divisible(dim, heads, "dim", "heads")
    require_number(norm_eps, "norm_eps", low=0)


@counts(dim=1, vision_dim=1, heads=1, mlp_width=1)
@checks(_check_layer, init=_check_layer_sizes)
class QFormerLayer(nn.Module):
    """Queries and words attend to each other; then the queries alone read the image, in the layers that have eyes.

    forward: x [B, M + T, D], features [B, N, D_vision], queries = M -> [B, M + T, D]. Queries and words have
    feed-forward nets of their own.
    """

    def __init__(
        self, *, dim: int, vision_dim: int, heads: int, mlp_width: int, reads: bool, words: bool, norm_eps: float
    ):
        super().__init__()
        self.attention = PostNormAttention(dim, dim, heads, norm_eps)
        self.cross_attention = PostNormAttention(dim, vision_dim, heads, norm_eps) if reads else None
        self.mlp_queries = PostNormMLP(dim, mlp_width, norm_eps)
        self.mlp_words = PostNormMLP(dim, mlp_width, norm_eps) if words else None

    def forward(self, x: Tensor, features: Tensor, queries: int, mask: Tensor | None) -> Tensor:
        x = self.attention(x, x, mask)  # [B, M + T, D]
        read, words = x[:, :queries], x[:, queries:]  # [B, M, D], [B, T, D]
        if self.cross_attention is not None:
            read = self.cross_attention(read, features)
        read = self.mlp_queries(read)
        return read if words.shape[1] == 0 else torch.cat([read, self.mlp_words(words)], dim=1)


def _check_forward(self: "QFormer", features: Tensor, ids: Tensor | None = None, attention_mask: Tensor | None = None):
    hint = "was the bridge built for another vision tower?"
    require_shape(features, "features", "B N D", D=self.vision_dim, hint=hint)
    require_same_device(features=features, bridge=self.queries)
    if attention_mask is not None and ids is None:
        raise ValueError("got an attention_mask but 0 ids: the mask marks the padding of the instruction")
    if ids is None:
        return
    if self.words is None:
        raise ValueError("got an instruction, but the bridge has a vocabulary of 0 words: give vocab_size")
    require_shape(ids, "ids", "B T", floating=False, B=features.shape[0])
    require_same_device(ids=ids, bridge=self.queries)
    if ids.shape[1] > len(self.positions):
        raise ValueError(
            f"the instruction has {ids.shape[1]} tokens, but there are positions for {len(self.positions)}"
        )
    if attention_mask is not None:
        require_shape(attention_mask, "attention_mask", "B T", floating=None, B=ids.shape[0], T=ids.shape[1])
        require_same_device(attention_mask=attention_mask, bridge=self.queries)


def _check_sizes(self, *, dim: int = 768, heads: int = 12, norm_eps: float = 1e-12, **rest: object) -> None:
    require_divisible(dim, heads, "dim", "heads")
    require_number(norm_eps, "norm_eps", low=0)


@checks(_check_forward, init=_check_sizes)
@counts(dim=1, vision_dim=1, queries=1, layers=1, heads=1, mlp_width=1, cross_every=1, vocab_size=0, max_length=1)
class QFormer(nn.Module):
    """`queries` visual tokens that a language model's question has shaped. forward: features [B, N, D_vision], ids
    [B, T] (or None), attention_mask [B, T] (True for real tokens, or None) -> [B, queries, D].

    Every `cross_every`-th layer, the first included, reads the image. `vocab_size` = 0 leaves out all that serves the
    instruction, which is BLIP-2's Q-Former at inference; the words need not be the language model's own. A linear map
    (`LinearBridge`) then leads to the width of the language model. The defaults are those of both papers' models.
    Raises ValueError for an instruction longer than `max_length`, or without a vocabulary.
    """

    def __init__(
        self,
        *,
        dim: int = 768,
        vision_dim: int = 1408,
        queries: int = 32,
        layers: int = 12,
        heads: int = 12,
        mlp_width: int = 3072,
        cross_every: int = 2,
        vocab_size: int = 0,
        max_length: int = 512,
        norm_eps: float = 1e-12,
    ):
        super().__init__()
        self.vision_dim = vision_dim
        self.queries = nn.Parameter(torch.randn(queries, dim) * 0.02)
        self.words = nn.Embedding(vocab_size, dim) if vocab_size else None
        self.positions = nn.Parameter(torch.randn(max_length, dim) * 0.02) if vocab_size else None
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.layers = nn.ModuleList(
            QFormerLayer(
                dim=dim,
                vision_dim=vision_dim,
                heads=heads,
                mlp_width=mlp_width,
                reads=layer % cross_every == 0,
                words=vocab_size > 0,
                norm_eps=norm_eps,
            )
            for layer in range(layers)
        )
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and name not in ("queries", "positions"):
                nn.init.normal_(parameter, std=0.02)

    def forward(self, features: Tensor, ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        M = len(self.queries)
        x = self.queries.expand(len(features), -1, -1)  # [M, D] -> [B, M, D]
        if ids is not None:
            words = self.words(ids) + self.positions[: ids.shape[1]]  # [B, T] -> [B, T, D]
            x = torch.cat([x, words], dim=1)  # [B, M, D], [B, T, D] -> [B, M + T, D]
        mask = None
        if attention_mask is not None:
            mask = padding_mask(F.pad(attention_mask.bool(), (M, 0), value=True))  # [B, T] -> [B, 1, 1, M + T]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, features, M, mask)  # [B, M + T, D]
        return x[:, :M]  # the words have done their part
