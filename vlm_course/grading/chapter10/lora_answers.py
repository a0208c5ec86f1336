"""Answers to the LoRA exercise, right and wrong."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Variant(nn.Module):
    """A right layer whose steps can be exchanged one by one."""

    def __init__(self, base, *, rank, alpha, dropout=0.0, **steps):
        super().__init__()
        self.steps = {"freeze": True, "start": ("random", "zero"), "parameters": True, "order": ("lora_a", "lora_b")}
        self.steps |= {"scale": lambda alpha, rank: alpha / rank, "scale_all": False, "plain": "layer", "reads": "x"}
        self.steps |= {"between": lambda inner: inner, "drops": "update", "transposed": False, "renamed": False}
        self.steps |= steps
        self.base, self.p = base, dropout
        scale = self.steps["scale"]
        self.scale = scale(alpha, rank) if callable(scale) else scale
        sides = [(rank, base.in_features), (base.out_features, rank)]
        if self.steps["renamed"]:
            sides.reverse()
        for name, side, kind in zip(("lora_a", "lora_b"), sides, self.steps["start"], strict=True):
            matrix = torch.zeros(side[::-1] if self.steps["transposed"] else side)
            if kind == "random":
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            setattr(self, name, nn.Parameter(matrix) if self.steps["parameters"] else matrix)
        self._freeze()

    def _freeze(self):
        freeze = self.steps["freeze"]
        frozen = {True: self.base, False: None, "weight": self.base.weight, "all": self}[freeze]
        if frozen is not None:
            frozen.requires_grad_(False)

    def _plain(self, x):
        if self.steps["plain"] == "weight":
            return F.linear(x, self.base.weight)
        return 0.0 if self.steps["plain"] == "nothing" else self.base(x)

    def _dropped(self, x):
        always = self.steps["drops"] == "always"
        return x if self.steps["drops"] == "never" else F.dropout(x, self.p, training=always or self.training)

    def forward(self, x):
        if self.steps["plain"] == "in place":
            with torch.no_grad():
                self.base.weight += self.scale * self.lora_b @ self.lora_a
            return self.base(x)
        dropped = self._dropped(x)
        read = self._plain(x) if self.steps["reads"] == "base" else dropped
        one, other = (getattr(self, name) for name in self.steps["order"])
        update = F.linear(self.steps["between"](F.linear(read, one)), other)
        plain = self._plain(dropped if self.steps["drops"] == "all" else x)
        return self.scale * (plain + update) if self.steps["scale_all"] else plain + self.scale * update


def made(**steps):
    """An answer that differs from the right one in the given steps."""
    return lambda base, *, rank, alpha, dropout=0.0: Variant(base, rank=rank, alpha=alpha, dropout=dropout, **steps)


class OneMatrix(nn.Module):
    """Forms B A first and applies it as one matrix."""

    def __init__(self, base, *, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.rank, self.alpha, self.dropout = base, rank, alpha, dropout
        for parameter in base.parameters():
            parameter.requires_grad = False
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        update = torch.einsum("or,ri->oi", self.lora_b, self.lora_a) * self.alpha
        return self.base(x) + F.dropout(x, self.dropout, self.training) @ update.T / self.rank


class FromLayers(nn.Module):
    """A and B as two linear layers, whose weights also have the asked names."""

    def __init__(self, base, *, rank, alpha, dropout=0.0):
        super().__init__()
        down = nn.Linear(base.in_features, rank, bias=False)
        up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(up.weight)
        self.lora_a, self.lora_b = down.weight, up.weight
        self.path = nn.Sequential(nn.Dropout(dropout), down, up)
        self.base, self.factor = base, alpha / rank
        self.base.weight.requires_grad_(False)
        if base.bias is not None:
            self.base.bias.requires_grad_(False)

    def forward(self, x):
        return self.path(x) * self.factor + self.base(x)
