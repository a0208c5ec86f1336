"""Input validation, kept apart from the code it guards.

The definitions that a chapter has the learner write stay short because their checks live in a decorator:

>>> @checks(lambda x, factor: require_shape(x, "x", "B N D", D=4))
... def scale(x, factor):
...     return factor * x
"""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from math import inf, isfinite, isqrt
from numbers import Integral, Real
from typing import Any

import torch


def checks(rule: Callable[..., None] | None = None, *, init: Callable[..., None] | None = None) -> Callable:
    """Run `rule` on the arguments before the decorated function, or before the `forward` of the decorated class.

    `rule` takes the same arguments as what it guards and raises ValueError; its result is ignored. `init` guards the
    constructor of a class in the same way, and so runs before any attribute is there.
    """

    def decorate(target: Any) -> Any:
        if not isinstance(target, type):
            return _guarded(target, rule)
        if rule is not None:
            target.forward = _guarded(target.forward, rule)
        if init is not None:
            target.__init__ = _guarded(target.__init__, init)
        return target

    return decorate


def method_checks(**rules: Callable[..., None]) -> Callable:
    """Guard the named methods of the decorated class, each by its own rule: @method_checks(update=..., select=...)."""

    def decorate(target: type) -> type:
        for name, rule in rules.items():
            setattr(target, name, _guarded(getattr(target, name), rule))
        return target

    return decorate


def counts(**least: int) -> Callable:
    """The named arguments of a function, or of a class's constructor, must be whole numbers, at least so large.

    None passes where it is the argument's default. Reads plain Python numbers only, so it costs next to nothing.

    >>> @counts(width=1, offset=0)
    ... def row(width: int, offset: int = 0) -> list[int]:
    ...     return list(range(offset, offset + width))
    """

    def decorate(target: Any) -> Any:
        function = target.__init__ if isinstance(target, type) else target
        parameters = inspect.signature(function).parameters
        if unknown := set(least) - set(parameters):
            raise TypeError(f"{function.__qualname__} has no arguments {sorted(unknown)}")
        places = [(list(parameters).index(name), name, low) for name, low in least.items()]
        optional = {name for name in least if parameters[name].default is None}

        def rule(*args: Any, **kwargs: Any) -> None:
            for place, name, low in places:
                if place < len(args):
                    require_count(args[place], name, low, optional=name in optional)
                elif name in kwargs:
                    require_count(kwargs[name], name, low, optional=name in optional)

        guarded = _guarded(function, rule)
        if isinstance(target, type):
            target.__init__ = guarded
            return target
        return guarded

    return decorate


