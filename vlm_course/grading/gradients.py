"""A driver for what is learned through: an answer with the right value that passes no gradient back is wrong."""

import torch

from vlm_course.grading.answers import Failure

CUT = "The result is cut off from its input (no_grad, detach or .item()): nothing could be learned from it."
PART = "The result is cut off from argument {} (.item(), float() or detach): that could never be learned."


def kept(answer, *arguments):
    """The answer's result for tensors that ask for a gradient. Failure where it depends on one but passes none back."""
    floats = [isinstance(value, torch.Tensor) and value.is_floating_point() for value in arguments]
    leaves = [
        value.detach().clone().requires_grad_() if is_float else value
        for value, is_float in zip(arguments, floats, strict=True)
    ]

    def ask(values):
        # Copies: an answer may work on them in place.
        return answer(*(v.clone() if is_float else v for v, is_float in zip(values, floats, strict=True)))

    result = ask(leaves)
    if not isinstance(result, torch.Tensor):
        return result
    if not result.requires_grad:
        raise Failure("error", CUT)
    asked = [place for place, is_float in enumerate(floats) if is_float]
    gradients = torch.autograd.grad(
        result.sum(), [leaves[place] for place in asked], allow_unused=True, retain_graph=True
    )
    for place, gradient in zip(asked, gradients, strict=True):
        if gradient is None and _depends(ask, leaves, place, result):
            raise Failure("error", PART.format(place + 1))
    return result


@torch.no_grad()
def _depends(ask, leaves, place: int, before: torch.Tensor) -> bool:
    """Whether the result moves when one argument does: a value clipped by hand has no gradient and needs none."""
    moved = list(leaves)
    moved[place] = leaves[place] * 1.01 + 0.01
    after = ask(moved)
    return after.shape == before.shape and not torch.allclose(after, before)
