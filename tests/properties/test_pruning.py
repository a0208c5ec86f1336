"""FastV: which tokens are kept, that nothing else changes, and what the decoder does with the rest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_course.attention import attention_weights, causal_mask
from vlm_course.decoder import Decoder, DecoderConfig, apply_rotary, rotary_phases
from vlm_course.pruning import flops_kept, kept_tokens, last_query_scores, prefill_pruned, prune

CLOSE = {"rtol": 0, "atol": 1e-5}
LAYERS, WIDTH, BATCH, TOKENS = 4, 16, 2, 12
IS_IMAGE = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0]]).bool()


@pytest.fixture
def decoder(redraw):
    config = DecoderConfig(
        vocab_size=30, width=WIDTH, layers=LAYERS, heads=4, kv_heads=2, mlp_width=24, max_positions=64
    )
    return redraw(Decoder(config), std=0.4)


@pytest.fixture
def embeds():
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------------- the choice


def test_scores_average_the_last_query_over_heads():
    weights = torch.tensor([[[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], [[0.9, 0.1, 0.0], [0.1, 0.2, 0.7]]]])
    torch.testing.assert_close(last_query_scores(weights), torch.tensor([[0.3, 0.35, 0.35]]))


@st.composite
def scored(draw):
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    images = draw(st.integers(0, tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scores = torch.rand(batch, tokens, generator=generator)
    is_image = torch.rand(batch, tokens, generator=generator).argsort(dim=1) < images
    return scores, is_image, draw(st.floats(0, 1))


@given(scored())
def test_the_best_image_tokens_and_all_text_are_kept_in_order(case):
    scores, is_image, ratio = case
    kept = kept_tokens(scores, is_image, ratio)
    images = int(is_image[0].sum())
    dropped = scores.shape[1] - kept.shape[1]
    assert dropped <= ratio * images + 1e-6 < dropped + 1
    for row, flags, indices in zip(scores, is_image, kept.tolist(), strict=True):
        assert indices == sorted(set(indices))
        text = [i for i, flag in enumerate(flags.tolist()) if not flag]
        best = sorted((i for i, flag in enumerate(flags.tolist()) if flag), key=lambda i: -row[i].item())
        assert set(indices) == set(text) | set(best[: images - dropped])


@given(scored())
def test_nothing_is_dropped_at_0_and_every_image_token_at_1(case):
    scores, is_image, _ = case
    everything = torch.arange(scores.shape[1]).expand_as(scores)
    assert torch.equal(kept_tokens(scores, is_image, 0), everything)
    kept = kept_tokens(scores, is_image, 1)
    assert kept.shape[1] == int((~is_image[0]).sum())
    assert not is_image.gather(1, kept).any()


def test_the_count_survives_float_errors():
    scores, is_image = torch.rand(1, 100), torch.ones(1, 100, dtype=torch.bool)
    for percent in range(101):
        assert kept_tokens(scores, is_image, percent / 100).shape[1] == 100 - percent
    assert kept_tokens(torch.rand(1, 5), torch.ones(1, 5, dtype=torch.bool), 0.5).shape[1] == 3  # rounded in its favour


def test_of_equal_scores_the_earlier_token_stays():
    is_image = torch.ones(1, 600, dtype=torch.bool)  # long enough that an unstable sort shows
    assert kept_tokens(torch.zeros(1, 600), is_image, 0.5).tolist() == [list(range(300))]


def test_text_stays_however_little_it_is_looked_at():
    scores, is_image = torch.tensor([[0.0, 0.9, 0.8, 0.7, 0.0]]), torch.tensor([[False, True, True, True, False]])
    assert kept_tokens(scores, is_image, 0.34).tolist() == [[0, 1, 2, 4]]


@given(scored(), st.integers(1, 4))
def test_prune_takes_whole_tokens(case, width):
    scores, is_image, ratio = case
    kept = kept_tokens(scores, is_image, ratio)
    hidden = torch.randn(*scores.shape, width)
    for row, indices, out in zip(hidden, kept, prune(hidden, kept), strict=True):
        assert torch.equal(out, row[indices])


# --------------------------------------------------------------------------------------------- in the decoder


def masked_reference(decoder, embeds, is_image, layer, ratio):
    """The same model with every token in every layer, where later layers may not look at the dropped ones."""
    config = decoder.config
    tokens = embeds.shape[1]
    phases = rotary_phases(torch.arange(tokens), config.head_dim, config.rope_theta)
    x, mask, causal = embeds, None, causal_mask(tokens)
    for index, block in enumerate(decoder.blocks):
        before = x
        x = block(x, phases, mask, None, index)
        if index == layer - 1:
            normed = block.attention_norm(before)
            split = (-1, config.head_dim)
            q = block.attention.query(normed).unflatten(-1, split).transpose(1, 2)
            k = block.attention.key(normed).unflatten(-1, split).transpose(1, 2)
            q, k = apply_rotary(q, *phases), apply_rotary(k, *phases)
            k = torch.stack([k[:, head // 2] for head in range(config.heads)], dim=1)  # 4 heads share 2
            weights = attention_weights(q, k, mask=causal)
            kept = kept_tokens(weights[:, :, -1].mean(1), is_image, ratio)
            alive = torch.zeros(embeds.shape[:2], dtype=torch.bool).scatter(1, kept, True)
            mask = causal & alive[:, None, None, :]
    return decoder.head(decoder.norm(x)), kept


@pytest.mark.parametrize("layer", [1, 2, LAYERS])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 1.0])
@torch.no_grad()
def test_dropping_a_token_equals_hiding_it_from_the_later_layers(decoder, embeds, layer, ratio):
    expected, kept = masked_reference(decoder, embeds, IS_IMAGE, layer, ratio)
    pruned = prefill_pruned(decoder, embeds, IS_IMAGE, layer=layer, ratio=ratio)
    assert torch.equal(pruned.kept, kept)
    torch.testing.assert_close(pruned.logits, prune(expected, kept), **CLOSE)
    if ratio == 0:
        torch.testing.assert_close(pruned.logits, decoder(embeds), **CLOSE)
    elif layer < LAYERS:
        assert (pruned.logits[:, -1] - decoder(embeds)[:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_kept_tokens_keep_their_positions(decoder, embeds):
    """Renumbered positions would move the text closer to what is left of the image, and change the answer."""
    pruned = prefill_pruned(decoder, embeds, IS_IMAGE, layer=1, ratio=1.0)
    phases = rotary_phases(torch.arange(TOKENS), decoder.config.head_dim, decoder.config.rope_theta)
    x = prune(decoder.blocks[0](embeds, phases, None, None, 0), pruned.kept)
    for renumbered in (False, True):
        positions = torch.arange(x.shape[1]).expand(BATCH, -1) if renumbered else pruned.kept
        y, kept_phases = x, rotary_phases(positions, decoder.config.head_dim, decoder.config.rope_theta)
        for index, block in enumerate(decoder.blocks[1:], start=1):
            y = block(y, kept_phases, None, None, index)
        gap = (decoder.head(decoder.norm(y)) - pruned.logits).abs().max().item()
        assert gap > 1e-3 if renumbered else gap < 1e-5


@torch.no_grad()
def test_decoding_goes_on_from_a_pruned_cache(decoder, embeds):
    layer, later = 2, torch.randn(BATCH, 3, WIDTH)
    cache = decoder.new_cache()
    pruned = prefill_pruned(decoder, embeds, IS_IMAGE, layer=layer, ratio=0.5, cache=cache)
    assert cache.length == TOKENS - 3  # of the last layer
    steps = [
        decoder(later[:, [step]], positions=torch.tensor([TOKENS + step]), cache=cache) for step in range(3)
    ]  # 3 x [B, 1, V]

    everything = torch.cat([embeds, later], dim=1)
    phases = rotary_phases(torch.arange(TOKENS + 3), decoder.config.head_dim, decoder.config.rope_theta)
    alive = torch.ones(BATCH, TOKENS + 3, dtype=torch.bool)
    alive[:, :TOKENS] = torch.zeros(BATCH, TOKENS, dtype=torch.bool).scatter(1, pruned.kept, True)
    x = everything
    for index, block in enumerate(decoder.blocks):
        mask = None if index < layer else causal_mask(TOKENS + 3) & alive[:, None, None, :]
        x = block(x, phases, mask, None, index)
    expected = decoder.head(decoder.norm(x))[:, TOKENS:]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, **CLOSE)


# ------------------------------------------------------------------------------------------------------ the cost


LLAVA_13B = {"layers": 40, "width": 5120, "mlp_width": 13824}


def test_cost_of_half_the_image_after_layer_two():
    """The setting of the paper's title, which it gives a reduction of 45 % for LLaVA-1.5-13B."""
    share = flops_kept(tokens=640, images=576, ratio=0.5, layer=2, **LLAVA_13B)
    assert 0.54 < share < 0.59


