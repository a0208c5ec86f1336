"""Every public function and class of the mechanisms takes every good shape and refuses every bad input.

The rows stand in bad_input/, one file for a part of the package; bad_input/table.py says what follows from a row. A
public function without a row fails here, and so does an argument that a row does not know.
"""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

FOLDER = Path(__file__).with_name("bad_input")


def load(path):
    spec = importlib.util.spec_from_file_location(f"bad_input_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = load(FOLDER / "table.py")
for rows in sorted(FOLDER.glob("rows_*.py")):
    load(rows)

MODULES = (
    "images patches vit contrastive bridges qformer attention fusion loss cache decoder llava generation chat training "
    "grounding.formats grounding.masks grounding.metrics grounding.regions grounding.tokens resolution dynamic_tiling "
    "pruning documents packing merging video actions budget measures costs shape_cropping h_reducer abstractor "
    "causal_former emu query_resampler token_resampler modality_adaptive"
).split()


def public():
    """Names of all that a user may call: functions, classes, and methods that take more than the object."""
    for name in MODULES:
        module = importlib.import_module(table.PACKAGE + name)
        for key, value in vars(module).items():
            if key.startswith("_") or getattr(value, "__module__", None) != module.__name__ or not callable(value):
                continue
            yield f"{name}.{key}"
            if inspect.isclass(value):
                for method, function in vars(value).items():
                    function = getattr(function, "__func__", function)
                    arguments = inspect.isfunction(function) and len(inspect.signature(function).parameters) > 1
                    if arguments and not method.startswith("_"):
                        yield f"{name}.{key}.{method}"


def test_every_public_name_has_a_row_and_every_row_a_name():
    names = set(public())
    assert names - set(table.ROWS) - set(table.NO_ROW) == set()
    assert (set(table.ROWS) | set(table.NO_ROW)) - names == set()
    assert all(len(reason) > 10 for reason in table.NO_ROW.values())


def sizes_for(row, numbers):
    drawn = {letter: max(number, row.low.get(letter, 1)) for letter, number in zip(row.letters, numbers, strict=False)}
    return SimpleNamespace(**row.fix, **drawn)


def target_of(row, sizes):
    """What is called, and the modules that the call lies on."""
    function = row.target(sizes)
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return function, isinstance(owner, nn.Module)


def refused(function, arguments, what, words):
    with pytest.raises(ValueError) as error:
        function(**arguments)
        pytest.fail(f"{what} was accepted")
    message = str(error.value)
    missing = [group for group in words if not any(word in message for word in group)]
    assert not missing, f"{what}: {message!r} names none of {missing}"


@pytest.mark.parametrize("name", table.ROWS)
@settings(max_examples=6)
@given(numbers=st.lists(st.integers(1, 5), min_size=9, max_size=9))
@torch.no_grad()
def test_good_shapes_pass_and_each_bad_one_is_refused(name, numbers):
    row = table.ROWS[name]
    sizes = sizes_for(row, numbers)
    function, on_module = target_of(row, sizes)
    arguments = table.arguments_of(row, sizes)
    function(**arguments)
    for what, change, words in table.spoilt_tensors(row, arguments, on_module=on_module):
        if what not in row.free:
            refused(function, {**table.arguments_of(row, sizes), **change}, what, words)


@pytest.mark.parametrize("name", table.ROWS)
@torch.no_grad()
def test_numbers_out_of_range_and_other_bad_calls_are_refused(name):
    row = table.ROWS[name]
    sizes = sizes_for(row, [3, 2, 4, 5, 3, 2, 3, 4, 2])
    function, _ = target_of(row, sizes)
    signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    assert set(row.arguments) <= set(signature.parameters), "the row has arguments that the function has not"
    called = function.forward if isinstance(function, nn.Module) else function
    for what, change, words in table.spoilt_numbers(row, called):
        if what.partition("=")[0] not in row.free and what not in row.free:
            refused(function, {**table.arguments_of(row, sizes), **change}, what, words)
    for change, *words in row.bad:
        change = change(sizes) if callable(change) else change
        refused(function, {**table.arguments_of(row, sizes), **change}, str(list(change)), [(word,) for word in words])


def test_reasons_are_given_for_what_may_pass():
    for name, row in table.ROWS.items():
        for what, reason in row.free.items():
            assert len(reason) > 10, f"{name}: {what}"
