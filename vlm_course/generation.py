"""Writing an answer token by token: greedy or sampled, in left-padded batches, with a KV cache."""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.decoder import (
    Decoder,
    DecoderBlock,
    KVCache,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    rotary_phases,
)
from vlm_course.llava import Llava
from vlm_course.validation import checks, counts, require_number, require_shape


def _check_top_p(probabilities, top_p):
    if probabilities.dim() < 1 or 0 in probabilities.shape:
        raise ValueError(f"probabilities are {list(probabilities.shape)}, expected [..., V], no axis of size 0")
    require_number(top_p, "top_p", high=1, above=0)


@checks(_check_top_p)
def top_p_filter(probabilities: Tensor, top_p: float) -> Tensor:
    """Keeps the fewest most likely tokens whose probability reaches `top_p`, the one that crosses it included.

    [..., V] -> [..., V], renormalised to sum to one. Source: Holtzman et al. 2020, section 3.1.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # what the more likely tokens already cover
    kept = torch.zeros_like(probabilities).scatter(-1, order, ordered * (before < top_p))
    return kept / kept.sum(dim=-1, keepdim=True)


def _check_choice(logits, *, temperature=0.0, top_p=1.0, generator=None):
    require_shape(logits, "logits", "B V")
    require_number(temperature, "temperature", low=0)
    require_number(top_p, "top_p", high=1, above=0)


@checks(_check_choice)
def choose_token(
    logits: Tensor, *, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """logits [B, V] -> ids [B]. Temperature 0 takes the best token; otherwise the temperature is applied first and
    top-p is taken of the distribution that it makes."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    return torch.multinomial(top_p_filter(probabilities, top_p), 1, generator=generator)[:, 0]


def _check_prompt(model, ids, pixels=None, *, attention_mask=None, temperature=0.0, top_p=1.0, **rest):
    require_shape(ids, "ids", "B T", floating=False)
    for name, value in (("pixels", pixels), ("attention_mask", attention_mask)):
        if value is not None and value.device != ids.device:
            raise ValueError(f"{name} is on {value.device}, but the ids are on {ids.device}")
    require_number(temperature, "temperature", low=0)
    require_number(top_p, "top_p", high=1, above=0)


