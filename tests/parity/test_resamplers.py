"""Qwen-VL's and TextMonkey's bridges: against torch's own attention module, MAE's formula and loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vlm_course.catalog import find
from vlm_course.query_resampler import QueryResampler, sincos_positions
from vlm_course.token_resampler import TokenResampler, distinct_tokens

CLOSE = {"rtol": 0, "atol": 1e-5}


@given(side=st.integers(1, 6), quarter=st.integers(1, 5))
def test_positions_are_the_formula(side, quarter):
    table = sincos_positions(side, 4 * quarter)
    assert table.shape == (side * side, 4 * quarter)
    for row in range(side):
        for col in range(side):
            expected = [wave(place / 10000 ** (i / quarter)) for place in (col, row) for wave in (math.sin, math.cos)
                        for i in range(quarter)]  # fmt: skip
            torch.testing.assert_close(table[row * side + col], torch.tensor(expected), **CLOSE)


def qwens(ours):
    """The same weights in torch's attention module, which the released code calls: queries, keys and values apart."""
    attention = nn.MultiheadAttention(ours.project.in_features, ours.heads, batch_first=True).eval()
    parts = (ours.to_q, ours.to_k, ours.to_v)
    attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    attention.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    attention.out_proj.load_state_dict(ours.to_out.state_dict())
    return attention


@pytest.mark.parametrize(("patches", "queries"), [(9, 9), (16, 4), (1, 4), (4, 1), (36, 9)])
@torch.no_grad()
def test_query_resampler_is_qwen_vls(redraw, patches, queries):
    ours = redraw(QueryResampler(5, 8, queries=queries, heads=2), 0.5)
    ours.positions.copy_(sincos_positions(math.isqrt(queries), 8))
    features = torch.randn(3, patches, 5)
    norm = lambda x, layer: F.layer_norm(x, (8,), layer.weight, layer.bias, 1e-6)  # noqa: E731
    side, old = math.isqrt(patches), math.isqrt(queries)
    table = ours.positions.reshape(1, old, old, 8).permute(0, 3, 1, 2)
    where = F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
    where = where.permute(0, 2, 3, 1).reshape(patches, 8) if side != old else ours.positions
    values = norm(features @ ours.widen.weight.T, ours.norm_keys)
    asked = (norm(ours.queries, ours.norm_queries) + ours.positions).expand(3, -1, -1)
    read, _ = qwens(ours)(asked, values + where, values)
    expected = norm(read, ours.norm) @ ours.project.weight.T
    torch.testing.assert_close(ours(features), expected, **CLOSE)


@torch.no_grad()
def test_where_a_patch_lies_matters_and_its_neighbours_in_the_batch_do_not(redraw):
    ours = redraw(QueryResampler(5, 8, queries=4, heads=2), 0.5)
    ours.positions.copy_(sincos_positions(2, 8))
    features = torch.randn(2, 9, 5)
    out = ours(features)
    assert (ours(features.flip(1)) - out).abs().max() > 1e-3
    torch.testing.assert_close(ours(features[1:]), out[1:], **CLOSE)


def test_query_resampler_has_the_published_size_and_tokens():
    model = find("qwen-vl")
    with torch.device("meta"):
        ours = QueryResampler(1664, 4096)
        tokens = ours(torch.zeros(1, model["patches"], 1664)).shape[1]
    assert tokens == model["visual_tokens"] == 256
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == model["bridge_parameters"] and not ours.positions.requires_grad
    read = [ours.widen, ours.to_q, ours.to_k, ours.to_v, ours.to_out]
    attention = sum(parameter.numel() for part in read for parameter in part.parameters())
    assert round(attention / 1e9, 2) == 0.07  # with queries, norms and the square map that follows: the paper's 0.08B
    assert 0.07e9 < attention < count < 0.1e9


def kept_by_loops(tokens, keep):
    """tokens [N, D]: for each the largest cosine with a later one, and the places of the `keep` smallest."""
    N = len(tokens)
    cosine = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
    repeated = [max([cosine(tokens[i], tokens[j]) for j in range(i + 1, N)], default=-2) for i in range(N)]
    return sorted(sorted(range(N), key=lambda i: repeated[i])[:keep])


@given(count=st.integers(1, 7), keep=st.integers(1, 7), dim=st.integers(2, 5), seed=st.integers(0, 9))
def test_distinct_tokens_are_those_of_the_loop(count, keep, dim, seed):
    keep = min(keep, count)
    tokens = torch.randn(2, count, dim, generator=torch.Generator().manual_seed(seed))
    assert distinct_tokens(tokens, keep).tolist() == [kept_by_loops(row, keep) for row in tokens]


def test_of_tokens_that_are_alike_the_last_stays():
    a, b, c = torch.eye(3)
    tokens = torch.stack([a, 2 * b, a, c, 5 * a])[None]  # a three times, at lengths that do not matter
    assert distinct_tokens(tokens, 3).tolist() == [[1, 3, 4]]
    assert distinct_tokens(tokens, 1).tolist() == [[4]]  # the last is compared with nothing
    assert distinct_tokens(tokens, 5).tolist() == [[0, 1, 2, 3, 4]]


@torch.no_grad()
def test_token_resampler_is_the_formula(redraw):
    ours = redraw(TokenResampler(6, inner=8, heads=2, keep=3), 0.5)
    tokens = torch.randn(2, 5, 6)
    out = ours(tokens)
    for b in range(2):
        kept = tokens[b, kept_by_loops(tokens[b], 3)]
        norm = lambda x, layer: F.layer_norm(x, (8,), layer.weight, layer.bias, 1e-5)  # noqa: E731
        queries = norm(kept @ ours.down.weight.T, ours.norm_latents)
        context = torch.cat([norm(tokens[b] @ ours.down.weight.T, ours.norm_media), queries])
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            q, k, v = (x @ map_.weight[part].T for x, map_ in
                       ((queries, ours.to_q), (context, ours.to_k), (context, ours.to_v)))  # fmt: skip
            heads.append((q @ k.T / 2).softmax(-1) @ v)
        read = torch.cat(heads, dim=-1) @ ours.to_out.weight.T
        hidden = norm(read, ours.norm) @ ours.fc1.weight.T
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        torch.testing.assert_close(out[b], kept + ours.scale * (hidden @ ours.fc2.weight.T), **CLOSE)


@torch.no_grad()
def test_untrained_it_only_drops():
    tokens = torch.randn(1, 6, 4)
    out = TokenResampler(4, inner=4, heads=2, keep=2)(tokens)
    torch.testing.assert_close(out[0], tokens[0, kept_by_loops(tokens[0], 2)], rtol=0, atol=0)


def test_token_resampler_keeps_textmonkeys_number():
    with torch.device("meta"):
        tokens = TokenResampler(4096)(torch.zeros(1, 4 * 256, 4096)).shape[1]
    assert tokens + 256 == find("textmonkey")["visual_tokens"]
