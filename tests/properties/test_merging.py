"""Token merging against a loop that follows the paper word by word, and what merging must not change."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_course.attention import attend
from vlm_course.merging import (
    Matching,
    bipartite_soft_matching,
    merge_tokens,
    merged_forward,
    proportional_attention,
    token_counts,
    unmerge_tokens,
)
from vlm_course.vit import VisionTransformer, ViTConfig

CLOSE = {"rtol": 0, "atol": 1e-5}


def naive(metric, x, sizes, r, protected):
    """One image, python numbers: returns the groups of token numbers, their averages and their sizes."""
    a = list(range(protected, len(metric), 2))
    b = list(range(protected + 1, len(metric), 2))

    def cosine(i, j):
        dot = sum(p * q for p, q in zip(metric[i], metric[j], strict=True))
        return dot / math.sqrt(sum(p * p for p in metric[i])) / math.sqrt(sum(q * q for q in metric[j]))

    edges = []
    for i in a:
        if b:
            j = max(b, key=lambda j, i=i: cosine(i, j))
            edges.append((cosine(i, j), i, j))
    edges.sort(reverse=True)
    groups = {i: [i] for i in range(len(metric))}
    for _, i, j in edges[: min(r, (len(metric) - protected) // 2)]:
        groups[j] += groups.pop(i)
    groups = [sorted(groups[i]) for i in sorted(groups)]
    weights = [sum(sizes[i] for i in group) for group in groups]
    means = [
        [sum(sizes[i] * x[i][d] for i in group) / weight for d in range(len(x[0]))]
        for group, weight in zip(groups, weights, strict=True)
    ]
    return groups, means, weights


@st.composite
def tokens(draw):
    batch, count = draw(st.integers(1, 3)), draw(st.integers(1, 17))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    metric = torch.randn(batch, count, draw(st.integers(2, 5)), generator=generator, dtype=torch.float64)
    x = torch.randn(batch, count, 3, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 6, (batch, count), generator=generator).double()
    return metric, x, sizes, draw(st.integers(0, 20)), draw(st.integers(0, min(2, count)))


@given(tokens())
def test_equals_the_loop(case):
    metric, x, sizes, r, protected = case
    matching = bipartite_soft_matching(metric, r, protected=protected)
    merged, merged_sizes = merge_tokens(x, sizes, matching)
    for row in range(len(x)):
        groups, means, weights = naive(metric[row].tolist(), x[row].tolist(), sizes[row].tolist(), r, protected)
        for place, group in enumerate(groups):
            assert (matching.assignment[row] == place).nonzero().flatten().tolist() == group
        torch.testing.assert_close(merged[row], torch.tensor(means, dtype=torch.float64))
        assert merged_sizes[row].tolist() == weights


@given(tokens())
def test_nothing_is_lost_and_protected_tokens_stay_bit_for_bit(case):
    metric, x, sizes, r, protected = case
    B, N, _ = x.shape
    matching = bipartite_soft_matching(metric, r, protected=protected)
    merged, merged_sizes = merge_tokens(x, sizes, matching)
    assert merged.shape[1] == matching.tokens == N - min(r, (N - protected) // 2)
    assert torch.equal(merged_sizes.sum(dim=1), sizes.sum(dim=1))
    total = (sizes[..., None] * x).sum(dim=1)
    torch.testing.assert_close((merged_sizes[..., None] * merged).sum(dim=1), total)
    assert torch.equal(merged[:, :protected], x[:, :protected])
    assert torch.equal(merged_sizes[:, :protected], sizes[:, :protected])
    counts = torch.zeros(B, matching.tokens).scatter_add(1, matching.assignment, torch.ones(B, N))
    alone = (counts == 1).gather(1, matching.assignment)  # tokens that nothing was merged with
    assert torch.equal(unmerge_tokens(merged, matching)[alone], x[alone])


def test_equal_tokens_merge_wherever_they_stand():
    metric = torch.eye(7)[None]
    metric[0, 6] = metric[0, 1]  # token 1 lies in A, token 6 in B (CLS is 0)
    matching = bipartite_soft_matching(metric, 1)
    assert matching.assignment.tolist() == [[0, 5, 1, 2, 3, 4, 5]]


def test_similarity_is_the_cosine_not_the_product():
    # Token 1 has the larger product with the long token 2, but points the way of token 4.
    metric = torch.tensor([[[0.0, 1.0], [1.0, 0.1], [50.0, 50.0], [-1.0, 5.0], [0.5, 0.05]]])
    assert bipartite_soft_matching(metric, 1).assignment.tolist() == [[0, 3, 1, 2, 3]]


def test_two_merges_weigh_every_patch_once():
    x = torch.randn(2, 9, 4)
    first = bipartite_soft_matching(torch.randn(2, 9, 4), 3)
    once, sizes = merge_tokens(x, torch.ones(2, 9), first)
    second = bipartite_soft_matching(torch.randn(2, 6, 4), 2)
    twice, sizes = merge_tokens(once, sizes, second)
    both = first.then(second)
    direct, direct_sizes = merge_tokens(x, torch.ones(2, 9), both)
    torch.testing.assert_close(twice, direct)
    assert torch.equal(sizes, direct_sizes)


@given(st.integers(0, 1000), st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_proportional_attention_is_attention_with_every_copy_written_out(seed, copies):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator) for n in (5, len(copies), len(copies)))
    repeats = torch.tensor(copies)
    expected = attend(q, k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2))
    sizes = repeats.expand(2, -1)
    torch.testing.assert_close(proportional_attention(q, k, v, sizes), expected, **CLOSE)
    if len(set(copies)) > 1:
        assert not torch.allclose(attend(q, k, v), expected, **CLOSE)


@pytest.fixture
def tower(redraw):
    return redraw(VisionTransformer(ViTConfig(image_size=(24, 32), patch_size=8, width=16, layers=3, heads=2,
                                              mlp_width=32)))  # fmt: skip


def test_r_zero_is_the_tower(tower):
    pixels = torch.randn(2, 3, 24, 32)
    x, sizes, matching = merged_forward(tower, pixels, 0)
    torch.testing.assert_close(x, tower(pixels), **CLOSE)
    assert (sizes == 1).all() and torch.equal(matching.assignment, torch.arange(13).repeat(2, 1))


def test_tokens_and_sizes_of_a_merged_tower(tower):
    x, sizes, matching = merged_forward(tower, torch.randn(2, 3, 24, 32), 4)
    assert token_counts(13, 4, 3) == [9, 5, 3]
    assert x.shape == (2, 3, 16) and (sizes.sum(dim=1) == 13).all() and (sizes[:, 0] == 1).all()
    counted = torch.zeros(2, 3).scatter_add(1, matching.assignment, torch.ones(2, 13))
    assert torch.equal(counted, sizes)
    assert (matching.assignment[:, 0] == 0).all()


def test_equal_patches_lose_nothing_by_merging(tower):
    # Without positions the patches of a plain image are equal, so merging them is exact, if attention knows the sizes.
    with torch.no_grad():
        tower.positions[1:] = 0
    pixels = torch.randn(2, 3, 1, 1).expand(-1, -1, 24, 32)
    expected = tower(pixels)[:, :2]
    x, sizes, _ = merged_forward(tower, pixels, 3)
    torch.testing.assert_close(x[:, :2], expected, **CLOSE)
    assert sizes.max() > 1


def test_merging_happens_between_attention_and_mlp(tower):
    x = tower.embed(torch.randn(1, 3, 24, 32))
    tower.blocks = tower.blocks[:1]
    block = tower.blocks[0]
    k = block.attention.qkv(block.norm1(x)).view(1, 13, 3, 2, 8)[:, :, 1].transpose(1, 2)
    after = x + block.attention(block.norm1(x))
    merged, sizes = merge_tokens(after, torch.ones(1, 13), bipartite_soft_matching(k.mean(dim=1), 5))
    tower.embed = lambda pixels: x
    torch.testing.assert_close(merged_forward(tower, x, 5)[0], merged + block.mlp(block.norm2(merged)), **CLOSE)
    assert torch.equal(merged_forward(tower, x, 5)[1], sizes)


def test_counts_of_a_published_setting():
    assert token_counts(197, 8, 12)[-1] == 197 - 96  # ViT-B/16 at r = 8
    assert token_counts(5, 100, 3) == [3, 2, 2]


X, ONES = torch.randn(2, 6, 3), torch.ones(2, 6)
FOUND = bipartite_soft_matching(X, 2)
HEADS = torch.randn(2, 3, 6, 4)
BAD = {
    "rank": (lambda: bipartite_soft_matching(torch.zeros(6, 3), 1), "2 dimensions.*expected 3"),
    "integers": (lambda: bipartite_soft_matching(torch.zeros(2, 6, 3).long(), 1), "int64"),
    "empty batch": (lambda: bipartite_soft_matching(torch.zeros(0, 6, 3), 1), "B = 0.*at least 1"),
    "NaN": (lambda: bipartite_soft_matching(X * float("nan"), 1), "NaN"),
    "negative r": (lambda: bipartite_soft_matching(X, -1), "r is -1"),
    "protected": (lambda: bipartite_soft_matching(X, 1, protected=7), "protected is 7.*6 tokens"),
    "tokens": (lambda: merge_tokens(torch.randn(2, 5, 3), torch.ones(2, 5), FOUND), r"\(2, 5\).*\(2, 6\)"),
    "size count": (lambda: merge_tokens(X, torch.ones(2, 5), FOUND), "N = 5.*expected 6"),
    "size zero": (lambda: merge_tokens(X, ONES * 0, FOUND), "not above 0"),
    "sizes elsewhere": (lambda: merge_tokens(X, ONES.to("meta"), FOUND), "cpu.*meta"),
    "unmerge": (lambda: unmerge_tokens(X, FOUND), "M = 6.*expected 4"),
    "then": (lambda: FOUND.then(FOUND), "6 tokens.*leaves 4"),
    "values": (lambda: proportional_attention(HEADS, HEADS, HEADS[:, :, :5], ONES), "S = 5.*expected 6"),
    "heads": (lambda: proportional_attention(HEADS, HEADS[:, :2], HEADS, ONES), "H = 2.*expected 3"),
    "sizes of attention": (lambda: proportional_attention(HEADS, HEADS, HEADS, ONES[:, :4]), "N = 4.*expected 6"),
    "attention devices": (lambda: proportional_attention(HEADS, HEADS, HEADS, ONES.to("meta")), "cpu.*meta"),
    "counts": (lambda: token_counts(0, 1, 1), "tokens is 0"),
    "counts r": (lambda: token_counts(5, -1, 1), "r is -1"),
    "forward": (lambda: merged_forward(None, X, -2), "r is -2"),
    "matching elsewhere": (lambda: merge_tokens(X, ONES, Matching(FOUND.assignment.to("meta"), 4)), "cpu.*meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
