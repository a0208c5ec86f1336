"""Input validation, kept apart from the code it guards.

The definitions that a chapter has the learner write stay short because their checks live in a decorator:

>>> @checks(lambda x, factor: require_shape(x, "x", "B N D", D=4))
... def scale(x, factor):
...     return factor * x
"""

from collections.abc import Callable
from functools import wraps
from math import isqrt
from typing import Any

import torch


def checks(rule: Callable[..., None]) -> Callable:
    """Run `rule` on the arguments before the decorated function, or before the `forward` of the decorated class.

    `rule` takes the same arguments as what it guards and raises ValueError; its result is ignored.
    """

    def decorate(target: Any) -> Any:
        if isinstance(target, type):
            target.forward = _guarded(target.forward, rule)
            return target
        return _guarded(target, rule)

    return decorate


def _guarded(function: Callable, rule: Callable[..., None]) -> Callable:
    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        rule(*args, **kwargs)
        return function(*args, **kwargs)

    return guarded


def require_shape(
    value: torch.Tensor, name: str, axes: str, *, hint: str = "", floating: bool | None = True, **sizes: int
) -> None:
    """Raise ValueError unless `value` has the named axes ("B N D"), the given sizes (D=1024) and a fitting dtype.

    `floating=True` asks for a floating-point tensor, False for an integer one, None for neither.
    """
    names = axes.split()
    shape = tuple(value.shape)
    cause = f"; {hint}" if hint else ""
    if len(shape) != len(names):
        raise ValueError(f"{name} has {len(shape)} dimensions {list(shape)}, expected {len(names)} [{', '.join(names)}]"
                         f"{cause}")  # fmt: skip
    for axis, size in zip(names, shape, strict=True):
        if axis in sizes and size != sizes[axis]:
            raise ValueError(f"{name} has {axis} = {size} in its shape {list(shape)}, expected {sizes[axis]}{cause}")
    if floating is not None and value.is_floating_point() != floating:
        kind = "a floating-point" if floating else "an integer"
        raise ValueError(f"{name} is {value.dtype}, expected {kind} dtype")


def require_divisible(value: int, divisor: int, value_name: str, divisor_name: str, *, hint: str = "") -> None:
    """Raise ValueError, naming both numbers, unless `divisor` divides `value`."""
    if divisor < 1 or value % divisor:
        cause = f"; {hint}" if hint else ""
        raise ValueError(f"{value_name} is {value}, which is no multiple of {divisor_name} = {divisor}{cause}")


def require_square(count: int, name: str, *, hint: str = "") -> int:
    """Side of the square of `count` cells; ValueError when `count` is no square number."""
    side = isqrt(max(count, 0))
    if count < 1 or side * side != count:
        cause = f"; {hint}" if hint else ""
        raise ValueError(f"{name} is {count}, expected a square number such as {max(side, 1) ** 2} or {(side + 1) ** 2}"
                         f"{cause}")  # fmt: skip
    return side
