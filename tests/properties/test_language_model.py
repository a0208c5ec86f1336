"""Properties of the decoder, Llava and generation that hold for any weights: causality, cache, padding, start."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_course import generation
from vlm_course.attention import prefix_mask
from vlm_course.cache import KVCache
from vlm_course.chat import pad_rows
from vlm_course.decoder import Decoder, DecoderConfig, RMSNorm, rotary_phases
from vlm_course.generation import JOIN_AFTER, _CachedStep, choose_token, generate, greedy_generate, top_p_filter
from vlm_course.llava import LLAVA_7B, LLAVA_13B, SMALL, Llava, LlavaConfig, small_config
from vlm_course.loss import response_loss
from vlm_course.tokenizer import WordTokenizer
from vlm_course.vit import ViTConfig

IMAGE, EOS, V, N = 3, 2, 64, 4
TEXT = DecoderConfig(vocab_size=V, width=24, layers=2, heads=4, kv_heads=2, mlp_width=40, max_positions=64)
VISION = ViTConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_width=32)


def redraw(module, std=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module.eval()


@pytest.fixture(scope="module")
def model():
    return redraw(Llava(LlavaConfig(vision=VISION, text=TEXT, image_id=IMAGE)).double())


def batch(rows=3, text=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, V, (rows, 1 + N + text), generator=generator)
    ids[:, 1 : 1 + N] = IMAGE
    return ids, torch.randn(rows, 3, 16, 16, generator=generator, dtype=torch.float64)


def pad_left(rows):
    """Rows of unequal length -> ids and mask, padded on the left."""
    return pad_rows([row.tolist() for row in rows], 0, side="left")


@settings(max_examples=20, deadline=None)
@given(position=st.integers(1, 10), seed=st.integers(0, 100))
def test_a_changed_future_token_moves_no_earlier_logit(model, position, seed):
    ids, pixels = batch(seed=seed)
    other = ids.clone()
    place = max(position, 1 + N)
    other[:, place] = (other[:, place] - 6 + 1) % (V - 6) + 6
    with torch.no_grad():
        moved = (model(other, pixels) - model(ids, pixels)).abs().amax(-1)
    assert moved[:, :place].max() == 0
    assert moved[:, place].min() > 1e-6


def test_a_changed_future_image_moves_no_earlier_logit(model):
    ids, pixels = batch()
    with torch.no_grad():
        moved = (model(ids, pixels + 1) - model(ids, pixels)).abs().amax(-1)
    assert moved[:, 0].max() == 0 and moved[:, 1:].min() > 1e-6


def test_padding_mask_does_not_replace_the_causal_mask(model):
    ids, pixels = batch()
    with torch.no_grad():
        expected = model(ids, pixels)
        got = model(ids, pixels, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@settings(max_examples=15, deadline=None)
@given(pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5), capacity=st.sampled_from([0, 3, 40]))
def test_cached_equals_uncached_in_any_pieces(model, pieces, capacity):
    decoder = model.decoder
    embeds = torch.randn(2, sum(pieces), 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cache = decoder.new_cache(capacity=capacity)
    with torch.no_grad():
        got = torch.cat([decoder(piece, cache=cache) for piece in embeds.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(got, decoder(embeds), atol=1e-10, rtol=0)
    assert cache.length == sum(pieces)


def test_left_padding_changes_no_real_logit(model):
    ids, pixels = batch()
    lengths = [11, 9, 6]
    padded, mask = pad_left([row[:length] for row, length in zip(ids, lengths, strict=True)])
    with torch.no_grad():
        expected, got = model(ids, pixels), model(padded, pixels, attention_mask=mask)
    assert torch.isfinite(got).all()
    for row, length in enumerate(lengths):
        torch.testing.assert_close(got[row, mask[row]], expected[row, :length], atol=1e-10, rtol=0)


def test_positions_count_image_tokens_and_not_padding(model, monkeypatch):
    ids, pixels = batch()
    padded, mask = pad_left([ids[0], ids[1, :8]])
    seen = []
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda *args, **kw: seen.append(kw["positions"]) or forward(*args, **kw))
    for use_cache in (True, False):
        seen.clear()
        generate(model, padded, pixels[:2], attention_mask=mask, max_new_tokens=3, use_cache=use_cache)
        assert seen[0][0].tolist() == list(range(11)) and seen[0][1, 3:].tolist() == list(range(8))
        assert seen[-1][:, -1].tolist() == [12, 9]


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    temperature=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 50),
    stop=st.booleans(),
)
def test_cached_generation_equals_recomputed_token_for_token(model, lengths, temperature, seed, stop):
    """Also in a left-padded batch, where the rows' positions differ."""
    ids, pixels = batch(rows=len(lengths), text=max(lengths), seed=seed)
    padded, mask = pad_left([row[: 1 + N + length] for row, length in zip(ids, lengths, strict=True)])
    eos = int(generate(model, padded, pixels, attention_mask=mask, max_new_tokens=3)[0, -1]) if stop else None
    answers = [
        generate(
            model,
            padded,
            pixels,
            attention_mask=mask,
            max_new_tokens=10,
            eos_id=eos,
            temperature=temperature,
            top_p=0.9,
            generator=torch.Generator().manual_seed(seed),
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*answers)
    if temperature == 0:
        for row, length in enumerate(lengths):
            alone = generate(
                model, ids[row : row + 1, : 1 + N + length], pixels[row : row + 1], max_new_tokens=10, eos_id=eos
            )
            assert torch.equal(answers[0][row, : alone.shape[1]], alone[0])


def test_greedy_generate_is_generate_without_options(model):
    ids, pixels = batch()
    new = JOIN_AFTER + 4  # some tokens by single matrices, the others by joined ones
    answers = [greedy_generate(model, ids, pixels, new), generate(model, ids, pixels, max_new_tokens=new)]
    assert torch.equal(*answers)
    for answer in answers:  # ordinary tensors, though they were made in inference mode
        assert not answer.is_inference()
        model.decoder.embed(answer).sum().backward()


def test_matrices_of_large_models_are_not_copied(model, monkeypatch):
    ids, pixels = batch()
    expected = generate(model, ids, pixels, max_new_tokens=JOIN_AFTER + 4)
    copied, step = [], _CachedStep.__init__

    def noted(self, *places, joined=False):
        copied.append(joined)
        step(self, *places, joined=joined)

    monkeypatch.setattr(_CachedStep, "__init__", noted)
    assert torch.equal(generate(model, ids, pixels, max_new_tokens=JOIN_AFTER + 4), expected)
    assert copied == [False, True]
    monkeypatch.setattr(generation, "JOIN_BELOW", 1)
    assert torch.equal(generate(model, ids, pixels, max_new_tokens=JOIN_AFTER + 4), expected)
    assert copied == [False, True, False]


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 3),
    past=st.integers(1, 6),
    steps=st.integers(1, 4),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([None, 10]),
    joined=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_cached_step_is_the_decoders_own(rows, past, steps, kv_heads, head_dim, joined, seed):
    sizes = {"vocab_size": V, "width": 24, "layers": 2, "heads": 4, "kv_heads": kv_heads, "mlp_width": 40}
    config = DecoderConfig(**sizes, head_dim=head_dim, norm_eps=0.3, rope_theta=50.0)
    decoder = redraw(Decoder(config).double(), seed=seed)
    ids = torch.randint(0, V, (rows, past + steps), generator=torch.Generator().manual_seed(seed))
    cache, step = decoder.new_cache(), _CachedStep(decoder, past + steps, joined=joined)
    with torch.no_grad():
        expected = decoder(decoder.embed(ids))
        decoder(decoder.embed(ids[:, :past]), cache=cache)
        for place in range(past, past + steps):
            torch.testing.assert_close(
                step(ids[:, place], cache), expected[:, place], atol=1e-5, rtol=1e-5
            )  # float32 norms
    assert cache.length == past + steps


