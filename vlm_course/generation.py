"""Writing an answer token by token: greedy or sampled, in left-padded batches, with a KV cache."""

import torch
from torch import Tensor


def top_p_filter(probabilities: Tensor, top_p: float) -> Tensor:
    """Keeps the fewest most likely tokens whose probability reaches `top_p`, the one that crosses it included.

    [..., V] -> [..., V], renormalised to sum to one. Source: Holtzman et al. 2020, section 3.1.
    """
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}, but it is a probability in (0, 1]")
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # what the more likely tokens already cover
    kept = torch.zeros_like(probabilities).scatter(-1, order, ordered * (before < top_p))
    return kept / kept.sum(dim=-1, keepdim=True)


def choose_token(
    logits: Tensor, *, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """logits [B, V] -> ids [B]. Temperature 0 takes the best token; otherwise the temperature is applied first and
    top-p is taken of the distribution that it makes."""
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, but it cannot be negative")
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    return torch.multinomial(top_p_filter(probabilities, top_p), 1, generator=generator)[:, 0]


@torch.no_grad()
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


@torch.no_grad()
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
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but at least one token must be asked for")
    if pixels is not None:
        if image_features is not None:
            raise ValueError("got both pixels and image_features: pass the images once")
        image_features = model.encode_images(pixels)  # [n_images, 3, H, W] -> [n_images, M, D]
    if attention_mask is not None:
        attention_mask = _left_padding_or_none(attention_mask, ids)
    cache = model.new_cache(capacity=ids.shape[1] + max_new_tokens) if use_cache else None
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    sequence, step, new = ids, ids, []
    while True:
        logits = model(
            step, image_features=image_features, attention_mask=attention_mask, cache=cache, logits_to_keep=1
        )
        logits = logits[:, -1]  # [B, 1, V] -> [B, V]
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
