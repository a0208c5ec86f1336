"""Answers to the cross-attention exercise: right ones in their own way, and one class that makes every mistake."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.grading.exercise import Mistake


class Block(nn.Module):
    """A whole block, right unless a switch is set."""

    def __init__(
        self, *, dim, media_dim, heads=8, head_dim=64, norm=nn.LayerNorm, activation=nn.GELU, feed_forward=None,
        bias=False, squash=torch.tanh, gates="both", how="", masking="", query_norm=True, ff_norm=True, residual=True,
        ff_residual=True, parallel=False, run_ff=True, one_gate=False, media_order="", read_again=False, wide=4,
        start=0.0,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.dim, self.head_dim = heads, dim, head_dim
        self.norm = norm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=bias)
        self.to_k = nn.Linear(media_dim, heads * head_dim, bias=bias)
        self.to_v = nn.Linear(media_dim, heads * head_dim, bias=bias)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=bias)
        self.attention_gate = nn.Parameter(torch.full((1,), start))
        self.feed_forward = nn.Sequential(
            norm(dim), nn.Linear(dim, wide * dim, bias=bias), activation(), nn.Linear(wide * dim, dim, bias=bias)
        )
        if not one_gate:
            self.feed_forward_gate = nn.Parameter(torch.full((1,), start))
        self.squash, self.gates, self.how, self.masking = squash, gates, how, masking
        self.query_norm, self.ff_norm, self.residual, self.ff_residual = query_norm, ff_norm, residual, ff_residual
        self.parallel, self.run_ff, self.media_order, self.read_again = parallel, run_ff, media_order, read_again

    def allowed(self, mask, tokens):
        """[B, T, I] -> [B, 1, T, I * M], as asked for."""
        if self.masking == "every earlier image":
            mask = mask.flip(-1).cumsum(-1).flip(-1) > 0
        if self.masking == "none":
            mask = torch.ones_like(mask)
        if self.masking == "inverted":
            mask = ~mask
        if self.masking == "tiled":
            return mask.repeat(1, 1, tokens)[:, None]
        return mask.repeat_interleave(tokens, dim=-1)[:, None]

    def read(self, text, media, mask):
        def split(x):
            if self.how == "cut":
                return x.reshape(len(x), self.heads, x.shape[1], -1)
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        keys = media.flatten(1, 2)
        if self.media_order == "swapped":
            keys = media.transpose(1, 2).flatten(1, 2)
        x = self.norm(text) if self.query_norm else text
        q, k, v = split(self.to_q(x)), split(self.to_k(keys)), split(self.to_v(keys))
        if self.how == "values are keys":
            v = k
        scale = {"no scale": 1.0, "width": (self.heads * self.head_dim) ** -0.5}.get(self.how, self.head_dim**-0.5)
        allowed = self.allowed(mask, media.shape[2])
        hidden = -1e9 if self.masking == "mean of all" else -math.inf
        weights = (q @ k.transpose(-2, -1) * scale).masked_fill(~allowed, hidden).softmax(-1)
        if self.masking == "after the softmax":
            weights = (q @ k.transpose(-2, -1) * scale).softmax(-1) * allowed
        weights = weights.nan_to_num(0.0)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, text, media, mask):
        gate, ff_gate = (
            self.squash(self.attention_gate),
            self.squash(getattr(self, "feed_forward_gate", self.attention_gate)),
        )
        if self.gates in ("feed-forward", "none"):
            gate = torch.ones_like(gate)
        if self.gates in ("attention", "none"):
            ff_gate = torch.ones_like(ff_gate)
        if self.gates == "swapped":
            gate, ff_gate = ff_gate, gate
        read = self.read(text, media, mask)
        new = text + gate * read if self.residual else gate * read
        if not self.run_ff:
            return new
        source = text if self.parallel else read if self.read_again else new
        inside = self.feed_forward(source) if self.ff_norm else self.feed_forward[1:](source)
        return new + ff_gate * inside if self.ff_residual else ff_gate * inside


def wrong(says: str, **switches) -> Mistake:
    return Mistake(says, lambda **sizes: Block(**sizes, **switches))


MISTAKES = {
    "no tanh": wrong("Your gates are not squashed: the parameter passes tanh first.", squash=lambda gate: gate),
    "sigmoid": wrong(
        "Your gates pass a sigmoid, which is 0.5 at zero: tanh is zero there, so that a new block changes nothing.",
        squash=torch.sigmoid,
    ),
    "attention without gate": wrong(
        "What was read is added in full: it passes a gate of its own, tanh(attention_gate).", gates="feed-forward"
    ),
    "feed-forward without gate": wrong(
        "The feed-forward half has no gate: both halves pass one, so a new block changes nothing.", gates="attention"
    ),
    "no gates": wrong("No gate is used: each half is multiplied by the tanh of its own gate.", gates="none"),
    "gates swapped": wrong("Your two gates are exchanged.", gates="swapped"),
    "one gate for both": wrong("A gate is missing: each half has its own, an nn.Parameter.", one_gate=True),
    "gates start open": wrong(
        "Your gates start open: they start at zero, torch.zeros(1), so that a new block changes nothing.", start=1.0
    ),
    "queries not normed": wrong("The text goes into the attention without its norm.", query_norm=False),
    "feed-forward not normed": wrong("The feed-forward net skips the norm that stands in it.", ff_norm=False),
    "no residual around attention": wrong("What was read replaces the text: it is added to it.", residual=False),
    "no residual around the feed-forward net": wrong(
        "The feed-forward net replaces the text: its result is added.", ff_residual=False
    ),
    "feed-forward net not used": wrong("Your block never runs its feed-forward net.", run_ff=False),
    "side by side": wrong(
        "Your feed-forward net works on the text as it came in: it works on the text after the attention.",
        parallel=True,
    ),
    "feed-forward on what was read": wrong(
        "Your feed-forward net works on what was read alone: it works on the text with that added.", read_again=True
    ),
    "no mask": wrong("Your text reads every image: the mask is not used.", masking="none"),
    "every earlier image": wrong(
        "Your text reads all earlier images: use the mask as it comes, it marks one image a token.",
        masking="every earlier image",
    ),
    "mask inverted": wrong("Your mask is inverted: True means may attend.", masking="inverted"),
    "mask tiled": wrong(
        "You repeat the mask as a whole: each image's column is repeated for its M tokens, with repeat_interleave.",
        masking="tiled",
    ),
    "mean of all before the first image": wrong(
        "Text before the first image reads the mean of all images: a row with nothing to read gives zeros.",
        masking="mean of all",
    ),
    "mask after the softmax": wrong(
        "You mask after the softmax, so the weights of what is left do not sum to one: mask the scores.",
        masking="after the softmax",
    ),
    "no scale": wrong("This is what you get without dividing the scores by sqrt(head_dim).", how="no scale"),
    "scaled by all heads": wrong(
        "You divide by sqrt(heads * head_dim): each head has its own scores, so only head_dim counts.", how="width"
    ),
    "heads cut wrongly": wrong(
        "You reshape straight to [B, H, T, d]: split the last dimension into heads first, then transpose.", how="cut"
    ),
    "values are keys": wrong("Your values are the keys: to_v is not used.", how="values are keys"),
    "images and tokens swapped": wrong(
        "You flatten the media token by token: image after image, so that they fit the mask.", media_order="swapped"
    ),
    "ReLU": Mistake(
        "This is what you get with ReLU in the feed-forward net: the default here is GELU.",
        lambda **sizes: Block(**sizes, activation=nn.ReLU),
    ),
    "biases": wrong("Your linear maps have biases: here only the norms have any.", bias=True),
    "feed-forward twice as wide": wrong(
        "Your feed-forward net is twice the text's width inside: it is four times as wide.", wide=2
    ),
}


class Fused(nn.Module):
    """Keys and values from one matrix, torch's own attention with an additive mask, gates as scalars."""

    def __init__(
        self, *, dim, media_dim, heads=8, head_dim=64, norm=nn.LayerNorm, activation=nn.GELU, feed_forward=None
    ):
        super().__init__()
        self.heads = heads
        self.norm_text = norm(dim)
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.kv = nn.Linear(media_dim, 2 * heads * head_dim, bias=False)
        self.o = nn.Linear(heads * head_dim, dim, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))
        self.norm_ff = norm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
        self.act = activation()
        self.ff_gate = nn.Parameter(torch.zeros(()))

    def forward(self, text, media, mask):
        B, T, _ = text.shape
        _, I, M, _ = media.shape
        keys, values = self.kv(media.reshape(B, I * M, -1)).chunk(2, dim=-1)
        q, k, v = (x.reshape(B, x.shape[1], self.heads, -1).transpose(1, 2)
                   for x in (self.q(self.norm_text(text)), keys, values))  # fmt: skip
        open_ = mask[..., None].expand(B, T, I, M).reshape(B, 1, T, I * M)
        scores = torch.zeros(open_.shape, dtype=q.dtype, device=q.device).masked_fill(~open_, -1e30)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=scores) * open_.any(-1, keepdim=True)
        text = text + self.gate.tanh() * self.o(read.transpose(1, 2).reshape(B, T, -1))
        return text + self.ff_gate.tanh() * self.down(self.act(self.up(self.norm_ff(text))))


class ImageByImage(nn.Module):
    """A loop over images: each token's read is taken from the one image that its mask names."""

    def __init__(self, *, dim, media_dim, heads=8, head_dim=64):
        super().__init__()
        self.block = Block(dim=dim, media_dim=media_dim, heads=heads, head_dim=head_dim)

    def forward(self, text, media, mask):
        block, read = self.block, 0
        for number in range(media.shape[1]):
            alone = torch.ones_like(mask[..., :1])
            read = read + mask[..., number, None] * block.read(text, media[:, number, None], alone)
        text = text + torch.tanh(block.attention_gate) * read
        return text + torch.tanh(block.feed_forward_gate) * block.feed_forward(text)
