"""Llama's weights and config, from and to transformers' `LlamaForCausalLM`."""

from collections.abc import Mapping
from typing import Any

import torch

from vlm_course.convert import State, WeightMap
from vlm_course.decoder import DecoderConfig

# No tensor changes its shape or order: both sides turn the rotary pairs (i, i + head_dim / 2).
DECODER = WeightMap(
    {
        "token_embedding.weight": "model.embed_tokens.weight",
        "blocks.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "blocks.{i}.attention.query.weight": "model.layers.{i}.self_attn.q_proj.weight",
        "blocks.{i}.attention.key.weight": "model.layers.{i}.self_attn.k_proj.weight",
        "blocks.{i}.attention.value.weight": "model.layers.{i}.self_attn.v_proj.weight",
        "blocks.{i}.attention.out.weight": "model.layers.{i}.self_attn.o_proj.weight",
        "blocks.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "blocks.{i}.mlp.gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
        "blocks.{i}.mlp.up.weight": "model.layers.{i}.mlp.up_proj.weight",
        "blocks.{i}.mlp.down.weight": "model.layers.{i}.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
)


def from_transformers(state: Mapping[str, torch.Tensor], *, tied: bool = False) -> State:
    """State dict of LlamaForCausalLM -> Decoder's. `tied` says that the head is the embedding, which files store once.

    Raises ValueError when a weight is missing or one has no place in our decoder, such as an attention bias.
    """
    # Files of old releases store the rotary frequencies, which both sides compute from the config.
    state = {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
    if tied and "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return DECODER.from_theirs(state)


def to_transformers(state: Mapping[str, torch.Tensor]) -> State:
    """State dict of Decoder -> LlamaForCausalLM's."""
    return DECODER.to_theirs(state)


def decoder_config(config: Any) -> DecoderConfig:
    """transformers' LlamaConfig -> DecoderConfig. Raises ValueError for an option that our decoder does not have."""
    rope = config.rope_parameters
    options = {
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "rope_type": (rope.get("rope_type", "default"), "default"),
    }
    for option, (theirs, ours) in options.items():
        if theirs != ours:
            raise ValueError(f"the checkpoint has {option}={theirs!r}, but our decoder only knows {ours!r}")
    return DecoderConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        mlp_width=config.intermediate_size,
        head_dim=config.head_dim,
        rope_theta=float(rope["rope_theta"]),
        norm_eps=config.rms_norm_eps,
        tie_embeddings=config.tie_word_embeddings,
        max_positions=config.max_position_embeddings,
    )


def transformers_config(config: DecoderConfig) -> Any:
    """DecoderConfig -> transformers' LlamaConfig; undoes `decoder_config`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.mlp_width,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=config.max_positions,
    )
