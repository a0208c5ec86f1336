"""attend and the masks: equal to the written-out softmax, aligned with a cache, silent where nothing may be seen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_course.attention import attend, attention_weights, block_mask, causal_mask, padding_mask, prefix_mask


def qkv(batch=2, heads=4, kv_heads=4, queries=5, keys=5, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, h, t, dim, generator=generator, dtype=torch.float64) for h, t in sizes]


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    kv_heads=st.integers(1, 3),
    queries=st.integers(1, 6),
    past=st.integers(0, 5),
    is_causal=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attend_equals_the_written_out_softmax(groups, kv_heads, queries, past, is_causal, masked, seed):
    q, k, v = qkv(2, groups * kv_heads, kv_heads, queries, past + queries, seed=seed)
    mask = torch.rand(2, 1, queries, past + queries, generator=torch.Generator().manual_seed(seed)) < 0.6
    allowed = mask if masked else torch.ones_like(mask)
    if is_causal:
        allowed = allowed & causal_mask(queries, offset=past)
    k_all, v_all = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    expected = attention_weights(q, k_all, mask=allowed) @ v_all
    got = attend(q, k, v, mask=mask if masked else None, is_causal=is_causal)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_a_cached_query_sees_every_key():
    """torch lines up the first query with the first key; then one new token would see key 0 alone."""
    q, k, v = qkv(queries=1, keys=6)
    torch.testing.assert_close(attend(q, k, v, is_causal=True), attend(q, k, v))
    first_key_only = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (attend(q, k, v, is_causal=True) - first_key_only).abs().max() > 0.1


def test_a_fully_masked_query_gets_zeros():
    q, k, v = qkv()
    mask = causal_mask(5).clone()
    mask[2] = False
    assert torch.equal(attend(q, k, v, mask=mask)[:, :, 2], torch.zeros(2, 4, 8, dtype=torch.float64))
    assert torch.isfinite(attend(q, k, v, mask=mask)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: {"mask": torch.ones(5, 5)}, "mask is torch.float32, expected torch.bool"),
        (lambda q, k, v: {"mask": causal_mask(4)}, "4 keys but there are 5"),
        (lambda q, k, v: {"mask": causal_mask(3, offset=2)}, "3 queries but there are 5"),
        (lambda q, k, v: {"k": k[:, :3], "v": v[:, :3]}, "4 query heads cannot share 3 key heads"),
        (lambda q, k, v: {"v": v[:, :, 1:]}, "as many keys as values"),
        (lambda q, k, v: {"k": k[..., :4], "v": v}, "queries have head_dim 8, keys 4"),
        (lambda q, k, v: {"k": k[:, :, :2], "v": v[:, :, :2], "is_causal": True}, "5 queries but only 2 keys"),
    ],
)
def test_attend_names_what_does_not_fit(change, message):
    q, k, v = qkv()
    arguments = {"q": q, "k": k, "v": v} | change(q, k, v)
    with pytest.raises(ValueError, match=message):
        attend(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@given(length=st.integers(0, 6), offset=st.integers(0, 4))
def test_causal_mask_is_aligned_at_the_bottom_right(length, offset):
    mask = causal_mask(length, offset=offset)
    assert mask.shape == (length, offset + length) and mask.dtype == torch.bool
    assert mask.tolist() == [[key <= offset + query for key in range(offset + length)] for query in range(length)]


def test_prefix_and_block_masks():
    prefix = prefix_mask(torch.tensor([0, 2]), 4)
    assert torch.equal(prefix[0, 0], causal_mask(4))
    assert prefix[1, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    documents = torch.tensor([[0, 0, 1, -1]])
    assert block_mask(documents)[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert block_mask(documents, causal=False)[0, 0, 0].tolist() == [True, True, False, False]


def test_padding_mask_hides_keys_for_every_query():
    mask = padding_mask(torch.tensor([[0, 1, 1]]))
    assert mask.shape == (1, 1, 1, 3) and mask.flatten().tolist() == [False, True, True]
    with pytest.raises(ValueError, match=r"1 dimensions \[3\], expected 2 \[batch, keys\]"):
        padding_mask(torch.ones(3))


def test_packed_documents_equal_documents_alone():
    lengths = [3, 1, 4]
    q, k, v = qkv(batch=1, queries=8, keys=8)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = attend(q, k, v, mask=block_mask(documents))
    alone = [
        attend(*parts, is_causal=True) for parts in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=2), atol=1e-12, rtol=0)
