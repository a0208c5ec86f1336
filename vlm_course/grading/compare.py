"""Comparing a result with the right one, and saying in one sentence how they differ."""

import math

import torch

from vlm_course.grading.exercise import Shape, Value


class Opaque:
    """Stands for a result that is neither a tensor, a number, a string nor a collection of them."""

    def __init__(self, kind: str):
        self.kind = kind


def plain(value) -> Value | Opaque:
    """The value as tensors, numbers, strings and collections of them; anything else becomes `Opaque`."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if type(value).__module__ == "numpy":  # first: numpy's float64 is a float, and no message may carry it
        return plain(torch.as_tensor(value)) if getattr(value, "ndim", 0) else plain(value.item())
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return tuple(plain(item) for item in value)
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): plain(item) for key, item in value.items()}
    return Opaque(type(value).__name__)


def _number(value) -> int | float | None:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.ndim == 0:
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _other_kind(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether the numbers are of another kind, which later code takes otherwise: attention adds a mask of numbers."""
    if want.dtype == torch.bool:
        return got.dtype != torch.bool
    return not want.is_floating_point() and got.is_floating_point()


def agree(got: Value | Opaque, want: Value, atol: float, *, values: bool = True) -> bool:
    """Whether `got` is right: tensors within atol (and 1e-5 of their scale), whole numbers exactly."""
    if isinstance(want, torch.Tensor):
        if not isinstance(got, torch.Tensor) or got.shape != want.shape:
            return False
        if not values:
            return True
        if _other_kind(got, want):
            return False
        want = want.double()
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        return torch.allclose(got.double(), want, atol=atol * scale, rtol=0)
    if isinstance(want, int | float):
        number = _number(got)
        if number is None or (isinstance(number, float) and not math.isfinite(number)):
            return False
        return number == want if isinstance(want, int) else math.isclose(number, want, rel_tol=1e-9)
    if isinstance(want, dict):
        return isinstance(got, dict) and got.keys() == want.keys() and all(agree(got[k], want[k], atol) for k in want)
    if isinstance(want, tuple):
        same_length = isinstance(got, tuple) and len(got) == len(want)
        return same_length and all(agree(g, w, atol) for g, w in zip(got, want, strict=True))
    return type(got) is type(want) and got == want


def show(value: Value | Opaque) -> str:
    """A value in a sentence: numbers with separators, tensors by their shape."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.ndim else show(value.item())
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, tuple):
        return (
            "(" + ", ".join(str(v) if isinstance(v, int) else show(v) for v in value) + ("," * (len(value) == 1)) + ")"
        )
    if isinstance(value, list):
        if value and all(isinstance(item, torch.Tensor) and item.shape == value[0].shape for item in value):
            return f"a list of {len(value)} tensors of shape {tuple(value[0].shape)}"
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, dict):
        return "a dict with the keys " + ", ".join(map(repr, value))
    return "nothing" if value is None else f"an object of the class {value.kind}"


def difference(got: Value | Opaque, want: Value) -> str:
    """One sentence on how a wrong result differs from the right one."""
    if got is None:
        return "Nothing came back: is a return statement missing?"
    if isinstance(want, torch.Tensor):
        if isinstance(got, tuple):
            return f"The result should be one tensor of shape {tuple(want.shape)}; yours is a list or tuple."
        if not isinstance(got, torch.Tensor):
            return f"The result should be a tensor of shape {tuple(want.shape)}; yours is {show(got)}."
        if got.shape != want.shape:
            return f"The result should have the shape {tuple(want.shape)}; yours has {tuple(got.shape)}."
        if _other_kind(got, want):
            kind = "booleans" if want.dtype == torch.bool else "whole numbers"
            return f"The result should hold {kind}, {want.dtype}; yours is {got.dtype}."
        if not torch.isfinite(got).all():
            return "The shape is right, but the result contains NaN or infinity."
        largest = (got.double() - want.double()).abs().max().item()
        coarse = f" (it is {got.dtype}, which rounds)" if got.dtype in (torch.float16, torch.bfloat16) else ""
        return f"The shape is right, the values are not: the largest difference is {largest:.2g}{coarse}."
    if isinstance(want, dict):
        if not isinstance(got, dict):
            return f"The result should be {show(want)}; yours is {show(got)}."
        for key in want:
            if key not in got:
                return f"The result has no entry {key!r}; it should be {show(want)}."
            if not agree(got[key], want[key], 0.0):
                if show(got[key]) == show(want[key]):  # tensors of one shape: what differs are their numbers
                    return f"In the entry {key!r}: {difference(got[key], want[key])}"
                return f"The entry {key!r} should be {show(want[key])}; yours is {show(got[key])}."
        extra = next(key for key in got if key not in want)
        return f"The result has an entry {extra!r} too many; it should be {show(want)}."
    if isinstance(want, tuple) and isinstance(got, tuple) and len(got) == len(want) and _is_long(want):
        place = next(i for i, (g, w) in enumerate(zip(got, want, strict=True)) if not agree(g, w, 0.0))
        return f"Entry {place} of {len(want)}, counted from 0: {difference(got[place], want[place])}"
    if isinstance(want, tuple) and isinstance(got, tuple) and len(got) != len(want):
        return f"The result should have {len(want)} entries; yours has {len(got)}."
    if isinstance(want, tuple) and not isinstance(got, tuple):
        return f"The result should be a list or tuple of {len(want)} entries; yours is {show(got)}."
    if isinstance(want, str) and isinstance(got, str) and len(want) > _SHORT:
        return _strings_differ(got, want)
    if show(got) == show(want):  # they differ behind the digits that are shown
        return f"The answer here is {want!r}; yours is {got!r}."
    return f"The answer here is {show(want)}; yours is {show(got)}."


_SHORT = 20  # characters of a text, and numbers in a row, that are read at a glance


def _is_long(value: tuple) -> bool:
    return len(value) > _SHORT or any(not isinstance(item, int | float) for item in value)


def _strings_differ(got: str, want: str) -> str:
    """Where two texts part, with a little of what stands around that place."""
    place = next((i for i, (g, w) in enumerate(zip(got, want, strict=False)) if g != w), min(len(got), len(want)))
    start = max(0, place - _SHORT // 2)
    right, wrong = (repr(text[start : place + _SHORT]) for text in (want, got))
    return f"From character {place} on the texts differ: {right} is right, yours has {wrong}."


def parameters_differ(got: list[tuple[str, Shape]], want: dict[str, Shape]) -> str:
    """One sentence on a module whose parameters are not those that the interface declares."""
    if not got:
        return (
            "The module has no parameters: layers must be attributes (or in nn.Sequential, nn.ModuleList) to be found."
        )
    count, right = (sum(math.prod(shape) for shape in shapes) for shapes in ([s for _, s in got], want.values()))
    if count != right:
        return f"The module has {count:,} parameters here; it should have {right:,}."
    return f"The number of parameters, {count:,}, is right, but their shapes are not those of the layers described."