@given(
    text=st.integers(1, 200),
    images=st.integers(0, 600),
    ratio=st.floats(0, 1),
    layer=st.integers(0, 8),
    width=st.integers(1, 64),
    mlp_width=st.integers(1, 64),
)
def test_cost_is_the_sum_over_layers(text, images, ratio, layer, width, mlp_width):
    sizes = {"tokens": text + images, "images": images, "layers": 8, "width": width, "mlp_width": mlp_width}
    share = flops_kept(ratio=ratio, layer=layer, **sizes)
    kept = kept_tokens(torch.zeros(1, text + images), (torch.arange(text + images) < images)[None], ratio).shape[1]
    counts = [text + images] * layer + [kept] * (8 - layer)
    products = [4 * n * width * width + 2 * n * n * width + 2 * n * width * mlp_width for n in counts]
    full = 8 * (
        4 * sizes["tokens"] * width**2 + 2 * sizes["tokens"] ** 2 * width + 2 * sizes["tokens"] * width * mlp_width
    )
    assert share == pytest.approx(sum(products) / full)
    assert flops_kept(ratio=0, layer=layer, **sizes) == flops_kept(ratio=ratio, layer=8, **sizes) == 1


# ----------------------------------------------------------------------------------------------------- bad input


def flops(**changes):
    sizes = {"tokens": 10, "images": 5, "ratio": 0.5, "layer": 2, "layers": 4, "width": 8, "mlp_width": 8}
    return flops_kept(**{**sizes, **changes})


