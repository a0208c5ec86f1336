"""Action tokens against numpy's own linspace and digitize, and what a round trip may lose."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_course.actions import ActionTokenizer, normalize_actions, unnormalize_actions

TOKENIZER = ActionTokenizer(vocab_size=32000)
numbers = st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=9)


def openvla(actions, vocab_size=32000, bins=256):
    """The published rule, in numpy: ids, and the numbers they decode to."""
    edges = np.linspace(-1, 1, bins)
    digits = np.digitize(np.clip(actions, -1, 1), edges)
    centres = (edges[:-1] + edges[1:]) / 2
    return vocab_size - digits, centres[np.clip(digits - 1, 0, bins - 2)]


@given(numbers)
def test_ids_and_numbers_are_those_of_openvla(values):
    actions = torch.tensor(values)
    ids, decoded = openvla(np.array(values, dtype=np.float32).astype(np.float64))
    assert TOKENIZER.encode(actions).tolist() == ids.tolist()
    torch.testing.assert_close(TOKENIZER.decode(torch.tensor(ids)), torch.tensor(decoded, dtype=torch.float32))


def test_every_edge_belongs_to_the_interval_above_it():
    edges = np.linspace(-1, 1, 256)
    expected, _ = openvla(edges)
    assert TOKENIZER.encode(torch.from_numpy(edges)).tolist() == expected.tolist()
    assert expected.tolist() == list(range(31999, 31743, -1))


def test_published_numbers():
    assert TOKENIZER.encode(torch.tensor([-1.0, 1.0, -7.0, 7.0])).tolist() == [31999, 31744, 31999, 31744]
    assert TOKENIZER.first_id == 31744
    assert len(TOKENIZER.edges) == 256 and len(TOKENIZER.centres) == 255
    last = TOKENIZER.decode(torch.tensor([31744, 31745]))
    assert last[0] == last[1] == pytest.approx(1 - 1 / 255)


def test_round_trip_loses_half_an_interval_at_most():
    actions = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    error = (TOKENIZER.decode(TOKENIZER.encode(actions)).double() - actions).abs().max()
    assert float(error) == pytest.approx(1 / 255, abs=1e-5)  # 0.0039216


@given(st.integers(2, 40), st.floats(-4, 0), st.floats(0.5, 4))
def test_any_bins_and_range_decode_into_their_interval(bins, low, high):
    tokenizer = ActionTokenizer(vocab_size=100, bins=bins, low=low, high=high)
    actions = torch.linspace(low, high, 57, dtype=torch.float64)
    ids = tokenizer.encode(actions)
    assert ids.min() >= tokenizer.first_id and ids.max() == 99
    half = (high - low) / (bins - 1) / 2
    assert ((tokenizer.decode(ids).double() - actions).abs() <= half * (1 + 1e-6) + 1e-6).all()
    assert torch.equal(tokenizer.encode(tokenizer.centres), 99 - torch.arange(bins - 1))


def test_shapes_stay():
    actions = torch.rand(2, 5, 7) * 2 - 1
    assert TOKENIZER.encode(actions).shape == TOKENIZER.decode(TOKENIZER.encode(actions)).shape == (2, 5, 7)


def test_unnormalise_by_hand_and_the_gripper_stays():
    q01, q99 = torch.tensor([-2.0, 10.0, 0.0]), torch.tensor([4.0, 20.0, 0.0])
    mask = torch.tensor([True, True, False])
    real = unnormalize_actions(torch.tensor([[-1.0, 1.0, 1.0], [0.5, 0.0, 0.0]]), q01, q99, mask)
    torch.testing.assert_close(real, torch.tensor([[-2.0, 20.0, 1.0], [2.5, 15.0, 0.0]]))


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.1, 5), st.floats(0, 1)), min_size=1, max_size=7))
def test_normalising_and_back_is_the_identity_within_the_percentiles(axes):
    low, width, part = (torch.tensor(column) for column in zip(*axes, strict=True))
    actions = low + part * width
    normal = normalize_actions(actions, low, low + width)
    assert (normal.abs() <= 1).all()
    torch.testing.assert_close(unnormalize_actions(normal, low, low + width), actions, rtol=0, atol=1e-4)


def test_outliers_are_clipped_but_not_on_a_masked_axis():
    q01, q99 = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    normal = normalize_actions(torch.tensor([9.0, 9.0]), q01, q99, torch.tensor([True, False]))
    assert normal.tolist() == [1.0, 9.0]


Q = (torch.zeros(3), torch.ones(3))
BAD = {
    "NaN": (lambda: TOKENIZER.encode(torch.tensor([0.0, float("nan")])), "1 numbers out of 2"),
    "integers": (lambda: TOKENIZER.encode(torch.tensor([1])), "int64.*floating"),
    "no actions": (lambda: TOKENIZER.encode(torch.zeros(0)), "empty.*at least one"),
    "a word of text": (lambda: TOKENIZER.decode(torch.tensor([31743])), "31743.*31744 to 31999"),
    "outside the vocabulary": (lambda: TOKENIZER.decode(torch.tensor([32000])), "32000.*31999"),
    "float ids": (lambda: TOKENIZER.decode(torch.tensor([1.0])), "float32.*integers"),
    "no ids": (lambda: TOKENIZER.decode(torch.zeros(0, dtype=torch.long)), "at least one"),
    "one bin": (lambda: ActionTokenizer(vocab_size=10, bins=1), "bins is 1.*2"),
    "small vocabulary": (lambda: ActionTokenizer(vocab_size=255), "255.*256"),
    "empty range": (lambda: ActionTokenizer(vocab_size=300, low=1.0, high=1.0), "low is 1.0 and high is 1.0"),
    "width": (lambda: unnormalize_actions(torch.zeros(2, 4), *Q), "3.*expected 4"),
    "scalar": (lambda: unnormalize_actions(torch.tensor(0.5), *Q), "0 dimensions"),
    "mask width": (lambda: unnormalize_actions(torch.zeros(3), *Q, torch.ones(2).bool()), r"\(2,\).*\(3,\)"),
    "mask dtype": (lambda: normalize_actions(torch.zeros(3), *Q, torch.ones(3)), "float32.*bool"),
    "swapped percentiles": (lambda: normalize_actions(torch.zeros(3), Q[1], Q[0]), "q01 = 1.0 and q99 = 0.0"),
    "NaN percentile": (lambda: normalize_actions(torch.zeros(3), Q[0], Q[1] * float("nan")), "q99 has 3"),
    "devices": (lambda: normalize_actions(torch.zeros(3), *Q, torch.ones(3, device="meta").bool()), "cpu.*meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
