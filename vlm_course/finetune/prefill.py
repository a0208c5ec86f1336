"""The pass over an image and its question, before the first token of the answer: no module calls, and in a CUDA graph.

The last block needs queries, output map and MLP for one position only, the one that the first token comes from; its
keys and values are needed for all. The head is applied once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_course.attention import attend
from vlm_course.decoder import apply_rotary
from vlm_course.finetune.decode_plain import PlainStep, State, Weights
from vlm_course.fusion import splice_image_features
from vlm_course.vit import ACTIVATIONS, TransformerBlock, VisionTransformer

GRAPHS = 8  # recorded passes that are kept, each for one length of prompt


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


class PlainOps:
    """What stands between the matrix products, in plain torch."""

    @staticmethod
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, D] -> [T, D]"""
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
        return weight * (x.float() * scale).to(x.dtype)

    @staticmethod
    def rope(qkv: Tensor, state: State, layer: int) -> Tensor:
        """[T, (H + 2 H_kv) d] -> queries [H, T, d]; keys and values go into the cache."""
        c, T = state.config, len(qkv)
        heads = qkv.view(1, T, -1, c.head_dim).transpose(1, 2)  # [1, H + 2 H_kv, T, d]
        q, k, v = heads.split([c.heads, c.kv_heads, c.kv_heads], dim=1)
        cos, sin = state.cos[:T], state.sin[:T]
        state.keys[layer, :, :T] = apply_rotary(k, cos, sin)[0]
        state.values[layer, :, :T] = v[0]
        return apply_rotary(q, cos, sin)[0]

    @staticmethod
    def silu_mul(gate_up: Tensor) -> Tensor:
        """[T, 2 F] -> [T, F]"""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def activation(x: Tensor, name: str) -> Tensor:
        return ACTIVATIONS[name](x)


