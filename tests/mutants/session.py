"""One pytest session in which the tests are collected once, and every run is a fork of it.

A fork starts with torch, transformers, the package and all tests in memory, so a mutant costs what its tests cost. The
change is made in the fork: the code of the changed function takes the place of the function's own. Forks hang where a
thread pool was alive before them, so arithmetic has one thread here.
"""

import ast
import gc
import inspect
import json
import os
import resource
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import spots

PASSED, FAILED, BROKEN = 0, 1, 3
SPARE = 6 << 30  # bytes that a mutant may take on top of what the session has: a wrong size must not fill the machine


class Session:
    """A pytest plugin: collects, then hands the items to `work` instead of running them."""

    def __init__(self, work: Callable[["Session"], None]):
        self.work, self.items, self.error = work, [], None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        if session.testsfailed:
            raise session.Interrupted(f"{session.testsfailed} files could not be collected")
        self.items = list(session.items)
        self.work(self)
        return True


def collect(folders: list[str], work: Callable[[Session], None]) -> int:
    """Collects the tests in the folders and calls `work`; returns pytest's exit code."""
    options = ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:timeout"]
    return int(pytest.main([*options, "-m", "not serial", *folders], plugins=[Session(work)]))


def failure(item: pytest.Item, following: pytest.Item | None) -> str | None:
    """Runs one test; what its failure says, None when it passed."""
    from _pytest.runner import runtestprotocol

    for report in runtestprotocol(item, nextitem=following, log=False):
        if report.failed:
            return str(report.longrepr)[-2000:]
    return None


def reach(items: list[pytest.Item], files: dict[str, str], answer: Path) -> None:
    """Runs all tests as they are. Writes, for each, its processor time and the lines of `files` that it runs."""
    lines: dict[str, set[int]] = {}

    def trace(frame, event, _):
        module = files.get(frame.f_code.co_filename)
        if module is None:
            return None
        seen = lines.setdefault(module, set())
        seen.add(frame.f_code.co_firstlineno)

        def local(frame, event, _):
            seen.add(frame.f_lineno)
            return local

        return local

    found = {}
    for item in items:
        lines.clear()
        sys.settrace(trace)
        began = time.process_time()
        try:
            broken = failure(item, None)
        finally:
            sys.settrace(None)
        seconds = time.process_time() - began
        found[item.nodeid] = {"seconds": seconds, "lines": {key: sorted(value) for key, value in lines.items()}}
        if broken:
            found[item.nodeid] = {"broken": broken}
    answer.write_text(json.dumps(found))


class Functions:
    """The functions of a module that are in memory, by their code, and how to change one."""

    def __init__(self, modules: dict[str, str]):
        self.modules, self.living, self.guards = modules, {}, []
        for function in gc.get_objects():
            if type(function) is types.FunctionType:
                self.living.setdefault(self._key(function.__code__), []).append(function)
                if function.__code__.co_qualname == "_guarded.<locals>.guarded":
                    self.guards.append(function)
        gc.collect()
        gc.freeze()  # the forks share what stands here

    @staticmethod
    def _key(code: types.CodeType) -> tuple:
        return code.co_filename, code.co_qualname, tuple(code.co_positions())

    def _codes(self, code: types.CodeType) -> Iterator[types.CodeType]:
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                yield inner
                if not inner.co_flags & 0x1:  # the body of a class
                    yield from self._codes(inner)

    def change(self, mutant: spots.Mutant) -> int:
        """Makes the change in this process; how many functions it changed."""
        if mutant.edit[0] == "bound":
            return self._change_bound(mutant)
        file, text = self.modules[mutant.module]
        old = list(self._codes(compile(ast.parse(text), file, "exec")))
        if mutant.default is not None:
            place, _ = mutant.default
            expression = compile(spots.changed_default(text, mutant), file, "eval")
            value = eval(expression, vars(sys.modules[f"vlm_course.{mutant.module}"]))
            named = [code for code in old if code.co_qualname == mutant.function]
            living = [function for code in named for function in self.living.get(self._key(code), [])]
            for function in living:
                if isinstance(place, str):
                    function.__kwdefaults__[place] = value
                else:
                    function.__defaults__ = (*function.__defaults__[:place], value, *function.__defaults__[place + 1 :])
            return len(living)
        changed = 0
        new = self._codes(compile(spots.changed_tree(text, mutant), file, "exec"))
        for before, after in zip(old, new, strict=True):
            if before != after:
                for function in self.living.get(self._key(before), []):
                    function.__code__ = after
                    changed += 1
        return changed

    def _change_bound(self, mutant: spots.Mutant) -> int:
        name, low = mutant.edit[1]
        changed = 0
        for guard in self.guards:
            rule = inspect.getclosurevars(guard).nonlocals["rule"]
            places = getattr(rule, "__closure__", None) and inspect.getclosurevars(rule).nonlocals.get("places")
            mine = guard.__qualname__ in (mutant.function, f"{mutant.function}.__init__")
            if places and mine and guard.__module__ == f"vlm_course.{mutant.module}":
                for number, (place, argument, _) in enumerate(places):
                    if argument == name:
                        places[number] = (place, argument, low)
                        changed += 1
        return changed


def fork(work: Callable[[], int], *, seconds: float = 0, quiet: bool = True) -> int:
    """Forks a process that calls `work` and ends with what it returns; `seconds` of processor time at most."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = BROKEN
    try:
        if quiet:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
        if seconds:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + SPARE, size + SPARE))
        code = work()
    finally:
        os._exit(int(code))


def outcome(status: int) -> str:
    """What a child's end says."""
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "killed"
    return {PASSED: "survived", FAILED: "killed"}.get(os.WEXITSTATUS(status), "broken")
