"""What a chapter loads while it runs lies among the files that make it stale, and other chapters' files do not."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_course.build.course import REPOSITORY, Course
from vlm_course.build.fingerprint import code_of
from vlm_course.build.reach import ASK_BY_CHAPTER, ASK_BY_NAME, reached_files
from vlm_course.build.source import read_source
from vlm_course.grading import registry
from vlm_course.grading.index import homes

PACKAGE = REPOSITORY / "vlm_course"
CHAPTERS = {chapter.number: chapter for chapter in Course().chapters()}

# Modules that import by a name which is not in their code, and how the search finds what they import.
COMPUTED = {
    "build/twins.py": "runs before a build, on a chapter's exercises; nothing that it does is printed",
    "catalog/building.py": "classes that the catalog's JSON files name",
    "grading/answers.py": "the driver of an exercise, a dotted string in its graders",
    "grading/registry.py": "graders, found by the names that the chapter asks for",
    "studies/__init__.py": "a table of dotted strings in the same file",
}

# Runs what a chapter imports and asks for, chapter after chapter in one process, and says what that loaded.
LOAD = """
import contextlib, io, json, os, sys
opened = set()
sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)
for number, lines in json.load(sys.stdin).items():
    for name in [name for name in sys.modules if name.split(".")[0] == "vlm_course"]:
        del sys.modules[name]
    opened.clear()
    with contextlib.redirect_stdout(io.StringIO()):
        for line in lines:
            exec(line, {})
    loaded = {module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "vlm_course"}
    data = {name for name in opened if os.path.isfile(name) and not name.endswith((".py", ".pyc"))}
    print(json.dumps([number, sorted(loaded | data)]))
"""


def reached(number: str) -> set[Path]:
    return set(reached_files(code_of(read_source(CHAPTERS[number].source)), number, PACKAGE))


def lines_to_load(number: str) -> list[str]:
    """The imports of a chapter, and a look-up for every exercise, question and table of claims that it asks for."""
    tree = ast.parse(code_of(read_source(CHAPTERS[number].source)))
    lines = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            if node.func.id in ASK_BY_NAME:
                lines.append(f"from vlm_course.grading import registry; registry.find({ast.unparse(node.args[0])})")
            if node.func.id in ASK_BY_CHAPTER:
                lines.append(f"from vlm_course.claims import claims; claims({ast.unparse(node.args[0])})")
    return lines


def test_what_chapters_load_is_among_what_they_reach():
    process = subprocess.run(
        [sys.executable, "-c", LOAD],
        input=json.dumps({number: lines_to_load(number) for number in CHAPTERS}),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.returncode == 0, process.stderr
    for number, loaded in map(json.loads, process.stdout.splitlines()):
        ours = {path for path in map(Path, loaded) if path.is_relative_to(PACKAGE)}
        assert len(ours) > 20
        assert sorted(ours - reached(number)) == [], f"chapter {number} loads these; why does the search miss them?"


def test_every_import_by_a_computed_name_is_known():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and not isinstance(node.args[0], ast.Constant):
                called = getattr(node.func, "attr", getattr(node.func, "id", None))
                if called in ("import_module", "__import__"):
                    found.add(path.relative_to(PACKAGE).as_posix())
    assert found == set(COMPUTED)


@pytest.mark.parametrize("number", CHAPTERS)
def test_finetune_and_other_chapters_graders_are_reached_only_where_they_are_used(number):
    files = {path.relative_to(PACKAGE).as_posix() for path in reached(number)}
    assert any(name.startswith("finetune/") for name in files) == (number == "10")
    assert {f"grading/chapter{number}/__init__.py", "grading/registry.py", "grading/examine.py"} <= files
    graders = {name.split("/")[1][-2:] for name in files if name.startswith("grading/chapter")}
    asked = {"03": {"00"}, "05": {"01", "02", "03"}}  # "visual_tokens" is a column of a table; `earlier`
    assert graders == {number} | asked.get(number, set())


def test_names_read_from_the_source_are_the_names():
    found = homes(PACKAGE / "grading")
    items = [*registry.exercises().values(), *registry.questions().values()]
    expected = {item.name: f"chapter{item.chapter}" for item in items}
    expected |= {item.attribute: f"chapter{item.chapter}" for item in registry.exercises().values()}
    assert found == expected
    assert all(registry.find(item.name) is item for item in items)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ('X = Question(name="q_1", chapter="02")', "chapter01 and chapter02 both have the name 'q_1'"),
        ("NAME = 'q_2'\nX = Question(name=NAME)", "chapter02/b.py, line 2: name must be a plain string"),
    ],
)
def test_a_name_that_cannot_be_looked_up_is_refused(tmp_path, second, says):
    for folder, text in (("chapter01", 'X = Question(name="q_1", chapter="01")'), ("chapter02", second)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "b.py").write_text(text)
    with pytest.raises(ValueError, match=says):
        homes(tmp_path)
