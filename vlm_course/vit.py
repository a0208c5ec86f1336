"""The vision transformer, as CLIP has it: class token, a LayerNorm before the first block, quick GELU.

Sources: Dosovitskiy et al. 2021 (arXiv 2010.11929), section 3.1; Radford et al. 2021 (CLIP, arXiv 2103.00020),
section 2.4. LLaVA (Liu et al. 2023, arXiv 2304.08485, section 4.1) reads the last layer but one of this tower.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.attention import attend
from vlm_course.patches import PatchEmbedding, interpolate_positions
from vlm_course.validation import (
    checks,
    counts,
    method_checks,
    require_count,
    require_divisible,
    require_number,
    require_one_of,
    require_same_device,
    require_shape,
    takes,
)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's approximation of GELU, x * sigmoid(1.702 x). It is close to GELU, not equal: up to 0.02 apart."""
    return F.silu(1.702 * x, inplace=True).div_(1.702)  # the same, with one new array of the tower's widest


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@counts(patch_size=1, width=1, layers=1, heads=1, mlp_width=1, channels=1)
@dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision transformer. `image_size` is one number for a square or (height, width), in pixels."""

    image_size: int | tuple[int, int]
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    channels: int = 3
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    pre_norm: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int) and (
            not isinstance(self.image_size, Sequence) or len(self.image_size) != 2
        ):
            raise ValueError(f"image_size is {self.image_size}, expected one whole number or two, (height, width)")
        require_number(self.norm_eps, "norm_eps", low=0)
        for size, side in zip(self.image_hw, ("height", "width"), strict=True):
            require_count(size, f"image_size, the image's {side},")
            require_divisible(size, self.patch_size, f"the image's {side}", "patch_size")
        require_divisible(self.width, self.heads, "width", "heads")
        require_one_of(self.activation, "activation", ACTIVATIONS)

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]


def _check_heads(self, width: int, heads: int) -> None:
    require_divisible(width, heads, "width", "heads")


@counts(width=1, heads=1)
@checks(takes("B T D", lambda self: self.qkv.weight, width=lambda self: self.qkv.in_features), init=_check_heads)
class SelfAttention(nn.Module):
    """Multi-head self-attention with biases and one fused projection. forward: [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, *, is_causal: bool = False) -> torch.Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)  # [B, T, D] -> [B, T, 3, H, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, T, 3, H, d] -> 3 x [B, H, T, d]
        x = attend(q, k, v, is_causal=is_causal)  # -> [B, H, T, d]
        return self.out(x.transpose(1, 2).reshape(B, T, D))  # [B, H, T, d] -> [B, T, D]


def _check_mlp(self, width: int, mlp_width: int, activation: str) -> None:
    require_one_of(activation, "activation", ACTIVATIONS)


