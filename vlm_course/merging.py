"""Token merging (ToMe): in every block of a trained ViT, the r most similar pairs of tokens become one token each.

Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster" (arXiv 2210.09461), section 3; written from the paper.
Merged tokens stand in the order of the tokens that they were merged into, so a class token stays first.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_course.validation import checks, counts, method_checks, readable, require_same_device, require_shape
from vlm_course.vit import VisionTransformer


def _check_then(self: "Matching", later: "Matching") -> None:
    if later.assignment.shape[1] != self.tokens:
        raise ValueError(
            f"the later matching is of {later.assignment.shape[1]} tokens, but this one leaves {self.tokens}"
        )
    require_same_device(earlier=self.assignment, later=later.assignment)


@method_checks(then=_check_then)
@counts(tokens=1)
@dataclass(frozen=True)
class Matching:
    """Which tokens become one. `assignment` [B, N]: the place, 0 .. tokens - 1, that every token goes to."""

    assignment: Tensor
    tokens: int

    def then(self, later: "Matching") -> "Matching":
        """This matching followed by one of its results: where the first tokens are after both."""
        return Matching(later.assignment.gather(1, self.assignment), later.tokens)


def _matching_rule(metric: Tensor, r: int, *, protected: int = 1) -> None:
    require_shape(metric, "metric", "B N D", hint="average the keys over the heads first")
    if protected > metric.shape[1]:
        raise ValueError(f"protected is {protected}, but there are {metric.shape[1]} tokens")
    if readable(metric) and not metric.isfinite().all():
        bad = int((~metric.isfinite()).sum())
        raise ValueError(
            f"{bad} of {metric.numel()} numbers of metric are NaN or infinite: their similarity has no order"
        )


@counts(r=0, protected=0)
@checks(_matching_rule)
def bipartite_soft_matching(metric: Tensor, r: int, *, protected: int = 1) -> Matching:
    """Find r tokens to merge into others.

    Tokens after the first `protected` ones (the class token) are dealt in turn into the sets A and B. Every token of
    A proposes its most similar token of B, by cosine; the r best proposals are taken. No two tokens of A look at each
    other, so no search for clusters is needed, and several of A may choose the same token of B.

    Args: metric [B, N, D], in ToMe the attention keys averaged over the heads; r, capped at half of the tokens that
    are not protected. Returns a `Matching` that leaves N - r tokens. Raises ValueError for a negative r.
    """
    B, N, _ = metric.shape
    r = min(r, (N - protected) // 2)
    index = torch.arange(protected, N, device=metric.device)
    in_a, in_b = index[0::2], index[1::2]
    survives = torch.ones(B, N, dtype=torch.bool, device=metric.device)
    target = torch.arange(N, device=metric.device).repeat(B, 1)  # [B, N]: the token that each one is merged into
    if r > 0:
        unit = torch.nn.functional.normalize(metric, dim=-1)  # [B, N, D]
        similarity = unit[:, in_a] @ unit[:, in_b].transpose(1, 2)  # -> [B, |A|, |B|]
        best, partner = similarity.max(dim=-1)  # [B, |A|, |B|] -> 2 x [B, |A|]
        chosen = best.topk(r, dim=-1).indices  # [B, |A|] -> [B, r], positions in A
        sources = in_a[chosen]  # [B, r], token numbers
        target.scatter_(1, sources, in_b[partner.gather(1, chosen)])
        survives.scatter_(1, sources, False)
    place = survives.cumsum(dim=1) - 1  # [B, N]: where a survivor stands afterwards
    return Matching(place.gather(1, target), N - r)


def _require_sizes(sizes: Tensor, batch: int, tokens: int) -> None:
    require_shape(sizes, "sizes", "B N", floating=None, B=batch, N=tokens, hint="one size for every token")
    if readable(sizes) and not bool((sizes > 0).all()):
        raise ValueError(f"sizes of shape {tuple(sizes.shape)} hold a number that is not above 0: sizes count patches")


def _merge_rule(x: Tensor, sizes: Tensor, matching: Matching) -> None:
    require_shape(x, "x", "B N D")
    require_same_device(x=x, sizes=sizes, **{"the matching": matching.assignment})
    _require_sizes(sizes, *x.shape[:2])
    if matching.assignment.shape != x.shape[:2]:
        raise ValueError(
            f"x has (batch, tokens) = {tuple(x.shape[:2])}, the matching {tuple(matching.assignment.shape)}"
        )


@checks(_merge_rule)
def merge_tokens(x: Tensor, sizes: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Average the tokens that share a place, each weighted by the number of patches it stands for.

    Args: x [B, N, D]; sizes [B, N], ones at first. Returns merged x [B, N - r, D] and sizes [B, N - r]. The sum of
    the sizes and the sum of size * x stay what they were; a token that nothing joins stays equal bit for bit.
    """
    B, _, D = x.shape
    places = matching.assignment  # [B, N]
    merged_sizes = sizes.new_zeros(B, matching.tokens).scatter_add(1, places, sizes)  # [B, N] -> [B, N - r]
    share = (sizes / merged_sizes.gather(1, places)).to(x.dtype)  # [B, N]; exactly 1 for a token on its own
    merged = x.new_zeros(B, matching.tokens, D)
    merged = merged.scatter_add(1, places[..., None].expand(-1, -1, D), share[..., None] * x)  # -> [B, N - r, D]
    return merged, merged_sizes


