"""Images of different sizes in one sequence, each with its 2-D positions, none seeing another.

Sources: Dehghani et al. 2023, "Patch n' Pack: NaViT" (arXiv 2307.06304), section 2.1 and appendix A.3; Agrawal et al.
2024, "Pixtral 12B" (arXiv 2410.07073), section 2.1, for the rotary positions in two dimensions and the tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.attention import block_mask
from vlm_course.decoder import DecoderBlock, DecoderConfig, RMSNorm
from vlm_course.patches import patchify
from vlm_course.validation import (
    checks,
    counts,
    readable,
    require_divisible,
    require_number,
    require_same_device,
    require_shape,
)


@dataclass(frozen=True)
class PackedImages:
    """Rows of L places, each filled with the patches of whole images, one image after the other.

    patches [B, L, C*p*p], zeros where there is padding; positions [B, L, 2], (row, column) of the patch in its own
    image; documents [B, L], the number of the image, -1 for padding; grids, (rows, columns) of patches by image.
    """

    patches: Tensor
    positions: Tensor
    documents: Tensor
    grids: tuple[tuple[int, int], ...]

    @property
    def mask(self) -> Tensor:
        """[B, 1, L, L], True where two patches belong to one image."""
        return block_mask(self.documents, causal=False)

    @property
    def fill(self) -> float:
        """Share of the places that hold a patch."""
        return float((self.documents >= 0).float().mean())


def _check_lengths(lengths: Sequence[int], capacity: int) -> None:
    if len(lengths) == 0:
        raise ValueError("there are 0 lengths to pack, expected at least 1")
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"sequence {index} has {length} tokens, but a row has room for 1 to {capacity}")


@counts(capacity=1)
@checks(_check_lengths)
def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each sequence, in the order given, into the first row that still has room for it; open a row if none has.

    Args: lengths in tokens; capacity of a row. Returns the rows as lists of indices; at most one row is half
    empty. Raises ValueError when one sequence is longer than a row. Source: NaViT, appendix A.3.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        row = next((row for row, free in enumerate(room) if free >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= length
    return rows


@counts(rows=1, columns=1)
def grid_positions(rows: int, columns: int, *, device: torch.device | str | None = None) -> Tensor:
    """(row, column) of every patch of a grid, read row by row: [rows * columns, 2]."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )  # 2 x [rows, columns]
    return torch.stack([row, column], dim=-1).flatten(0, 1)  # [rows, columns, 2] -> [N, 2]


def _pack_rule(images: Sequence[Tensor], patch_size: int, *, capacity=None, rows=None) -> None:
    if len(images) == 0:
        raise ValueError("there are 0 images to pack, expected at least 1")
    for index, image in enumerate(images):
        name = f"image {index}"
        require_shape(image, name, "C H W", floating=None, C=images[0].shape[0], hint="pack a list of single images")
        require_divisible(image.shape[1], patch_size, f"the height of {name}", "patch_size")
        require_divisible(image.shape[2], patch_size, f"the width of {name}", "patch_size")
        if (image.dtype, image.device) != (images[0].dtype, images[0].device):
            raise ValueError(f"{name} is {image.dtype} on {image.device}, image 0 {images[0].dtype} on "
                             f"{images[0].device}: expected one dtype and one device")  # fmt: skip
    if rows is not None and sorted(index for row in rows for index in row) != list(range(len(images))):
        raise ValueError(f"rows is {rows}, expected each of the numbers 0 to {len(images) - 1} once")


