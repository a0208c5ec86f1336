"""Every mask against the plainest loop over rows, queries and keys, and what each of them refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_course.attention import (
    attend,
    attention_weights,
    block_mask,
    causal_mask,
    media_attention_mask,
    padding_mask,
    prefix_mask,
    queries_mask,
)
from vlm_course.fusion import media_mask, packed_media_mask

IMAGE, EOS, WORD = 9, 2, 7


@given(st.lists(st.integers(0, 7), min_size=1, max_size=3), st.integers(1, 6))
def test_prefix(lengths, length):
    mask = prefix_mask(torch.tensor(lengths), length)
    assert mask.shape == (len(lengths), 1, length, length)
    for row, prefix in enumerate(lengths):
        for query in range(length):
            for key in range(length):
                assert bool(mask[row, 0, query, key]) == (key <= query or key < prefix)


@given(st.lists(st.lists(st.integers(-2, 2), min_size=4, max_size=4), min_size=1, max_size=3), st.booleans())
def test_block(documents, causal):
    mask = block_mask(torch.tensor(documents), causal=causal)
    assert mask.shape == (len(documents), 1, 4, 4)
    for row, numbers in enumerate(documents):
        for query, own in enumerate(numbers):
            for key, other in enumerate(numbers):
                expected = own == other and own >= 0 and (key <= query or not causal)
                assert bool(mask[row, 0, query, key]) == expected
    if causal:
        assert torch.equal(mask, block_mask(torch.tensor(documents)))


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=2, max_size=3),
    st.lists(st.lists(st.integers(-1, 1), min_size=5, max_size=5), min_size=3, max_size=3),
)
def test_some_rows_of_a_mask(queries, documents):
    """The places of the queries may be in any order, and twice the same."""
    places, numbers = torch.tensor(queries), torch.tensor(documents)[: len(queries)]
    causal, packed = queries_mask(places, 5), queries_mask(places, 5, documents=numbers)
    assert causal.shape == packed.shape == (len(queries), 1, 3, 5)
    for row, chosen in enumerate(queries):
        assert torch.equal(causal[row, 0], causal_mask(5)[chosen])
        assert torch.equal(packed[row, 0], block_mask(numbers)[row, 0][chosen])


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=3))
def test_padding(rows):
    mask = padding_mask(torch.tensor(rows).long())
    assert mask.shape == (len(rows), 1, 1, 3) and mask.dtype == torch.bool
    assert mask[:, 0, 0].tolist() == rows


@given(st.lists(st.sampled_from([IMAGE, EOS, WORD]), min_size=1, max_size=10), st.integers(0, 2), st.integers(1, 3))
def test_media(row, spare, tokens_per_image):
    """Who reads which image: the last one before the token, in packed rows only since the document began.

    The <eos> itself still belongs to its document.
    """
    ids, images = torch.tensor([row]), row.count(IMAGE) + spare
    if images == 0:
        return
    plain, packed = media_mask(ids, IMAGE, images), packed_media_mask(ids, IMAGE, images, EOS)
    assert plain.shape == packed.shape == (1, len(row), images)
    last, last_in_document = None, None
    for place, token in enumerate(row):
        if token == IMAGE:
            last = last_in_document = row[: place + 1].count(IMAGE) - 1
        assert plain[0, place].tolist() == [image == last for image in range(images)]
        assert packed[0, place].tolist() == [image == last_in_document for image in range(images)]
        if token == EOS:
            last_in_document = None
    tokens = media_attention_mask(plain, tokens_per_image)
    assert tokens.shape == (1, 1, len(row), images * tokens_per_image)
    for image in range(images):
        for token in range(tokens_per_image):
            assert torch.equal(tokens[0, 0, :, image * tokens_per_image + token], plain[0, :, image])


def test_one_query_alone_sees_what_its_mask_allows():
    """A single cached query needs no causal mask, yet one that is given still holds."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, tokens, 4, generator=draw, dtype=torch.float64) for tokens in (1, 5, 5))
    mask = torch.tensor([True, False, True, True, False])[None]
    expected = attention_weights(q, k, mask=mask) @ v
    for is_causal in (False, True):
        torch.testing.assert_close(attend(q, k, v, mask=mask, is_causal=is_causal), expected)
    assert attention_weights(q, k, mask=mask)[..., 1].max() == 0


Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
REFUSED = {
    "negative length": (lambda: causal_mask(-1), "length is -1"),
    "negative offset": (lambda: causal_mask(2, offset=-1), "offset is -1"),
    "padding of a row": (lambda: padding_mask(torch.ones(3)), r"attention_mask .*3.*expected.*\[batch, keys\]"),
    "prefix lengths": (lambda: prefix_mask(torch.ones(1, 2).long(), 3), r"lengths .*1, 2.*expected.*\[batch\]"),
    "prefix of nothing": (lambda: prefix_mask(torch.tensor([0]), 0), "length is 0"),
    "queries of a row": (lambda: queries_mask(torch.zeros(3).long(), 5), r"queries .*3.*expected.*\[batch, queries\]"),
    "queries between places": (lambda: queries_mask(torch.zeros(1, 3), 5), "queries is torch.float32.*integer"),
    "no keys": (lambda: queries_mask(torch.zeros(1, 3).long(), 0), "length is 0"),
    "documents of other rows": (
        lambda: queries_mask(torch.zeros(1, 3).long(), 5, documents=torch.zeros(2, 5).long()),
        "documents has batch = 2.*expected 1",
    ),
    "documents of other tokens": (
        lambda: queries_mask(torch.zeros(1, 3).long(), 5, documents=torch.zeros(1, 4).long()),
        "documents has tokens = 4.*expected 5",
    ),
    "documents that are no numbers": (
        lambda: queries_mask(torch.zeros(1, 3).long(), 5, documents=torch.zeros(1, 5)),
        "documents is torch.float32.*integer",
    ),
    "documents of a row": (lambda: block_mask(torch.zeros(3).long()), r"documents .*3.*expected.*\[batch, tokens\]"),
    "media of a row": (lambda: media_attention_mask(torch.ones(3, 2), 4), r"media .*3, 2.*expected.*\[batch, tokens"),
    "three axes": (lambda: attend(Q[0], K[0], K[0]), "as many keys as values"),
    "keys without heads": (lambda: attend(Q, K[0], K[0]), "as many keys as values"),
    "another batch": (lambda: attend(Q[:1], K, K), "same batch"),
    "no query": (lambda: attend(Q[:, :, :0], K, K), "no axis of size 0"),
    "no key": (lambda: attend(Q, K[:, :, :0], K[:, :, :0]), "no axis of size 0"),
    "values elsewhere": (lambda: attend(Q, K, K.to("meta")), "v on meta"),
    "mask elsewhere": (lambda: attend(Q, K, K, mask=torch.ones(3, 5).bool().to("meta")), "mask is on meta"),
    "mask of one axis": (lambda: attend(Q, K, K, mask=torch.ones(5).bool()), "mask has 1 dim.*2 to 4"),
    "mask of five axes": (lambda: attend(Q, K, K, mask=torch.ones(1, 1, 1, 3, 5).bool()), "mask has 5 dim.*2 to 4"),
    "mask of other heads": (lambda: attend(Q, K, K, mask=torch.ones(1, 3, 3, 5).bool()), "3 heads but there are 4"),
    "mask of other rows": (lambda: attend(Q, K, K, mask=torch.ones(3, 1, 3, 5).bool()), "3 rows but there are 2"),
    "expanded images": (lambda: media_mask(torch.tensor([[IMAGE, IMAGE]]), IMAGE, 1), "2 image tokens but n_im"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "mask", [torch.ones(3, 5), torch.ones(1, 3, 5), torch.ones(2, 4, 1, 5), torch.ones(1, 1, 3, 1)]
)
def test_masks_that_broadcast_are_taken(mask):
    assert attend(Q, K, K, mask=mask.bool()).shape == Q.shape


def test_as_many_images_as_were_given_are_enough():
    assert media_mask(torch.tensor([[IMAGE, WORD]]), IMAGE, 1).all()
