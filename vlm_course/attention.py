"""Attention and every mask of the course. Masks are boolean, True = may attend, and are built only here."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_course.validation import checks, counts, require_same_device, require_shape


@counts(length=0, offset=0)
def causal_mask(length: int, *, offset: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Each query sees its own position and all earlier ones.

    `offset` is the number of keys that lie before the first query, as in a KV cache: the last query always sees the
    last key (bottom-right alignment). Returns [length, offset + length].
    """
    queries = torch.arange(offset, offset + length, device=device)
    keys = torch.arange(offset + length, device=device)
    return keys[None, :] <= queries[:, None]  # [length, offset + length]


@checks(lambda attention_mask: require_shape(attention_mask, "attention_mask", "batch keys", floating=None))
def padding_mask(attention_mask: Tensor) -> Tensor:
    """Hides padded keys: [B, S] with 1 or True for real tokens -> [B, 1, 1, S]. It hides no future: AND it with
    `causal_mask`, never put it in its place."""
    return attention_mask.bool()[:, None, None, :]  # [B, S] -> [B, 1, 1, S]


def _prefix_rule(lengths, length):
    require_shape(lengths, "lengths", "batch", floating=False, hint="one prefix length per row")


@counts(length=1)
@checks(_prefix_rule)
def prefix_mask(lengths: Tensor, length: int) -> Tensor:
    """Causal, but the first `lengths[b]` tokens (an image and its question, as in PaliGemma) see each other fully.

    lengths [B] counts prefix tokens -> [B, 1, length, length]. Source: T5 (Raffel et al. 2020), section 3.2.1.
    """
    in_prefix = torch.arange(length, device=lengths.device) < lengths[:, None]  # [B, T]
    return causal_mask(length, device=lengths.device) | in_prefix[:, None, None, :]  # [B, 1, T, T]


def _block_rule(documents, *, causal=True):
    require_shape(documents, "documents", "batch tokens", floating=False)


@checks(_block_rule)
def block_mask(documents: Tensor, *, causal: bool = True) -> Tensor:
    """Several documents packed in one row: a token sees only tokens with its own document number.

    documents [B, T] integers, a negative number marks padding (which sees nothing and is not seen)
    -> [B, 1, T, T]. Source: NaViT (Dehghani et al. 2023), section 2.1, with `causal=False` for image patches.
    """
    same = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, :, None]  # [B, T, T]
    if causal:
        same = same & causal_mask(documents.shape[1], device=documents.device)
    return same[:, None]  # [B, T, T] -> [B, 1, T, T]


def _queries_rule(queries, length, *, documents=None):
    require_shape(queries, "queries", "batch queries", floating=False)
    if documents is not None:
        require_shape(documents, "documents", "batch tokens", floating=False, batch=len(queries), tokens=length)
        require_same_device(queries=queries, documents=documents)


@counts(length=1)
@checks(_queries_rule)
def queries_mask(queries: Tensor, length: int, *, documents: Tensor | None = None) -> Tensor:
    """The rows of a causal mask that belong to some positions only: queries [B, S], the places of the queries in a row
    of `length` tokens -> [B, 1, S, length]. With documents [B, length] these rows are `block_mask`'s."""
    keys = torch.arange(length, device=queries.device)
    mask = keys <= queries[..., None]  # [B, S, T]
    if documents is not None:
        own = documents.gather(1, queries)  # [B, S]
        mask = mask & (own[..., None] == documents[:, None, :]) & (own >= 0)[..., None]
    return mask[:, None]


def _media_rule(media, tokens_per_image):
    require_shape(media, "media", "batch tokens images", floating=None)


@counts(tokens_per_image=1)
@checks(_media_rule)
def media_attention_mask(media: Tensor, tokens_per_image: int) -> Tensor:
    """Which visual tokens a text token may read: [B, T, n_images] from `fusion.media_mask` ->
    [B, 1, T, n_images * tokens_per_image]."""
    return media.bool().repeat_interleave(tokens_per_image, dim=-1)[:, None]


def _attend_rule(q, k, v, *, mask=None, is_causal=False):
    if q.dim() != 4 or k.dim() != 4 or k.shape[:-1] != v.shape[:-1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"expected [batch, heads, tokens, head_dim] with as many keys as values, but got {shapes}")
    if q.shape[0] != k.shape[0] or 0 in q.shape or 0 in k.shape or 0 in v.shape:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"expected the same batch for queries and keys, and no axis of size 0, but got {shapes}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}: expected one device")
    if q.shape[-1] != k.shape[-1]:
        have = f"queries have head_dim {q.shape[-1]}, keys {k.shape[-1]}"
        raise ValueError(f"{have}, expected the same: were heads and head_dim swapped?")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: not a multiple")
    if is_causal and q.shape[-2] > k.shape[-2]:
        raise ValueError(f"{q.shape[-2]} queries but only {k.shape[-2]} keys: causal needs a key for every query")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype}, expected torch.bool: a number would be added to the scores")
    if not 2 <= mask.dim() <= 4:
        raise ValueError(f"the mask has {mask.dim()} dimensions {tuple(mask.shape)}, expected 2 to 4: [B, H, T, S]")
    if mask.device != q.device:
        raise ValueError(f"the mask is on {mask.device}, but the queries are on {q.device}")
    axes = ((k.shape[2], "keys"), (q.shape[2], "queries"), (q.shape[1], "heads"), (q.shape[0], "rows"))
    for have, (size, what) in zip(reversed(mask.shape), axes, strict=False):
        if have not in (1, size):
            raise ValueError(f"the mask has {have} {what} but there are {size}: does it leave out the cached tokens?")


@checks(_attend_rule)
def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Scaled dot-product attention; the one place that calls torch's fused kernel.

    q [B, H, T, d], k and v [B, H_kv, S, d], where H_kv divides H (grouped queries) -> [B, H, T, d]. `mask` is boolean
    and broadcasts to [B, H, T, S]. `is_causal` lines up the last query with the last key, also when a cache makes
    S > T (torch's own flag lines up the first ones), and combines with `mask` (torch refuses both).
    A query that may attend to nothing gets zeros. Source: Vaswani et al. 2017, section 3.2.1.
    """
    is_causal = is_causal and q.shape[-2] > 1  # the last query sees every key: one alone needs no causal mask
    if is_causal and (mask is not None or q.shape[-2] != k.shape[-2]):
        causal = causal_mask(q.shape[-2], offset=k.shape[-2] - q.shape[-2], device=q.device)
        mask, is_causal = causal if mask is None else causal & mask, False
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)


@checks(lambda q, k, *, mask=None: _attend_rule(q, k, k, mask=mask))
def attention_weights(q: Tensor, k: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The softmax that `attend` never shows: q [B, H, T, d], k [B, H, S, d] -> rows that sum to one, [B, H, T, S].

    `attention_weights(q, k) @ v` equals `attend(q, k, v)`. A fully masked row is all zeros, as in `attend`.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, H, T, d] -> [B, H, T, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1).nan_to_num(0.0)
