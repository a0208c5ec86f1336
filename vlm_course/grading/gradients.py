"""A driver for losses: an answer with the right value through which nothing can be learned is wrong."""

import torch

from vlm_course.grading.answers import Failure

CUT = "The result is cut off from its input (no_grad, detach or .item()): nothing could be learned from it."


def kept(answer, *arguments):
    """The answer's result for tensors that ask for a gradient. Failure where a right kind of result has lost it."""
    floats = [isinstance(value, torch.Tensor) and value.is_floating_point() for value in arguments]
    # Copies of leaves: an answer may work on them in place.
    asked = [
        value.detach().requires_grad_().clone() if is_float else value
        for value, is_float in zip(arguments, floats, strict=True)
    ]
    result = answer(*asked)
    if isinstance(result, torch.Tensor) and not result.requires_grad:
        raise Failure("error", CUT)
    return result
