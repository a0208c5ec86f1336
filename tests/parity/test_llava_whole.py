"""The whole LLaVA, from the shipped model to 13B: three ways to run it, and transformers', give one answer."""

from dataclasses import replace

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from vlm_course.chat import encode_chat
from vlm_course.convert import llava as convert
from vlm_course.decoder import DecoderConfig
from vlm_course.generation import generate, greedy_generate
from vlm_course.llava import LLAVA_7B, LLAVA_13B, SMALL, Llava, LlavaConfig
from vlm_course.plain import PlainKVCache, PlainLlava, greedy_cached, greedy_decode
from vlm_course.pretrained import load_small
from vlm_course.probe_questions import question_set
from vlm_course.vit import ViTConfig

TINY = LlavaConfig(
    vision=ViTConfig(image_size=32, patch_size=8, width=24, layers=3, heads=4, mlp_width=64),
    text=DecoderConfig(
        vocab_size=200, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48, rope_theta=500.0, norm_eps=1e-3
    ),
    image_id=199,
)


@pytest.fixture(scope="module")
def small():
    return load_small()


@pytest.fixture(scope="module")
def exam(small):
    return question_set(small.tokenizer, scenes=3, seed=5)


@pytest.fixture(scope="module")
def theirs(small):
    model = convert.as_transformers(small.model)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def plain(small):
    model = PlainLlava(small.model.config)
    model.load_state_dict(small.model.state_dict())
    return model.eval().requires_grad_(False)


def redrawn(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = Llava(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("config", [TINY, SMALL, LLAVA_7B, LLAVA_13B, replace(TINY, feature_layer=-3)], ids=str)
def test_configurations_go_there_and_back(config):
    assert convert.llava_config(convert.transformers_config(config)) == config


@pytest.mark.parametrize("config", [LLAVA_7B, LLAVA_13B], ids=["7B", "13B"])
def test_every_weight_of_the_real_sizes_has_its_place_in_transformers(config):
    with torch.device("meta"):
        ours, theirs = Llava(config), LlavaForConditionalGeneration(convert.transformers_config(config))
    shapes = {name: tensor.shape for name, tensor in convert.to_transformers(ours.state_dict()).items()}
    # Their class keeps rotary frequencies in buffers that are not saved, so the state dicts agree exactly.
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_a_plain_model_of_any_size_takes_the_same_weights():
    for config in (TINY, LLAVA_7B, LLAVA_13B):
        with torch.device("meta"):
            ours, plain = Llava(config).state_dict(), PlainLlava(config).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in plain.items()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(TINY, bridge="linear"), "'linear' with 16 tokens for 16 patches"),
        (replace(TINY, visual_tokens=4), "4 tokens for 16 patches"),
        (replace(TINY, vision=replace(TINY.vision, image_size=(32, 40)), visual_tokens=20), r"images of \(32, 40\)"),
        (replace(TINY, vision=replace(TINY.vision, pre_norm=False)), "pre_norm=False"),
    ],
)
def test_what_transformers_does_not_have_is_said(config, message):
    with pytest.raises(ValueError, match=message):
        convert.transformers_config(config)


def test_the_shipped_model_in_transformers_has_the_same_logits(small, theirs, exam):
    with torch.no_grad():
        expected = theirs(input_ids=exam.ids, pixel_values=exam.pixels).logits
        torch.testing.assert_close(small.model(exam.ids, exam.pixels), expected, atol=1e-4, rtol=1e-4)
    back = convert.from_transformers(theirs.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in small.model.state_dict().items())


