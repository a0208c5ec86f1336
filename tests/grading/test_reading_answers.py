"""Where answers come from and how a check is proven: files of every kind, questions, a matrix that fails."""

import builtins
import dataclasses
import json
import sys

import pytest

from vlm_course.grading import extract, prove, quiz, registry
from vlm_course.grading.answers import Failure, LocalAnswer
from vlm_course.grading.compare import plain
from vlm_course.grading.extract import SourceError


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("answer.py", b"\xff\xfe\x00", "answer.py cannot be read: UnicodeDecodeError."),
        ("answer.txt", "x = 1", "answer.txt is neither a notebook (.ipynb) nor a Python file (.py)."),
        ("answer.ipynb", '{"cells": [{"cell', "may have been saved in part"),
        ("answer.ipynb", '{"cells": [{"cell_type": "code"}]}', "may have been saved in part"),
        ("answer.ipynb", "[]", "may have been saved in part"),
    ],
)
def test_a_file_that_holds_no_answers_says_why(tmp_path, name, content, says):
    with pytest.raises(SourceError) as error:
        extract.read(written(tmp_path, name, content))
    assert says in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(SourceError, match=r"There is no file gone\.py\."):
        extract.read(tmp_path / "gone.py")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(SourceError, match=r"folder\.py cannot be read"):
        extract.read(tmp_path / "folder.py")


def test_magics_of_a_notebook_are_left_out_and_lines_keep_their_numbers(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": "text"},
        {"cell_type": "code", "source": ["%matplotlib inline\n", "!ls\n", "a = 1\n"]},
        {"cell_type": "code", "source": "%%time\nb = 2\n"},
    ]
    pieces = extract.read(written(tmp_path, "n.ipynb", json.dumps({"cells": cells})))
    assert [piece.label for piece in pieces] == ["code cell 1 of n.ipynb", "code cell 2 of n.ipynb"]
    found, broken = extract.statements(pieces)
    assert not broken and [sorted(statement.binds) for statement in found] == [["a"]]
    assert found[0].node.lineno == 3


def test_what_is_no_python_is_named_and_the_rest_is_read(tmp_path):
    pieces = [extract.Piece("one", "def f(:"), extract.Piece("two", "x = 1\0"), extract.Piece("three", "y = 2")]
    found, broken = extract.statements(pieces)
    assert [piece.label for piece, _ in broken] == ["one", "two"]
    assert [sorted(statement.binds) for statement in found] == [["y"]]


SCRIPT = """
import math as m, os.path
try:
    from json import loads
except ImportError:
    loads = None
SIDE = 4
def helper(x):
    SIDE2 = x * SIDE
    return m.sqrt(SIDE2)
async def later():
    return helper(1)
for epoch in range(10 ** 9):
    answer = None
def answer(x):
    return helper(x) + len(loads("[1]"))
answer = answer
other = 5
"""


def test_an_answer_brings_what_it_leans_on_and_nothing_else(tmp_path):
    """The loop that would never end is no definition, and a later `answer = answer` is not the answer."""
    found, _ = extract.statements(extract.read(written(tmp_path, "a.py", SCRIPT)))
    chosen = extract.needed(found, "answer")
    names = [sorted(statement.binds) for statement in chosen]
    assert names == [["m", "os"], ["loads"], ["SIDE"], ["helper"], ["answer"]]
    assert extract.needed(found, "nowhere") == []
    assert [sorted(s.binds) for s in extract.needed(found, "later")][-1] == ["later"]


# ---------------------------------------------------------------------------------------------------- questions


@pytest.fixture
def shown(monkeypatch):
    import IPython.display

    things = []
    monkeypatch.setattr(IPython.display, "display", things.append)
    return things


def test_a_question_has_buttons_that_give_the_reason(shown):
    asked = next(iter(registry.questions().values()))
    quiz.question(asked.name)
    text, box = shown
    assert text.data == asked.markdown()
    buttons, reason = box.children
    assert list(buttons.options) == list(asked.options) and buttons.value is None
    for letter, option in asked.options.items():
        buttons.value = letter
        assert option.reason in reason.value and "\n" not in reason.value
        assert reason.value.startswith("Correct." if letter == asked.answer else f"Not {letter}.")


def test_without_widgets_the_text_is_complete(shown, monkeypatch):
    name = next(iter(registry.questions()))
    quiz.question(name, widget=False)
    monkeypatch.delitem(sys.modules, "ipywidgets", raising=False)
    importing = builtins.__import__

    def without_widgets(module, *rest):
        if module == "ipywidgets":
            raise ImportError(module)
        return importing(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without_widgets)
    quiz.question(name)
    assert len(shown) == 2 and shown[0].data == shown[1].data


@pytest.mark.parametrize("find", [registry.exercise, registry.question])
def test_an_unknown_name_lists_those_that_are_known(find):
    with pytest.raises(ValueError, match=r"There is no (exercise|question) 'nothing'\. Known: \w+, "):
        find("nothing")


def test_an_exercise_is_found_by_what_it_defines():
    item = registry.exercise("projection_parameters")
    assert registry.exercise(item.attribute) is item


# ----------------------------------------------------------------------------------------------------- the proof


def test_a_check_that_lets_mistakes_pass_is_not_proven(monkeypatch, capsys):
    """The right answer entered as a mistake survives; a mistake entered as right is a false alarm, and so on."""
    item = registry.exercise("projection_parameters")
    mistakes = dict(item.mistakes)
    name, wrong = next(iter(mistakes.items()))
    spoilt = dataclasses.replace(
        item,
        mistakes=mistakes
        | {"no mistake": dataclasses.replace(wrong, answer=lambda v, l: l * (v + l + 2)), "unknown": wrong},
        also_correct={"wrong": wrong.answer},
    )
    proof = prove.prove(spoilt, seeds=[0])
    assert not proof.holds
    assert proof.survivors == ("no mistake (seed 0)",)
    assert proof.unnamed and all(entry.startswith(("unknown", name)) for entry in proof.unnamed)
    assert len(proof.alarms) == 1 and proof.alarms[0].startswith("wrong (seed 0: ")
    said = str(proof)
    assert f"killed {len(mistakes) + 1} of {len(mistakes) + 2}, false alarms 1 of 2" in said
    assert "survivors: no mistake" in said and "rejected: wrong" in said
    monkeypatch.setattr(prove, "exercises", lambda: {"spoilt": spoilt, "sound": item})
    assert prove.main(["sound"]) == 0
    assert prove.main([]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_wrapped_definition_of_the_package_is_entered_and_refused():
    item = registry.exercise("projection_parameters")
    twin = registry.twin(item)
    answer = LocalAnswer(lambda *args: plain(twin(*args)), (item.twin,))
    with pytest.raises(Failure):
        answer.call((3, 4))