def test_phases_made_before_are_those_of_the_positions(model):
    decoder = model.decoder
    embeds = torch.rand(2, 5, decoder.config.width)
    places = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])
    phases = rotary_phases(places, decoder.config.head_dim, decoder.config.rope_theta)
    assert torch.equal(decoder(embeds, phases=phases), decoder(embeds, positions=places))
    assert not torch.equal(decoder(embeds, phases=rotary_phases(2 * places, decoder.config.head_dim)), decoder(embeds))
    with pytest.raises(ValueError, match="pass one of the two"):
        decoder(embeds, phases=phases, positions=places)
    with pytest.raises(ValueError, match=r"expected \(4, "):
        decoder(embeds[:, :4], phases=phases)


def test_what_hangs_on_a_module_is_called_at_every_token(model):
    """A hook, an adapter or another class is not bypassed by the quick step, and the answer stays the same."""
    ids, pixels = batch()
    expected, calls = generate(model, ids, pixels, max_new_tokens=5), []
    assert _CachedStep.fits(model)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model.decoder.blocks[1].mlp.down, register)(lambda *_: calls.append(1))
        assert torch.equal(generate(model, ids, pixels, max_new_tokens=5), expected)
        handle.remove()
    assert len(calls) == 2 * 5

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    other = Llava(model.config).double()
    other.load_state_dict(model.state_dict())
    other.decoder.blocks[0].mlp.up.__class__ = Doubled
    assert not _CachedStep.fits(other)
    assert torch.equal(*(generate(other, ids, pixels, max_new_tokens=5, use_cache=cached) for cached in (True, False)))


