"""Parts of published models that transformers and timm do not have, as small as their shapes and counts allow.

They exist to be built on the meta device: counted, and traced. Each names the paper or file that it follows.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vlm_course import h_reducer
from vlm_course.attention import attend
from vlm_course.bridges import PerceiverResampler
from vlm_course.fusion import GatedCrossAttention, media_mask
from vlm_course.query_resampler import QueryResampler
from vlm_course.token_resampler import TokenResampler
from vlm_course.vit import VisionTransformer, ViTConfig, select_features


class WindowedResampler(nn.Module):
    """TextMonkey's bridge: `QueryResampler` on every window, then `TokenResampler` on all of them; the last window is
    the whole page and keeps its tokens. The adapters of each window are left out.

    forward: [windows + 1, N, D_vision] -> [1, keep + queries, D_llm].
    Source: Yuliang-Liu/Monkey, monkey_model/text_monkey/visual_text.py, VisionTransformer.encode.
    """

    def __init__(self, *, vision_dim: int, llm_dim: int, queries: int, keep: int):
        super().__init__()
        self.windows = QueryResampler(vision_dim, llm_dim, queries=queries)
        self.tokens = TokenResampler(llm_dim, keep=keep)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.windows(features)  # [windows + 1, N, D_vision] -> [windows + 1, queries, D_llm]
        kept = self.tokens(tokens[:-1].flatten(0, 1)[None])  # -> [1, keep, D_llm]
        return torch.cat([kept, tokens[-1:]], dim=1)


class HReducer(h_reducer.HReducer):
    """DocOwl 1.5's bridge as its checkpoints store it: with a LayerNorm that nothing uses.

    Source: X-PLUG/mPLUG-DocOwl, DocOwl1.5/mplug_docowl/model/visual_encoder.py, MplugDocOwlHReducerModel.
    """

    def __init__(self, *, vision_dim: int, llm_dim: int):
        super().__init__(vision_dim, llm_dim)
        self.norm = nn.LayerNorm(vision_dim)


class Twin(nn.Module):
    """A module twice, for words and for visual tokens. Which of the two a token takes changes no shape, so here all
    tokens take the first."""

    def __init__(self, words: nn.Module, image: nn.Module):
        super().__init__()
        self.words, self.image = words, image

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x)


def modality_llama(*, config: dict) -> nn.Module:
    """Llama with the modality-adaptive module of mPLUG-Owl2 and DocOwl 1.5: keys, values and both norms of every layer
    exist twice. Source: X-PLUG/mPLUG-DocOwl at e5d9b44, DocOwl1.5/mplug_docowl/model/modeling_llama2.py.
    """
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    for layer in model.model.layers:
        for owner, name in (
            (layer.self_attn, "k_proj"),
            (layer.self_attn, "v_proj"),
            (layer, "input_layernorm"),
            (layer, "post_attention_layernorm"),
        ):
            module = getattr(owner, name)
            setattr(owner, name, Twin(module, copy.deepcopy(module)))
    return model


def emu_language(*, config: dict) -> nn.Module:
    """LLaMA with Emu's second head, which gives the next visual embedding."""
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.regress = nn.Linear(config["hidden_size"], config["hidden_size"], bias=False)
    return model


