"""The tiny LLaVA of the studies: the shipped vision tower, a fresh bridge and decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..decoder import DecoderConfig
from ..llava import Llava, LlavaConfig
from ..pretrained import Small


def tiny_config(small: Small, **text) -> LlavaConfig:
    """The model of the studies: the shipped tower, an MLP bridge, a decoder of under a million parameters.

    `text` replaces sizes of the decoder.
    """
    sizes = {"width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "mlp_width": 192, "max_positions": 512} | text
    return LlavaConfig(
        vision=small.model.config.vision,
        text=DecoderConfig(vocab_size=small.tokenizer.vocab_size, **sizes),
        image_id=small.tokenizer.image_id,
        feature_layer=small.model.config.feature_layer,
    )


def tiny_llava(small: Small, *, seed: int, bridge: nn.Module | None = None, **text) -> Llava:
    """A fresh bridge and decoder, drawn from the seed, behind the shipped vision tower (shared, not copied)."""
    device = next(small.model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llava(tiny_config(small, **text), bridge=bridge)
    model.vision = small.model.vision
    return model.to(device)


def learned(model: Llava) -> dict[str, Tensor]:
    """What a run has learned: all tensors but those of the vision tower, in half precision on the CPU."""
    state = model.state_dict().items()
    return {k: v.detach().cpu().half().contiguous() for k, v in state if not k.startswith("vision.")}
