"""The quick way to the same loss: `prepare(model, plan)` once, then `loss(model, batch, count)` in every step.

What it does, each switched off where it does not apply: weights with one input side by side and multiplied once; the
head, and the last block's queries and MLP, only where an answer is learned; no logits beyond a part of them; adapters
in few products; packed documents by variable-length attention; blocks compiled once for all layers; blocks computed
again in the backward pass only as many as memory asks for; frozen parts without a graph; a batch that knows its sizes
makes no step wait for the device. The model's own modules, parameter names and forward stay as they are, so optimizers,
checkpoints and evaluation know nothing of it. Tried and left out: the tower as one CUDA graph (1.00 times as fast, one
H100).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm_course.attention import block_mask, queries_mask
from vlm_course.decoder import DecoderBlock, rotary_phases
from vlm_course.finetune.collate import sizes_of
from vlm_course.finetune.fast_blocks import Layout, Map, Tensors, decoder_block, varlen, vision_block
from vlm_course.finetune.fast_loss import IGNORE, linear_cross_entropy, loss_and_slope
from vlm_course.finetune.fast_memory import blocks_again
from vlm_course.finetune.fused import fuse, gate_up_parts, intact, qkv_parts
from vlm_course.finetune.lora import LoRALinear
from vlm_course.fusion import splice_image_features
from vlm_course.llava import Llava

FEW = 0.75  # share of a row's positions up to which it pays to choose those with an answer
_prepared: weakref.WeakKeyDictionary[nn.Module, Runner] = weakref.WeakKeyDictionary()


class NotFast(ValueError):
    """The model has parts that the quick way does not know; the plain loss computes the same."""


@dataclass
class Options:
    """How the quick way runs. `recompute`: blocks computed again in the backward pass, None for as few as fit."""

    dtype: torch.dtype | None = None  # of activations; None: that of the decoder's weights
    compiled: bool = False
    recompute: int | None = None
    answers_only: bool = True
    settings: dict = field(default_factory=dict)  # for torch.compile


def _maps(block: DecoderBlock) -> dict[str, list[nn.Module]]:
    a, m = block.attention, block.mlp
    return {"qkv": [a.query, a.key, a.value], "out": [a.out], "gate_up": [m.gate, m.up], "down": [m.down]}


def _map(modules: Sequence[nn.Module]) -> Map:
    """What the product of some linear layers with one input is. Raises NotFast where they differ."""
    rows = tuple(module.out_features for module in modules)
    adapters = [module for module in modules if isinstance(module, LoRALinear)]
    if adapters:
        settings = {(m.scale, m.dropout.p, m.lora_a.shape[0]) for m in adapters}
        if len(adapters) < len(modules) or len(settings) > 1 or any(type(m) is not LoRALinear for m in adapters):
            raise NotFast(f"{len(adapters)} of {len(modules)} layers with one input have LoRA, or they differ")
        return Map("lora", rows, adapters[0].scale, adapters[0].dropout.p)
    if any(type(module) is not nn.Linear for module in modules):
        raise NotFast(f"a {type(modules[0]).__name__} stands where a linear layer is expected")
    learning = {module.weight.requires_grad for module in modules}
    if len(learning) > 1:
        raise NotFast("some of the layers with one input learn and some are frozen")
    return Map("full" if learning.pop() else "frozen", rows)


def _tensors(m: Map, modules: Sequence[nn.Module], whole: Tensor) -> Tensors:
    if m.kind == "lora":
        return (whole, *(x.lora_a for x in modules), *(x.lora_b for x in modules))
    return (whole, *(x.weight for x in modules)) if m.kind == "full" else (whole,)


class Runner:
    """A prepared model's weights in the order in which they are used, and the functions that use them."""

    def __init__(self, model: Llava, options: Options):
        text, vision = model.config.text, model.config.vision
        decoder = model.decoder
        kinds = [{name: _map(modules) for name, modules in _maps(block).items()} for block in decoder.blocks]
        if any(kind != kinds[0] for kind in kinds):
            raise NotFast("the blocks learn in different ways")
        self.options, self.config, self.maps = options, model.config, kinds[0]
        self.dtype = options.dtype or decoder.head.weight.dtype
        self.blocks, self.pieces = [], []
        for block in decoder.blocks:
            wholes = {
                "qkv": (fuse(qkv_parts(block)), qkv_parts(block)),
                "out": (block.attention.out.weight.detach(), []),
                "gate_up": (fuse(gate_up_parts(block)), gate_up_parts(block)),
                "down": (block.mlp.down.weight.detach(), []),
            }
            t = {name: _tensors(self.maps[name], ms, wholes[name][0]) for name, ms in _maps(block).items()}
            norm1, norm2 = block.attention_norm.weight, block.mlp_norm.weight
            self.blocks.append((norm1, t["qkv"], t["out"], norm2, t["gate_up"], t["down"]))
            self.pieces += [wholes["qkv"], wholes["gate_up"]]
        shape = {"heads": text.heads, "kv_heads": text.kv_heads, "head_dim": text.head_dim, "eps": text.norm_eps}
        self.plain = {mode: decoder_block(Layout(**shape, **self.maps, training=mode)) for mode in (True, False)}
        self.forward = {mode: self._compiled(block) for mode, block in self.plain.items()}
        layers = model.config.feature_layer % (vision.layers + 1)
        self.tower = [_tower_tensors(block) for block in model.vision.blocks[:layers]]
        self.tower_forward = self._compiled(vision_block(vision.heads, vision.norm_eps, vision.activation))
        self.tower_learns = any(p.requires_grad for p in model.vision.parameters())
        self.step = self._compiled(loss_and_slope)
        self.again: dict[int, int] = {}

    def _compiled(self, function: Callable) -> Callable:
        return torch.compile(function, **self.options.settings) if self.options.compiled else function

    def check(self) -> None:
        """Raises ValueError when the model's weights were replaced after `prepare`."""
        for whole, parts in self.pieces:
            if not intact(whole, parts):
                raise ValueError(
                    f"{len(parts)} weights no longer lie in the {tuple(whole.shape)} they were put into: the model was "
                    "moved or converted after fast.prepare, call it again"
                )

    def features(self, model: Llava, pixels: Tensor) -> Tensor:
        """[n, 3, H, W] -> [n, M, D]; the frozen tower leaves no graph."""
        with torch.set_grad_enabled(self.tower_learns and torch.is_grad_enabled()):
            x = self._patches(model, pixels)
        own = next(model.bridge.parameters()).dtype
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=own != self.dtype):
            return model.bridge(x[:, 1:])

    def _patches(self, model: Llava, pixels: Tensor) -> Tensor:
        """[n, 3, H, W] -> [n, 1 + N, D_vision]"""
        kept = model.vision.class_token.dtype
        with torch.autocast(pixels.device.type, dtype=self.dtype, enabled=kept != self.dtype, cache_enabled=False):
            x = model.vision.embed(pixels.to(kept)).to(self.dtype)
        for weights in self.tower:
            x = self.tower_forward(x, weights)
        return x

    def embeddings(self, model: Llava, batch) -> Tensor:
        """[B, T, D]: tokens, and features where the placeholders are."""
        x = model.decoder.token_embedding(batch.ids).to(self.dtype)
        if batch.pixels is None:
            return x
        look = batch.ids.device.type == "cpu"
        return splice_image_features(x, batch.ids, self.features(model, batch.pixels), self.config.image_id, check=look)

    def hidden(self, model: Llava, batch) -> tuple[Tensor, Tensor]:
        """What enters the final norm, and its targets: [B, S, D] and [B, S], for the positions with an answer."""
        documents, (B, T) = batch.documents, batch.ids.shape
        few = FEW if self.options.answers_only else 0.0
        rows, targets, lengths = chosen(batch.labels, documents, few=few, sizes=batch.sizes)
        mask = None
        if documents is not None and (not batch.ids.is_cuda or varlen() is None):
            mask, lengths = block_mask(documents), None
        positions = torch.arange(T, device=batch.ids.device) if batch.positions is None else batch.positions
        cos, sin = rotary_phases(positions, self.config.text.head_dim, self.config.text.rope_theta)
        x = self.embeddings(model, batch)
        training = model.decoder.training
        last = len(self.blocks) - 1
        again = self._again(B * T, x.device)
        for layer, weights in enumerate(self.blocks):
            if rows is not None and layer == last:
                chosen_mask = queries_mask(rows, T, documents=documents)
                x = self.plain[training](x, cos, sin, chosen_mask, None, weights, rows)
            elif layer < again and torch.is_grad_enabled():
                x = checkpoint(
                    self.forward[training], x, cos, sin, mask, lengths, weights, use_reentrant=False,
                    preserve_rng_state=self._drops(),
                )  # fmt: skip
            else:
                x = self.forward[training](x, cos, sin, mask, lengths, weights)
        return x, targets

    def _drops(self) -> bool:
        return any(m.dropout for m in self.maps.values())

    def _again(self, tokens: int, device: torch.device) -> int:
        if self.options.recompute is not None:
            return self.options.recompute
        if device.type != "cuda":
            return 0
        if tokens not in self.again:
            learning = {id(p): p for weights in self.blocks for p in _flat(weights) if p.requires_grad}
            self.again[tokens] = blocks_again(self.config.text, tokens, self.maps, list(learning.values()), device)
        return self.again[tokens]

    def loss(self, model: Llava, batch, count: Tensor | float | None) -> Tensor:
        """See `loss`."""
        self.check()
        with torch.autocast(batch.ids.device.type, enabled=False):
            x, targets = self.hidden(model, batch)
            targets = targets.flatten()
            if count is None:
                count = (targets != IGNORE).sum()
            x = model.decoder.norm(x) if model.decoder.norm.weight.dtype == x.dtype else self._norm(model, x)
            weight = model.decoder.head.weight
            return linear_cross_entropy(x.flatten(0, 1), weight, targets, count, step=self.step)

    def _norm(self, model: Llava, x: Tensor) -> Tensor:
        return model.decoder.norm(x.float()).to(x.dtype)


