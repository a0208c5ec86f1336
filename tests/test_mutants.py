"""The changes that `make mutate` tries: the slips it knows, what it leaves alone, and that a change takes hold."""

import ast
import gc
import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="mutants are forks, and this system has none")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))
try:
    from mutants import session, spots
finally:
    del sys.path[0]

TOY = '''
from functools import wraps

LIMIT = 3


def checks(rule):
    def decorate(function):
        @wraps(function)
        def guarded(*args, **kwargs):
            rule(*args, **kwargs)
            return function(*args, **kwargs)
        return guarded
    return decorate


def require(value, name, least=1, *, hint=""):
    """Nothing in 1 docstring is changed."""
    if value < least:
        raise ValueError(f"{name} is {value + 0}, expected {least}" + hint)


@checks(lambda x=2, *, low=0: require(x, "x", 1 + 1, hint="one" + "two"))
def scale(x: int = 2, *, low: int = 5) -> int:
    if x > 3 and not low == 7:
        return max(x, low) - 1
    return sum([x, low])


class Box:
    size: int = 4

    def __init__(self):
        super().__init__()
        self.kept = True

    def area(self):
        return self.size ** 2
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy module in memory, its mutants by name, and what changes it."""
    file = tmp_path / "toy.py"
    file.write_text(TOY)
    spec = importlib.util.spec_from_file_location("vlm_course.toy", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "vlm_course.toy", module)
    spec.loader.exec_module(module)
    known = {mutant.name.removeprefix("toy."): mutant for mutant in spots.mutants("toy", TOY)}
    functions = session.Functions({"toy": (str(file), TOY)})
    gc.unfreeze()
    return module, lambda name: functions.change(known[name])


SLIPS = [
    "1 + 1 -> 1 - 1",
    "1 + 1 -> 2 + 1",
    "1 + 1 -> 1 + 2",
    "x=2 -> x=3",
    "low=5 -> low=6",
    "x > 3 and (not low == 7) -> x > 3 or not low == 7",
    "x > 3 and (not low == 7) -> not low == 7",
    "x > 3 and (not low == 7) -> x > 3",
    "x > 3 -> x >= 3",
    "x > 3 -> x > 4",
    "x > 3 and (not low == 7) -> x > 3 and low == 7",
    "low == 7 -> low != 7",
    "low == 7 -> low == 8",
    "max(x, low) - 1 -> max(x, low) + 1",
    "max(x, low) -> min(x, low)",
    "max(x, low) - 1 -> max(x, low) - 2",
    "sum([x, low]) -> len([x, low])",
]


def names():
    return [mutant.name.removeprefix("toy.") for mutant in spots.mutants("toy", TOY)]


def test_the_slips_of_a_small_module():
    """Words of messages, hints, docstrings, annotations and module constants are left alone."""
    of_scale = [name.split(": ", 1)[1] for name in names() if name.startswith("scale: ")]
    assert of_scale == SLIPS
    assert [name for name in names() if name.startswith("require: ")] == [
        "require: least=1 -> least=2",
        "require: value < least -> value <= least",
    ]
    assert [name for name in names() if name.startswith("Box.")] == [
        "Box.__init__: self.kept = True -> self.kept = False",
        "Box.area: self.size ** 2 -> self.size * 2",
        "Box.area: self.size ** 2 -> self.size ** 3",
    ]
    assert not any("LIMIT" in name or "size: int" in name for name in names())


def test_every_mutant_has_a_name_of_its_own_and_is_python():
    found = spots.mutants("toy", TOY)
    assert len({mutant.name for mutant in found}) == len(found)
    for mutant in found:
        tree = spots.changed_tree(TOY, mutant)
        compile(tree, "toy.py", "exec")
        assert ast.dump(tree) != ast.dump(ast.parse(TOY)), mutant.name
        assert mutant.span[0] <= mutant.line <= mutant.span[1] or mutant.default


def refuses(function, value):
    try:
        function(value, "x")
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(
    ("name", "call", "before", "after"),
    [
        ("scale: max(x, low) -> min(x, low)", lambda toy: toy.scale(4, low=9), 8, 3),
        ("scale: x=2 -> x=3", lambda toy: toy.scale(), 7, 8),
        ("scale: low=5 -> low=6", lambda toy: toy.scale(2), 7, 8),
        ("Box.area: self.size ** 2 -> self.size * 2", lambda toy: toy.Box().area(), 16, 8),
        ("require: value < least -> value <= least", lambda toy: refuses(toy.require, 1), False, True),
    ],
)
def test_a_change_takes_hold_behind_decorators_and_in_objects_made_before(toy, name, call, before, after):
    module, change = toy
    held = module.scale
    assert call(module) == before
    assert change(name) >= 1
    assert call(module) == after and module.scale is held


def test_a_change_of_a_rule_in_a_decorator_takes_hold(toy):
    module, change = toy
    with pytest.raises(ValueError, match="x is 1, expected 2"):
        module.scale(1)
    assert change("scale: 1 + 1 -> 1 + 2") == 1
    with pytest.raises(ValueError, match="x is 2, expected 3"):
        module.scale(2)


def test_a_bound_of_a_decorator_takes_hold_for_functions_classes_and_dataclasses():
    """Put back at the end: these are the package's own."""
    from vlm_course import packing, patches

    calls = {
        "packing.grid_positions: @counts(rows=1) -> @counts(rows=2)": lambda: packing.grid_positions(1, 2),
        "patches.PatchEmbedding: @counts(width=1) -> @counts(width=2)": lambda: patches.PatchEmbedding(
            channels=1, patch_size=1, width=1
        ),
        "packing.PackedViTConfig: @counts(layers=1) -> @counts(layers=2)": lambda: packing.PackedViTConfig(
            patch_size=1, width=4, layers=1, heads=1, mlp_width=1
        ),
    }
    files = {name: str(ROOT / "vlm_course" / f"{name}.py") for name in ("packing", "patches")}
    texts = {name: Path(file).read_text(encoding="utf-8") for name, file in files.items()}
    known = {mutant.name: mutant for name, text in texts.items() for mutant in spots.mutants(name, text)}
    functions = session.Functions({name: (file, texts[name]) for name, file in files.items()})
    gc.unfreeze()
    for name, call in calls.items():
        mutant = known[name]
        call()
        assert functions.change(mutant) == 1
        try:
            with pytest.raises(ValueError, match="is 1, expected a whole number of at least 2"):
                call()
        finally:
            mutant.edit = ("bound", (mutant.edit[1][0], 1))
            functions.change(mutant)
        call()


def test_mutants_of_the_real_modules_are_found_in_memory():
    """Every function of the seven modules can be changed: none is hidden behind what the tool cannot reach."""
    files = {name: ROOT / "vlm_course" / f"{name}.py" for name in spots.MODULES}
    for name in files:
        importlib.import_module(f"vlm_course.{name}")
    texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    functions = session.Functions({name: (str(files[name]), text) for name, text in texts.items()})
    gc.unfreeze()
    for name, text in texts.items():
        codes = functions._codes(compile(ast.parse(text), str(files[name]), "exec"))
        missing = [code.co_qualname for code in codes if not functions.living.get(functions._key(code))]
        classes = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)}
        assert set(missing) <= classes, missing
