"""Emu: its causal transformer against T5's decoder in transformers, its objective and its writing against loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlm_course.catalog import find
from vlm_course.causal_former import CausalFormer, distance_buckets
from vlm_course.decoder import DecoderConfig
from vlm_course.emu import Emu, next_element_loss

CLOSE = {"rtol": 0, "atol": 1e-5}
IMG, END, IMAGE, PAD = 20, 21, 22, 23
TEXT = DecoderConfig(vocab_size=24, width=12, layers=2, heads=3, kv_heads=3, mlp_width=16)


def t5_decoder(redraw, *, queries, layers=2, vision_dim=10, buckets=32, max_distance=128):
    """Our bridge and transformers' T5 decoder with its weights, whose cross-attention reads `vision_dim` channels."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Stack

    config = T5Config(
        vocab_size=4, d_model=12, d_kv=4, d_ff=20, num_layers=layers, num_heads=3, is_decoder=True, use_cache=False,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=max_distance, dropout_rate=0.0,
    )  # fmt: skip
    theirs = T5Stack(config)
    for block in theirs.block:
        cross = block.layer[1].EncDecAttention
        cross.k, cross.v = nn.Linear(vision_dim, 12, bias=False), nn.Linear(vision_dim, 12, bias=False)
    redraw(theirs, 0.6)
    ours = CausalFormer(
        vision_dim, 7, queries=queries, dim=12, layers=layers, heads=3, mlp_width=20, buckets=buckets,
        max_distance=max_distance,
    )  # fmt: skip
    redraw(ours, 0.6)
    with torch.no_grad():
        ours.norm.weight.copy_(theirs.final_layer_norm.weight)
        ours.distance_bias.weight.copy_(theirs.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
        for mine, block in zip(ours.layers, theirs.block, strict=True):
            for name, attention in (
                ("attention", block.layer[0].SelfAttention),
                ("cross_attention", block.layer[1].EncDecAttention),
            ):
                for to, source in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out", "o")):
                    getattr(getattr(mine, name), to).weight.copy_(getattr(attention, source).weight)
            for to, source in (("norm_self", 0), ("norm_cross", 1), ("norm_mlp", 2)):
                getattr(mine, to).weight.copy_(block.layer[source].layer_norm.weight)
            mine.fc1.weight.copy_(block.layer[2].DenseReluDense.wi.weight)
            mine.fc2.weight.copy_(block.layer[2].DenseReluDense.wo.weight)
    return ours, theirs


@pytest.mark.parametrize(("queries", "buckets", "max_distance"), [(1, 32, 128), (9, 32, 128), (40, 8, 20)])
@torch.no_grad()
def test_causal_former_is_t5s_decoder(redraw, queries, buckets, max_distance):
    ours, theirs = t5_decoder(redraw, queries=queries, buckets=buckets, max_distance=max_distance)
    features = torch.randn(2, 5, 10)
    read = theirs(
        inputs_embeds=ours.queries.expand(2, -1, -1), encoder_hidden_states=ours.norm_features(features)
    ).last_hidden_state
    torch.testing.assert_close(ours(features), ours.project(read), **CLOSE)


@pytest.mark.parametrize(("length", "buckets", "max_distance"), [(300, 32, 128), (40, 8, 20), (1, 2, 2), (9, 2, 3)])
def test_buckets_are_t5s(length, buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    place = torch.arange(length)
    expected = T5Attention._relative_position_bucket(
        place[None, :] - place[:, None], bidirectional=False, num_buckets=buckets, max_distance=max_distance
    )
    assert torch.equal(distance_buckets(length, buckets=buckets, max_distance=max_distance), expected)


@torch.no_grad()
def test_an_embedding_knows_nothing_of_later_ones(redraw):
    bridge = redraw(CausalFormer(10, 7, queries=6, dim=12, layers=3, heads=3, mlp_width=20), 0.6)
    features = torch.randn(2, 5, 10)
    out = bridge(features)
    bridge.queries[3] += 1
    moved = (bridge(features) - out).abs().amax(dim=(0, 2))
    assert moved[:3].max() == 0 and moved[3:].min() > 1e-4


@settings(max_examples=15)
@given(queries=st.integers(1, 5), patches=st.integers(1, 6), batch=st.integers(1, 3))
@torch.no_grad()
def test_patches_have_no_order_and_fewer_queries_give_the_same_beginning(queries, patches, batch):
    torch.manual_seed(queries)
    bridge = CausalFormer(6, 5, queries=5, dim=8, layers=2, heads=2, mlp_width=9)
    for parameter in bridge.parameters():
        parameter.normal_(0, 0.4)
    features = torch.randn(batch, patches, 6)
    out = bridge(features)
    assert out.shape == (batch, 5, 5)
    torch.testing.assert_close(bridge(features[:, torch.randperm(patches)]), out, **CLOSE)
    bridge.queries = nn.Parameter(bridge.queries[:queries])
    torch.testing.assert_close(bridge(features), out[:, :queries], **CLOSE)


def test_the_default_is_t5_base_with_emus_widths():
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Stack

    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, is_decoder=True, vocab_size=1)
    with torch.device("meta"):
        theirs, ours = T5Stack(config), CausalFormer(1408, 5120)
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    stack = count(theirs) - 768  # one word
    wider = 12 * 2 * (1408 - 768) * 768  # the keys and values of the cross-attention read the tower's width
    assert count(ours) == stack + wider + 32 * 768 + 2 * 1408 + (768 * 5120 + 5120)
    assert len(ours.queries) == find("emu")["visual_tokens"] == 32


# ---------------------------------------------------------------------------------------------- the objective


def emu(redraw, queries=3):
    bridge = CausalFormer(6, 12, queries=queries, dim=8, layers=1, heads=2, mlp_width=9)
    return redraw(Emu(bridge=bridge, text=TEXT, image_id=IMAGE, start_id=IMG), 0.3)


def rows():
    """Two images in the first row, one in the second, which is padded."""
    image = [IMG, IMAGE, IMAGE, IMAGE, END]
    return torch.tensor([[1, *image, 4, 5, *image, 6], [1, 2, 3, *image, 7, 8, 9, PAD, PAD, PAD]])


def loss_by_loop(logits, regressed, ids, embeds, *, silent, end_id, weight):
    words, images = [], []
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            following = int(ids[b, t + 1])
            closes = end_id is not None and following == end_id and int(ids[b, t]) == IMAGE
            if following == IMAGE or closes:
                images.append(((regressed[b, t] - embeds[b, t + 1]) ** 2).mean())
            if following != IMAGE and following not in silent:
                scores = logits[b, t]
                words.append(torch.logsumexp(scores, 0) - scores[following])
    words, images = sum(words) / len(words), sum(images) / len(images)
    return words + weight * images, words, images


@pytest.mark.parametrize("end_id", [None, END])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_loss_is_the_loop(redraw, end_id, weight):
    model, ids = emu(redraw), rows()
    out = model(ids, torch.randn(3, 4, 6))
    silent = (IMG, END, PAD)
    ours = next_element_loss(*out[:2], ids, out.embeds, image_id=IMAGE, silent=silent, end_id=end_id, weight=weight)
    expected = loss_by_loop(*out[:2], ids, out.embeds, silent=silent, end_id=end_id, weight=weight)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_an_end_that_closes_no_image_is_not_asked_for():
    """A stray [/IMG] among words has no embedding before it that could lead to it."""
    ids = torch.tensor([[1, IMG, IMAGE, IMAGE, END, 4, END, 5]])
    out = torch.randn(1, 8, 24), torch.randn(1, 8, 12), torch.randn(1, 8, 12)
    ours = next_element_loss(out[0], out[1], ids, out[2], image_id=IMAGE, silent=(IMG, END, PAD), end_id=END)
    expected = loss_by_loop(out[0], out[1], ids, out[2], silent=(IMG, END, PAD), end_id=END, weight=1.0)
    torch.testing.assert_close(ours.embeddings, expected[2], **CLOSE)
    torch.testing.assert_close(ours.embeddings, ((out[1][0, 1:4] - out[2][0, 2:5]) ** 2).mean(), **CLOSE)


def test_the_released_mask_of_places_is_the_rule():
    """modeling_llama.py takes its targets where <image> or [/IMG] stands, and predictions from [IMG] or <image>."""
    ids = rows()
    targets = (ids == IMAGE) | (ids == END)
    sources = (ids == IMAGE) | (ids == IMG)
    assert torch.equal(sources[:, :-1], targets[:, 1:])
    out = torch.randn(2, ids.shape[1], 24), torch.randn(2, ids.shape[1], 12), torch.randn(2, ids.shape[1], 12)
    ours = next_element_loss(out[0], out[1], ids, out[2], image_id=IMAGE, silent=(IMG, END, PAD), end_id=END)
    torch.testing.assert_close(ours.embeddings, ((out[1][sources] - out[2][targets]) ** 2).mean(), **CLOSE)


def test_targets_get_no_gradient_and_words_none_from_silence():
    ids = rows()
    logits, regressed, embeds = (torch.randn(2, ids.shape[1], n, requires_grad=True) for n in (24, 12, 12))
    next_element_loss(logits, regressed, ids, embeds, image_id=IMAGE, silent=(IMG, END, PAD)).total.backward()
    assert embeds.grad is None
    asked = logits.grad.abs().sum(-1) > 0
    following = ids[:, 1:]
    assert torch.equal(asked[:, :-1], (following < IMG)) and not asked[:, -1].any()
    assert torch.equal((regressed.grad.abs().sum(-1) > 0)[:, :-1], following == IMAGE)


@torch.no_grad()
def test_forward_is_llama_on_spliced_embeddings(redraw):
    from transformers import LlamaConfig, LlamaModel

    model, ids, features = emu(redraw), rows(), torch.randn(3, 4, 6)
    config = LlamaConfig(
        vocab_size=24, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, rms_norm_eps=TEXT.norm_eps,
    )  # fmt: skip
    theirs = LlamaModel(config).eval()
    theirs.embed_tokens.weight.copy_(model.language.token_embedding.weight)
    theirs.norm.weight.copy_(model.language.norm.weight)
    for mine, layer in zip(model.language.blocks, theirs.layers, strict=True):
        for to, source in (
            (layer.self_attn.q_proj, mine.attention.query),
            (layer.self_attn.k_proj, mine.attention.key),
            (layer.self_attn.v_proj, mine.attention.value),
            (layer.self_attn.o_proj, mine.attention.out),
            (layer.mlp.gate_proj, mine.mlp.gate),
            (layer.mlp.up_proj, mine.mlp.up),
            (layer.mlp.down_proj, mine.mlp.down),
            (layer.input_layernorm, mine.attention_norm),
            (layer.post_attention_layernorm, mine.mlp_norm),
        ):
            to.weight.copy_(source.weight)
    embeds = theirs.embed_tokens(ids)
    embeds[ids == IMAGE] = model.bridge(features).flatten(0, 1)
    hidden = theirs(inputs_embeds=embeds, use_cache=False).last_hidden_state
    out = model(ids, features)
    torch.testing.assert_close(out.embeds, embeds, **CLOSE)
    torch.testing.assert_close(out.logits, hidden @ model.language.head.weight.T, **CLOSE)
    torch.testing.assert_close(out.regressed, hidden @ model.regress.weight.T, **CLOSE)


def written_by_loop(model, ids, features):
    """generate_image's way: placeholders are added to the prompt, and in every round all of them are computed anew."""
    written = None
    for number in range(len(model.bridge.queries)):
        sequence = torch.cat([ids, torch.full((len(ids), number), IMAGE)], dim=1)
        embeds = model.embed(ids, features)
        if written is not None:
            embeds = torch.cat([embeds, written], dim=1)
        hidden = model.hidden(embeds)
        assert hidden.shape[1] == sequence.shape[1]
        written = model.regress(hidden[:, -(number + 1) :])  # from [IMG] on, and every embedding written so far
    return written


@pytest.mark.parametrize("queries", [1, 4])
@torch.no_grad()
def test_writing_an_image_is_the_released_loop(redraw, queries):
    model = emu(redraw, queries)
    ids = torch.tensor([[1, 2, IMG], [3, 4, IMG]])
    torch.testing.assert_close(model.generate_embeddings(ids), written_by_loop(model, ids, None), **CLOSE)
    prompt = torch.tensor([[1, IMG, *[IMAGE] * queries, END, 2, IMG]])
    features = torch.randn(1, 4, 6)
    out = model.generate_embeddings(prompt, features)
    assert out.shape == (1, queries, 12)
    torch.testing.assert_close(out, written_by_loop(model, prompt, features), **CLOSE)


def test_a_tiny_emu_learns_to_write_the_image_it_was_shown(redraw):
    """The regression brings the second head to the embeddings that the bridge made; the words are learned beside it."""
    torch.manual_seed(0)
    model = Emu(
        bridge=CausalFormer(6, 12, queries=3, dim=8, layers=1, heads=2, mlp_width=9), text=TEXT, image_id=IMAGE,
        start_id=IMG,
    )  # fmt: skip
    ids, features = torch.tensor([[1, IMG, IMAGE, IMAGE, IMAGE, END, 4, 5]]), torch.randn(1, 4, 6)
    model.bridge.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(200):
        out = model(ids, features)
        loss = next_element_loss(*out[:2], ids, out.embeds, image_id=IMAGE, silent=(IMG, END))
        if step == 0:
            assert abs(loss.words.item() - math.log(24)) < 0.2
            first = loss.embeddings.item()
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert loss.words < 0.05 and loss.embeddings < 0.05 * first
    written = model.generate_embeddings(ids[:, :2])
    assert (written - model.bridge(features)).square().mean() < 0.1 * first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([[1, 2, 3, 4]])}, r"0 of 3 next tokens are image tokens"),
        ({"ids": torch.tensor([[1, IMAGE, IMAGE, IMAGE]])}, r"0 of 3 next tokens are words"),
        ({"ids": torch.tensor([[1, IMAGE, 3, 99]])}, r"from 1 to 99, expected 0 to 23"),
        ({"weight": -1.0}, r"weight is -1"),
    ],
)
def test_nothing_to_learn_from_is_refused(change, message):
    good = {"logits": torch.zeros(1, 4, 24), "regressed": torch.zeros(1, 4, 12), "embeds": torch.zeros(1, 4, 12)}
    with pytest.raises(ValueError, match=message):
        next_element_loss(**{**good, "ids": torch.tensor([[1, IMAGE, 2, 3]]), "image_id": IMAGE, **change})


def test_a_prompt_that_asks_for_no_image_is_refused(redraw):
    with pytest.raises(ValueError, match=r"ends with id 2, expected 20"):
        emu(redraw).generate_embeddings(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"3 image tokens, but there are 0 images"):
        emu(redraw)(torch.tensor([[IMG, IMAGE, IMAGE, IMAGE]]))
    with pytest.raises(ValueError, match=r"9 placeholders but the tower gave 2 x 3 = 6"):
        emu(redraw)(rows(), torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match=r"width 12.*14"):
        wide = DecoderConfig(vocab_size=24, width=14, layers=1, heads=1, kv_heads=1, mlp_width=4)
        Emu(bridge=CausalFormer(6, 12, queries=1, dim=8, layers=1, heads=2), text=wide, image_id=IMAGE, start_id=IMG)
    with pytest.raises(ValueError, match=r"image_id is 24, expected 0 to 23"):
        Emu(bridge=CausalFormer(6, 12, queries=1, dim=8, layers=1, heads=2), text=TEXT, image_id=24, start_id=IMG)
