"""Bridges: from a vision tower's features to a language model's embedding space.

`LinearBridge` and `VisionProjection` keep every patch, `pixel_shuffle` and `ShuffleProjection` trade patches for width,
and `PerceiverResampler` and `CAbstractor` compress any number of patches to a fixed number of visual tokens. `qformer`
has the bridge that also reads the question.
"""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.attention import attend
from vlm_course.validation import (
    checks,
    counts,
    require_divisible,
    require_grid,
    require_same_device,
    require_shape,
    require_square,
    takes,
)

TOWER = "was the bridge built for another vision tower?"


@counts(vision_dim=1, llm_dim=1)
@checks(
    takes(
        "B N D",
        lambda self: self.linear.weight,
        width=lambda self: self.linear.in_features,
        name="features",
        hint=TOWER,
    )
)
class LinearBridge(nn.Module):
    """One linear map. forward: features [B, N, D_vision] -> [B, N, D_llm].

    Source: Liu et al. 2023 (LLaVA, arXiv 2304.08485), section 4.1, the projection matrix W.
    """

    def __init__(self, vision_dim: int, llm_dim: int):
        super().__init__()
        self.linear = nn.Linear(vision_dim, llm_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)  # [B, N, D_vision] -> [B, N, D_llm]


@counts(vision_dim=1, llm_dim=1)
@checks(
    takes(
        "B N D",
        lambda self: self.mlp[0].weight,
        width=lambda self: self.mlp[0].in_features,
        name="features",
        hint=TOWER,
    )
)
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


def _check_latents(self: "PerceiverLayer", media: torch.Tensor, latents: torch.Tensor) -> None:
    width = self.to_q.in_features
    require_shape(media, "media", "B N D", D=width, hint=TOWER)
    require_shape(latents, "latents", "B M D", B=media.shape[0], D=width)
    require_same_device(media=media, latents=latents, **{"the layer": self.norm_media.weight})


@counts(dim=1, heads=1, head_dim=1, mlp_ratio=1)
@checks(_check_latents)
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
        read = attend(q, k, v)  # [B, H, M, d] x [B, H, N+M, d] -> [B, H, M, d]
        latents = latents + self.to_out(read.transpose(1, 2).flatten(2))  # [B, H, M, d] -> [B, M, D]
        return latents + self.feed_forward(latents)  # [B, M, D]


@counts(dim=1, queries=1, depth=1, heads=1, head_dim=1, mlp_ratio=1)
@checks(takes("B N D", lambda self: self.latents, name="features", hint=TOWER))
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


@checks(takes("B C H W", lambda self: self.weight, at=1))
class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a feature map. forward: [B, C, H, W] -> [B, C, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B, C, H, W] -> [B, H, W, C] -> back


@counts(channels=1, squeezed=1)
@checks(takes("B C H W", lambda self: self.squeeze.weight, width=lambda self: self.squeeze.in_channels, at=1))
class SqueezeExcite(nn.Module):
    """Scale every channel by a gate in (0, 1), computed from all channels' means. forward: [B, C, H, W] -> same.

    Source: Hu et al. 2018 (arXiv 1709.01507), section 3.
    """

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.excite(F.silu(self.squeeze(x.mean(dim=(2, 3), keepdim=True))))  # [B, C, H, W] -> [B, C, 1, 1]
        return x * gate.sigmoid()  # [B, C, H, W]


