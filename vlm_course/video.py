"""Video for a language model: which frames, how many tokens of each, and where those tokens stand in time and space.

Sources: Wang et al. 2024 (Qwen2-VL, arXiv 2409.12191), section 2.1; Li et al. 2024 (LLaVA-OneVision, arXiv
2408.03326), section 3.2; Alayrac et al. 2022 (Flamingo, arXiv 2204.14198), section 2.1, for the Perceiver over time.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.bridges import PerceiverResampler
from vlm_course.validation import (
    checks,
    counts,
    require_divisible,
    require_grid,
    require_number,
    require_one_of,
    require_same_device,
    require_shape,
    takes,
)

TEXT, IMAGE, VIDEO = 0, 1, 2


def _check_sample(total: int, frames: int) -> None:
    if frames > total:
        raise ValueError(f"{frames} frames of a video of {total}: expected no more than it has")


@counts(total=1, frames=1)
@checks(_check_sample)
def sample_frames(total: int, frames: int) -> Tensor:
    """`frames` indices spread evenly over a video of `total` frames, the first and the last included: [frames].

    A single frame is the first. Raises ValueError when more frames are asked for than there are.
    """
    if frames == 1:
        return torch.zeros(1, dtype=torch.long)
    return torch.arange(frames) * (total - 1) // (frames - 1)


def _check_rate(
    total: int, video_fps: float, fps: float, *, min_frames: int = 4, max_frames: int = 768, multiple: int = 2
) -> None:
    require_number(video_fps, "video_fps", above=0)
    require_number(fps, "fps", above=0)
    if multiple > max_frames or min_frames > max_frames:
        raise ValueError(f"min_frames {min_frames} and multiple {multiple}, expected 1 to max_frames = {max_frames}")
    if min(total, max(total / video_fps * fps, min_frames)) < multiple:
        raise ValueError(f"the video has {total} frames, but {multiple} of those taken are embedded together")


@counts(total=1, min_frames=1, max_frames=1, multiple=1)
@checks(_check_rate)
def sample_by_rate(
    total: int, video_fps: float, fps: float, *, min_frames: int = 4, max_frames: int = 768, multiple: int = 2
) -> Tensor:
    """Indices at about `fps` frames a second of a video of `total` frames at `video_fps`: Qwen2-VL's rule.

    The count is kept within `min_frames`, `max_frames` and `total`, then rounded down to a `multiple` (frames that
    are embedded together); the frames start equally long pieces of the video. Raises ValueError when fewer than
    `multiple` frames are left.
    """
    wanted = min(max(total / video_fps * fps, min_frames), max_frames // multiple * multiple, total)
    frames = int(wanted // multiple) * multiple
    return torch.arange(frames) * total // frames


def _pair_rule(frames: Tensor, size: int = 2) -> None:
    if frames.dim() < 2 or frames.numel() == 0:
        raise ValueError(f"frames has shape {tuple(frames.shape)}, expected [F, ...] with no empty axis")


@counts(size=1)
@checks(_pair_rule)
def group_frames(frames: Tensor, size: int = 2) -> Tensor:
    """Consecutive frames in groups; the last frame is repeated when the count is no multiple, so none is lost.

    [F, ...] -> [ceil(F / size), size, ...].
    """
    missing = -len(frames) % size
    frames = torch.cat([frames, frames[-1:].expand(missing, *frames.shape[1:])])  # -> [F + missing, ...]
    return frames.unflatten(0, (-1, size))


@counts(size=1)
@checks(lambda features, size=2: require_shape(features, "features", "F N D"))
def merge_frames(features: Tensor, size: int = 2) -> Tensor:
    """Average the features of consecutive frames, patch by patch: [F, N, D] -> [ceil(F / size), N, D].

    An incomplete last group is filled up with its last frame, as in `group_frames`.
    """
    return group_frames(features, size).mean(dim=1)  # [F, N, D] -> [F / size, size, N, D] -> [F / size, N, D]


def _check_clip(self: "TubeletEmbedding", frames: Tensor) -> None:
    require_divisible(frames.shape[2], self.patch_size, "the frames' height", "patch_size")
    require_divisible(frames.shape[3], self.patch_size, "the frames' width", "patch_size")


@counts(channels=1, patch_size=1, width=1, size=1)
@checks(takes("F C H W", lambda self: self.weight, width=lambda self: self.weight.shape[1], at=1, name="frames"))
@checks(_check_clip)
class TubeletEmbedding(nn.Module):
    """Patches that reach through `size` frames: what a 3-D convolution with stride = kernel computes.

    forward: frames [F, C, H, W] -> [ceil(F / size), N, D]. The weight [D, C, size, p, p] is Qwen2-VL's Conv3d's.
    """

    def __init__(self, *, channels: int, patch_size: int, width: int, size: int = 2):
        super().__init__()
        self.patch_size, self.size = patch_size, size
        self.weight = nn.Parameter(torch.empty(width, channels, size, patch_size, patch_size))
        nn.init.normal_(self.weight, std=(channels * size * patch_size**2) ** -0.5)

    def forward(self, frames: Tensor) -> Tensor:
        p = self.patch_size
        x = group_frames(frames, self.size)  # [F, C, H, W] -> [G, size, C, H, W]
        x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # -> [G, size, C, rows, p, cols, p]
        x = x.permute(0, 3, 5, 2, 1, 4, 6).flatten(3).flatten(1, 2)  # -> [G, rows * cols, C * size * p * p]
        return F.linear(x, self.weight.flatten(1))  # [G, N, C * size * p * p] -> [G, N, D]


def _pool_rule(features: Tensor, grid: tuple[int, int], *, stride: int = 2, mode: str = "bilinear") -> None:
    require_grid(grid, "grid")
    rows, columns = grid
    require_shape(features, "features", "F N D", N=rows * columns, hint=f"the grid is {rows} x {columns}, without CLS")
    if stride > min(grid):
        raise ValueError(f"stride is {stride}, expected 1 to {min(grid)}, the shorter side of the grid")
    require_one_of(mode, "mode", ("average", "max", "bilinear"))


@counts(stride=1)
@checks(_pool_rule)
def pool_frames(features: Tensor, grid: tuple[int, int], *, stride: int = 2, mode: str = "bilinear") -> Tensor:
    """Fewer tokens for each frame: features [F, rows * columns, D] -> [F, rows' * columns', D].

    "average" and "max" pool stride x stride cells and drop what is left over at the edge (LLaVA-NeXT-Video);
    "bilinear" shrinks the map to ceil(rows / stride) x ceil(columns / stride) and drops nothing (LLaVA-OneVision).
    """
    x = features.unflatten(1, grid).permute(0, 3, 1, 2)  # [F, N, D] -> [F, D, rows, columns]
    if mode == "bilinear":
        size = (-(-grid[0] // stride), -(-grid[1] // stride))
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    else:
        x = F.avg_pool2d(x, stride) if mode == "average" else F.max_pool2d(x, stride)
    return x.flatten(2).transpose(1, 2)  # [F, D, rows', columns'] -> [F, rows' * columns', D]


@counts(frames=1, temporal=1, spatial=1)
@checks(lambda frames, grid, **rest: require_grid(grid, "grid"))
def video_tokens(frames: int, grid: tuple[int, int], *, temporal: int = 1, spatial: int = 1) -> int:
    """Visual tokens of a video: groups of `temporal` frames times blocks of `spatial` x `spatial` patches, both
    counts rounded up."""
    return -(-frames // temporal) * -(-grid[0] // spatial) * -(-grid[1] // spatial)


def _check_frames(self: "TemporalPerceiver", features: Tensor) -> None:
    if features.shape[1] > len(self.times):
        raise ValueError(f"the clip has {features.shape[1]} frames, but there are times for {len(self.times)}")


@counts(dim=1, queries=1, max_frames=1, depth=1, heads=1, head_dim=1)
@checks(takes("B F N D", lambda self: self.times, name="features"))
@checks(_check_frames)
class TemporalPerceiver(nn.Module):
    """A whole clip as `queries` tokens: every frame's features get a learned time, then one resampler reads all.

    forward: [B, F, N, D] -> [B, queries, D], for 1 to `max_frames` frames.
    """

    def __init__(self, *, dim: int, queries: int, max_frames: int, depth: int = 1, heads: int = 8, head_dim: int = 64):
        super().__init__()
        self.times = nn.Parameter(torch.randn(max_frames, dim))
        self.resampler = PerceiverResampler(dim=dim, queries=queries, depth=depth, heads=heads, head_dim=head_dim)

    def forward(self, features: Tensor) -> Tensor:
        frames = features.shape[1]
        timed = features + self.times[:frames, None]  # [B, F, N, D] + [F, 1, D]
        return self.resampler(timed.flatten(1, 2))  # [B, F * N, D] -> [B, queries, D]


def _mrope_rule(
    types: Tensor,
    *,
    images: Sequence[tuple[int, int, int]] = (),
    videos: Sequence[tuple[int, int, int]] = (),
    merge: int = 2,
    attention_mask: Tensor | None = None,
    after: str = "maximum",
) -> None:
    require_shape(types, "types", "B T", floating=False)
    if attention_mask is not None:
        if attention_mask.shape != types.shape:
            have = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask is {have}, types {tuple(types.shape)}: expected the same shape")
        require_same_device(types=types, attention_mask=attention_mask)
    if types.is_meta:
        raise ValueError("types is on meta, expected a device with numbers, such as cpu: positions follow from them")
    low, high = (int(end) for end in types.aminmax())
    if low < TEXT or high > VIDEO:
        raise ValueError(f"types run from {low} to {high}, expected {TEXT} (text), {IMAGE} (image) and {VIDEO} (video)")
    for grid in (*images, *videos):
        if len(grid) != 3 or min(grid) < 1:
            raise ValueError(f"a grid is {tuple(grid)}, expected (frames, rows, columns), 1 or more of each")
        for side, name in zip(grid[1:], ("rows", "columns"), strict=True):
            require_divisible(side, merge, f"the {name} of grid {tuple(grid)}", "merge")
    if attention_mask is not None and not attention_mask.bool().any(dim=1).all():
        raise ValueError("attention_mask has a row with 0 real tokens, expected at least 1 in each")
    require_one_of(after, "after", ("maximum", "extent"))
    kept = types if attention_mask is None else types[attention_mask.bool()]
    for kind, grids, name in ((IMAGE, images, "image"), (VIDEO, videos, "video")):
        tokens, need = int((kept == kind).sum()), sum(t * h * w for t, h, w in grids) // merge**2
        if tokens != need:
            raise ValueError(f"there are {tokens} {name} tokens, but the {len(grids)} {name} grids need {need}")


def _grid_ids(grid: tuple[int, int, int], merge: int, start: int) -> Tensor:
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    axes = [torch.arange(size) + start for size in (frames, rows, columns)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)  # [3, F, rows, columns] -> [3, M]


@counts(merge=1)
@checks(_mrope_rule)
def mrope_positions(
    types: Tensor,
    *,
    images: Sequence[tuple[int, int, int]] = (),
    videos: Sequence[tuple[int, int, int]] = (),
    merge: int = 2,
    attention_mask: Tensor | None = None,
    after: str = "maximum",
) -> tuple[Tensor, Tensor]:
    """Qwen2-VL's positions in three dimensions. A text token has one number three times; a visual token has its
    frame, row and column, counted from where the text before it ended.

    Args: types [B, T], 0 text, 1 image, 2 video; images and videos, (frames, rows, columns) in patches before the
    merging of `merge` x `merge` patches into a token, in reading order over the batch; attention_mask [B, T], False
    for padding, whose positions are 0. `after` is where the text goes on behind an image: "maximum", one more than
    the largest number so far (the paper's rule), or "extent", the start plus the longer side in tokens
    (transformers 5). They differ only for a video with more frames than its longer side has tokens.

    Returns positions [3, B, T] (frame, row, column) and [B], what to add to a row's count of real tokens to get the
    position of its next token. Raises ValueError when the tokens and the grids do not agree.
    """
    B, T = types.shape
    positions = torch.zeros(3, B, T, dtype=torch.long, device=types.device)
    deltas = torch.zeros(B, dtype=torch.long, device=types.device)
    real = torch.ones_like(types, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    grids = {IMAGE: iter(images), VIDEO: iter(videos)}
    for row in range(B):
        kinds = types[row, real[row]].tolist()
        ids, start = [], 0
        for kind, run in groupby(kinds):
            left = len(list(run))
            if kind == TEXT:
                ids.append(torch.arange(left).expand(3, -1) + start)  # [3, left]
                start += left
                continue
            while left > 0:  # two images may touch
                grid = next(grids[kind])
                visual = _grid_ids(grid, merge, start)  # [3, M]
                left -= visual.shape[1]
                if left < 0:
                    raise ValueError(f"row {row} ends {-left} tokens before grid {tuple(grid)} is complete")
                ids.append(visual)
                start = int(visual.max()) + 1 if after == "maximum" else start + max(grid[1:]) // merge
        row_ids = torch.cat(ids, dim=1)  # [3, real tokens]
        positions[:, row, real[row]] = row_ids.to(types.device)
        deltas[row] = int(row_ids.max()) + 1 - len(kinds)
    return positions, deltas


def _phases_rule(positions: Tensor, head_dim: int, sections: Sequence[int], theta: float = 10000.0) -> None:
    require_shape(positions, "positions", "3 B T", floating=False, **{"3": 3}, hint="frame, row and column")
    require_number(theta, "theta", above=0)
    if len(sections) != 3 or min(sections) < 0 or 2 * sum(sections) != head_dim:
        raise ValueError(f"sections is {tuple(sections)}, sum {sum(sections)}, expected three that sum to half of "
                         f"head_dim = {head_dim}")  # fmt: skip


@counts(head_dim=2)
@checks(_phases_rule)
def mrope_phases(
    positions: Tensor, head_dim: int, sections: Sequence[int], theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Rotary angles for `decoder.apply_rotary`: the first pairs turn with the frame, then the row, then the column.

    positions [3, B, T]; sections, how many of the head_dim / 2 pairs each axis gets (16, 24, 24 in Qwen2-VL).
    Returns cosine and sine, each float32 [B, 1, T, head_dim / 2]. Text gets the angles of ordinary rotary positions.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * theta**-exponents  # [3, B, T] -> [3, B, T, d / 2]
    parts = angles.split(list(sections), dim=-1)  # 3 x [3, B, T, section]
    angles = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)[:, None]  # -> [B, 1, T, d / 2]
    return angles.cos(), angles.sin()
