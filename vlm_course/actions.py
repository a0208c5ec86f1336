"""Robot actions as tokens: every number of an action becomes one of 256 words of the language model.

Sources: Brohan et al. 2023 (RT-2, arXiv 2307.15818), section 3.2; Kim et al. 2024 (OpenVLA, arXiv 2406.09246),
section 3.2, whose bins, word numbers and quantiles are the ones here.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlm_course.validation import checks, counts, readable, require_number, require_shape


def _require_finite(value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {kind}, expected a floating-point tensor")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty, shape {tuple(value.shape)}, expected at least one number")
    bad = int((~value.isfinite()).sum()) if readable(value) else 0
    if bad:
        raise ValueError(f"{name} has {bad} numbers out of {value.numel()} that are NaN or infinite")


@counts(vocab_size=1, bins=2)
@dataclass(frozen=True)
class ActionTokenizer:
    """Numbers in [low, high] as the last words of a vocabulary, the most negative action being the very last one.

    `bins` evenly spaced edges, both ends included, cut the range into bins - 1 intervals: 256 edges make 255 centres.
    The number `high` itself gets a word of its own (digit 256), which decodes to the last centre. So a round trip
    is wrong by half an interval at most, (high - low) / (bins - 1) / 2, which is 0.0039 here.
    `vocab_size` counts the tokenizer's words, without rows that only pad the embedding (32000 for Llama 2).
    """

    vocab_size: int
    bins: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        require_number(self.low, "low")
        require_number(self.high, "high")
        if self.vocab_size < self.bins:
            raise ValueError(f"a vocabulary of {self.vocab_size} words has no room for {self.bins} action words")
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}: an empty range")

    @property
    def edges(self) -> Tensor:
        """[bins] float64, by numpy: torch's linspace ends in another last bit, which moves actions on an edge."""
        return torch.from_numpy(np.linspace(self.low, self.high, self.bins))

    @property
    def centres(self) -> Tensor:
        """[bins - 1] float64, the number that each interval decodes to."""
        edges = self.edges
        return (edges[:-1] + edges[1:]) / 2

    @property
    def first_id(self) -> int:
        """The smallest id that is an action word; the largest is vocab_size - 1."""
        return self.vocab_size - self.bins

    def encode(self, actions: Tensor) -> Tensor:
        """actions [..., D], normalised; numbers outside [low, high] are clipped -> ids [..., D], int64.

        Raises ValueError for NaN, infinity, an empty tensor or integers.
        """
        _require_finite(actions, "actions")
        edges = self.edges.to(actions.device)
        # Left edge included, right edge excluded: digit 1 is [edge 0, edge 1), digit `bins` is `high` alone.
        digits = torch.bucketize(actions.double().clamp(self.low, self.high), edges, right=True)
        return self.vocab_size - digits  # [..., D]

    def decode(self, ids: Tensor) -> Tensor:
        """ids [..., D] of action words -> actions [..., D], float32: the centres of their intervals.

        Raises ValueError for an id that is no action word, where a silent clip would move the robot.
        """
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.numel() == 0:
            raise ValueError(f"ids is {ids.dtype} of shape {tuple(ids.shape)}, expected integers, at least one")
        low, high = int(ids.min()), int(ids.max())
        if low < self.first_id or high >= self.vocab_size:
            raise ValueError(
                f"ids run from {low} to {high}, but action words run from {self.first_id} to {self.vocab_size - 1}: "
                "did the model answer with text?"
            )
        digits = self.vocab_size - ids  # 1 .. bins
        intervals = (digits - 1).clamp(max=self.bins - 2)  # 0 .. bins - 2; `high` shares the last interval
        return self.centres.to(ids.device)[intervals].float()  # [..., D]


def _range_rule(actions: Tensor, q01: Tensor, q99: Tensor, mask: Tensor | None = None) -> None:
    _require_finite(actions, "actions")
    if actions.dim() == 0:
        raise ValueError("actions has 0 dimensions, expected [..., D] with one number for each axis of the robot")
    width = actions.shape[-1]
    for value, name in ((q01, "q01"), (q99, "q99")):
        require_shape(value, name, "D", D=width, hint=f"the actions have {width} numbers")
        _require_finite(value, name)
    if mask is not None and (mask.shape != (width,) or mask.dtype != torch.bool):
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool of shape ({width},)")
    devices = {str(t.device) for t in (actions, q01, q99, mask) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"actions, q01, q99 and mask lie on {len(devices)} devices, expected 1: {sorted(devices)}")
    if not readable(q01):
        return
    scaled = torch.ones_like(q01, dtype=torch.bool) if mask is None else mask
    inverted = ((q99 <= q01) & scaled).nonzero().flatten().tolist()
    if inverted:
        axis = inverted[0]
        raise ValueError(f"axis {axis} has q01 = {float(q01[axis])} and q99 = {float(q99[axis])}: expected q01 < q99")


@checks(_range_rule)
def normalize_actions(actions: Tensor, q01: Tensor, q99: Tensor, mask: Tensor | None = None) -> Tensor:
    """The robot's units to [-1, 1]: the 1st percentile becomes -1, the 99th becomes 1, what lies outside is clipped.

    Args: actions [..., D]; q01 and q99 [D], percentiles over the training data; mask [D], False for an axis that is
    left as it is, such as a gripper that is 0 or 1 already. Returns [..., D].
    """
    scaled = (2 * (actions - q01) / (q99 - q01) - 1).clamp(-1, 1)  # [..., D]
    return scaled if mask is None else torch.where(mask, scaled, actions)


@checks(_range_rule)
def unnormalize_actions(actions: Tensor, q01: Tensor, q99: Tensor, mask: Tensor | None = None) -> Tensor:
    """Undo `normalize_actions`, up to its clipping: [-1, 1] back to the robot's units, [..., D] -> [..., D].

    The percentiles must be those of the data set that the robot's actions came from: with another robot's the arm
    moves, only elsewhere.
    """
    scaled = (actions + 1) / 2 * (q99 - q01) + q01  # [..., D]
    return scaled if mask is None else torch.where(mask, scaled, actions)