@counts(in_channels=1, channels=1)
@checks(takes("B C H W", lambda self: self.conv1.weight, width=lambda self: self.conv1.in_channels, at=1))
class RegBlock(nn.Module):
    """RegNet's bottleneck block with LayerNorm and SiLU. forward: [B, C_in, H, W] -> [B, C_out, H, W].

    1x1 convolution, 3x3 depthwise convolution, squeeze-and-excite, 1x1 convolution, plus a shortcut.
    Source: Radosavovic et al. 2020 (RegNet, arXiv 2003.13678), figure 4, as Honeybee uses it.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm1 = LayerNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm2 = LayerNorm2d(channels)
        self.squeeze_excite = SqueezeExcite(channels, max(1, round(in_channels / 4)))
        self.conv3 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm3 = LayerNorm2d(channels)
        self.shortcut = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), LayerNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.norm1(self.conv1(x)))  # [B, C_in, H, W] -> [B, C, H, W]
        y = F.silu(self.norm2(self.conv2(y)))  # each pixel looks at its 3x3 neighbourhood, channel by channel
        y = self.norm3(self.conv3(self.squeeze_excite(y)))  # [B, C, H, W]
        return F.silu(y + self.shortcut(x))


def _check_grid(self: "CAbstractor", features: torch.Tensor) -> None:
    rows, cols = self.grid
    hint = f"the bridge was built for a grid of {rows} x {cols} patches of its tower: was CLS left in, or N changed?"
    require_shape(features, "features", "B N D", N=rows * cols, D=self.vision_dim, hint=hint)
    require_same_device(features=features, **{"the bridge": self.mlp[0].weight})


def _check_abstractor(self, *, queries: int, grid: int | tuple[int, int], **rest: object) -> None:
    require_grid((grid, grid) if isinstance(grid, int) else grid, "grid")


@counts(vision_dim=1, llm_dim=1, queries=1, hidden=1, depth=1, mlp_depth=1)
@checks(_check_grid, init=_check_abstractor)
class CAbstractor(nn.Module):
    """Convolutions around an average pool: locality kept, any number of tokens. forward: [B, N, D] -> [B, M, D_llm].

    `grid` is (rows, columns) of the patches, one number for a square; `queries` = M must be a square number.
    `positions=True` adds a learned position to every patch first. Raises ValueError for another grid or width.
    Source: Cha et al. 2024 (Honeybee, arXiv 2312.06742), section 3.3.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        llm_dim: int,
        queries: int,
        hidden: int = 1024,
        depth: int = 3,
        mlp_depth: int = 2,
        grid: int | tuple[int, int],
        positions: bool = False,
    ):
        super().__init__()
        self.vision_dim = vision_dim
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
        side = require_square(queries, "queries", hint="the tokens are pooled on a square grid")
        cells = self.grid[0] * self.grid[1]
        self.positions = nn.Parameter(torch.randn(cells, vision_dim) * 0.02) if positions else None
        self.before = nn.Sequential(*(RegBlock(hidden if i else vision_dim, hidden) for i in range(depth)))
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.after = nn.Sequential(*(RegBlock(hidden, hidden) for _ in range(depth)))
        layers = [nn.Linear(hidden, llm_dim)]
        for _ in range(mlp_depth - 1):
            layers += [nn.SiLU(), nn.Linear(llm_dim, llm_dim)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.positions is not None:
            features = features + self.positions  # [B, N, D] + [N, D]
        x = features.transpose(1, 2).unflatten(2, self.grid)  # [B, N, D] -> [B, D, rows, cols]
        x = self.after(self.pool(self.before(x)))  # [B, D, rows, cols] -> [B, hidden, sqrt(M), sqrt(M)]
        return self.mlp(x.flatten(2).transpose(1, 2))  # [B, hidden, sqrt(M), sqrt(M)] -> [B, M, D_llm]


def _check_shuffle(x: torch.Tensor, factor: int = 2, *, grid: tuple[int, int] | None = None) -> None:
    require_shape(x, "x", "B N D", floating=None)
    N = x.shape[1]
    if grid is None:
        side = require_square(N, "N", hint="was CLS left in? For another shape pass grid=(rows, columns)")
        grid = (side, side)
    require_grid(grid, "grid")
    if grid[0] * grid[1] != N:
        cells = grid[0] * grid[1]
        raise ValueError(f"x has N = {N} patches, but the grid {tuple(grid)} has {cells} cells; was CLS left in?")
    for size, name in zip(grid, ("rows", "columns"), strict=True):
        require_divisible(size, factor, f"the grid's number of {name}", "factor", hint="pad the image first")


@counts(factor=1)
@checks(_check_shuffle)
def pixel_shuffle(x: torch.Tensor, factor: int = 2, *, grid: tuple[int, int] | None = None) -> torch.Tensor:
    """Put each square of factor x factor patches side by side in one wider token: no value is lost.

    Args: x [B, N, D]; grid (rows, columns), by default the square of N. Returns [B, N / factor**2, factor**2 * D],
    in the order (row in square, column in square, channel). Raises ValueError when the factor does not divide the grid.
    Source: Shi et al. 2016 (arXiv 1609.05158), section 3.2, in reverse; Chen et al. 2024 (InternVL 1.5,
    arXiv 2404.16821), section 3.1.
    """
    B, N, D = x.shape
    rows, cols = grid or (isqrt(N), isqrt(N))
    f = factor
    x = x.reshape(B, rows // f, f, cols // f, f, D)  # [B, N, D] -> [B, rows/f, f, cols/f, f, D]
    x = x.transpose(2, 3)  # [B, rows/f, f, cols/f, f, D] -> [B, rows/f, cols/f, f, f, D]
    return x.reshape(B, N // f**2, f**2 * D)  # [B, rows/f, cols/f, f, f, D] -> [B, N/f**2, f**2*D]


def _check_shuffled(self: "ShuffleProjection", features: torch.Tensor) -> None:
    width = self.mlp[0].normalized_shape[0] // self.factor**2
    require_shape(features, "features", "B N D", D=width, hint="was the bridge built for another vision tower?")
    require_same_device(features=features, **{"the bridge": self.mlp[1].weight})


@counts(vision_dim=1, llm_dim=1, factor=1)
@checks(_check_shuffled)
class ShuffleProjection(nn.Module):
    """InternVL's bridge: pixel shuffle, LayerNorm, MLP. forward: [B, N, D_vision] -> [B, N / factor**2, D_llm].

    N must be a square whose side `factor` divides. Source: Chen et al. 2024 (InternVL 1.5, arXiv 2404.16821),
    section 3.1, and its released code for the LayerNorm.
    """

    def __init__(self, vision_dim: int, llm_dim: int, *, factor: int = 2):
        super().__init__()
        self.factor = factor
        self.mlp = nn.Sequential(
            nn.LayerNorm(factor**2 * vision_dim),
            nn.Linear(factor**2 * vision_dim, llm_dim),
            nn.GELU(),
            nn.Linear(llm_dim, llm_dim),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.mlp(pixel_shuffle(features, self.factor))  # [B, N, D] -> [B, N/f**2, f**2*D] -> [B, N/f**2, D_llm]
