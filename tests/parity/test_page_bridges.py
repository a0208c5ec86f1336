"""H-Reducer and visual abstractor, of which no library has a copy, against loops over single tokens and heads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_course.abstractor import AbstractorLayer, VisualAbstractor
from vlm_course.catalog import find
from vlm_course.causal_former import CausalFormer
from vlm_course.h_reducer import HReducer
from vlm_course.query_resampler import QueryResampler
from vlm_course.token_resampler import TokenResampler

CLOSE = {"rtol": 0, "atol": 1e-5}


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def reduced_by_loops(bridge, patches):
    """patches [rows, columns, D] -> [tokens, D_llm], four patches at a time, one new feature at a time."""
    merge, D = bridge.merge, patches.shape[-1]
    tokens = []
    for row in patches:
        for start in range(0, len(row), merge):
            window = row[start : start + merge]  # [merge, D]
            if bridge.mix is not None:
                flat = [
                    sum(window[place] @ bridge.mix.weight[channel, :, 0, place] for place in range(merge))
                    + bridge.mix.bias[channel]
                    for channel in range(merge * D)
                ]
                window = gelu(torch.stack(flat)).reshape(merge, D)  # the channel says place first, feature second
            merged = torch.stack(
                [
                    sum(window[place] @ bridge.reduce.weight[channel, :, 0, place] for place in range(merge))
                    + bridge.reduce.bias[channel]
                    for channel in range(D)
                ]
            )
            tokens.append(bridge.project.weight @ merged + bridge.project.bias)
    return torch.stack([*tokens, bridge.end[0, 0]])


@pytest.mark.parametrize(("rows", "columns", "merge"), [(1, 4, 4), (3, 8, 4), (5, 6, 2), (2, 3, 3), (1, 1, 1)])
@pytest.mark.parametrize("mix", [True, False])
@torch.no_grad()
def test_h_reducer_is_the_loop(redraw, rows, columns, merge, mix):
    bridge = redraw(HReducer(5, 7, merge=merge, mix=mix))
    features = torch.randn(2, rows * columns, 5)
    out = bridge(features, grid=(rows, columns))
    for image, tokens in zip(features, out, strict=True):
        torch.testing.assert_close(tokens, reduced_by_loops(bridge, image.reshape(rows, columns, 5)), **CLOSE)


@torch.no_grad()
def test_a_square_needs_no_grid_and_rows_stay_apart(redraw):
    bridge = redraw(HReducer(3, 4))
    features = torch.randn(1, 64, 3)
    out = bridge(features)
    torch.testing.assert_close(out, bridge(features, grid=(8, 8)), rtol=0, atol=0)
    changed = features.clone()
    changed[0, 8 * 5 + 6] += 1  # row 5, column 6: the second token of the row
    moved = (bridge(changed) != out).any(dim=-1)[0].nonzero().flatten().tolist()
    assert moved == [5 * 2 + 1]


def test_h_reducer_has_the_published_tokens_and_size():
    with torch.device("meta"):
        bridge = HReducer(1024, 4096)
        tokens = bridge(torch.zeros(1, find("docowl-1.5")["patches"], 1024)).shape[1]
    assert tokens == find("docowl-1.5")["visual_tokens"] == 257
    count = sum(parameter.numel() for parameter in bridge.parameters())
    assert count + 2 * 1024 == find("docowl-1.5")["bridge_parameters"]  # the released module stores an idle LayerNorm


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), merge=st.integers(1, 4), batch=st.integers(1, 3))
@torch.no_grad()
def test_any_grid_of_whole_windows_gives_a_token_a_window(rows, columns, merge, batch):
    bridge = HReducer(2, 3, merge=merge)
    features = torch.randn(batch, rows * columns * merge, 2)
    out = bridge(features, grid=(rows, columns * merge))
    assert out.shape == (batch, rows * columns + 1, 3)
    torch.testing.assert_close(out[-1:], bridge(features[-1:], grid=(rows, columns * merge)), **CLOSE)
    torch.testing.assert_close(out[:, -1], bridge.end[0].expand(batch, -1), rtol=0, atol=0)


def norm(x, layer):
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + layer.eps) * layer.weight + layer.bias


def silu(x):
    return x / (1 + torch.exp(-x))


def linear(x, layer):
    return layer.weight @ x + layer.bias


def read_by_loops(layer, queries, features):
    """One layer, a query, a head and a key at a time: queries [M, D], features [N, D] -> [M, D]."""
    x = [norm(query, layer.norm_queries) for query in queries]
    context = x + [norm(feature, layer.norm_features) for feature in features]
    d = queries.shape[1] // layer.heads
    out = []
    for query in x:
        q, heads = linear(query, layer.to_q), []
        for head in range(layer.heads):
            part = slice(head * d, (head + 1) * d)
            scores = torch.stack([q[part] @ linear(key, layer.to_k)[part] / math.sqrt(d) for key in context])
            weights = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
            heads.append(sum(w * linear(key, layer.to_v)[part] for w, key in zip(weights, context, strict=True)))
        y = query + linear(torch.cat(heads), layer.to_out)
        inner = norm(y, layer.norm_mlp)
        gated = silu(linear(inner, layer.gate)) * linear(inner, layer.up)
        out.append(y + linear(norm(gated, layer.norm_gated), layer.down))
    return torch.stack(out)


@pytest.mark.parametrize("patches", [1, 6])
@torch.no_grad()
def test_abstractor_layer_is_the_loop(redraw, patches):
    layer = redraw(AbstractorLayer(6, 3, 8), 0.6)
    queries, features = torch.randn(2, 4, 6), torch.randn(2, patches, 6)
    out = layer(queries, features)
    for b in range(2):
        torch.testing.assert_close(out[b], read_by_loops(layer, queries[b], features[b]), **CLOSE)


@torch.no_grad()
def test_small_numbers_tell_the_norms_apart(redraw):
    """An epsilon of 1e-6 or 1e-5 shows only where the variance is as small."""
    layer = redraw(AbstractorLayer(6, 3, 8), 0.6)
    for parameter in (layer.gate.weight, layer.up.weight, layer.gate.bias, layer.up.bias):
        parameter.mul_(0.05)
    queries, features = 1e-3 * torch.randn(1, 4, 6), 1e-3 * torch.randn(1, 5, 6)
    expected = read_by_loops(layer, queries[0], features[0])
    torch.testing.assert_close(layer(queries, features)[0], expected, **CLOSE)
    assert {layer.norm_queries.eps, layer.norm_features.eps, layer.norm_mlp.eps} == {1e-5}
    assert layer.norm_gated.eps == 1e-6


@pytest.mark.parametrize("places", [0, 15])
@torch.no_grad()
def test_the_whole_abstractor_is_its_layers_the_places_a_map_and_an_end(redraw, places):
    bridge = redraw(VisualAbstractor(6, 5, queries=3, layers=2, heads=2, mlp_width=7, places=places), 0.6)
    features = torch.randn(3, 4, 6)
    where = torch.tensor([[11, 11], [0, 0], [0, 1]]) if places else None
    out = bridge(features, where)
    assert out.shape == (3, 4, 5)
    for b in range(3):
        x = bridge.queries
        for layer in bridge.layers:
            x = read_by_loops(layer, x, features[b])
        if places:
            row, col = where[b].tolist()
            x = x + (bridge.positions.rows.weight[row] + bridge.positions.columns.weight[col]) / 2
        expected = torch.stack([*(linear(query, bridge.project) for query in x), bridge.end[0, 0]])
        torch.testing.assert_close(out[b], expected, **CLOSE)


@settings(max_examples=15)
@given(batch=st.integers(1, 3), patches=st.integers(1, 6), queries=st.integers(1, 4))
@torch.no_grad()
def test_the_order_of_the_patches_and_the_rest_of_the_batch_do_not_matter(batch, patches, queries):
    bridge = VisualAbstractor(4, 3, queries=queries, layers=2, heads=2, mlp_width=5)
    features = torch.randn(batch, patches, 4)
    out = bridge(features)
    torch.testing.assert_close(out[:1], bridge(features[:1]), **CLOSE)
    torch.testing.assert_close(out, bridge(features[:, torch.randperm(patches)]), **CLOSE)


def test_the_default_has_the_released_sizes():
    with torch.device("meta"):
        bridge = VisualAbstractor(1024, 4096)
        tokens = bridge(torch.zeros(1, 257, 1024)).shape[1]
    assert tokens == find("docowl")["visual_tokens"] == find("ureader")["visual_tokens"] == 65
    layer = 4 * (1024**2 + 1024) + 2 * (1024 * 4096 + 4096) + (4096 * 1024 + 1024) + 3 * 2 * 1024 + 2 * 4096
    count = sum(parameter.numel() for parameter in bridge.parameters())
    assert count == 6 * layer + 64 * 1024 + (1024 * 4096 + 4096) + 4096


def test_places_are_asked_for_exactly_where_they_are_known():
    plain, placed = (VisualAbstractor(4, 3, queries=2, layers=1, heads=2, mlp_width=5, places=n) for n in (0, 15))
    with pytest.raises(ValueError, match=r"places \[1, 2\].*0 rows"):
        plain(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"no places.*15 rows"):
        placed(torch.zeros(1, 2, 4))


BRIDGES = {
    "abstractor": (
        lambda: VisualAbstractor(6, 4, queries=2, layers=1, heads=2, mlp_width=5, places=15),
        (torch.randn(2, 4, 6), torch.tensor([[11, 11], [0, 1]])),
    ),
    "h_reducer": (lambda: HReducer(3, 4), (torch.randn(1, 16, 3),)),
    "causal_former": (
        lambda: CausalFormer(6, 5, queries=3, dim=8, layers=1, heads=2, mlp_width=4),
        (torch.randn(1, 4, 6),),
    ),
    "query_resampler": (lambda: QueryResampler(3, 8, queries=4, heads=2), (torch.randn(1, 9, 3),)),
    "token_resampler": (lambda: TokenResampler(4, inner=4, heads=2, keep=2), (torch.randn(1, 5, 4),)),
}


@pytest.mark.parametrize("name", BRIDGES)
@torch.no_grad()
def test_it_compiles_without_a_graph_break(redraw, in_one_graph, name):
    make, arguments = BRIDGES[name]
    bridge = redraw(make())
    # One graph a shape: with sizes as symbols, torch 2.11 cannot follow the check that N is a square.
    compiled = in_one_graph(bridge, dynamic=False)
    torch.testing.assert_close(compiled(*arguments), bridge(*arguments), **CLOSE)