class TritonOps:
    """The same, one kernel each."""

    def __init__(self):
        from vlm_course.finetune import prefill_kernels

        self.kernels = prefill_kernels

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, (T, D) = torch.empty_like(x), x.shape
        warps = 8 if D >= 2048 else 4
        self.kernels.rms_norm_kernel[(T,)](x, weight, y, eps, D=D, DP=_power(D), num_warps=warps)
        return y

    def rope(self, qkv: Tensor, state: State, layer: int) -> Tensor:
        c, T = state.config, len(qkv)
        q, block = qkv.new_empty(c.heads, T, c.head_dim), 16
        grid = (T, -(-(c.heads + 2 * c.kv_heads) // block))
        self.kernels.rope_kernel[grid](
            qkv, state.cos, state.sin, q, state.keys[layer], state.values[layer], state.capacity, T,
            HEADS=c.heads, KV_HEADS=c.kv_heads, HALF=c.head_dim // 2, HALF_P=_power(c.head_dim // 2), BLOCK=block,
        )  # fmt: skip
        return q

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        T, hidden = gate_up.shape[0], gate_up.shape[1] // 2
        y, block = gate_up.new_empty(T, hidden), min(2048, _power(hidden))
        self.kernels.silu_mul_kernel[(T, -(-hidden // block))](gate_up, y, HIDDEN=hidden, BLOCK=block)
        return y

    def activation(self, x: Tensor, name: str) -> Tensor:
        if name != "quick_gelu":
            return ACTIVATIONS[name](x)
        self.kernels.quick_gelu_kernel[(-(-x.numel() // 2048),)](x, x.numel(), BLOCK=2048)
        return x


def _tower_block(block: TransformerBlock, x: Tensor, ops, activation: str) -> Tensor:
    """One block of the vision tower: [n, T, D] -> [n, T, D]."""
    n, T, D = x.shape
    norm1, norm2, attention, mlp = block.norm1, block.norm2, block.attention, block.mlp
    h = F.layer_norm(x, (D,), norm1.weight, norm1.bias, norm1.eps)
    qkv = F.linear(h, attention.qkv.weight, attention.qkv.bias).view(n, T, 3, attention.heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [n, H, T, d]
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, T, D)
    x = x + F.linear(mixed, attention.out.weight, attention.out.bias)
    h = F.layer_norm(x, (D,), norm2.weight, norm2.bias, norm2.eps)
    h = ops.activation(F.linear(h, mlp.fc1.weight, mlp.fc1.bias), activation)
    return x + F.linear(h, mlp.fc2.weight, mlp.fc2.bias)


def tower_features(tower: VisionTransformer, pixels: Tensor, layer: int, ops) -> Tensor:
    """`VisionTransformer.patch_features` without its module calls: [n, 3, H, W] -> [n, N, D]."""
    x = tower.embed(pixels)
    for block in tower.blocks[: layer % (len(tower.blocks) + 1)]:
        x = _tower_block(block, x, ops, tower.config.activation)
    return x[:, 1:]  # [n, 1+N, D] -> [n, N, D]


def _block(x: Tensor, w: Weights, layer: int, state: State, ops, last: bool) -> Tensor:
    """[T, D] -> [T, D], or [1, D] for the last block, where only the last position is still needed."""
    c = state.config
    q = ops.rope(ops.norm(x, w.norm1, c.norm_eps) @ w.qkv.T, state, layer)  # [H, T, d]
    keys, values = (cache[layer, :, : len(x)] for cache in (state.keys, state.values))  # [H_kv, T, d]
    if last:
        x, q = x[-1:], q[:, -1:]
    mixed = attend(q[None], keys[None], values[None], is_causal=True)  # [1, H, T, d]
    x = torch.addmm(x, mixed[0].transpose(0, 1).flatten(1), w.out.T)
    h = ops.norm(x, w.norm2, c.norm_eps) @ w.gate_up.T
    return torch.addmm(x, ops.silu_mul(h), w.down.T)


class Prefill:
    """Reads a prompt into the state's cache and writes the first token. One graph for each length of prompt."""

    def __init__(self, model, step: PlainStep, ops, *, graphs: bool):
        self.model, self.step, self.ops, self.graphs = model, step, ops, graphs
        self._kept: dict[tuple, tuple[Callable[[], None], Tensor, Tensor | None]] = {}

    def run(self, ids: Tensor, pixels: Tensor | None, features: Tensor | None) -> None:
        """ids [T]; pixels [n, 3, H, W], or features [n, M, D], or neither. Afterwards `state.x` is the first token's
        embedding."""
        model, step, state = self.model, self.step, self.step.state
        x = F.embedding(ids, step.embedding)  # [T, D]
        if pixels is not None:
            patches = tower_features(model.vision, pixels, model.config.feature_layer, self.ops)
            features = model.bridge(patches)
        if features is not None:
            x = splice_image_features(x[None], ids[None], features, model.config.image_id, check=False)[0]
        last = len(step.blocks) - 1
        for layer, weights in enumerate(step.blocks):
            x = _block(x, weights, layer, state, self.ops, layer == last)
        state.length.fill_(len(ids) - 1)
        state.written.fill_(0)
        state.x.copy_(x[-1])
        step.choose()

    def __call__(self, ids: Tensor, pixels: Tensor | None, features: Tensor | None) -> None:
        if not self.graphs:
            return self.run(ids, pixels, features)
        image = pixels if pixels is not None else features
        key = (len(ids), pixels is not None, None if image is None else (image.shape, image.dtype))
        if key not in self._kept:
            while len(self._kept) >= GRAPHS:
                self._kept.pop(next(iter(self._kept)))  # the oldest
            self._kept[key] = self._captured(ids, pixels, features)
        replay, ids_in, image_in = self._kept[key]
        ids_in.copy_(ids)
        if image is not None:
            image_in.copy_(image)
        replay()
        return None

    def _captured(self, ids: Tensor, pixels: Tensor | None, features: Tensor | None):
        ids_in = ids.clone()
        pixels_in, features_in = (None if t is None else t.clone() for t in (pixels, features))
        graph = capture(lambda: self.run(ids_in, pixels_in, features_in))
        return graph.replay, ids_in, pixels_in if features_in is None else features_in


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Runs once on a side stream, so that all kernels are compiled, then records it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on
        run()
    return graph