def _unmerge_rule(x: Tensor, matching: Matching) -> None:
    require_shape(x, "x", "B M D", B=matching.assignment.shape[0], M=matching.tokens, hint="what the matching leaves")
    require_same_device(x=x, **{"the matching": matching.assignment})


@checks(_unmerge_rule)
def unmerge_tokens(x: Tensor, matching: Matching) -> Tensor:
    """Give every original token the value of the one it was merged into: [B, N - r, D] -> [B, N, D]."""
    return x.gather(1, matching.assignment[..., None].expand(-1, -1, x.shape[-1]))


def _proportional_rule(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> None:
    require_shape(q, "q", "B H T d")
    B, H, _, d = q.shape
    require_shape(k, "k", "B H S d", B=B, H=H, d=d)
    require_shape(v, "v", "B H S e", B=B, H=H, S=k.shape[2], hint="one value for every key")
    require_same_device(q=q, k=k, v=v, sizes=sizes)
    _require_sizes(sizes, B, k.shape[2])


@checks(_proportional_rule)
def proportional_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> Tensor:
    """Attention in which a token of size s draws as much as s equal tokens would: softmax(q k / sqrt(d) + log s) v.

    Args: q [B, H, T, d]; k and v [B, H, S, d]; sizes [B, S]. Returns [B, H, T, d]. Source: equation 1 of the paper.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, H, T, d] -> [B, H, T, S]
    scores = scores + sizes.to(scores.dtype).log()[:, None, None, :]  # [B, S] -> [B, 1, 1, S]
    return scores.softmax(dim=-1) @ v  # [B, H, T, S] -> [B, H, T, d]


def _check_counts(tokens: int, r: int, layers: int, *, protected: int = 1) -> None:
    if protected > tokens:
        raise ValueError(f"protected is {protected}, but tokens is {tokens}: no more can be protected than there are")


@counts(tokens=1, r=0, layers=1, protected=0)
@checks(_check_counts)
def token_counts(tokens: int, r: int, layers: int, *, protected: int = 1) -> list[int]:
    """Tokens after each of `layers` blocks that remove r each, or half of what is left when that is fewer."""
    after = []
    for _ in range(layers):
        tokens -= min(r, (tokens - protected) // 2)
        after.append(tokens)
    return after


@counts(r=0)
def merged_forward(tower: VisionTransformer, pixels: Tensor, r: int) -> tuple[Tensor, Tensor, Matching]:
    """A trained tower with ToMe in every block, between attention and MLP; nothing is trained again.

    Args: pixels [B, C, H, W]; r tokens removed in each block. Returns the tokens [B, M, D] (class token first, not
    post-normed, as the tower's own forward), their sizes [B, M], and the matching of all layers together [B, 1+N].
    With r = 0 this is the tower's forward.
    """
    x = tower.embed(pixels)  # [B, C, H, W] -> [B, 1+N, D]
    B, N, D = x.shape
    sizes = x.new_ones(B, N)
    total = Matching(torch.arange(N, device=x.device).repeat(B, 1), N)
    for block in tower.blocks:
        attention = block.attention
        qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.heads, -1))  # [B, T, D] -> [B, T, 3, H, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # -> 3 x [B, H, T, d]
        mixed = proportional_attention(q, k, v, sizes).transpose(1, 2).reshape(B, -1, D)  # [B, H, T, d] -> [B, T, D]
        x = x + attention.out(mixed)
        matching = bipartite_soft_matching(k.mean(dim=1), r)  # keys [B, H, T, d] -> [B, T, d]
        x, sizes = merge_tokens(x, sizes, matching)  # [B, T, D] -> [B, T - r, D]
        total = total.then(matching)
        x = x + block.mlp(block.norm2(x))
    return x, sizes, total