class PooledProjection(nn.Module):
    """Molmo's connector: each 2 x 2 window of patches is pooled by attention, whose query is the window's mean, then
    a gated feed-forward layer leads to the language model's width.

    forward: [B, N, 2 D_vision], the features of two layers side by side -> [B, N / 4, D_llm].
    Source: allenai/Molmo-7B-D-0924, modeling_molmo.py and config.json (image_pooling_2d "attention_meanq",
    image_projector "mlp", image_padding_embed "pad_and_partial_pad").
    """

    def __init__(self, *, vision_dim: int, pooled_dim: int, mlp_width: int, llm_dim: int, heads: int = 16):
        super().__init__()
        self.heads = heads
        self.padding = nn.Parameter(torch.empty(2, vision_dim))
        self.to_q, self.to_k, self.to_v = (nn.Linear(vision_dim, pooled_dim) for _ in range(3))
        self.to_out = nn.Linear(pooled_dim, pooled_dim)
        self.gate = nn.Linear(pooled_dim, mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, llm_dim, bias=False)
        self.up = nn.Linear(pooled_dim, mlp_width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        side = round(features.shape[1] ** 0.5)
        windows = features.unflatten(1, (side // 2, 2, side // 2, 2)).transpose(2, 3).flatten(3, 4)
        windows = windows.flatten(1, 2).flatten(0, 1)  # [B, N, 2D] -> [B N / 4, 4, 2D]
        parts = (self.to_q(windows.mean(1, keepdim=True)), self.to_k(windows), self.to_v(windows))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # [B N / 4, H, 1 or 4, d]
        pooled = self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))  # [B N / 4, 1, D]
        tokens = pooled.reshape(len(features), -1, pooled.shape[-1])  # [B, N / 4, D]
        return self.down(nn.functional.silu(self.gate(tokens)) * self.up(tokens))  # [B, N / 4, D_llm]


class TwoLayerViT(nn.Module):
    """Molmo's tower: CLIP's without its last block and last norm, read at two layers. forward: [B, 3, H, W] ->
    [B, N, 2 D]. Source: as `PooledProjection`; vllm, model_executor/models/molmo.py (VIT_LAYERS)."""

    def __init__(self, *, config: dict, layers: list[int]):
        super().__init__()
        self.tower = VisionTransformer(ViTConfig(**config))
        self.tower.post_norm = nn.Identity()
        self.layers = layers

    def forward(self, pixels: Tensor) -> Tensor:
        return select_features(self.tower.hidden_states(pixels), self.layers)  # [B, 3, H, W] -> [B, N, 2 D]


def molmo_language(*, config: dict, extra: int) -> nn.Module:
    """Qwen2 with `extra` embeddings for Molmo's own tokens, which the head cannot answer with."""
    import transformers

    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
    model.new_embedding = nn.Parameter(torch.empty(extra, config["hidden_size"]))
    return model


class FusedProjection(nn.Sequential):
    """OpenVLA's bridge: three linear maps, the first to four times the width of both towers together.

    forward: [B, N, D_1 + D_2] -> [B, N, D_llm].
    Source: openvla/openvla-7b, modeling_prismatic.py, PrismaticProjector with use_fused_vision_backbone.
    """

    def __init__(self, *, vision_dim: int, llm_dim: int):
        super().__init__(
            nn.Linear(vision_dim, 4 * vision_dim),
            nn.GELU(),
            nn.Linear(4 * vision_dim, llm_dim),
            nn.GELU(),
            nn.Linear(llm_dim, llm_dim),
        )


class RelativeBlock(nn.Module):
    """A block of Chinchilla's size: attention with a fifth square matrix for relative positions, and an MLP of four
    times the width. forward: [B, T, D] -> [B, T, D]; the relative term is left out, since it changes no shape.

    Sources: Hoffmann et al. 2022 (Chinchilla, arXiv 2203.15556), table of sizes; Dai et al. 2019 (Transformer-XL).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.relative, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.fc1, self.fc2 = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        parts = (self.query(y), self.key(y), self.value(y))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # [B, H, T, d]
        x = x + self.out(attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Flamingo(nn.Module):
    """Flamingo from its paper's table: NFNet-F6, a resampler, and a frozen language model with a gated
    cross-attention block in front of every `every`-th of its blocks.

    forward: ids [B, T] with one <image>, pixels [B, 3, H, W] -> logits [B, T, V]. The image's tokens never enter the
    sequence. The tower's features are those of its last stage, 1536 channels wide, before the final convolution: the
    width that the paper gives the resampler.
    Source: Alayrac et al. 2022 (arXiv 2204.14198), section 2 and the table of sizes in the appendix, quoted by
    dhansmair/flamingo-mini's wiki and, for all three columns, by public notes on the paper.
    """

    def __init__(self, *, width: int, layers: int, heads: int, every: int, vocab_size: int = 32000):
        super().__init__()
        import timm

        self.every = every
        self.vision = timm.create_model("nfnet_f6", pretrained=False, num_classes=0)
        self.resampler = PerceiverResampler(dim=1536, queries=64, depth=6, heads=16, head_dim=128)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(RelativeBlock(width, heads) for _ in range(layers))
        self.gated = nn.ModuleList(
            GatedCrossAttention(dim=width, media_dim=1536, heads=heads, head_dim=128)
            for _ in range(-(-layers // every))
        )
        self.norm = nn.RMSNorm(width)

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        features = self.vision.stages(self.vision.stem(pixels))  # [B, 3, H, W] -> [B, 1536, rows, columns]
        media = self.resampler(features.flatten(2).transpose(1, 2))[:, None]  # -> [B, 1, 64, 1536]
        mask = media_mask(ids, 0, 1)  # [B, T, 1]
        x = self.token_embedding(ids)  # [B, T] -> [B, T, D]
        for index, block in enumerate(self.blocks):
            if index % self.every == 0:
                x = self.gated[index // self.every](x, media, mask)
            x = block(x)
        return self.norm(x) @ self.token_embedding.weight.T  # [B, T, D] -> [B, T, V]
