"""The same bits from the same seed: the switches are set and put back, and the other form of the gradient is equal."""

import pytest
import torch
from torch import nn

from vlm_course.pretrained.recipe import build
from vlm_course.repeatable import LookUp, repeatable, with_repeatable_embeddings
from vlm_course.tokenizer import WordTokenizer


def switches():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


def test_inside_torch_keeps_to_ordered_operations_and_outside_it_is_as_before():
    from torch._inductor import config

    before = switches(), config.deterministic
    with pytest.raises(KeyError), repeatable():
        assert switches() == (True, False, False) and config.deterministic
        raise KeyError
    assert (switches(), config.deterministic) == before


@pytest.mark.parametrize("shape", [(7,), (2, 5), (3, 1, 4)])
def test_look_up_gives_the_rows_and_the_gradient_of_an_embedding(shape):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = LookUp(11, 6), nn.Embedding(11, 6)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 4, shape, generator=generator)  # few words, each many times
    weights = torch.randn(*shape, 6, generator=generator)
    for module in (ours, theirs):
        (module(ids) * weights).sum().backward()
    assert torch.equal(ours(ids), theirs(ids))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert not ours.weight.grad[4:].any()


def test_a_model_keeps_its_parameters_and_their_names():
    torch.manual_seed(0)
    contrastive, llava = build(WordTokenizer.small())
    for model in (contrastive, llava):
        before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        assert with_repeatable_embeddings(model) is model
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
        assert not any(type(module) is nn.Embedding for module in model.modules())
        assert any(type(module) is LookUp for module in model.modules())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="padding_idx 0"):
        with_repeatable_embeddings(nn.ModuleDict({"words": nn.Embedding(4, 2, padding_idx=0)}))
    with pytest.raises(ValueError, match="ids"):
        LookUp(4, 2)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="rows"):
        LookUp(0, 2)
