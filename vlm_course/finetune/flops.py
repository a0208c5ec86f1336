"""How much arithmetic a training step is, by one rule, and what the machine at hand can do at most.

The rule: N is every matrix that a token is multiplied with, the head included, the embedding table not. A token costs
6 N operations where the weights learn, 4 N where they are frozen but gradients pass through, 2 N in a forward pass
alone. Attention scores and the adapters' own matrices are not counted, so a share of the peak by this rule is a lower
bound of what the machine does. The vision tower counts with all its parameters and the class token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlm_course.budget import vit_parameters
from vlm_course.decoder import DecoderConfig
from vlm_course.llava import LlavaConfig
from vlm_course.validation import counts, require_one_of

FACTORS = {"projector": 4, "lora": 4, "full": 6, "all": 6}


def decoder_weights(text: DecoderConfig) -> int:
    """Weights that each token is multiplied with: all matrices of the blocks, and the head."""
    attention = 2 * text.width * text.head_dim * (text.heads + text.kv_heads)
    return text.layers * (attention + 3 * text.width * text.mlp_width) + text.width * text.vocab_size


@counts(samples=1, tokens=1)
def step_flops(config: LlavaConfig, mode: str, samples: int, tokens: int, *, images: int | None = None) -> int:
    """Operations of a training step with `samples` rows of `tokens` tokens (visual ones included).

    images: how many the vision tower encodes, by default one a row. mode "all": the tower learns too. The bridge's own
    weights, 21 of 6,607 million at 7B, are not counted, as in the peers' script.
    """
    require_one_of(mode, "mode", FACTORS)
    language = FACTORS[mode] * decoder_weights(config.text) * samples * tokens
    images = samples if images is None else images
    per_token = (6 if mode == "all" else 2) * vit_parameters(config.vision)
    return language + per_token * images * (1 + config.vision.n_patches)


@dataclass(frozen=True)
class Floors:
    """What the machine reached in this run: a large matrix product and a large copy. Operations/s and bytes/s."""

    name: str
    flops: float
    bandwidth: float

    def share(self, flops: float, seconds: float) -> float:
        """Of the matrix peak."""
        return flops / seconds / self.flops

    def decode_seconds(self, text: DecoderConfig) -> float:
        """A token: 16-bit weights once through memory."""
        return 2 * decoder_weights(text) / self.bandwidth

    def prefill_seconds(self, text: DecoderConfig, tokens: int) -> float:
        """A pass over a prompt by the rule above."""
        return 2 * decoder_weights(text) * tokens / self.flops


def median_seconds(run: Callable[[], object], *, runs: int = 5, warm_up: int = 3) -> float:
    """The median time of a call, with the device idle before and after."""
    taken = []
    for number in range(warm_up + runs):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        if number >= warm_up:
            taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


@counts(size=1, elements=1)
def measure_floors(
    device: torch.device | str, *, size: int = 8192, elements: int = 1 << 30, dtype: torch.dtype = torch.bfloat16
) -> Floors:
    """A product of two size x size matrices, and a copy of `elements` numbers (read and written: counted twice)."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn_like(a)
    flops = 2 * size**3 / median_seconds(lambda: a @ b)
    x = torch.randn(elements, device=device, dtype=dtype)
    y = torch.empty_like(x)
    bandwidth = 2 * x.numel() * x.element_size() / median_seconds(lambda: y.copy_(x))
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Floors(name, flops, bandwidth)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
