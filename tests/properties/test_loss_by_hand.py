"""The loss and its divisor, worked out by hand; where its checks must not look: a far device, a compiled graph."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_course.loss import answer_weights, division_factor, instruction_loss, response_loss


def test_instruction_loss_by_hand():
    """Of the probabilities 1/2, 1/4, 1/8 the last two are of the response: (2 ln 2 + 3 ln 2) / 2."""
    log_probs = torch.tensor([0.5, 0.25, 0.125]).log()
    assert instruction_loss(log_probs, torch.tensor([0, 1, 1])).item() == pytest.approx(2.5 * math.log(2))
    assert instruction_loss(log_probs, torch.tensor([True, False, False])).item() == pytest.approx(math.log(2))
    assert instruction_loss(log_probs[:1], torch.tensor([1])).item() == pytest.approx(math.log(2))


@given(length=st.integers(2, 7), data=st.data())
def test_instruction_loss_is_the_response_loss_of_one_sequence(length, data):
    response = data.draw(st.lists(st.booleans(), min_size=length, max_size=length).filter(lambda row: any(row[1:])))
    draw = torch.Generator().manual_seed(length)
    logits, ids = torch.randn(1, length, 5, generator=draw), torch.randint(5, (1, length), generator=draw)
    labels = torch.where(torch.tensor([response]), ids, -100)
    log_probs = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(
        instruction_loss(log_probs, torch.tensor(response[1:])), response_loss(logits, labels), atol=1e-6, rtol=1e-6
    )


def test_instruction_loss_refuses_a_batch():
    with pytest.raises(ValueError, match=r"\(2, 3\).*expected \[N\] and \[N\]"):
        instruction_loss(torch.zeros(2, 3), torch.ones(2, 3))


def test_instruction_loss_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="0 tokens, expected at least 1"):
        instruction_loss(torch.zeros(0), torch.zeros(0))


def test_instruction_loss_looks_at_no_values_on_the_meta_device():
    assert instruction_loss(torch.zeros(3, device="meta"), torch.zeros(3, device="meta")).shape == ()


def test_answer_weights_are_shares_of_the_response_tokens():
    assert answer_weights([1, 3]) == [0.25, 0.75]
    assert answer_weights([1]) == [1.0]
    with pytest.raises(ValueError, match=r"\[2, 0\].*at least 1"):
        answer_weights([2, 0])


def test_the_mean_over_a_batch_is_its_conversations_means_by_those_weights():
    """Rows with 1 and 3 response tokens: the batch's loss is not the mean of the rows' losses."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 6, generator=draw)
    labels = torch.tensor([[-100, -100, -100, 2], [-100, 1, 3, 5]])
    rows = torch.stack([response_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(2)])
    whole = response_loss(logits, labels)
    torch.testing.assert_close(whole, (rows * torch.tensor(answer_weights([1, 3]))).sum())
    assert abs(whole - rows.mean()) > 0.01


@pytest.mark.parametrize(("context", "response", "factor"), [(3, 1, 0.25), (0, 2, 1.0), (576, 24, 0.04)])
def test_division_factor(context, response, factor):
    assert division_factor(context, response) == pytest.approx(factor)


def test_division_factor_is_what_a_wrong_divisor_does_to_the_loss():
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 7, 5, generator=draw)
    labels = torch.tensor([[-100, -100, -100, -100, 1, 0, 4]])
    by_length = response_loss(logits, labels, count=7)
    assert (by_length / response_loss(logits, labels)).item() == pytest.approx(division_factor(4, 3))


def test_a_count_may_be_a_tensor_and_then_a_part_without_response_adds_nothing():
    """A part of an accumulated batch may hold no response token; who passes the count has looked."""
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([[-100, 1, 2], [-100, -100, -100]])
    whole = response_loss(logits, labels)
    for count in (2, torch.tensor(2)):
        parts = [response_loss(logits[i : i + 1], labels[i : i + 1], count=count) for i in range(2)]
        torch.testing.assert_close(sum(parts), whole)
        assert parts[1].item() == 0


def test_the_first_label_is_no_target():
    """Nothing predicts token 0: a row with a label there alone has nothing to learn from."""
    labels = torch.tensor([[3, -100, -100]])
    with pytest.raises(ValueError, match="all 1 x 3 labels are -100"):
        response_loss(torch.zeros(1, 3, 4), labels)


def test_on_the_meta_device_only_shapes_count():
    logits, labels = torch.zeros(2, 3, 4, device="meta"), torch.zeros(2, 3, dtype=torch.long, device="meta")
    assert response_loss(logits, labels).is_meta
    assert response_loss(logits, labels, count=3).shape == ()


def test_a_compiled_graph_has_the_loss_in_one_piece(in_one_graph):
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([[-100, -100, 2, 3]])
    compiled = in_one_graph(response_loss)
    torch.testing.assert_close(compiled(logits, labels), response_loss(logits, labels))
    torch.testing.assert_close(compiled(logits, labels, count=4), response_loss(logits, labels) / 2)
