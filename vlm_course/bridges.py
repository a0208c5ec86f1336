"""Bridges: from a vision tower's features to a language model's embedding space.

`LinearBridge` and `VisionProjection` keep every patch, `pixel_shuffle` trades patches for width, and
`PerceiverResampler` and `CAbstractor` compress any number of patches to a fixed number of visual tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.validation import checks, require_shape


def _width(expected: Callable[[nn.Module], int]) -> Callable[..., None]:
    hint = "was the bridge built for another vision tower?"
    return lambda self, features: require_shape(features, "features", "B N D", D=expected(self), hint=hint)


@checks(_width(lambda self: self.linear.in_features))
class LinearBridge(nn.Module):
    """One linear map. forward: features [B, N, D_vision] -> [B, N, D_llm].

    Source: Liu et al. 2023 (LLaVA, arXiv 2304.08485), section 4.1, the projection matrix W.
    """

    def __init__(self, vision_dim: int, llm_dim: int):
        super().__init__()
        self.linear = nn.Linear(vision_dim, llm_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)  # [B, N, D_vision] -> [B, N, D_llm]


@checks(_width(lambda self: self.mlp[0].in_features))
class VisionProjection(nn.Module):
    """Two linear maps with an exact GELU between. forward: features [B, N, D_vision] -> [B, N, D_llm].

    Source: Liu et al. 2024 (LLaVA-1.5, arXiv 2310.03744), section 3.2, the MLP projector.
    """

    def __init__(self, vision_dim: int, llm_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(vision_dim, llm_dim),
            nn.GELU(),
            nn.Linear(llm_dim, llm_dim),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.mlp(features)  # [B, N, D_vision] -> [B, N, D_llm]


class PerceiverLayer(nn.Module):
    """One layer of the resampler: the latents read the media and themselves, then pass a feed-forward net.

    forward: media [B, N, D], latents [B, M, D] -> latents [B, M, D]. No biases but the LayerNorms'.
    """

    def __init__(self, *, dim: int, heads: int, head_dim: int, mlp_ratio: int, activation: type[nn.Module]):
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, mlp_ratio * dim, bias=False),
            activation(),
            nn.Linear(mlp_ratio * dim, dim, bias=False),
        )

    def forward(self, media: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        queries = self.norm_latents(latents)  # [B, M, D]
        context = torch.cat([self.norm_media(media), queries], dim=1)  # [B, N, D], [B, M, D] -> [B, N+M, D]
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, H*d] -> [B, H, T, d]
            for x in (self.to_q(queries), self.to_k(context), self.to_v(context))
        )
        read = F.scaled_dot_product_attention(q, k, v)  # [B, H, M, d] x [B, H, N+M, d] -> [B, H, M, d]
        latents = latents + self.to_out(read.transpose(1, 2).flatten(2))  # [B, H, M, d] -> [B, M, D]
        return latents + self.feed_forward(latents)  # [B, M, D]


@checks(_width(lambda self: self.latents.shape[1]))
class PerceiverResampler(nn.Module):
    """Any number of features in, `queries` tokens out. forward: features [B, N, D] -> [B, queries, D].

    `queries` learned latents attend to the features and to each other. `activation=nn.ReLU` gives Idefics' version.
    Source: Alayrac et al. 2022 (Flamingo, arXiv 2204.14198), section 2.1 and appendix A.1.1 (without time embeddings).
    """

    def __init__(
        self,
        *,
        dim: int,
        queries: int,
        depth: int = 1,
        heads: int = 8,
        head_dim: int = 64,
        mlp_ratio: int = 4,
        activation: type[nn.Module] = nn.GELU,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(queries, dim))
        self.layers = nn.ModuleList(
            PerceiverLayer(dim=dim, heads=heads, head_dim=head_dim, mlp_ratio=mlp_ratio, activation=activation)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        latents = self.latents.expand(len(features), -1, -1)  # [M, D] -> [B, M, D]
        for layer in self.layers:
            latents = layer(features, latents)  # [B, N, D], [B, M, D] -> [B, M, D]
        return self.norm(latents)  # [B, M, D]
