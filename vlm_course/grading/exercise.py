"""What an exercise is: its interface, its oracle, its cases, and the wrong answers that it must know by name.

Everything that passes between a test and an answer is a tensor, a number, a string, or a tuple, list or dict of them,
so the answer may run in another process than the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Value = torch.Tensor | int | float | str | tuple | list | dict
Shape = tuple[int, ...]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One call of the answer.

    `call` holds the arguments by name, in their order; `construct` those of a module's constructor. With `values` False
    only the shapes are compared (a case at a real model's size, where the oracle's loops would take minutes). `starts`
    names parameters that must start at zero: they are left as the answer made them, and the oracle gets zeros.
    """

    call: dict[str, Value]
    construct: dict[str, Value] = field(default_factory=dict)
    values: bool = True
    starts: tuple[str, ...] = ()


@dataclass(frozen=True)
class FunctionInterface:
    """A function of tensors, numbers and strings. Arguments are passed by position.

    An answer may also need things that cannot travel between processes, such as a model, or be a class that is used in
    several steps. Then `driver` ("module:name") is called in the answer's process, as driver(answer, *arguments): it
    makes those things, uses the answer, and returns tensors and numbers.
    """

    arguments: dict[str, str]
    returns: str
    driver: str | None = None


def as_declared(values: Tensors) -> Tensors:
    """The parameters as the interface declares them."""
    return values


def transposed(values: Tensors) -> Tensors:
    """Every weight matrix as [in, out], for answers that write `x @ weight`."""
    return {name: value.T if value.ndim == 2 and name.endswith("weight") else value for name, value in values.items()}


@dataclass(frozen=True)
class ModuleInterface:
    """A torch module: how it is constructed, which parameters it has, how it is called.

    `parameters(construct)` names every parameter and its shape. The checker draws values for them, loads them into the
    answer (by name where the names agree, else in order among parameters of one shape) and into the oracle. `layouts`
    are other ways to hold the same numbers that are just as right.
    """

    constructor: dict[str, str]
    parameters: Callable[[dict], dict[str, Shape]]
    call: dict[str, str]
    returns: str
    positional: bool = False
    layouts: tuple[Callable[[Tensors], Tensors], ...] = (as_declared, transposed)


Interface = FunctionInterface | ModuleInterface


@dataclass(frozen=True)
class Mistake:
    """A plausible error: the sentence that the learner reads, and the wrong answer itself."""

    says: str
    answer: Callable


@dataclass(frozen=True)
class Exercise:
    """One exercise with everything that proves its check.

    `attribute` is the name the learner defines, `twin` the package's own definition ("module:name") and `forbidden`
    what an answer may not call beside it. `oracle` is the plainest possible loop: for a function it takes the call's
    arguments, for a module (float64 parameters, constructor arguments, *call arguments).
    """

    name: str
    chapter: str
    title: str
    difficulty: str
    minutes: int
    points: int
    attribute: str
    twin: str
    interface: Interface
    oracle: Callable
    cases: Callable[[int], list[Case]]
    mistakes: dict[str, Mistake]
    also_correct: dict[str, Callable]
    forbidden: tuple[str, ...] = ()
    atol: float = 1e-5

    @property
    def driver(self) -> str | None:
        """What uses the answer in its process ("module:name"), where calling it is not enough."""
        return self.interface.driver if isinstance(self.interface, FunctionInterface) else None

    @property
    def off_limits(self) -> tuple[str, ...]:
        """The package's definitions ("module:name") that are no answer."""
        return (self.twin, *self.forbidden)


@dataclass(frozen=True)
class Verdict:
    """The outcome: one sentence, then details. `mistake` is the key of the recognised mistake, if there is one."""

    passed: bool
    says: str
    details: str = ""
    attempted: bool = True
    mistake: str | None = None

    def __str__(self) -> str:
        return f"{self.says}\n{self.details}" if self.details else self.says