def test_generation_to_the_last_position_and_not_beyond(model):
    ids, pixels = batch(rows=1)
    room = TEXT.max_positions - ids.shape[1]
    longest = generate(model, ids, pixels, max_new_tokens=room + 1)  # the last token is written, never read
    assert longest.shape[1] == room + 1
    assert torch.equal(generate(model, ids, pixels, max_new_tokens=room), longest[:, :-1])
    with pytest.raises(ValueError, match="65 tokens do not fit in max_positions=64"):
        generate(model, ids, pixels, max_new_tokens=room + 2)


def test_generation_encodes_the_image_once_and_leaves_no_trace(model, monkeypatch):
    ids, pixels = batch()
    calls = []
    encode = Llava.encode_images
    monkeypatch.setattr(Llava, "encode_images", lambda self, pixels: calls.append(1) or encode(self, pixels))
    for use_cache in (True, False):
        calls.clear()
        first = generate(model, ids, pixels, max_new_tokens=6, use_cache=use_cache)
        assert len(calls) == 1
        assert torch.equal(generate(model, ids, pixels, max_new_tokens=6, use_cache=use_cache), first)


def test_generation_ends_with_eos_and_never_writes_an_image(model):
    ids, pixels = batch()
    free = generate(model, ids, pixels, max_new_tokens=12)
    assert free.shape == (3, 12)
    # An end that comes early in a row which would have gone on with other words, while another row never ends.
    ends = [int(row[i]) for row in free for i in range(3) if (row[i + 1 :] != row[i]).any()]
    eos = next(end for end in ends if not (free == end).any(dim=1).all())
    stopped = generate(model, ids, pixels, max_new_tokens=12, eos_id=eos)
    assert stopped.shape == free.shape
    for row, unstopped in zip(stopped, free, strict=True):
        before = (unstopped == eos).cumsum(0) == 0
        assert torch.equal(row, torch.where(before, unstopped, eos))
    with torch.no_grad():
        model.decoder.head.weight[IMAGE] *= 100
        wanted = model(ids, pixels)[:, -1].argmax(-1)
        assert (wanted == IMAGE).any()
        assert not (generate(model, ids, pixels, max_new_tokens=4) == IMAGE).any()
        model.decoder.head.weight[IMAGE] /= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"attention_mask": torch.tensor([[1] * 10 + [0]] * 3)}, "pad on the left"),
        ({"attention_mask": torch.ones(3, 4)}, r"attention_mask is \(3, 4\) but ids are \(3, 11\)"),
        ({"temperature": -1.0}, "temperature is -1.0.*from 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_generation_refuses(model, arguments, message):
    ids, pixels = batch()
    with pytest.raises(ValueError, match=message):
        generate(model, ids, pixels, **({"max_new_tokens": 2} | arguments))


def test_top_p_keeps_the_token_that_crosses():
    probabilities = torch.tensor([[0.15, 0.5, 0.3, 0.05]])
    assert (top_p_filter(probabilities, 0.6) > 0).tolist() == [[False, True, True, False]]
    assert (top_p_filter(probabilities, 0.4) > 0).tolist() == [[False, True, False, False]]
    torch.testing.assert_close(top_p_filter(probabilities, 1.0), probabilities)
    torch.testing.assert_close(top_p_filter(probabilities, 0.6), torch.tensor([[0, 0.625, 0.375, 0]]))


def test_temperature_comes_before_top_p():
    """At temperature 4 the distribution is nearly flat, so top-p 0.5 must let more than one token through."""
    logits = torch.tensor([4.0, 2.0, 1.0, 0.0]).repeat(2000, 1)
    drawn = choose_token(logits, temperature=4.0, top_p=0.5, generator=torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1}
    share = (drawn == 0).float().mean().item()
    assert abs(share - 1 / (1 + math.exp(-0.5))) < 0.03


def test_loss_at_the_start_is_about_the_logarithm_of_the_vocabulary():
    torch.manual_seed(0)
    config = small_config(512)
    start = Llava(config)
    ids = torch.randint(6, 512, (2, 164))
    ids[:, 1:145] = IMAGE
    labels = ids.clone()
    labels[:, :150] = -100
    with torch.no_grad():
        loss = response_loss(start(ids, torch.randn(2, 3, 96, 96)), labels)
    assert abs(loss.item() - math.log(512)) < 0.15


def test_sizes():
    parameters = {}
    for name, config in {"small": SMALL, "7b": LLAVA_7B, "13b": LLAVA_13B}.items():
        with torch.device("meta"):
            parameters[name] = sum(p.numel() for p in Llava(config).parameters())
    assert parameters["small"] < 9.5e6
    assert parameters["7b"] == 7_063_427_072  # the number that the published model has
    assert round(parameters["13b"] / 1e9, 1) == 13.4
    assert (LLAVA_7B.visual_tokens, SMALL.visual_tokens) == (576, 144)
    assert SMALL.text.vocab_size == WordTokenizer.small().vocab_size
    assert SMALL.image_id == WordTokenizer.image_id


def test_rotary_phases_stay_float32():
    cos, sin = rotary_phases(torch.arange(400), 32)
    assert cos.dtype == sin.dtype == torch.float32
    assert len(torch.stack([cos[:, 0], sin[:, 0]], 1).unique(dim=0)) == 400
    decoder = Decoder(TEXT).bfloat16()
    assert not [name for name, _ in decoder.named_buffers()]  # no table that .bfloat16() could round


def test_prefix_mask_opens_the_image_to_itself(model):
    """A prefix-LM as in PaliGemma: the mask is used as it stands."""
    embeds = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = embeds.clone()
    other[:, 2] += 1
    mask = prefix_mask(torch.tensor([3]), 6)
    with torch.no_grad():
        moved = (model.decoder(other, mask=mask) - model.decoder(embeds, mask=mask)).abs().amax(-1)[0]
        causal = (model.decoder(other) - model.decoder(embeds)).abs().amax(-1)[0]
    assert moved[:2].min() > 1e-6 and causal[:2].max() == 0


def test_rms_norm_has_unit_mean_square():
    x = 7 * torch.randn(4, 32)
    torch.testing.assert_close(RMSNorm(32)(x).square().mean(-1), torch.ones(4), atol=1e-4, rtol=0)
    assert RMSNorm(32).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_cache_starts_empty_and_grows():
    cache = KVCache(1)
    assert cache.length == 0
    keys = torch.arange(10.0).view(1, 1, 10, 1)
    for piece in keys.split([4, 1, 5], dim=2):
        k, v = cache.update(0, piece, -piece)
    assert torch.equal(k, keys) and torch.equal(v, -keys) and cache.length == 10


def test_errors_name_both_numbers(model):
    ids, pixels = batch()
    with pytest.raises(ValueError, match="image has 3 placeholders but the tower gave 4 features"):
        model(ids[:, 2:], pixels)
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 4\) .* 11 new tokens"):
        model(ids, pixels, attention_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="both pixels and image_features"):
        model(ids, pixels, image_features=torch.zeros(3, N, 24))
    with pytest.raises(ValueError, match="65 tokens do not fit in max_positions=64"):
        model(torch.full((1, 65), 7))
    with pytest.raises(ValueError, match=r"D = 16 .*expected 24"):
        model.decoder(torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="image_id 64 is outside the vocabulary of 64"):
        LlavaConfig(vision=VISION, text=TEXT, image_id=64)
    with pytest.raises(ValueError, match="6 query heads cannot share 4 key heads"):
        DecoderConfig(vocab_size=8, width=24, layers=1, heads=6, kv_heads=4, mlp_width=8)


def test_training_reaches_every_part_that_is_read():
    """All parameters but those behind the feature layer (the tower's last block and final norm) get a gradient."""
    torch.manual_seed(0)
    model = Llava(LlavaConfig(vision=VISION, text=TEXT, image_id=IMAGE))
    ids, pixels = batch()
    response_loss(model(ids, pixels.float()), ids).backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert silent == {n for n, _ in model.named_parameters() if n.startswith(("vision.blocks.1", "vision.post_norm"))}
    assert model.bridge.mlp[0].weight.grad.abs().sum() > 0