@counts(width=1, mlp_width=1)
@checks(takes("B T D", lambda self: self.fc1.weight, width=lambda self: self.fc1.in_features), init=_check_mlp)
class MLP(nn.Module):
    """Two linear maps with an activation between. forward: [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, mlp_width: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))  # [B, T, D] -> [B, T, mlp_width] -> [B, T, D]


def _check_block(self, *, width: int, heads: int, mlp_width: int, activation: str, norm_eps: float = 1e-5) -> None:
    require_divisible(width, heads, "width", "heads")
    require_one_of(activation, "activation", ACTIVATIONS)
    require_number(norm_eps, "norm_eps", low=0)


@counts(width=1, heads=1, mlp_width=1)
@checks(takes("B T D", lambda self: self.norm1.weight), init=_check_block)
class TransformerBlock(nn.Module):
    """Pre-norm transformer block, shared by the vision and the text tower. forward: [B, T, D] -> [B, T, D]."""

    def __init__(self, *, width: int, heads: int, mlp_width: int, activation: str, norm_eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, mlp_width, activation)

    def forward(self, x: torch.Tensor, *, is_causal: bool = False) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), is_causal=is_causal)  # [B, T, D]
        return x + self.mlp(self.norm2(x))  # [B, T, D]


def _check_blocks(blocks: nn.ModuleList) -> None:
    if len(blocks) < 1:
        raise ValueError("there are 0 blocks to initialise, expected at least 1")


@checks(_check_blocks)
@torch.no_grad()
def init_transformer(blocks: nn.ModuleList) -> None:
    """Weights N(0, 0.02), biases zero; the maps that end a residual branch are scaled by 1/sqrt(2 * layers).

    Source of the scaling: Radford et al. 2019 (GPT-2), section 2.3. It keeps the residual stream's variance near
    one at initialisation, whatever the depth.
    """
    for block in blocks:
        for linear in (block.attention.qkv, block.attention.out, block.mlp.fc1, block.mlp.fc2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for linear in (block.attention.out, block.mlp.fc2):
            linear.weight.mul_((2 * len(blocks)) ** -0.5)


def _check_sequence(patches: torch.Tensor, class_token: torch.Tensor, positions: torch.Tensor) -> None:
    require_shape(patches, "patches", "B N D")
    N, D = patches.shape[1:]
    require_shape(class_token, "class_token", "D", D=D)
    hint = f"the image gave {N} patches, and the class token has a position too"
    require_shape(positions, "positions", "1+N D", D=D, **{"1+N": 1 + N}, hint=hint)
    require_same_device(patches=patches, class_token=class_token, positions=positions)


@checks(_check_sequence)
def add_class_and_positions(patches: torch.Tensor, class_token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Put the class token before the patches and add a learned position to each of them.

    Args: patches [B, N, D]; class_token [D]; positions [1+N, D], row 0 for the class token. Returns [B, 1+N, D].
    Raises ValueError when the positions are not one more than the patches. Source: Dosovitskiy et al. 2021, equation 1.
    """
    cls = class_token.expand(len(patches), 1, -1)  # [D] -> [B, 1, D]
    return torch.cat([cls, patches], dim=1) + positions  # [B, 1, D], [B, N, D] -> [B, 1+N, D]


def _check_selection(states: list[torch.Tensor], layer: int | list[int] = -2, strategy: str = "default") -> None:
    if len(states) < 1:
        raise ValueError("there are 0 hidden states to choose from, expected at least 1")
    for index, state in enumerate(states):
        require_shape(state, f"state {index}", "B 1+N D", **dict(zip(("B", "1+N", "D"), states[0].shape, strict=False)))
        require_same_device(**{"state 0": states[0], f"state {index}": state})
    require_one_of(strategy, "strategy", ("default", "full"))
    layers = [layer] if isinstance(layer, int) else layer
    if not isinstance(layers, list | tuple) or len(layers) < 1:
        raise ValueError(f"layer is {layer!r}: 0 layers, expected a number or a list of at least 1")
    for index in layers:
        if not -len(states) <= index < len(states):
            span = f"-{len(states)} to {len(states) - 1}"
            raise ValueError(f"layer is {index}, but there are {len(states)} hidden states: expected {span}")


@checks(_check_selection)
def select_features(states: list[torch.Tensor], layer: int | list[int] = -2, strategy: str = "default") -> torch.Tensor:
    """What a language model gets of a vision tower's hidden states.

    Args: states, layers+1 tensors [B, 1+N, D], the first being the input of block 1; layer, one of them or a list whose
    features are joined along the width; strategy, "default" without the class token or "full" with it.
    Returns [B, N, D], [B, N, k*D] for k layers, 1+N for "full". No norm is applied.
    Source: Liu et al. 2023 (LLaVA), section 4.1; the names are those of transformers' LlavaConfig
    (vision_feature_layer, vision_feature_select_strategy).
    """
    layers = [layer] if isinstance(layer, int) else layer
    features = torch.cat([states[index] for index in layers], dim=-1)  # k x [B, 1+N, D] -> [B, 1+N, k*D]
    return features[:, 1:] if strategy == "default" else features  # [B, 1+N, k*D] -> [B, N, k*D]


