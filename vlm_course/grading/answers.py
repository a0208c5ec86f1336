"""The answer's side of a check: build it, load its parameters, call it; whatever goes wrong becomes a sentence."""

import contextlib
import importlib
import inspect
import linecache
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from vlm_course.grading.compare import Opaque, plain
from vlm_course.grading.exercise import Shape, Tensors, Value

_PACKAGE = str(Path(__file__).resolve().parent.parent) + os.sep
_LIBRARIES = tuple(
    {os.path.join(path, "") for path in (*sysconfig.get_paths().values(), *site.getsitepackages()) if path}
    - {os.path.join(sys.prefix, ""), os.path.join(sys.base_prefix, "")}
)


class Failure(Exception):
    """The answer gave no result. `kind` is not_attempted, forbidden, fatal (it cannot go on) or error."""

    def __init__(self, kind: str, says: str):
        super().__init__(says)
        self.kind = kind
        self.says = says


class Answer(Protocol):
    """What a check needs from an answer, in this process or in another."""

    def build(self, construct: dict, positional: bool, device: str = "cpu") -> list[tuple[str, Shape]]:
        """Construct the module; names and shapes of its parameters, in order. On "meta" it has no numbers."""

    def load(self, values: Tensors) -> None:
        """Set the parameters, by the answer's own names; others keep what the answer gave them."""

    def call(self, arguments: tuple[Value, ...]) -> Value | Opaque:
        """Call the module that was built, or the function."""


def _owner(filename: str) -> str:
    if filename.startswith(_PACKAGE):
        return "package"
    return "library" if filename.startswith(_LIBRARIES) or filename.startswith("<frozen") else "learner"


def stopped(error: BaseException) -> Failure:
    """The failure for an exception that an answer raised, with the learner's own line where there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    # A stub raises in its own body; torch raises the same class for an operation that a dtype lacks.
    if isinstance(error, NotImplementedError) and frames and _owner(frames[-1].filename) != "library":
        source = linecache.getline(frames[-1].filename, frames[-1].lineno or 0)
        if not source or "NotImplementedError" in source:
            return Failure("not_attempted", "Not attempted yet.")
    if isinstance(error, SystemExit):
        return Failure("error", "Your code calls sys.exit(): an answer returns its result and goes on.")
    own = [frame for frame in frames if _owner(frame.filename) == "learner"]
    where = f" (line {own[-1].lineno}" + (f": {own[-1].line}" if own[-1].line else "") + ")" if own else ""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return Failure("error", f"It needs more memory than this check allows{where}.")
    message = next((line for line in str(error).splitlines() if line.strip()), "")
    message = f": {message[:200]}".rstrip(".") if message else ""
    return Failure("error", f"It stops with {type(error).__name__}{message}{where}.")


def _is_twin(candidate, twin: str) -> bool:
    module, name = twin.split(":")
    return getattr(candidate, "__module__", None) == module and getattr(candidate, "__qualname__", "") == name


def _imported(place: str) -> Callable:
    """The definition at "module:name"."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _copy(value: Value, device: str) -> Value:
    """An argument of the answer's own, lists in it too."""
    if isinstance(value, torch.Tensor):
        return value.clone().to(device)
    return type(value)(_copy(item, device) for item in value) if type(value) in (list, tuple) else value


def _untouched(before: Value, after: Value) -> bool:
    """Whether a copied argument is still what it was. On the meta device nothing can tell."""
    if isinstance(before, torch.Tensor):
        return after.device.type == "meta" or (before.shape == after.shape and torch.equal(before, after))
    if type(before) in (list, tuple):
        return len(before) == len(after) and all(map(_untouched, before, after))
    return before is after or not isinstance(before, int | float | str) or before == after


class LocalAnswer:
    """An answer in this process. `off_limits` are definitions of the package that an answer may not lean on; `driver`
    uses the answer where calling it is not enough (see `FunctionInterface`)."""

    def __init__(self, target: Callable, off_limits: tuple[str, ...] = (), driver: str | None = None):
        self._target = target
        self._drive = _imported(driver) if driver else None
        self._module: nn.Module | None = None
        self._device = "cpu"
        self._off_limits = off_limits
        self._files = tuple(
            (os.sep + os.path.join(*module.split(".")) + ".py", name, twin)
            for twin in off_limits
            for module, name in [twin.split(":")]
        )

    def build(self, construct: dict, positional: bool, device: str = "cpu") -> list[tuple[str, Shape]]:
        self._device = device
        with self._guard(), self._place():
            self._refuse_twin(self._target)
            built = self._target(*construct.values()) if positional else self._target(**construct)
            if inspect.isclass(built) or not isinstance(built, nn.Module):
                kind = (
                    "a class, not an object"
                    if inspect.isclass(built)
                    else f"an object of the class {type(built).__name__}"
                )
                raise Failure("error", f"This should make an nn.Module; it makes {kind}.")
            for part in built.modules():
                self._refuse_twin(type(part))
            self._module = built
            return [(name, tuple(value.shape)) for name, value in built.named_parameters()]

    def load(self, values: Tensors) -> None:
        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                if name in values:
                    parameter.copy_(values[name])

    def call(self, arguments: tuple[Value, ...]) -> Value | Opaque:
        target = self._module if self._module is not None else self._target
        fresh = [_copy(value, self._device) for value in arguments]
        with self._guard(), self._place():
            self._refuse_twin(target)
            result = self._drive(target, *fresh) if self._drive else target(*fresh)
            for number, (before, after) in enumerate(zip(arguments, fresh, strict=True), 1):
                if not _untouched(before, after):
                    raise Failure("error", f"It changes its argument number {number}, which others still use: copy it.")
            trainable = self._module is not None and any(p.requires_grad for p in self._module.parameters())
            if trainable and isinstance(result, torch.Tensor) and not result.requires_grad:
                cut = "The result is cut off from the parameters (detach, .data or no_grad): nothing could be trained."
                raise Failure("error", cut)
            return plain(result)

    def _place(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._device == "cpu" else torch.device(self._device)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Exceptions become failures, and so does entering the body of a definition that is off limits."""
        entered: list[str] = []

        def watch(frame, event, _argument):
            if event == "call":
                code = frame.f_code
                for suffix, name, twin in self._files:
                    at_home = code.co_filename.endswith(suffix)
                    if at_home and (code.co_qualname == name or code.co_qualname.startswith(name + ".")):
                        entered.append(twin)

        before = sys.getprofile()
        if self._files:
            sys.setprofile(watch)
        try:
            yield
        except (Failure, KeyboardInterrupt):
            raise
        except BaseException as error:
            if not entered:
                raise stopped(error) from None
        finally:
            if self._files:
                sys.setprofile(before)
        if entered:
            raise self._not_yours(entered[0])

    def _refuse_twin(self, candidate) -> None:
        family = inspect.getmro(candidate) if inspect.isclass(candidate) else (candidate, type(candidate))
        for member in family:
            for twin in self._off_limits:
                if _is_twin(member, twin):
                    raise self._not_yours(twin)

    @staticmethod
    def _not_yours(twin: str) -> Failure:
        place = twin.replace(":", ".")
        return Failure("forbidden", f"This leans on the package's own {place}: write your own to get the points.")
