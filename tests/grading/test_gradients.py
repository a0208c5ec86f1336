"""A loss through which nothing can be learned is wrong, whatever its value."""

import pytest
import torch
import torch.nn.functional as F

from vlm_course.grading.answers import Failure, LocalAnswer

DRIVER = "vlm_course.grading.gradients:kept"
LOGITS = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))


def loss(logits):
    return F.cross_entropy(logits, torch.arange(3))


def in_place(logits):
    return loss(logits.mul_(1))


@pytest.mark.parametrize("answer", [loss, in_place])
def test_a_value_with_a_gradient_comes_back(answer):
    assert torch.equal(LocalAnswer(answer, driver=DRIVER).call((LOGITS,)), loss(LOGITS))


@pytest.mark.parametrize("cut", [torch.no_grad()(loss), lambda logits: loss(logits).detach()])
def test_a_value_without_one_is_told(cut):
    with pytest.raises(Failure) as caught:
        LocalAnswer(cut, driver=DRIVER).call((LOGITS,))
    assert "cut off from its input" in caught.value.says


def test_a_plain_number_is_left_to_the_comparison():
    assert isinstance(LocalAnswer(lambda logits: loss(logits).item(), driver=DRIVER).call((LOGITS,)), float)


def test_one_argument_that_is_cut_off_is_named():
    scale = torch.tensor(0.5)

    def value(logits, scale):
        return loss(logits * scale.item())

    with pytest.raises(Failure) as caught:
        LocalAnswer(value, driver=DRIVER).call((LOGITS, scale))
    assert "cut off from argument 2" in caught.value.says
    tensors = LocalAnswer(lambda logits, scale: loss(logits * scale), driver=DRIVER).call((LOGITS, scale))
    assert torch.equal(tensors, loss(LOGITS * 0.5))


def test_an_argument_that_changes_nothing_needs_no_gradient():
    """Clipped by hand: above the limit the factor is a constant, and its gradient would be 0."""
    clipped = LocalAnswer(lambda logits, scale: loss(logits * min(scale, torch.tensor(2.0))), driver=DRIVER)
    assert torch.equal(clipped.call((LOGITS, torch.tensor(5.0))), loss(2 * LOGITS))