def test_several_images_in_a_row_of_several_turns(theirs, small):
    """Two images in one row, each with its own question, and a finished turn between them."""
    generator = torch.Generator().manual_seed(0)
    model = redrawn(TINY, seed=4)  # a seed whose answers do not repeat one word
    other = convert.as_transformers(model)
    words = lambda n: torch.randint(1, 199, (2, n), generator=generator)  # noqa: E731
    image = torch.full((2, 16), 199)
    ids = torch.cat([words(2), image, words(7), image, words(4)], dim=1)
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    with torch.no_grad():
        expected = other(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(model(ids, pixels), expected, atol=1e-5, rtol=0)
        assert (model(ids, pixels[[1, 0, 2, 3]]) - expected).abs().max() > 1e-2  # which image is which matters
    wanted = other.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=12, do_sample=False, suppress_tokens=[199], pad_token_id=0,
        eos_token_id=None, attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    for use_cache in (True, False):
        got = generate(model, ids, pixels, max_new_tokens=12, use_cache=use_cache)
        assert torch.equal(got, wanted[:, ids.shape[1] :])
    assert len(got.unique()) > 8


@pytest.mark.parametrize("row", range(3))
def test_turn_by_turn_from_one_cache_is_the_whole_conversation_at_once(small, theirs, exam, row):
    """A second question goes on from the first turn's cache; transformers reads the whole conversation anew."""
    tokenizer, model = small.tokenizer, small.model
    cache, image, done, history = model.new_cache(), exam.pixels[row : row + 1], 0, []
    for question in exam.texts[row][:3]:
        ids, _ = encode_chat(tokenizer, [*history, (question, None)], model.config.visual_tokens)
        answer, step, features = [], torch.tensor([ids[done:]]), model.encode_images(image) if not done else None
        while len(answer) < 12 and tokenizer.eos_id not in answer:
            logits = model(step, image_features=features, cache=cache)
            answer.append(int(logits[0, -1].argmax()))
            step, features = torch.tensor([answer[-1:]]), None
        if answer[-1] == tokenizer.eos_id:  # the last token was chosen and not read yet: the next turn starts with it
            answer = answer[:-1]
        full = theirs.generate(
            input_ids=torch.tensor([ids]), pixel_values=image, max_new_tokens=len(answer), do_sample=False,
            eos_token_id=None, pad_token_id=0, attention_mask=torch.ones(1, len(ids)),
        )  # fmt: skip
        assert full[0, len(ids) :].tolist() == answer
        done = cache.length
        history.append((question, tokenizer.decode(answer)))


def test_three_ways_to_write_an_answer_are_one(small, plain, exam):
    model, tokenizer = small.model, small.tokenizer
    for row in range(3):
        for question in ("Describe the image.", *exam.texts[row][:2]):
            ids = torch.tensor([encode_chat(tokenizer, [(question, None)], model.config.visual_tokens)[0]])
            pixels = exam.pixels[row : row + 1]
            wanted = generate(model, ids, pixels, max_new_tokens=40, eos_id=tokenizer.eos_id)
            assert torch.equal(greedy_decode(plain, ids, pixels, 40, tokenizer.eos_id), wanted)
            assert torch.equal(greedy_cached(plain, ids, pixels, 40, tokenizer.eos_id), wanted)
            assert torch.equal(greedy_generate(model, ids, pixels, wanted.shape[1]), wanted)


def test_the_plain_model_masks_its_padding(small, plain, exam):
    model, tokenizer = small.model, small.tokenizer
    rows = [encode_chat(tokenizer, [(q, None)], model.config.visual_tokens)[0] for q in ("Describe the image.", "cat")]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    real = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    assert not real.all()
    got = plain(ids, exam.pixels[:2], real)
    torch.testing.assert_close(got[real], model(ids, exam.pixels[:2], attention_mask=real)[real], atol=1e-4, rtol=1e-4)
    alone = plain(torch.tensor([rows[1]]), exam.pixels[1:2])
    torch.testing.assert_close(got[1, -len(rows[1]) :], alone[0], atol=1e-4, rtol=1e-4)


def test_the_plain_cache_holds_what_the_models_own_holds(small, exam):
    ids, pixels = exam.ids[:1, :160], exam.pixels[:1]
    own, plain = small.model.new_cache(), PlainKVCache()
    with torch.no_grad():
        for cache in (own, plain):
            assert cache.length == 0
            small.model(ids, pixels, cache=cache)
            small.model(ids[:, -1:], cache=cache)
            assert cache.length == 161
    for layer in range(small.model.config.text.layers):
        empty = torch.empty(1, small.model.config.text.kv_heads, 0, small.model.config.text.head_dim)
        for one, other in zip(own.update(layer, empty, empty), plain.stored[layer], strict=True):
            torch.testing.assert_close(one, other)