@counts(patch_size=1, capacity=1)
@checks(_pack_rule)
def pack_images(
    images: Sequence[Tensor],
    patch_size: int,
    *,
    capacity: int | None = None,
    rows: Sequence[Sequence[int]] | None = None,
) -> PackedImages:
    """Cut images [C, H, W] of any sizes into patches and lay them out in rows.

    `capacity` is the length of a row in patches, filled by `first_fit`; None makes a single row. `rows` gives the
    layout by hand: `[[0], [1], [2]]` is the usual padded batch of one image a row. Rows are then as long as the
    fullest of them. Raises ValueError when the patch size does not divide a side, or an image exceeds `capacity`.
    """
    pieces = [patchify(image[None], patch_size)[0] for image in images]  # [C, H, W] -> [N, C*p*p]
    lengths = [len(piece) for piece in pieces]
    grids = tuple((image.shape[1] // patch_size, image.shape[2] // patch_size) for image in images)
    if rows is None:
        rows = first_fit(lengths, sum(lengths) if capacity is None else capacity)
    longest = max(sum(lengths[index] for index in row) for row in rows)
    if capacity is not None and longest > capacity:
        raise ValueError(f"a row holds {longest} patches, but the capacity is {capacity}")
    length = longest if capacity is None else capacity
    device = images[0].device
    patches = pieces[0].new_zeros(len(rows), length, pieces[0].shape[1])  # [B, L, C*p*p]
    positions = torch.zeros(len(rows), length, 2, dtype=torch.long, device=device)
    documents = torch.full((len(rows), length), -1, device=device)
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            place = slice(start, start + lengths[index])
            patches[number, place] = pieces[index]
            positions[number, place] = grid_positions(*grids[index], device=device)
            documents[number, place] = index
            start = place.stop
    return PackedImages(patches, positions, documents, grids)


def _unpack_rule(features: Tensor, packed: PackedImages) -> None:
    B, L = packed.documents.shape
    require_shape(features, "features", "B L D", B=B, L=L, hint="features of another packing?")
    if features.device != packed.documents.device:
        raise ValueError(f"features lie on {features.device}, the packing on {packed.documents.device}")


@checks(_unpack_rule)
def unpack_images(features: Tensor, packed: PackedImages) -> list[Tensor]:
    """features [B, L, D] of a packing -> one tensor [N_i, D] for each image, in the order of the images."""
    return [features[packed.documents == index] for index in range(len(packed.grids))]


def _axial_rule(positions: Tensor, head_dim: int, theta: float = 10000.0) -> None:
    require_shape(positions, "positions", "B L 2", floating=False, **{"2": 2}, hint="(row, column) of every patch")
    require_divisible(head_dim, 4, "head_dim", "4", hint="pairs for rows and as many for columns")
    require_number(theta, "theta", above=0)


@counts(head_dim=1)
@checks(_axial_rule)
def axial_phases(positions: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Rotary angles in two dimensions, for `decoder.apply_rotary`: half of the pairs turn with the row, half with the
    column.

    Of the frequencies theta^(-2i/d) the even i go to the row and the odd i to the column, as in Pixtral, so both see
    the whole range from fast to slow. positions [B, L, 2] -> cosine and sine, each float32 [B, 1, L, head_dim / 2].
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = theta**-exponents  # [d / 2]
    rows, columns = positions[..., :1].float(), positions[..., 1:].float()  # 2 x [B, L, 1]
    angles = torch.cat([rows * frequencies[0::2], columns * frequencies[1::2]], dim=-1)[:, None]  # -> [B, 1, L, d / 2]
    return angles.cos(), angles.sin()


def _table_rule(table: Tensor, packed: PackedImages) -> None:
    require_shape(table, "table", "rows columns D", hint="unflatten a table [N, D] into its grid")
    if table.device != packed.documents.device:
        raise ValueError(f"table lies on {table.device}, the packing on {packed.documents.device}")


@checks(_table_rule)
def stretched_positions(table: Tensor, packed: PackedImages) -> Tensor:
    """Learned positions for a packing: the table [rows, columns, D], stretched to the grid of every image.

    Bilinear and anti-aliased, as in SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786, section 2.4). Returns
    [B, L, D], zeros where there is padding.
    """
    stretched = table.new_zeros(*packed.documents.shape, table.shape[2])  # [B, L, D]
    for index, grid in enumerate(packed.grids):
        image = F.interpolate(table.permute(2, 0, 1)[None], size=grid, mode="bilinear", antialias=True)  # [1, D, r, c]
        stretched[packed.documents == index] = image[0].flatten(1).T  # [1, D, r, c] -> [N_i, D]
    return stretched


def _check_places(self: "FactorisedPositions", positions: Tensor) -> None:
    require_shape(positions, "positions", "B L 2", floating=False, **{"2": 2}, hint="(row, column) of every patch")
    require_same_device(positions=positions, **{"the tables": self.rows})
    if not readable(positions):
        return
    for axis, table in enumerate((self.rows, self.columns)):
        low, high = (int(end) for end in positions[..., axis].aminmax())
        if low < 0 or high >= len(table):
            name = ("rows", "columns")[axis]
            raise ValueError(f"positions run over {name} {low} to {high}, but the table has {len(table)} {name}")


@counts(max_rows=1, max_columns=1, width=1)
@checks(_check_places)
class FactorisedPositions(nn.Module):
    """NaViT's learned positions: one table for rows plus one for columns, so a new aspect ratio needs no new row.

    forward: positions [B, L, 2] -> [B, L, D]. Raises ValueError for a patch outside the tables. Source: section 2.1.
    """

    def __init__(self, max_rows: int, max_columns: int, width: int):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(max_rows, width) * 0.02)
        self.columns = nn.Parameter(torch.randn(max_columns, width) * 0.02)

    def forward(self, positions: Tensor) -> Tensor:
        return self.rows[positions[..., 0]] + self.columns[positions[..., 1]]  # [B, L, 2] -> [B, L, D]


@counts(patch_size=1, width=1, layers=1, heads=1, mlp_width=1, channels=1)
@dataclass(frozen=True)
class PackedViTConfig:
    """Shape of a vision tower without a fixed image size."""

    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    channels: int = 3
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require_divisible(self.width, 4 * self.heads, "width", "4 * heads", hint="rows and columns share a head")
        require_number(self.rope_theta, "rope_theta", above=0)
        require_number(self.norm_eps, "norm_eps", low=0)


def _check_packed(self: "PackedVisionTransformer", packed: PackedImages) -> None:
    length = self.embedding.in_features
    require_shape(packed.patches, "patches", "B L C*p*p", **{"C*p*p": length}, hint="another patch size?")
    require_same_device(patches=packed.patches, **{"the tower": self.norm.weight})


def _check_packed_config(self, config: PackedViTConfig) -> None:
    if not isinstance(config, PackedViTConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a PackedViTConfig")


@checks(_check_packed, init=_check_packed_config)
class PackedVisionTransformer(nn.Module):
    """Pixtral's tower: the decoder's own block, with axial phases for its positions and a block mask for its causal
    one. forward: PackedImages -> [B, L, D], for `unpack_images`; what stands at padding means nothing.
    """

    def __init__(self, config: PackedViTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Linear(config.channels * config.patch_size**2, config.width, bias=False)
        self.norm = RMSNorm(config.width, config.norm_eps)
        block = DecoderConfig(
            vocab_size=1,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.heads,
            mlp_width=config.mlp_width,
            norm_eps=config.norm_eps,
        )
        self.head_dim = block.head_dim
        self.blocks = nn.ModuleList(DecoderBlock(block) for _ in range(config.layers))

    def forward(self, packed: PackedImages) -> Tensor:
        phases = axial_phases(packed.positions, self.head_dim, self.config.rope_theta)
        mask = packed.mask  # [B, 1, L, L]
        x = self.norm(self.embedding(packed.patches))  # [B, L, C*p*p] -> [B, L, D]
        for layer, block in enumerate(self.blocks):
            x = block(x, phases, mask, None, layer)  # [B, L, D] -> [B, L, D]
        return x
