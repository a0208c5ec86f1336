"""DocOwl 1.5's blocks against transformers' Llama, token kind by token kind, and against a loop where kinds mix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_course.catalog import find
from vlm_course.decoder import DecoderConfig, rotary_phases
from vlm_course.modality_adaptive import ModalityAdaptiveBlock, twin_parameters

CLOSE = {"rtol": 0, "atol": 1e-5}
CONFIG = DecoderConfig(vocab_size=5, width=12, layers=1, heads=3, kv_heads=3, mlp_width=16)


def llama_layer(ours, kind):
    """transformers' decoder layer with the weights that tokens of one kind ("words" or "image") take."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        vocab_size=5, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=3, rms_norm_eps=CONFIG.norm_eps, attn_implementation="eager",
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, 0).eval()
    attention, mlp = ours.attention, ours.mlp
    for to, source in (
        (layer.self_attn.q_proj, attention.query),
        (layer.self_attn.k_proj, getattr(attention.key, kind)),
        (layer.self_attn.v_proj, getattr(attention.value, kind)),
        (layer.self_attn.o_proj, attention.out),
        (layer.mlp.gate_proj, mlp.gate),
        (layer.mlp.up_proj, mlp.up),
        (layer.mlp.down_proj, mlp.down),
        (layer.input_layernorm, getattr(ours.attention_norm, kind)),
        (layer.post_attention_layernorm, getattr(ours.mlp_norm, kind)),
    ):
        to.load_state_dict(source.state_dict())
    return layer


def whole_phases(length):
    cos, sin = rotary_phases(torch.arange(length), CONFIG.head_dim)
    return torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None]  # transformers' layout


@pytest.mark.parametrize("kind", ["words", "image"])
@torch.no_grad()
def test_tokens_of_one_kind_pass_a_llama_layer(redraw, kind):
    ours = redraw(ModalityAdaptiveBlock(CONFIG), 0.4)
    x, is_image = torch.randn(2, 6, 12), torch.full((2, 6), kind == "image")
    causal = torch.full((6, 6), -torch.inf).triu(1)[None, None]
    theirs = llama_layer(ours, kind)(x, attention_mask=causal, position_embeddings=whole_phases(6))
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    phases = rotary_phases(torch.arange(6), CONFIG.head_dim)
    torch.testing.assert_close(ours(x, is_image, phases), theirs, **CLOSE)


def block_by_loop(block, x, is_image):
    """x [T, D]: each token takes the modules of its kind, one at a time."""
    kind = lambda module, t: module.image if is_image[t] else module.words  # noqa: E731
    T, d = len(x), CONFIG.head_dim
    cos, sin = rotary_phases(torch.arange(T), d)
    normed = [kind(block.attention_norm, t)(x[t]) for t in range(T)]

    def turned(vector, t):
        heads = vector.reshape(-1, d)
        first, second = heads[:, : d // 2], heads[:, d // 2 :]
        return torch.cat([first * cos[t] - second * sin[t], second * cos[t] + first * sin[t]], dim=1)  # [H, d]

    q = [turned(block.attention.query(normed[t]), t) for t in range(T)]
    k = [turned(kind(block.attention.key, t)(normed[t]), t) for t in range(T)]
    v = [kind(block.attention.value, t)(normed[t]).reshape(-1, d) for t in range(T)]
    out = []
    for t in range(T):
        heads = []
        for h in range(CONFIG.heads):
            weights = torch.stack([q[t][h] @ k[s][h] / d**0.5 for s in range(t + 1)]).softmax(0)
            heads.append(sum(w * v[s][h] for s, w in enumerate(weights)))
        y = x[t] + block.attention.out(torch.cat(heads))
        out.append(y + block.mlp(kind(block.mlp_norm, t)(y)))
    return torch.stack(out)


@settings(max_examples=15)
@given(kinds=st.lists(st.booleans(), min_size=1, max_size=6))
@torch.no_grad()
def test_mixed_tokens_each_take_the_modules_of_their_kind(kinds):
    torch.manual_seed(len(kinds))
    block = ModalityAdaptiveBlock(CONFIG)
    for parameter in block.parameters():
        parameter.normal_(0, 0.4)
    x, is_image = torch.randn(1, len(kinds), 12), torch.tensor([kinds])
    phases = rotary_phases(torch.arange(len(kinds)), CONFIG.head_dim)
    torch.testing.assert_close(block(x, is_image, phases)[0], block_by_loop(block, x[0], kinds), **CLOSE)


def test_the_twins_are_what_docowl_has_more_than_llama():
    model, plain = find("docowl-1.5"), find("docowl")
    more = twin_parameters(width=4096, layers=32, kv_width=4096)
    assert model["language_parameters"] == plain["language_parameters"] + more
    block = ModalityAdaptiveBlock(CONFIG)
    image = sum(parameter.numel() for name, parameter in block.named_parameters() if ".image." in name)
    assert image == twin_parameters(width=12, layers=1, kv_width=12)
