"""Packed conversations equal the conversations alone, and transformers' own way to pack."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

from vlm_course.attention import causal_mask
from vlm_course.convert import llama
from vlm_course.decoder import Decoder, DecoderConfig
from vlm_course.llava import Llava, LlavaConfig
from vlm_course.loss import response_loss
from vlm_course.packed import pack, pack_row, packed_logits
from vlm_course.vit import ViTConfig

IMAGE, PAD, M = 3, 0, 4
VISION = ViTConfig(image_size=16, patch_size=8, width=24, layers=2, heads=3, mlp_width=32)
TEXT = DecoderConfig(vocab_size=50, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48)


@pytest.fixture(scope="module")
def model():
    llava = Llava(LlavaConfig(vision=VISION, text=TEXT, image_id=IMAGE))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in llava.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return llava.eval()


def documents(lengths, images, seed):
    generator = torch.Generator().manual_seed(seed)
    out = []
    for length, count in zip(lengths, images, strict=True):
        words = torch.randint(7, 50, (length,), generator=generator).tolist()
        ids = [words[0], *[IMAGE] * (M * count), *words[1:]]
        labels = [-100] * (len(ids) - length // 2) + ids[len(ids) - length // 2 :]
        out.append((ids, labels))
    return out


def alone(model, docs, features):
    """Every document in a pass of its own: its logits, and the sum of its losses over its response tokens."""
    logits, total, count, taken = [], 0.0, 0, 0
    for ids, labels in docs:
        own = ids.count(IMAGE) // M
        seen = features[taken : taken + own] if own else None
        taken += own
        ids, labels = torch.tensor([ids]), torch.tensor([labels])
        logits.append(model(ids, image_features=seen)[0])
        tokens = int((labels[:, 1:] != -100).sum())
        if tokens:
            total, count = total + response_loss(logits[-1][None], labels) * tokens, count + tokens
    return logits, total / count


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=6),
    images=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    room=st.integers(17, 40),
    seed=st.integers(0, 99),
)
def test_packed_documents_equal_the_documents_alone(model, lengths, images, room, seed):
    docs = documents(lengths, images[: len(lengths)], seed)
    features = torch.randn(sum(images[: len(lengths)]), M, TEXT.width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        want, loss = alone(model, docs, features)
        packed = pack(docs, room, pad_id=PAD, image_id=IMAGE, visual_tokens=M)
        got = packed_logits(model, packed, features if len(features) else None)
    for number in range(len(docs)):
        torch.testing.assert_close(got[packed.documents == number], want[number], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(response_loss(got, packed.labels), loss, atol=1e-5, rtol=1e-5)
    assert sorted(packed.order) == list(range(len(docs)))


def test_without_the_block_mask_documents_leak(model):
    docs = documents([6, 7], [1, 1], 0)
    features = torch.randn(2, M, TEXT.width)
    packed = pack(docs, 40, pad_id=PAD, image_id=IMAGE, visual_tokens=M)
    with torch.no_grad():
        right = packed_logits(model, packed, features)
        leaky = packed_logits(model, packed, features, mask=causal_mask(40)[None, None])
        other = packed_logits(model, packed, features.flip(0))
    second = packed.documents[0] == packed.order[1]
    assert (right - leaky)[0][second].abs().max() > 0.01
    assert (right - other)[0][second].abs().max() > 0.01  # the order of the images counts


def test_neighbours_cannot_be_noticed(model):
    """Another neighbour, before or behind, moves nothing: the difference is exactly zero."""
    mine, other, third = documents([6, 6, 6], [1, 1, 1], 1)
    features = torch.randn(3, M, TEXT.width)
    with torch.no_grad():
        results = []
        for neighbour, place in ((other, 1), (third, 2)):
            packed = pack([mine, neighbour], 20, pad_id=PAD, image_id=IMAGE, visual_tokens=M)
            logits = packed_logits(model, packed, features[[0, place]])
            results.append(logits[packed.documents == 0])
    assert torch.equal(*results)


def test_a_row_equals_the_collator_of_transformers():
    docs = documents([5, 3, 8], [0, 0, 0], 2)
    whole = [(ids, list(ids)) for ids, _ in docs]  # loss on every token, where the first label matters
    for batch in (docs, whole):
        ids, labels, numbers, positions = pack_row([d[0] for d in batch], [d[1] for d in batch])
        collate = DataCollatorWithFlattening(return_tensors="pt", return_seq_idx=True)
        theirs = collate([{"input_ids": i, "labels": t} for i, t in batch])
        assert theirs["input_ids"][0].tolist() == ids
        assert theirs["labels"][0].tolist() == labels
        assert theirs["position_ids"][0].tolist() == positions
        assert theirs["seq_idx"][0].tolist() == numbers


def test_packed_logits_and_loss_equal_llama_of_transformers():
    """transformers finds the documents from the positions that restart, and hides them from each other."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    ours = Decoder(llama.decoder_config(config))
    ours.load_state_dict(llama.from_transformers(theirs.state_dict()))
    docs = documents([5, 3, 8], [0, 0, 0], 3)
    ids, labels, _, positions = (torch.tensor([v]) for v in pack_row(*zip(*docs, strict=True)))
    packed = pack(docs, 16, pad_id=PAD)
    with torch.no_grad():
        want = theirs(input_ids=ids, position_ids=positions, labels=labels, use_cache=False)
        got = ours(ours.embed(packed.ids), mask=packed.mask, positions=packed.positions)
    row = torch.cat([got[packed.documents == n] for n in range(3)])
    torch.testing.assert_close(row, want.logits[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(response_loss(got, packed.labels), want.loss, atol=1e-5, rtol=1e-5)


def test_rows_are_filled_and_padding_is_marked():
    packed = pack(documents([4, 9, 6], [0, 0, 0], 4), 10, pad_id=PAD)
    assert packed.ids.shape == (2, 10) and packed.order == [1, 2, 0]
    assert packed.filled == pytest.approx(0.95)
    loose = pack(documents([4, 9], [0, 0], 4), 10, pad_id=PAD)
    assert loose.filled == pytest.approx(0.65)
    assert ((loose.documents == -1) == (loose.ids == PAD)).all()
    assert (loose.labels[loose.documents == -1] == -100).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack([], 8, pad_id=0), "0 documents"),
        (lambda: pack([([1] * 9, [1] * 9)], 8, pad_id=0), "document 0 has 9 tokens but a row has room for 8"),
        (
            lambda: pack([([1, 3, 3], [-100] * 3)], 8, pad_id=0, image_id=3, visual_tokens=4),
            "2 placeholders but an image takes 4.*cut inside the image",
        ),
        (lambda: pack_row([[1, 2]], [[1]]), "document 0 has 2 ids but 1 labels"),
        (lambda: pack_row([[1, 2]], []), "1 documents but labels of 0"),
        (lambda: pack_row([[1], []], [[1], []]), "document 1 of 2 is empty"),
    ],
)
def test_what_cannot_be_packed_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_number_of_images_is_checked(model):
    packed = pack(documents([4, 4], [1, 1], 0), 20, pad_id=PAD, image_id=IMAGE, visual_tokens=M)
    with pytest.raises(ValueError, match="1 images were given, the rows hold 2"):
        packed_logits(model, packed, torch.zeros(1, M, TEXT.width))