SCORES, FLAGS = torch.rand(2, 4), torch.tensor([[True, True, False, False]] * 2)


@pytest.mark.parametrize(
    "call, numbers",
    [
        (lambda: last_query_scores(torch.zeros(2, 3, 4)), "3 dimensions.*expected 4"),
        (lambda: last_query_scores(torch.zeros(2, 0, 4, 4)), "H = 0.*at least 1"),
        (lambda: last_query_scores(torch.zeros(2, 2, 0, 4)), "T = 0.*at least 1"),
        (lambda: kept_tokens(SCORES[0], FLAGS, 0.5), "1 dimensions.*expected 2"),
        (lambda: kept_tokens(SCORES, FLAGS[:, :3], 0.5), "T = 3.*expected 4"),
        (lambda: kept_tokens(SCORES, FLAGS[:1], 0.5), "B = 1.*expected 2"),
        (lambda: kept_tokens(SCORES, FLAGS.long(), 0.5), "int64.*bool"),
        (lambda: kept_tokens(SCORES.to("meta"), FLAGS, 0.5), "cpu.*meta"),
        (lambda: kept_tokens(SCORES[:0], FLAGS[:0], 0.5), "B = 0.*at least 1"),
        (lambda: kept_tokens(SCORES, torch.tensor([[True] * 4, [False] * 4]), 0.5), "0 image tokens, another 4"),
        (lambda: kept_tokens(SCORES, FLAGS, 1.01), "1.01.*0.*to 1"),
        (lambda: kept_tokens(SCORES, FLAGS, -0.1), "-0.1.*0.*to 1"),
        (lambda: kept_tokens(SCORES, FLAGS, float("nan")), "nan.*0.*to 1"),
        (lambda: kept_tokens(SCORES.masked_fill(FLAGS, torch.nan), FLAGS, 0.5), "4 of 8 scores are NaN"),
        (lambda: prune(torch.zeros(2, 4), torch.zeros(2, 1).long()), "2 dimensions.*expected 3"),
        (lambda: prune(torch.zeros(2, 4, 3), torch.zeros(1, 1).long()), "B = 1.*expected 2"),
        (lambda: prune(torch.zeros(2, 4, 3), torch.zeros(2, 1)), "float32.*integer"),
        (lambda: prune(torch.zeros(2, 4, 3), torch.tensor([[0], [4]])), r"0\.\.4.*expected 0\.\.3"),
        (lambda: prune(torch.zeros(2, 4, 3), torch.tensor([[0], [-1]])), r"-1\.\.0.*expected 0\.\.3"),
        (lambda: prune(torch.zeros(2, 4, 3, device="meta"), torch.zeros(2, 1).long()), "cpu.*meta"),
        (lambda: flops(ratio=2), "ratio is 2"),
        (lambda: flops(images=11), "images is 11.*10 tokens"),
        (lambda: flops(images=-1), "images is -1.*at least 0"),
        (lambda: flops(tokens=0, images=0), "tokens is 0"),
        (lambda: flops(layer=5), "layer is 5.*4 layers"),
        (lambda: flops(layer=0, layers=0), "layers is 0"),
        (lambda: flops(width=0), "width is 0"),
        (lambda: flops(mlp_width=0), "mlp_width is 0"),
    ],
)
def test_bad_input_names_both_sides(call, numbers):
    with pytest.raises(ValueError, match=numbers):
        call()


