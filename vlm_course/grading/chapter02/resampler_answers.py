"""Answers to the resampler exercise: two that are right in their own way, and one class that makes every mistake."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.grading.exercise import Mistake


class Layer(nn.Module):
    """One layer, with a switch for every mistake."""

    def __init__(self, dim, heads, head_dim, mlp_ratio, *, bias, feed_forward, activation):
        super().__init__()
        self.heads, self.dim, self.head_dim = heads, dim, head_dim
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * head_dim, bias=bias) for _ in range(3))
        self.to_out = nn.Linear(heads * head_dim, dim, bias=bias)
        if feed_forward:
            wide = nn.Linear(dim, mlp_ratio * dim, bias=bias)
            self.feed_forward = nn.Sequential(
                nn.LayerNorm(dim), wide, activation(), nn.Linear(mlp_ratio * dim, dim, bias=bias)
            )

    def attend(self, queries, context, values, how):
        def split(x):
            if how == "cut":
                return x.reshape(len(x), self.heads, x.shape[1], -1)  # [B, T, H*d] -> [B, H, T, d], scrambled
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, H*d] -> [B, H, T, d]

        q, k, v = split(self.to_q(queries)), split(self.to_k(context)), split(self.to_v(values))
        scale = {"no scale": 1.0, "width": (self.heads * self.head_dim) ** -0.5, "dim": self.dim**-0.5}
        scores = q @ k.transpose(-2, -1) * scale.get(how, self.head_dim**-0.5)  # [B, H, M, d] -> [B, H, M, T]
        read = scores.softmax(-2 if how == "over queries" else -1) @ v  # [B, H, M, T] -> [B, H, M, d]
        return self.to_out(read.transpose(1, 2).flatten(2))  # [B, H, M, d] -> [B, M, D]

    def forward(self, media, latents, *, how, media_norm, latent_norm, keys, residual, ff_residual, run_ff):
        queries = self.norm_latents(latents) if latent_norm else latents
        seen = self.norm_media(media) if media_norm else media
        context = {
            "media": seen,
            "latents": queries,
            "both": torch.cat([seen, queries], dim=1),
            "latents first": torch.cat([queries, seen], dim=1),
            "bare latents": torch.cat([seen, latents], dim=1),
            "bare values": torch.cat([seen, queries], dim=1),
        }[keys]
        values = torch.cat([media, latents], dim=1) if keys == "bare values" else context
        read = self.attend(queries, context, values, how)
        latents = latents + read if residual else read
        if not run_ff:
            return latents
        return latents + self.feed_forward(latents) if ff_residual else self.feed_forward(latents)


class Resampler(nn.Module):
    """A whole resampler, right unless a switch is set."""

    def __init__(
        self, *, dim, queries, depth=1, heads=8, head_dim=64, mlp_ratio=4, activation=nn.GELU, bias=False,
        feed_forward=True, how="", media_norm=True, latent_norm=True, last_norm=True, keys="both", residual=True,
        ff_residual=True, run_ff=True, shared=False, only_first=False, in_place=False, pooled=False, no_batch=False,
    ):  # fmt: skip
        super().__init__()
        self.latents = nn.Parameter(torch.randn(queries, dim))
        self.layers = nn.ModuleList(
            Layer(dim, heads, head_dim, mlp_ratio, bias=bias, feed_forward=feed_forward, activation=activation)
            for _ in range(1 if shared else depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.rounds = [0] * depth if shared else [0] if only_first else list(range(depth))
        self.last_norm, self.in_place, self.pooled, self.no_batch = last_norm, in_place, pooled, no_batch
        self.switches = {
            "how": how,
            "media_norm": media_norm,
            "latent_norm": latent_norm,
            "keys": keys,
            "residual": residual,
            "ff_residual": ff_residual,
            "run_ff": run_ff and feed_forward,
        }

    def forward(self, media):
        if self.no_batch:
            media = media.mean(0, keepdim=True).expand_as(media)
        latents = self.latents.expand(len(media), -1, -1)  # [M, D] -> [B, M, D]
        for i in self.rounds:
            latents = self.layers[i](media, latents, **self.switches)
        if self.in_place:
            self.latents.data += latents.detach().mean(0)
        out = self.norm(latents) if self.last_norm else latents
        return out.mean(1) if self.pooled else out


class MediaAsQueries(Resampler):
    """Asks from the wrong side: every media token reads the latents."""

    def forward(self, media):
        latents = self.latents.expand(len(media), -1, -1)
        for layer in self.layers:
            media = layer(latents, media, **self.switches)
        return self.norm(media)


def wrong(says: str, **switches) -> Mistake:
    return Mistake(says, lambda **sizes: Resampler(**sizes, **switches))


MISTAKES = {
    "media not normed": wrong("The media go into the attention without their LayerNorm.", media_norm=False),
    "latents not normed": wrong("The latents go into the attention without their LayerNorm.", latent_norm=False),
    "latents normed only as queries": wrong(
        "Among the keys and values the latents lack their LayerNorm: use the normed ones there too.",
        keys="bare latents",
    ),
    "values not normed": wrong(
        "Your values are not normed: keys and values both come from the normed media and latents.", keys="bare values"
    ),
    "no norm at the end": wrong("The LayerNorm at the end is missing.", last_norm=False),
    "media alone as keys": wrong(
        "Your latents read the media alone: keys and values hold the latents too.", keys="media"
    ),
    "latents alone as keys": wrong(
        "Your latents read only each other: the media must be among the keys and values.", keys="latents"
    ),
    "no residual around attention": wrong(
        "The attention replaces the latents: its result is added to them.", residual=False
    ),
    "no residual around the feed-forward net": wrong(
        "The feed-forward net replaces the latents: its result is added to them.", ff_residual=False
    ),
    "feed-forward net not used": wrong("Your layer never runs its feed-forward net.", run_ff=False),
    "no scale": wrong("This is what you get without dividing the scores by sqrt(head_dim).", how="no scale"),
    "scaled by all heads": wrong(
        "You divide by sqrt(heads * head_dim): each head has its own scores, so only head_dim counts.", how="width"
    ),
    "scaled by dim": wrong("You divide by sqrt(dim): each head's vectors are head_dim wide.", how="dim"),
    "softmax over queries": wrong(
        "Your softmax runs over the queries: each query's weights over the keys must sum to 1.", how="over queries"
    ),
    "heads cut wrongly": wrong(
        "You reshape straight to [B, H, T, d]: split the last dimension into heads first, then transpose.", how="cut"
    ),
    "ReLU": Mistake(
        "This is what you get with ReLU in the feed-forward net: the default here is GELU.",
        lambda **sizes: Resampler(**sizes, activation=nn.ReLU),
    ),
    "one layer for all": wrong(
        "All your rounds share one layer: each of the `depth` layers has parameters of its own.", shared=True
    ),
    "only the first layer": wrong("Only your first layer runs: the latents pass through all of them.", only_first=True),
    "biases": wrong("Your linear maps have biases: here only the LayerNorms have any.", bias=True),
    "no feed-forward net": wrong("Your layers have no feed-forward net.", feed_forward=False),
    "batch mixed": wrong("The images of a batch are mixed: each reads its own media.", no_batch=True),
    "averaged": wrong("You average the latents: each of them is a token of its own.", pooled=True),
    "media as queries": Mistake(
        "Your queries are the media, so every token comes back: the latents ask, the media are read.", MediaAsQueries
    ),
    "latents changed in place": wrong(
        "A second call gives another result: nothing may change in between, neither latents in place nor by dropout.",
        in_place=True,
    ),
}


def latents_first(**sizes):
    return Resampler(**sizes, keys="latents first")


class OneClass(nn.Module):
    """Everything in one class, keys and values from one matrix."""

    def __init__(self, *, dim, queries, depth=1, heads=8, head_dim=64, mlp_ratio=4, activation=nn.GELU):
        super().__init__()
        self.heads = heads
        self.query_tokens = nn.Parameter(torch.zeros(1, queries, dim)[0])
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.ModuleDict({"norm_media": nn.LayerNorm(dim), "norm_latents": nn.LayerNorm(dim)})
            block["q"] = nn.Linear(dim, heads * head_dim, bias=False)
            block["kv"] = nn.Linear(dim, 2 * heads * head_dim, bias=False)
            block["out"] = nn.Linear(heads * head_dim, dim, bias=False)
            block["norm_ff"] = nn.LayerNorm(dim)
            block["up"] = nn.Linear(dim, mlp_ratio * dim, bias=False)
            block["down"] = nn.Linear(mlp_ratio * dim, dim, bias=False)
            self.blocks.append(block)
        self.act, self.last = activation(), nn.LayerNorm(dim)

    def forward(self, media):
        latents = self.query_tokens.unsqueeze(0).repeat(media.shape[0], 1, 1)  # [M, D] -> [B, M, D]
        for block in self.blocks:
            normed = block["norm_latents"](latents)
            k, v = block["kv"](torch.cat([block["norm_media"](media), normed], 1)).chunk(2, -1)  # [B, N+M, H*d] each
            q, k, v = (x.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for x in (block["q"](normed), k, v))
            read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [B, H, M, d] -> [B, M, H, d]
            latents = latents + block["out"](read.reshape(*normed.shape[:2], -1))
            latents = latents + block["down"](self.act(block["up"](block["norm_ff"](latents))))
        return self.last(latents)


class ByHand(nn.Module):
    """Matrices as [in, out], einsum, a softmax of its own, and a loop over images and heads."""

    def __init__(self, *, dim, queries, depth=1, heads=8, head_dim=64, mlp_ratio=4):
        super().__init__()
        self.depth, self.heads, self.head_dim = depth, heads, head_dim
        self.latents = nn.Parameter(torch.randn(queries, dim))
        width, wide = heads * head_dim, mlp_ratio * dim
        for i in range(depth):
            for name in ("media", "latents"):
                self.register_parameter(f"{name}_scale{i}", nn.Parameter(torch.ones(dim)))
                self.register_parameter(f"{name}_shift{i}", nn.Parameter(torch.zeros(dim)))
            for name, shape in {"q": (dim, width), "k": (dim, width), "v": (dim, width), "o": (width, dim)}.items():
                self.register_parameter(f"{name}{i}", nn.Parameter(torch.randn(shape)))
            self.register_parameter(f"ff_scale{i}", nn.Parameter(torch.ones(dim)))
            self.register_parameter(f"ff_shift{i}", nn.Parameter(torch.zeros(dim)))
            self.register_parameter(f"up{i}", nn.Parameter(torch.randn(dim, wide)))
            self.register_parameter(f"down{i}", nn.Parameter(torch.randn(wide, dim)))
        self.scale, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    @staticmethod
    def norm(x, scale, shift):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * scale + shift

    def one(self, media):
        latents = self.latents
        for i in range(self.depth):
            p = {name[: -len(str(i))]: value for name, value in self.named_parameters() if name.endswith(str(i))}
            asked = self.norm(latents, p["latents_scale"], p["latents_shift"])
            seen = torch.cat([self.norm(media, p["media_scale"], p["media_shift"]), asked])
            read = []
            for h in range(self.heads):
                part = slice(h * self.head_dim, (h + 1) * self.head_dim)
                scores = torch.einsum("md,nd->mn", asked @ p["q"][:, part], seen @ p["k"][:, part])
                weights = (scores / math.sqrt(self.head_dim)).exp()
                read.append(weights / weights.sum(1, keepdim=True) @ (seen @ p["v"][:, part]))
            latents = latents + torch.cat(read, dim=-1) @ p["o"]
            latents = latents + F.gelu(self.norm(latents, p["ff_scale"], p["ff_shift"]) @ p["up"]) @ p["down"]
        return self.norm(latents, self.scale, self.shift)

    def forward(self, media):
        return torch.stack([self.one(image) for image in media])
