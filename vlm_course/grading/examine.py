"""Examining an answer: every case, and on failure the name of the mistake if it is a known one."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vlm_course.grading.answers import Answer, Failure, LocalAnswer
from vlm_course.grading.compare import Opaque, agree, difference, parameters_differ, show
from vlm_course.grading.exercise import (
    Case,
    Exercise,
    FunctionInterface,
    ModuleInterface,
    Shape,
    Tensors,
    Value,
    Verdict,
)

_LARGE = 1_000_000  # parameters from which building a module takes long enough to notice
_KEPT = 2_000
_FINAL = ("not_attempted", "forbidden", "fatal")


@dataclass(frozen=True)
class Outcome:
    """What one case brought: a failure, or unexpected parameters, or a result for each way to read the parameters."""

    failure: Failure | None = None
    shapes: list[tuple[str, Shape]] | None = None
    results: list[Value | Opaque] = field(default_factory=list)


def draw(shapes: dict[str, Shape], seed: int) -> Tensors:
    """Parameter values far from the defaults, which hide mistakes: N(0, 0.2), a LayerNorm's scale 1 + N(0, 0.5)."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    is_scale = {name: len(shape) == 1 and name.endswith("weight") for name, shape in shapes.items()}
    return {name: 1 + 0.5 * value if is_scale[name] else 0.2 * value for name, value in values.items()}


def _assign(shapes: list[tuple[str, Shape]], values: Tensors) -> Tensors | None:
    """The drawn values under the answer's own names; None where its shapes are others."""
    if sorted(shape for _, shape in shapes) != sorted(tuple(value.shape) for value in values.values()):
        return None
    if all(name in values and tuple(values[name].shape) == shape for name, shape in shapes):
        return {name: values[name] for name, _ in shapes}
    waiting = defaultdict(list)
    for value in values.values():
        waiting[tuple(value.shape)].append(value)
    return {name: waiting[shape].pop(0) for name, shape in shapes}


def _readings(exercise: Exercise, case: Case, shapes: list[tuple[str, Shape]], drawn: Tensors) -> list[Tensors]:
    """The drawn values under the answer's own names, for every layout that fits, but for those that `starts` names."""
    found = []
    stays = {name: torch.full_like(value, float(name in case.starts)) for name, value in drawn.items()}
    for layout in exercise.interface.layouts:
        values, kept = _assign(shapes, layout(drawn)), _assign(shapes, layout(stays))
        if values is not None:
            found.append({name: value for name, value in values.items() if not kept[name].any()})
    return found


def _call(answer: Answer, case: Case, atol: float) -> Value | Opaque:
    arguments = tuple(case.call.values())
    result = answer.call(arguments)
    if case.values and isinstance(result, torch.Tensor):
        again = answer.call(arguments)
        if not agree(again, result, atol) and torch.isfinite(result).all():
            raise Failure("error", "A second call with the same input gives another result: forward changes something.")
    return result


def _run(exercise: Exercise, answer: Answer, case: Case, drawn: Tensors) -> Outcome:
    try:
        if isinstance(exercise.interface, FunctionInterface):
            return Outcome(results=[_call(answer, case, exercise.atol)])
        if not case.values or sum(value.numel() for value in drawn.values()) > _LARGE:
            sketch = _run_module(exercise, answer, case, drawn, "meta")
            if sketch is not None:
                return sketch
        return _run_module(exercise, answer, case, drawn, "cpu")
    except Failure as failure:
        return Outcome(failure=failure)


def _run_module(exercise: Exercise, answer: Answer, case: Case, drawn: Tensors, device: str) -> Outcome | None:
    """Build, load and call. On the meta device, which is fast at any size: None where only real numbers can tell."""
    sketched = device == "meta"
    try:
        shapes = answer.build(case.construct, exercise.interface.positional, device)
        readings = _readings(exercise, case, shapes, drawn)
        if not readings:
            return _without_parameters(answer, case, shapes)
        if not case.values:
            return Outcome(results=[_call(answer, case, exercise.atol)])
        if sketched:
            return None
        results = []
        for values in readings:
            answer.load(values)
            results.append(_call(answer, case, exercise.atol))
        return Outcome(results=results)
    except Failure as failure:
        if sketched and failure.kind not in _FINAL:
            return None
        raise


def _without_parameters(answer: Answer, case: Case, shapes: list[tuple[str, Shape]]) -> Outcome:
    """The outcome of a module with other parameters: not attempted if its forward still is the stub."""
    try:
        answer.call(tuple(case.call.values()))
    except Failure as failure:
        if failure.kind in _FINAL:
            return Outcome(failure=failure)
    return Outcome(shapes=shapes)


