"""Fewer visual tokens in the middle of the language model: FastV.

After the first layers, few image tokens are still attended to. FastV reads which from the attention of layer K and lets
only those, and all text, go on to the later layers. Source: Chen et al. 2024 (FastV, arXiv 2403.06764), section 4.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vlm_course.attention import attention_weights
from vlm_course.cache import KVCache
from vlm_course.decoder import Decoder, DecoderBlock, apply_rotary, rotary_phases
from vlm_course.validation import checks, counts, require_number, require_same_device, require_shape


def _check_scores(weights: Tensor) -> None:
    require_shape(weights, "weights", "B H T S", hint="attention of one layer, not yet averaged over heads")


@checks(_check_scores)
def last_query_scores(weights: Tensor) -> Tensor:
    """How much the last token, which predicts the answer's first word, looks at each token, averaged over heads.

    weights [B, H, T, S], rows of a softmax -> [B, S]. The paper's text averages over all queries instead; its released
    code, which made its numbers, takes the last one, as here.
    """
    return weights[:, :, -1].mean(dim=1)  # [B, H, T, S] -> [B, H, S] -> [B, S]


def _check_mask(is_image: Tensor, sizes: dict[str, int], device: torch.device) -> None:
    require_shape(is_image, "is_image", "B T", floating=None, **sizes, hint="one flag for every token")
    if is_image.dtype != torch.bool:
        raise ValueError(f"is_image is {is_image.dtype}, expected torch.bool: True marks an image token")
    if is_image.device != device:
        raise ValueError(f"is_image is on {is_image.device}, what it marks is on {device}")
    counts = is_image.sum(dim=1)
    if counts.min() != counts.max():
        least, most = int(counts.min()), int(counts.max())
        raise ValueError(f"one row has {least} image tokens, another {most}: rows must stay equally long when pruned")


def _check_ratio(ratio: float) -> None:
    require_number(ratio, "ratio", 0, 1)  # nothing is dropped at 0, every image token at 1


def _check_kept(scores: Tensor, is_image: Tensor, ratio: float) -> None:
    require_shape(scores, "scores", "B T")
    _check_mask(is_image, {"B": scores.shape[0], "T": scores.shape[1]}, scores.device)
    _check_ratio(ratio)
    if scores.isnan().any():
        raise ValueError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN, expected 0: NaN has no rank")


@checks(_check_kept)
def kept_tokens(scores: Tensor, is_image: Tensor, ratio: float) -> Tensor:
    """Which tokens survive: all text, and the image tokens without the `ratio` of them that scores lowest.

    Args: scores [B, T]; is_image [B, T] boolean, as many in each row; ratio, the paper's R, from 0 to 1.
    Returns indices [B, T - floor(ratio * images)] in the order of the text. Of equal scores the earlier token stays.
    """
    images = int(is_image[0].sum())
    dropped = int(round(ratio * images, 7))  # 0.29 * 100 is 28.999999999999996
    ranked = scores.masked_fill(~is_image, torch.inf)  # text comes before every image token
    order = ranked.argsort(dim=1, descending=True, stable=True)  # [B, T]
    return order[:, : scores.shape[1] - dropped].sort(dim=1).values  # attention is causal: the order must stay


def _check_prune(hidden: Tensor, kept: Tensor) -> None:
    require_shape(hidden, "hidden", "B T D")
    require_shape(kept, "kept", "B kept", floating=False, B=hidden.shape[0])
    if kept.device != hidden.device:
        raise ValueError(f"kept is on {kept.device}, hidden is on {hidden.device}")
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < hidden.shape[1]:
        span = f"{int(kept.min())}..{int(kept.max())}"
        raise ValueError(
            f"kept has indices {span}, expected 0..{hidden.shape[1] - 1}: hidden has {hidden.shape[1]} tokens"
        )


@checks(_check_prune)
def prune(hidden: Tensor, kept: Tensor) -> Tensor:
    """Only the kept tokens: hidden [B, T, D], kept [B, K] indices -> [B, K, D]."""
    return hidden.gather(1, kept[:, :, None].expand(-1, -1, hidden.shape[-1]))  # [B, T, D] -> [B, K, D]


def _last_query_weights(block: DecoderBlock, x: Tensor, phases: tuple[Tensor, Tensor]) -> Tensor:
    """The softmax row of the last query in this block: x [B, T, D] -> [B, H, 1, T]. Touches no cache."""
    attention = block.attention
    x = block.attention_norm(x)
    q = attention.query(x[:, -1:]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B, H, 1, d]
    k = attention.key(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B, H_kv, T, d]
    cos, sin = phases
    q, k = apply_rotary(q, cos[-1:], sin[-1:]), apply_rotary(k, cos, sin)
    return attention_weights(q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))  # the last query sees all keys


class Pruned(NamedTuple):
    """logits [B, K, V] of the tokens that reached the end, and kept [B, K], where these stood in the input."""

    logits: Tensor
    kept: Tensor


def _check_prefill(
    decoder: Decoder, embeds: Tensor, is_image: Tensor, *, layer: int, ratio: float, cache: KVCache | None = None
) -> None:
    width, limit = decoder.config.width, decoder.config.max_positions
    require_shape(embeds, "embeds", "B T D", D=width, hint="does the bridge end in another width?")
    _check_mask(is_image, {"B": embeds.shape[0], "T": embeds.shape[1]}, embeds.device)
    _check_ratio(ratio)
    if not 1 <= embeds.shape[1] <= limit:
        raise ValueError(f"there are {embeds.shape[1]} tokens, expected 1 to max_positions = {limit}")
    if not 1 <= layer <= len(decoder.blocks):
        raise ValueError(f"layer is {layer}, expected 1 to {len(decoder.blocks)}: that many layers see every token")
    require_same_device(embeds=embeds, **{"the decoder": decoder.norm.weight})
    if cache is not None and cache.length:
        raise ValueError(f"the cache holds {cache.length} tokens, expected 0: pruning happens once, with the prompt")


@counts(layer=1)
@checks(_check_prefill)
def prefill_pruned(
    decoder: Decoder, embeds: Tensor, is_image: Tensor, *, layer: int, ratio: float, cache: KVCache | None = None
) -> Pruned:
    """Run the prompt; after block `layer` (the paper's K, counted from 1) only the kept tokens go on.

    Args: embeds [B, T, D] without padding; is_image [B, T] boolean. Kept tokens keep their positions, so the gaps stay
    where the dropped tokens were. With a cache, the later layers hold fewer tokens than the first ones; go on with
    `decoder(next_embeds, positions=torch.tensor([T]), cache=cache)`: the default positions would count the short cache.
    """
    positions = torch.arange(embeds.shape[1], device=embeds.device)  # [T]
    config = decoder.config
    phases = rotary_phases(positions, config.head_dim, config.rope_theta)
    x = embeds
    for index, block in enumerate(decoder.blocks[:layer]):
        scored, x = x, block(x, phases, None, cache, index)  # [B, T, D]
    kept = kept_tokens(last_query_scores(_last_query_weights(block, scored, phases)), is_image, ratio)  # [B, K]
    x = prune(x, kept)  # [B, T, D] -> [B, K, D]
    phases = rotary_phases(positions[kept], config.head_dim, config.rope_theta)
    for index, block in enumerate(decoder.blocks[layer:], start=layer):
        x = block(x, phases, None, cache, index)  # [B, K, D]
    return Pruned(decoder.head(decoder.norm(x)), kept)


def _check_flops(
    *, tokens: int, images: int, ratio: float, layer: int, layers: int, width: int, mlp_width: int
) -> None:
    _check_ratio(ratio)
    if images > tokens:
        raise ValueError(f"images is {images}, but there are {tokens} tokens with them")
    if layer > layers:
        raise ValueError(f"layer is {layer}, but there are {layers} layers")


@counts(tokens=1, images=0, layer=0, layers=1, width=1, mlp_width=1)
@checks(_check_flops)
def flops_kept(*, tokens: int, images: int, ratio: float, layer: int, layers: int, width: int, mlp_width: int) -> float:
    """Share of a prefill's multiplications that is left after pruning, from 0 to 1.

    `tokens` counts all of them, `images` among them; `layer` of the `layers` run in full. A layer costs
    4 n d^2 + 2 n^2 d + 2 n d m for n tokens: the paper counts a feed-forward net of two matrices (section 4.2), while
    Llama's has three, which changes the share little.
    """

    def cost(n: int) -> int:
        return 4 * n * width**2 + 2 * n**2 * width + 2 * n * width * mlp_width

    left = tokens - int(round(ratio * images, 7))
    return (layer * cost(tokens) + (layers - layer) * cost(left)) / (layers * cost(tokens))