def _flat(weights) -> list[Tensor]:
    return [t for w in weights for t in (w if isinstance(w, tuple) else (w,))]


def _tower_tensors(block) -> Tensors:
    a, m = block.attention, block.mlp
    layers = (block.norm1, a.qkv, a.out, block.norm2, m.fc1, m.fc2)
    return tuple(tensor for layer in layers for tensor in (layer.weight, layer.bias))


def chosen(
    labels: Tensor, documents: Tensor | None, *, few: float = FEW, sizes: tuple[int, int] | None = None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Which positions answers are predicted at, what they predict, and where packed documents end.

    labels [B, T] unshifted -> rows [B, S] of positions, S the most that any row has, rounded up to a multiple of 32
    (None for all of them: at least `few` of a row), targets [B, S] with -100 where a row has fewer, and with documents
    [B, T] their cumulative lengths [documents + 1] over all rows, padding being a document too. sizes: `sizes_of`.
    """
    B, T = labels.shape
    targets = torch.cat([labels[:, 1:], labels.new_full((B, 1), IGNORE)], dim=1)  # [B, T]
    learned = targets != IGNORE
    most, held = sizes or sizes_of(labels, documents)
    lengths = None
    if documents is not None:
        starts = torch.ones_like(documents, dtype=torch.bool)  # [B, T], where a document begins
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        place = torch.arange(B * T, device=labels.device)
        room = -(-(held + 1) // 64) * 64  # few different shapes: documents of length 0 fill it
        ends = torch.where(starts.flatten(), place, B * T).sort().values[: room - 1]
        fill = ends.new_full((room - len(ends),), B * T)
        lengths = torch.cat([ends, fill]).to(torch.int32)
    S = min(T, -(-max(most, 1) // 32) * 32)
    if S > few * T:
        return None, targets, lengths
    rows = learned.int().sort(dim=1, descending=True, stable=True).indices[:, :S]  # [B, S], answers first, in order
    return rows, targets.gather(1, rows), lengths


def options_for(model: Llava, plan=None) -> Options:
    """What a `FinetunePlan` asks for; without one, the model's own dtype and no compiling."""
    low = plan is not None and plan.dtype in ("autocast", "bfloat16")
    cuda = next(model.parameters()).is_cuda
    return Options(dtype=torch.bfloat16 if low else None, compiled=bool(plan is not None and plan.compile and cuda))


def prepare(model: Llava, plan=None, *, options: Options | None = None) -> Runner:
    """Lay out the model's weights and compile its blocks; call it after LoRA was added and parts were frozen.

    Raises:
        NotFast: a part is not the course's own (a ValueError; the plain loss works for it).
    """
    if type(model) is not Llava:
        raise NotFast(f"model is a {type(model).__name__}, expected a Llava")
    runner = Runner(model, options or options_for(model, plan))
    _prepared[model] = runner
    return runner


def loss(model: Llava, batch, count: Tensor | float | None = None) -> Tensor:
    """Sum over the answer tokens of -log p, / `count` (by default their number), in nats: equal to `losses.plain_loss`.

    batch: ids, labels [B, T], pixels, positions, documents as in `collate.Batch`, on the model's device. Prepares the
    model where that was not done.
    """
    runner = _prepared.get(model) or prepare(model)
    return runner.loss(model, batch, count)


def ready(model: Llava, plan=None) -> Callable:
    """`loss` for a model that it knows, `losses.plain_loss` for any other."""
    from vlm_course.finetune.losses import plain_loss

    try:
        prepare(model, plan)
    except NotFast:
        return plain_loss
    return partial(loss)