def _check_pixels(self: "VisionTransformer", pixels: torch.Tensor, *, interpolate: bool = False) -> None:
    require_same_device(pixels=pixels, **{"the tower": self.class_token})


def _check_config(self, config: ViTConfig) -> None:
    if not isinstance(config, ViTConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a ViTConfig")


@method_checks(embed=_check_pixels)
@checks(init=_check_config)
class VisionTransformer(nn.Module):
    """CLIP's vision tower. forward: pixels [B, C, H, W] -> [B, 1+N, D], CLS first, before the final LayerNorm.

    The positions belong to the configured image size; for another size ask for `interpolate=True`, which stretches
    them (bicubic) to the new grid. Raises ValueError for any other mismatch of the pixels with the config.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(
            channels=config.channels, patch_size=config.patch_size, width=config.width
        )
        self.class_token = nn.Parameter(torch.randn(config.width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1 + config.n_patches, config.width) * 0.02)
        self.pre_norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            TransformerBlock(
                width=config.width,
                heads=config.heads,
                mlp_width=config.mlp_width,
                activation=config.activation,
                norm_eps=config.norm_eps,
            )
            for _ in range(config.layers)
        )
        self.post_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        init_transformer(self.blocks)

    def embed(self, pixels: torch.Tensor, *, interpolate: bool = False) -> torch.Tensor:
        """pixels [B, C, H, W] -> [B, 1+N, D]: what enters block 1."""
        height, width = self.config.image_hw
        sizes = {} if interpolate else {"H": height, "W": width}
        hint = "resize the image, or pass interpolate=True to stretch the positions"
        require_shape(pixels, "pixels", "B C H W", C=self.config.channels, **sizes, hint=hint)
        grid = tuple(size // self.config.patch_size for size in pixels.shape[2:])
        positions = self.positions
        if grid != self.config.grid:
            positions = interpolate_positions(positions, self.config.grid, grid)  # [1+N, D] -> [1+N', D]
        patches = self.patch_embedding(pixels)  # [B, C, H, W] -> [B, N, D]
        return self.pre_norm(add_class_and_positions(patches, self.class_token, positions))  # -> [B, 1+N, D]

    def hidden_states(self, pixels: torch.Tensor, *, interpolate: bool = False) -> list[torch.Tensor]:
        """layers+1 tensors [B, 1+N, D]: the input of block 1, then every block's output."""
        states = [self.embed(pixels, interpolate=interpolate)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def forward(self, pixels: torch.Tensor, *, interpolate: bool = False) -> torch.Tensor:
        x = self.embed(pixels, interpolate=interpolate)
        for block in self.blocks:
            x = block(x)  # [B, 1+N, D] -> [B, 1+N, D]
        return x

    def pooled(self, pixels: torch.Tensor, *, interpolate: bool = False) -> torch.Tensor:
        """pixels -> [B, D]: the normalised class token, what CLIP compares with a text."""
        return self.post_norm(self(pixels, interpolate=interpolate)[:, 0])  # [B, 1+N, D] -> [B, D]

    def patch_features(self, pixels: torch.Tensor, layer: int = -2, *, interpolate: bool = False) -> torch.Tensor:
        """pixels -> [B, N, D]: the patches of hidden_states(pixels)[layer], without CLS and without a final norm.

        Only the blocks up to that layer run. Raises ValueError when the tower has no such layer.
        """
        states = len(self.blocks) + 1
        if not -states <= layer < states:
            raise ValueError(f"layer is {layer}, but a tower of {states - 1} blocks has {states} hidden states")
        x = self.embed(pixels, interpolate=interpolate)
        for block in self.blocks[: layer % states]:
            x = block(x)  # [B, 1+N, D] -> [B, 1+N, D]
        return x[:, 1:]  # [B, 1+N, D] -> [B, N, D]
