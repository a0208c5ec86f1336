"""The Q-Former against transformers' InstructBLIP and BLIP-2, and the shuffled projection against InternVL's."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_course.qformer import QFormer

CLOSE = {"rtol": 0, "atol": 1e-4}
STD = 0.8  # a LayerNorm at the end of every sub-layer, drawn smaller, would silence what comes before it
SIZES = {"dim": 24, "vision_dim": 20, "queries": 5, "layers": 4, "heads": 3, "mlp_width": 40}
NAMES = {
    "embeddings.word_embeddings.weight": "words.weight",
    "embeddings.position_embeddings.weight": "positions",
    "embeddings.layernorm": "norm",
    "encoder.layer.": "layers.",
    "crossattention.": "cross_attention.",
    "attention.attention.query": "attention.to_q",
    "attention.attention.key": "attention.to_k",
    "attention.attention.value": "attention.to_v",
    "attention.output.dense": "attention.to_out",
    "attention.output.LayerNorm": "attention.norm",
    "intermediate_query.dense": "mlp_queries.fc1",
    "output_query.dense": "mlp_queries.fc2",
    "output_query.LayerNorm": "mlp_queries.norm",
    "intermediate.dense": "mlp_words.fc1",
    "output.dense": "mlp_words.fc2",
    "output.LayerNorm": "mlp_words.norm",
}


def our_name(name):
    name = re.sub(r"crossattention\.attention\.", "crossattention.attention.attention.", name)
    name = re.sub(r"crossattention\.(output|attention\.attention)", r"cross_attention.\1", name)
    name = name.replace("cross_attention.attention.attention.", "cross_attention.")
    for theirs, ours in (("query.", "to_q."), ("key.", "to_k."), ("value.", "to_v.")):
        name = re.sub(rf"(cross_attention\.){theirs}", rf"\1{ours}", name)
    name = name.replace("cross_attention.output.dense", "cross_attention.to_out")
    name = name.replace("cross_attention.output.LayerNorm", "cross_attention.norm")
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def instructblip(redraw, cross_every=2):
    from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

    config = InstructBlipQFormerConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=12, cross_attention_frequency=cross_every, encoder_hidden_size=20,
    )  # fmt: skip
    theirs = redraw(InstructBlipQFormerModel(config), STD)
    ours = redraw(QFormer(**SIZES, cross_every=cross_every, vocab_size=30, max_length=12), STD)
    state = {our_name(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict({"queries": ours.queries, **state})
    return ours, theirs


@pytest.mark.parametrize("cross_every", [1, 2, 3])
@torch.no_grad()
def test_queries_with_an_instruction_are_instructblips(redraw, cross_every):
    ours, theirs = instructblip(redraw, cross_every)
    ids = torch.randint(0, 30, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    features = torch.randn(3, 9, 20)
    queries = ours.queries.expand(3, -1, -1)
    for real in (torch.ones_like(mask), mask):
        expected = theirs(
            input_ids=ids,
            attention_mask=torch.cat([torch.ones(3, 5), real], dim=1).long(),
            query_embeds=queries,
            encoder_hidden_states=features,
        ).last_hidden_state[:, :5]
        torch.testing.assert_close(ours(features, ids, real), expected, **CLOSE)
    torch.testing.assert_close(ours(features, ids), ours(features, ids, torch.ones_like(mask)), **CLOSE)


@torch.no_grad()
def test_queries_without_an_instruction_are_blip2s(redraw):
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
        cross_attention_frequency=2, encoder_hidden_size=20,
    )  # fmt: skip
    theirs = redraw(Blip2QFormerModel(config), STD)
    ours = redraw(QFormer(**SIZES), STD)
    state = {our_name(name): tensor for name, tensor in theirs.state_dict().items()}
    state = {re.sub("^layernorm", "norm", name): tensor for name, tensor in state.items()}
    ours.load_state_dict({"queries": ours.queries, **state})
    features = torch.randn(2, 7, 20)
    expected = theirs(query_embeds=ours.queries.expand(2, -1, -1), encoder_hidden_states=features).last_hidden_state
    torch.testing.assert_close(ours(features), expected, **CLOSE)


@torch.no_grad()
def test_the_question_decides_what_the_queries_bring(redraw):
    ours, _ = instructblip(redraw)
    features = torch.randn(1, 9, 20)
    one, other = (ours(features, torch.tensor([ids])) for ids in ([3, 4, 5], [3, 4, 6]))
    assert (one - other).abs().max() > 1e-2
    swapped = ours(features, torch.tensor([[4, 3, 5]]))
    assert (one - swapped).abs().max() > 1e-2  # words have positions
    other_image = ours(torch.randn(1, 9, 20), torch.tensor([[3, 4, 5]]))
    assert (one - other_image).abs().max() > 1e-2


@settings(max_examples=15)
@given(patches=st.integers(1, 9), words=st.integers(1, 7), padding=st.integers(0, 5), batch=st.integers(1, 3))
@torch.no_grad()
def test_padding_and_the_order_of_the_patches_change_nothing(patches, words, padding, batch):
    torch.manual_seed(patches)
    bridge = QFormer(**SIZES, vocab_size=30, max_length=12).eval()
    for parameter in bridge.parameters():
        parameter.normal_(0, 0.2)
    features, ids = torch.randn(batch, patches, 20), torch.randint(0, 30, (batch, words))
    expected = bridge(features, ids)
    assert expected.shape == (batch, 5, 24)
    padded = torch.cat([ids, torch.randint(0, 30, (batch, padding))], dim=1)
    mask = torch.arange(words + padding).expand(batch, -1) < words
    torch.testing.assert_close(bridge(features, padded, mask), expected, **CLOSE)
    torch.testing.assert_close(bridge(features[:, torch.randperm(patches)], ids), expected, **CLOSE)
    torch.testing.assert_close(bridge(features[-1:], ids[-1:]), expected[-1:], **CLOSE)


def test_the_default_has_the_published_size():
    """188M parameters, BLIP-2, section 3.1, with the words and their feed-forward nets, which InstructBLIP keeps."""
    from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    with torch.device("meta"):
        theirs = InstructBlipQFormerModel(InstructBlipQFormerConfig())
        ours = QFormer(vocab_size=30522)
    assert count(ours) == count(theirs) + 32 * 768
    assert 180e6 < count(ours) < 190e6


@torch.no_grad()
def test_it_compiles_without_a_graph_break(in_one_graph):
    bridge = QFormer(**SIZES, vocab_size=30, max_length=12).eval()
    features, ids, mask = torch.randn(2, 6, 20), torch.randint(0, 30, (2, 4)), torch.ones(2, 4, dtype=torch.bool)
    compiled = in_one_graph(bridge)
    torch.testing.assert_close(compiled(features, ids, mask), bridge(features, ids, mask), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 4])
def test_shuffled_projection_is_internvls(redraw, factor):
    from types import SimpleNamespace

    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    from vlm_course.bridges import ShuffleProjection

    config = SimpleNamespace(
        downsample_ratio=1 / factor, projector_hidden_act="gelu",
        vision_config=SimpleNamespace(hidden_size=6), text_config=SimpleNamespace(hidden_size=10),
    )  # fmt: skip
    theirs = redraw(InternVLMultiModalProjector(config))
    ours = ShuffleProjection(6, 10, factor=factor).eval()
    names = {"layer_norm": "mlp.0", "linear_1": "mlp.1", "linear_2": "mlp.3"}
    state = {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    features = torch.randn(2, 64, 6)
    shuffled = InternVLModel.pixel_shuffle(None, features.reshape(2, 8, 8, 6), 1 / factor)
    torch.testing.assert_close(ours(features), theirs(shuffled.flatten(1, 2)), **CLOSE)


@torch.no_grad()
def test_a_shuffle_and_a_linear_map_are_idefics3s_connector(redraw):
    from types import SimpleNamespace

    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    from vlm_course.bridges import pixel_shuffle

    config = SimpleNamespace(
        scale_factor=3, vision_config=SimpleNamespace(hidden_size=6), text_config=SimpleNamespace(hidden_size=10)
    )
    theirs = redraw(Idefics3Connector(config))
    features = torch.randn(2, 81, 6)
    ours = pixel_shuffle(features, 3) @ theirs.modality_projection.proj.weight.T
    torch.testing.assert_close(ours, theirs(features), **CLOSE)