@pytest.mark.parametrize(
    "changes, numbers",
    [
        ({"embeds": torch.zeros(2, TOKENS, 8)}, f"D = 8.*expected {WIDTH}"),
        ({"embeds": torch.zeros(TOKENS, WIDTH)}, "2 dimensions.*expected 3"),
        ({"embeds": torch.zeros(2, 65, WIDTH), "is_image": torch.zeros(2, 65).bool()}, "65 tokens.*64"),
        ({"embeds": torch.zeros(2, 0, WIDTH), "is_image": torch.zeros(2, 0).bool()}, "T = 0.*at least 1"),
        ({"is_image": IS_IMAGE[:, 1:]}, f"T = {TOKENS - 1}.*expected {TOKENS}"),
        ({"is_image": IS_IMAGE.to("meta")}, "meta.*cpu"),
        ({"layer": 0}, "layer is 0.*at least 1"),
        ({"layer": 5}, "layer is 5.*1 to 4"),
        ({"ratio": 1.5}, "ratio is 1.5"),
    ],
)
def test_prefill_refuses(decoder, embeds, changes, numbers):
    given = {"embeds": embeds, "is_image": IS_IMAGE, "layer": 2, "ratio": 0.5, **changes}
    with pytest.raises(ValueError, match=numbers):
        prefill_pruned(decoder, given.pop("embeds"), given.pop("is_image"), **given)


@torch.no_grad()
def test_prefill_refuses_a_used_cache(decoder, embeds):
    cache = decoder.new_cache()
    decoder(embeds[:, :5], cache=cache)
    with pytest.raises(ValueError, match="holds 5 tokens, expected 0"):
        prefill_pruned(decoder, embeds, IS_IMAGE, layer=2, ratio=0.5, cache=cache)
