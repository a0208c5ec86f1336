"""Who looked at whom: the attention weights of a real forward pass, which the fused kernels never show.

with attention_maps(model) as maps:
    model(ids, pixels)
maps["decoder.blocks.3.attention"]  # [B, H, T, S], every row sums to one (or is all zeros where nothing was seen)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlm_course.attention import attention_weights, causal_mask, media_attention_mask
from vlm_course.bridges import PerceiverLayer
from vlm_course.decoder import Decoder, SelfAttention, apply_rotary
from vlm_course.fusion import GatedCrossAttention


@contextmanager
def attention_maps(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While the context is open, every forward pass leaves the weights of its attention layers, by module name.

    Watched are the decoder's self-attention [B, H, T, past + T], gated cross-attention [B, H, T, n_images * M] and the
    layers of a Perceiver resampler [B, H, M, N + M], whose last M keys are the latents themselves. A second pass
    overwrites the first. Raises ValueError for a model that has none of these.
    """
    watched = {name: module for name, module in model.named_modules() if type(module) in _WEIGHTS}
    if not watched:
        raise ValueError(f"{type(model).__name__} has no attention layer of those that can be watched")
    maps: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(_note(maps, name, _WEIGHTS[type(module)])) for name, module in watched.items()
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def _note(maps, name, weights):
    def hook(module, args):
        with torch.no_grad():
            maps[name] = weights(module, *args)

    return hook


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, T, H * d] -> [B, H, T, d]


def _self_attention(module: SelfAttention, x, phases, mask, cache, layer) -> Tensor:
    if cache is not None:
        raise ValueError("attention can be watched in a pass without a KV cache: run the whole sequence at once")
    q = apply_rotary(module.query(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2), *phases)
    k = apply_rotary(module.key(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2), *phases)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, H_kv, T, d] -> [B, H, T, d]
    mask = causal_mask(x.shape[1], device=x.device) if mask is None else mask
    return attention_weights(q, k, mask=mask)


def _cross_attention(module: GatedCrossAttention, text, media, mask) -> Tensor:
    q, k = _heads(module.to_q(module.norm(text)), module.heads), _heads(module.to_k(media.flatten(1, 2)), module.heads)
    return attention_weights(q, k, mask=media_attention_mask(mask, media.shape[2]))


def _resampler(module: PerceiverLayer, media, latents) -> Tensor:
    queries = module.norm_latents(latents)
    context = torch.cat([module.norm_media(media), queries], dim=1)  # [B, N + M, D]
    return attention_weights(_heads(module.to_q(queries), module.heads), _heads(module.to_k(context), module.heads))


_WEIGHTS = {SelfAttention: _self_attention, GatedCrossAttention: _cross_attention, PerceiverLayer: _resampler}


@torch.no_grad()
def hidden_states(decoder: Decoder, embeds: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The residual stream: embeds [B, T, D] -> [layers + 1, B, T, D], before the first block and after each of them.

    mask: as in `Decoder.forward`; None means causal.
    """
    states = [embeds]
    handles = [block.register_forward_hook(lambda _, __, out: states.append(out)) for block in decoder.blocks]
    try:
        decoder(embeds, mask=mask, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(states)