def _same(one: Outcome, other: Outcome, case: Case, atol: float) -> bool:
    if one.failure or other.failure:
        return bool(one.failure and other.failure and _signature(one.failure) == _signature(other.failure))
    if one.shapes is not None or other.shapes is not None:
        both = one.shapes is not None and other.shapes is not None
        return both and sorted(s for _, s in one.shapes) == sorted(s for _, s in other.shapes)
    return any(agree(a, b, atol, values=case.values) for a in one.results for b in other.results)


def _signature(failure: Failure) -> str:
    """The failure's sentence without the line, which differs between two answers with the same mistake."""
    return failure.says.split(" (line ")[0].rstrip(".")


def _describe(case: Case) -> str:
    parts = [f"{name}={show(value)}" for name, value in {**case.construct, **case.call}.items()]
    return f"Case: {', '.join(parts)}." if parts else ""


def _explain(exercise: Exercise, case: Case, outcome: Outcome, want: Value) -> str:
    if outcome.failure:
        return outcome.failure.says
    if outcome.shapes is not None:
        return parameters_differ(outcome.shapes, exercise.interface.parameters(case.construct))
    return difference(outcome.results[0], want)


def _right(exercise: Exercise, case: Case, drawn: Tensors) -> Value:
    """The oracle's result; for a case without values it need only have the right shape."""
    if isinstance(exercise.interface, FunctionInterface):
        return exercise.oracle(*case.call.values())
    exact = {name: value.double() for name, value in drawn.items()}
    return exercise.oracle(exact, case.construct, *case.call.values())


@dataclass(frozen=True)
class Trial:
    """One case with everything that is known about it."""

    key: tuple[str, int, int]
    case: Case
    drawn: Tensors
    outcome: Outcome
    want: Value
    right: bool


def examine(exercise: Exercise, answer: Answer, seed: int = 0) -> Verdict:
    """Run every case drawn from `seed`; where the answer is wrong, find the known mistake that gives the same."""
    trials = []
    for number, case in enumerate(exercise.cases(seed)):
        drawn: Tensors = {}
        if isinstance(exercise.interface, ModuleInterface):
            drawn = draw(exercise.interface.parameters(case.construct), 1000 * seed + number)
            drawn |= {name: torch.zeros_like(drawn[name]) for name in case.starts}
        outcome = _run(exercise, answer, case, drawn)
        if outcome.failure and outcome.failure.kind in _FINAL:
            attempted = outcome.failure.kind != "not_attempted"
            return Verdict(False, outcome.failure.says, attempted=attempted)
        key = (exercise.name, seed, number)
        want = _remember(("oracle", *key), lambda case=case, drawn=drawn: _right(exercise, case, drawn))
        right = any(agree(result, want, exercise.atol, values=case.values) for result in outcome.results)
        trials.append(Trial(key, case, drawn, outcome, want, right))
    wrong = [trial for trial in trials if not trial.right]
    if not wrong:
        return Verdict(True, "Correct.")
    first = wrong[0]
    found = _explain(exercise, first.case, first.outcome, first.want)
    name = _recognise(exercise, wrong, [trial for trial in trials if trial.right])
    if name is None:
        return Verdict(False, found, _describe(first.case))
    return Verdict(False, exercise.mistakes[name].says, f"{found}\n{_describe(first.case)}".strip(), mistake=name)


def _recognise(exercise: Exercise, wrong: list[Trial], right: list[Trial]) -> str | None:
    """The mistake that does what the answer does in every case, else one that does so wherever the answer is wrong."""
    alike = [name for name in exercise.mistakes if _commits(exercise, name, wrong)]
    if len(alike) < 2:
        return alike[0] if alike else None
    return next((name for name in alike if _commits(exercise, name, right)), alike[0])


def _commits(exercise: Exercise, name: str, trials: list[Trial]) -> bool:
    """Whether the mistake gives what the answer gave in each of these cases."""
    for trial in trials:
        key = ("mistake", name, *trial.key)
        if not _same(trial.outcome, _remember(key, lambda t=trial: _err(exercise, name, t)), trial.case, exercise.atol):
            return False
    return True


def _err(exercise: Exercise, name: str, trial: Trial) -> Outcome:
    return _run(exercise, LocalAnswer(exercise.mistakes[name].answer, driver=exercise.driver), trial.case, trial.drawn)


_known: dict[tuple, Value | Outcome] = {}


def _remember(key: tuple, compute: Callable):
    """What the oracle and the mistakes give depends on the exercise and the seed alone, and loops are slow."""
    if key not in _known:
        _known[key] = compute()
        if len(_known) > _KEPT:
            del _known[next(iter(_known))]
    return _known[key]
