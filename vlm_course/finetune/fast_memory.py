"""How many blocks must be computed again in the backward pass for a step to fit, by formula and by what is free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlm_course.decoder import DecoderConfig

SPARE = 6e9  # bytes left alone at least: the head's part of the logits, fragments
WIDEST = 14  # or so many arrays of the widest layer: gradients of a block, copies in float32


def kept_per_token(text: DecoderConfig, kinds: Mapping[str, str], *, rank: int = 0, item: int = 2) -> int:
    """Bytes of one token that a block keeps for its backward pass when everything that is cheap is computed again.

    Its input and the stream behind attention; queries, keys and values before and after their turn; what attention
    read; gate and up, and their product; each normed input that a gradient of a weight needs.
    """
    D, d = text.width, text.head_dim
    qkv = (text.heads + 2 * text.kv_heads) * d
    values = 2 * D + 2 * qkv + text.heads * d + 2 * text.mlp_width
    if any(kind != "frozen" for kind in kinds.values()):
        values += 2 * D + text.mlp_width + 7 * rank
    return item * values


def blocks_again(
    text: DecoderConfig, tokens: int, maps: Mapping, learning: Sequence[Tensor], device: torch.device
) -> int:
    """Blocks that cannot keep what their backward pass needs, of a step with `tokens` tokens.

    Counts as taken: what is allocated now, a gradient for every parameter that learns and has none yet.
    """
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free -= sum(p.numel() * p.element_size() for p in learning if p.grad is None and not p._post_accumulate_grad_hooks)
    kinds = {name: m.kind for name, m in maps.items()}
    each = kept_per_token(text, kinds, rank=_rank(learning, kinds)) * tokens
    spare = max(SPARE, WIDEST * 2 * 2 * text.mlp_width * tokens)  # gate and up in 16 bits
    fit = int((free - spare) // each)
    return min(text.layers, max(0, text.layers - fit))


def _rank(learning: Sequence[Tensor], kinds: Mapping[str, str]) -> int:
    if "lora" not in kinds.values():
        return 0
    return min((min(p.shape) for p in learning if p.dim() == 2), default=0)
