"""A small language for rows of good calls, and the ways in which each of them is spoilt.

A row names a public function, class or method and gives the arguments of a good call. A tensor is given by its axes:

    row("attention.attend", q=F("B H T d"), k=F("B H S d"), v=F("B H S d"))

Sizes are drawn for the letters; a letter that occurs twice, in `fix`, or with a factor ("4r") is bound. From this
follow the bad calls: another rank, an axis without entries, a bound axis that is one longer, one tensor on another
device (the meta device stands for it). Arguments that the signature calls int or float are made negative, zero and NaN.
Each bad call must raise ValueError that names what was given and what was expected. What may pass is listed in `free`,
with the reason. `bad` adds calls that no rule foresees, with the words that the message must hold.
"""

import inspect
import math
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace, UnionType

import torch

PACKAGE = "vlm_course."
AXIS = re.compile(r"(\d*)([A-Za-z]\w*)?$")


@dataclass(frozen=True)
class Tensor:
    """Axes such as "B N D", a kind of number, and, if zeros or noise will not do, a function of the sizes."""

    axes: str
    kind: str = "float"
    make: Callable | None = None

    def draw(self, sizes: SimpleNamespace) -> torch.Tensor:
        shape = [size_of(axis, sizes) for axis in self.axes.split()]
        if self.make is not None:
            value = self.make(sizes)
            assert list(value.shape) == shape, f"the row makes {list(value.shape)}, its axes say {shape}"
            return value
        if self.kind == "float":
            return torch.rand(shape)
        return torch.zeros(shape, dtype=torch.long) if self.kind == "int" else torch.ones(shape, dtype=torch.bool)


def I(axes: str, make: Callable | None = None) -> Tensor:  # noqa: E743
    """An integer tensor."""
    return Tensor(axes, "int", make)


def Bool(axes: str, make: Callable | None = None) -> Tensor:
    """A boolean tensor."""
    return Tensor(axes, "bool", make)


def F(axes: str, make: Callable | None = None) -> Tensor:
    """A floating-point tensor."""
    return Tensor(axes, "float", make)


@dataclass
class Row:
    """See the top of this module. `arguments` may hold functions of the sizes."""

    name: str
    arguments: dict
    fix: dict = field(default_factory=dict)
    free: dict = field(default_factory=dict)
    least: dict = field(default_factory=dict)
    low: dict = field(default_factory=dict)
    bad: list = field(default_factory=list)
    on: Callable | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    @property
    def letters(self) -> list[str]:
        found = {letter for tensor in self.tensors.values() for _, letter in axes_of(tensor) if letter}
        return sorted(found - set(self.fix))

    def target(self, sizes: SimpleNamespace) -> Callable:
        parts = self.name.split(".")
        owner = import_module(PACKAGE + ".".join(parts[: module_depth(parts)]))
        path = parts[module_depth(parts) :]
        if self.on is None:
            for part in path:
                owner = getattr(owner, part)
            return owner
        owner = self.on(sizes)
        return owner if path[-1] == "forward" else getattr(owner, path[-1])


ROWS: dict[str, Row] = {}
NO_ROW: dict[str, str] = {}  # public names that need no row, with the reason


def row(_row: str, /, _on=None, _fix=None, _free=None, _least=None, _low=None, _bad=(), **arguments) -> None:
    """Add a row. Arguments: F, I or Bool of axes, a function of the sizes, or the value itself.

    _on: builds, from the sizes, the object whose method is called; _fix: sizes of letters; _free: what may pass, with
    the reason; _least: smallest value of an int (default 1); _low: smallest size of a letter, 2 where 1 would
    broadcast; _bad: [(changed arguments, words of the message), ...].
    """
    assert _row not in ROWS, _row
    ROWS[_row] = Row(_row, arguments, _fix or {}, _free or {}, _least or {}, _low or {}, list(_bad), _on)


def module_depth(parts: list[str]) -> int:
    return 2 if parts[0] == "grounding" else 1


def axes_of(tensor: Tensor) -> list[tuple[int, str | None]]:
    """("4r", "D", "3") -> (4, "r"), (1, "D"), (3, None)."""
    found = []
    for axis in tensor.axes.split():
        number, letter = AXIS.match(axis).groups()
        found.append((int(number or 1), letter))
    return found


def size_of(axis: str, sizes: SimpleNamespace) -> int:
    number, letter = AXIS.match(axis).groups()
    return int(number or 1) * (getattr(sizes, letter) if letter else 1)


def bound(row_: Row, name: str, place: int) -> bool:
    """Whether the axis is tied to something else in the call."""
    number, letter = axes_of(row_.tensors[name])[place]
    if letter is None or letter in row_.fix or number > 1:
        return True
    return sum(other == letter for tensor in row_.tensors.values() for _, other in axes_of(tensor)) > 1


def arguments_of(row_: Row, sizes: SimpleNamespace) -> dict:
    drawn = {name: tensor.draw(sizes) for name, tensor in row_.tensors.items()}
    for name, value in row_.arguments.items():
        if name not in drawn:
            drawn[name] = value(sizes) if inspect.isfunction(value) else value
    return {name: drawn[name] for name in row_.arguments}


def spoilt_tensors(row_: Row, arguments: dict, *, on_module: bool):
    """(what, changed arguments, numbers that the message must name) for every tensor of the call."""
    for name in row_.tensors:
        x = arguments[name]
        shown = lambda y: (str(list(y.shape)), str(tuple(y.shape)), f"{y.dim()} dimensions")  # noqa: E731
        for y in (x[None], x[0] if x.dim() else None):
            if y is not None:
                yield f"{name}.rank", {name: y}, [shown(y)]
        for place, axis in enumerate(row_.tensors[name].axes.split()):
            y = x.narrow(place, 0, 0)
            yield f"{name}.{axis}=0", {name: y}, [("= 0", " 0 ", *shown(y)[:2], "empty")]
            if bound(row_, name, place):
                y = torch.cat([x, x.narrow(place, 0, 1)], dim=place)
                n = x.shape[place]
                yield f"{name}.{axis}+1", {name: y}, [(str(n + 1), *shown(y)[:2]), NUMBERS]
        if on_module or len(row_.tensors) > 1:
            yield f"{name}.device", {name: x.to("meta")}, [("meta",), ("cpu",)]


NUMBERS = ("expected", "but", "no multiple", "cannot")


def spoilt_numbers(row_: Row, function: Callable):
    """Every argument that the signature calls int or float, with a value out of its range, and NaN."""
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    for name, hint in hints.items():
        kinds = set(typing.get_args(hint)) if isinstance(hint, UnionType) else {hint}
        if name == "return" or not kinds & {int, float}:
            continue
        low = row_.least.get(name, 1 if int in kinds else 0)
        values = [math.nan, math.inf] if int not in kinds else [low - 1, 1.5]
        values += [low - 1] if int not in kinds else []
        for value in values:
            yield f"{name}={value}", {name: value}, [(repr(value), str(value)), ("expected", "but", "cannot", "no ")]
