"""The whole matrix: every named mistake fails under its own name, stubs are no attempts, correct answers pass."""

import pytest

from vlm_course.grading.prove import prove
from vlm_course.grading.registry import exercises


@pytest.mark.parametrize("name", list(exercises()))
def test_every_mistake_is_caught_and_named(name, capsys):
    proof = prove(exercises()[name], seeds=(0, 1))
    with capsys.disabled():
        print(f"\n{proof}")
    assert proof.holds, str(proof)


@pytest.mark.parametrize("item", exercises().values(), ids=lambda item: item.name)
def test_an_exercise_is_complete(item):
    assert len(item.mistakes) >= 6
    assert len(item.also_correct) >= 2
    assert item.points > 0 and item.minutes > 0 and item.difficulty in ("easy", "medium", "hard")
    sentences = [mistake.says for mistake in item.mistakes.values()]
    assert len(set(sentences)) == len(sentences), "two mistakes say the same"
    for says in sentences:
        assert says.endswith(".") and "\n" not in says and len(says) < 160


def test_a_survivor_and_a_false_alarm_are_reported():
    """The matrix itself can fail: a mistake that is right survives, a correct answer that is wrong is an alarm."""
    from dataclasses import replace

    from vlm_course.grading.exercise import Mistake

    item = exercises()["visual_tokens"]
    right, wrong = item.also_correct["after cropping"], item.mistakes["rounded up"].answer
    broken = replace(item, name="broken", mistakes={"right": Mistake("Wrong.", right)}, also_correct={"wrong": wrong})
    proof = prove(broken, seeds=(0,))
    assert not proof.holds
    assert proof.survivors and proof.alarms