def _for_inference(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Runs `function` in torch's inference mode, cheaper than `no_grad` for every small operation. What it returns is
    an ordinary tensor, which a training may read."""

    @wraps(function)
    def run(*args, **kwargs):
        with torch.inference_mode():
            result = function(*args, **kwargs)
        return result.clone()

    return run


@counts(max_new_tokens=1)
@checks(lambda model, ids, pixels, max_new_tokens: _check_prompt(model, ids, pixels))
@_for_inference
def greedy_generate(model, ids: Tensor, pixels: Tensor, max_new_tokens: int) -> Tensor:
    """`generate` at its simplest: the best token each time, no padding, no early end.

    ids [B, T] with expanded placeholders, pixels [n_images, 3, H, W] -> the new ids [B, max_new_tokens].
    """
    cache, features, step, new = model.new_cache(), model.encode_images(pixels), ids, []
    for _ in range(max_new_tokens):
        logits = model(step, image_features=features, cache=cache, logits_to_keep=1)  # [B, T] -> [B, 1, V]
        step, features = logits[:, -1].argmax(dim=-1, keepdim=True), None  # [B, 1]; the cache holds the image now
        new.append(step)
    return torch.cat(new, dim=1)  # max_new_tokens x [B, 1] -> [B, max_new_tokens]


JOIN_AFTER = 8  # tokens: after so many a step's matrices are joined, and the steps to come soon pay for the copy
JOIN_BELOW = 2**28  # parameters of a model whose matrices are copied at all: more would take gigabytes
_PARTS = {Decoder, DecoderBlock, SelfAttention, SwiGLU, RMSNorm, nn.ModuleList, nn.Linear, nn.Embedding}


class _CachedStep:
    """One more token for every row of a cache: what `Decoder.forward` computes, without calling a module.

    Small models spend most of a step on calls, not on arithmetic. Here the weights are looked up once, the rotary
    phases come from a table of `length` positions, queries and keys turn together, and the query heads that share a
    key head stand as its queries. `joined` copies the matrices that read the same input side by side, transposed:
    one product instead of two or three, and one that a CPU's BLAS shares among threads when there is a single row.
    call: ids [B], the tokens before them in `cache` -> logits [B, V].
    """

    def __init__(self, decoder: Decoder, length: int, *, joined: bool = False):
        def matrices(*linears: nn.Linear) -> list[Tensor]:  # [in, out] each, or one [in, all outs]
            weights = [linear.weight.t() for linear in linears]
            return [torch.cat(weights, dim=1).contiguous()] if joined else weights

        self.config = decoder.config
        self.embedding, self.norm, self.head = decoder.token_embedding.weight, decoder.norm.weight, decoder.head.weight
        self.blocks = [
            (
                block.attention_norm.weight,
                matrices(block.attention.query, block.attention.key, block.attention.value),
                block.attention.out.weight.t(),
                block.mlp_norm.weight,
                matrices(block.mlp.gate, block.mlp.up),
                block.mlp.down.weight.t(),
            )
            for block in decoder.blocks
        ]
        positions = torch.arange(length, device=self.head.device)
        cos, sin = rotary_phases(positions, self.config.head_dim, self.config.rope_theta)  # 2 x [length, d/2]
        self.cos, self.sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # 2 x [length, d]

    @staticmethod
    def fits(model) -> bool:
        """Whether every part is the course's own, without hooks: anything else, such as an adapter, must be called."""
        return type(model) is Llava and all(
            type(part) in _PARTS and not (part._forward_hooks or part._forward_pre_hooks)
            for part in model.decoder.modules()
        )

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        sizes = self.config
        rows, width, d = len(ids), (sizes.width,), sizes.head_dim
        cos, sin = self.cos[cache.length], self.sin[cache.length]  # [d]
        x = self.embedding[ids]  # [B] -> [B, D]
        for layer, (norm1, qkv, out, norm2, gate_up, down) in enumerate(self.blocks):
            h = F.rms_norm(x, width, norm1, sizes.norm_eps)
            heads = _side_by_side(h, qkv).view(rows, -1, d)  # [B, D] -> [B, H + 2 H_kv, d]
            qk, v = heads.split([sizes.heads + sizes.kv_heads, sizes.kv_heads], dim=1)
            # `apply_rotary` in three operations, both halves at once
            turned = torch.addcmul(qk.float() * cos, qk.float().roll(d // 2, dims=-1), sin).to(x.dtype)
            q, k = turned.split([sizes.heads, sizes.kv_heads], dim=1)
            # [B, H_kv, 1, d] -> [B, H_kv, past + 1, d]
            keys, values = cache.update(layer, k.unsqueeze(2), v.unsqueeze(2))
            q = q.view(rows, sizes.kv_heads, -1, d)  # [B, H, d] -> [B, H_kv, H / H_kv, d]
            read = F.scaled_dot_product_attention(q, keys, values)  # [B, H_kv, H / H_kv, d]
            x = torch.addmm(x, read.reshape(rows, -1), out)  # [B, H * d] -> [B, D]
            h = F.rms_norm(x, width, norm2, sizes.norm_eps)
            gate, up = _side_by_side(h, gate_up).chunk(2, dim=-1)  # [B, D] -> 2 x [B, mlp_width]
            x = torch.addmm(x, F.silu(gate) * up, down)  # [B, mlp_width] -> [B, D]
        return F.linear(F.rms_norm(x, width, self.norm, sizes.norm_eps), self.head)  # [B, D] -> [B, V]


def _side_by_side(x: Tensor, matrices: list[Tensor]) -> Tensor:
    """x [B, in] through each matrix [in, out], the results joined: [B, all outs]."""
    products = [x @ matrix for matrix in matrices]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


@counts(max_new_tokens=1, eos_id=0)
@checks(_check_prompt)
@_for_inference
def generate(
    model,
    ids: Tensor,
    pixels: Tensor | None = None,
    *,
    image_features: Tensor | None = None,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    eos_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """ids [B, T], left-padded, placeholders expanded -> the new ids [B, up to max_new_tokens], eos_id after the end.

    attention_mask [B, T] is True for real tokens; without it no token is padding. The images, as `pixels` or as
    `image_features`, are encoded once. Positions count image tokens like any other. <image> itself is never written.
    `use_cache=False` runs the whole sequence again for every token and gives the same answer.
    With `eos_id=None` nothing ends early.
    """
    if pixels is not None:
        if image_features is not None:
            raise ValueError("got both pixels and image_features: pass the images once")
        image_features = model.encode_images(pixels)  # [n_images, 3, H, W] -> [n_images, M, D]
    if attention_mask is not None:
        attention_mask = _left_padding_or_none(attention_mask, ids)
    length = ids.shape[1] + max_new_tokens
    cache = model.new_cache(capacity=length) if use_cache else None
    quick, small = None, sum(weight.numel() for weight in model.parameters()) < JOIN_BELOW
    if (
        use_cache
        and attention_mask is None
        and _CachedStep.fits(model)
        and length <= model.decoder.config.max_positions
    ):
        quick = _CachedStep(model.decoder, length)
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    sequence, step, new = ids, ids, []
    while True:
        if quick is not None and len(new) == JOIN_AFTER and small:
            quick = _CachedStep(model.decoder, length, joined=True)
        if quick is not None and new:
            logits = quick(new[-1], cache)  # [B] -> [B, V]
        else:
            logits = model(
                step, image_features=image_features, attention_mask=attention_mask, cache=cache, logits_to_keep=1
            )[:, -1]  # [B, 1, V] -> [B, V]
        logits[:, model.config.image_id] = -torch.inf
        token = choose_token(logits, temperature=temperature, top_p=top_p, generator=generator)  # [B, V] -> [B]
        if eos_id is not None:
            token = torch.where(finished, eos_id, token)
            finished = finished | (token == eos_id)
        new.append(token)
        if len(new) == max_new_tokens or (eos_id is not None and bool(finished.all())):
            return torch.stack(new, dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(ids), 1)], dim=1)
        if use_cache:
            step, image_features = token[:, None], None  # the image is in the cache already
        else:
            step = sequence = torch.cat([sequence, token[:, None]], dim=1)


def _left_padding_or_none(attention_mask: Tensor, ids: Tensor) -> Tensor | None:
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)} but ids are {tuple(ids.shape)}")
    mask = attention_mask.bool()
    if bool(mask.all()):
        return None  # nothing is padded: the faster causal path gives the same result
    if not bool(mask[:, -1].all()):
        raise ValueError("a row ends in padding: generation continues at the right, so pad on the left")
    return mask