def checks_on_request(rule: Callable[..., None]) -> Callable:
    """Like `checks`, for a function whose checks read values back from the device: whoever cannot wait calls it with
    `check=False`. The rule is told (`check`), the function is not.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def guarded(*args: Any, check: bool = True, **kwargs: Any) -> Any:
            rule(*args, check=check, **kwargs)
            return function(*args, **kwargs)

        return guarded

    return decorate


def _guarded(function: Callable, rule: Callable[..., None]) -> Callable:
    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        rule(*args, **kwargs)
        return function(*args, **kwargs)

    return guarded


def require_count(value: int, name: str, least: int = 1, *, optional: bool = False) -> None:
    """Raise ValueError unless `value` is a whole number of at least `least` (or None, if that is allowed)."""
    if type(value) is int and value >= least:  # nearly every call, at a tenth of the price of what follows
        return
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt) or value < least:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}")


def require_number(
    value: float, name: str, low: float = -inf, high: float = inf, *, above: float | None = None
) -> None:
    """Raise ValueError unless `value` is finite, from `low` to `high`, both included, and greater than `above`."""
    fine = isinstance(value, Real) and isfinite(value) and low <= value <= high
    if not fine or (above is not None and value <= above):
        start = f"from {low:g}" if above is None else f"above {above:g}"
        span = (f" {start}" if above is not None or isfinite(low) else "") + (f" to {high:g}" if isfinite(high) else "")
        raise ValueError(f"{name} is {value!r}, expected a finite number{span}")


def require_same_device(**tensors: torch.Tensor) -> None:
    """Raise ValueError, naming both devices, unless all tensors lie on one. Compares labels: no GPU is waited for."""
    (first, device), *others = ((name, tensor.device) for name, tensor in tensors.items())
    for name, other in others:
        if other != device:
            raise ValueError(f"{first} is on {device}, but {name} is on {other}: move both to one device")


def require_shape(
    value: torch.Tensor,
    name: str,
    axes: str,
    *,
    hint: str = "",
    floating: bool | None = True,
    empty: bool = False,
    **sizes: int,
) -> None:
    """Raise ValueError unless `value` has the named axes ("B N D"), the given sizes (D=1024) and a fitting dtype.

    `floating=True` asks for a floating-point tensor, False for an integer one, None for neither. `empty=True` lets
    axes of size 0 pass.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, expected a tensor [{', '.join(axes.split())}]")
    names = axes.split()
    shape = tuple(value.shape)
    cause = f"; {hint}" if hint else ""
    if len(shape) != len(names):
        raise ValueError(f"{name} has {len(shape)} dimensions {list(shape)}, expected {len(names)} [{', '.join(names)}]"
                         f"{cause}")  # fmt: skip
    for axis, size in zip(names, shape, strict=True):
        if axis in sizes and size != sizes[axis]:
            raise ValueError(f"{name} has {axis} = {size} in its shape {list(shape)}, expected {sizes[axis]}{cause}")
        if size == 0 and not empty:
            raise ValueError(f"{name} has {axis} = 0 in its shape {list(shape)}, expected at least 1")
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


def readable(tensor: torch.Tensor) -> bool:
    """Whether a check may look at the numbers of a tensor: not on the meta device, which holds none, nor while torch
    compiles a graph, which such a look would break."""
    return not (tensor.is_meta or torch.compiler.is_compiling())


def require_finite(value: torch.Tensor, name: str) -> None:
    """Raise ValueError when a tensor holds NaN or infinity. Waits for the tensor's device."""
    if readable(value) and not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise ValueError(f"{name} has {bad} of {value.numel()} numbers that are NaN or infinite, expected 0")


def takes(
    axes: str,
    weight: Callable[[Any], torch.Tensor],
    *,
    width: Callable[[Any], int] | None = None,
    at: int = -1,
    name: str | None = None,
    hint: str = "",
) -> Callable[..., None]:
    """A rule for a module's method whose first argument is a floating-point tensor with the given axes.

    Args:
        axes: such as "B T D".
        weight: a parameter of the module; the tensor must lie on its device.
        width: the size that axis `at` must have, by default the last axis of `weight`.
        name: of the argument, by default what the guarded method calls it ("x" if the rule stands alone).

    What is right costs a few comparisons of Python numbers; only what is wrong is looked at closely.
    """
    names = axes.split()
    rank, axis = len(names), names[at]

    def rule(self: Any, *args: Any, **kwargs: Any) -> None:
        x = args[0] if args else kwargs[label] if label in kwargs else next(iter(kwargs.values()))
        w = weight(self)
        size = w.shape[-1] if width is None else width(self)
        if isinstance(x, torch.Tensor) and x.dim() == rank and x.shape[at] == size and x.device == w.device:
            if x.is_floating_point() and 0 not in x.shape:
                return
        require_shape(x, label, axes, hint=hint, **{axis: size})
        require_same_device(**{label: x, "the module": w})

    label = name or "x"
    return rule


def require_grid(grid: Any, name: str) -> None:
    """Raise ValueError unless `grid` is (rows, columns), two whole numbers of at least 1."""
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise ValueError(f"{name} is {grid!r}, expected two whole numbers: (rows, columns)")
    if any(isinstance(side, bool) or not isinstance(side, Integral) or side < 1 for side in grid):
        raise ValueError(f"{name} is {tuple(grid)}, expected two whole numbers of at least 1: (rows, columns)")


def require_one_of(value: Any, name: str, known: Any) -> None:
    """Raise ValueError, listing what is known, unless `value` is among it."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
