"""What is refused and what is understood, on the committed question sets.

Each set has a half that the rules were written with (dev) and one that was written first and is only measured (test).
The targets are asked of each half alone.
"""

import re
from pathlib import Path

import pytest

from vlm_course.ask.scope import MAX_WORDS, Description, Intent, QuestionError, Refusal, understand
from vlm_course.tokenizer import WordTokenizer
from vlm_course.worlds.dialogs import KINDS

SETS = Path(__file__).parent / "ask_questions"
HALVES = ("dev", "test")


def lines(name: str) -> list[str]:
    return [line for line in (SETS / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def paraphrases(half: str) -> list[tuple[str, str, str]]:
    """(kind, what it is about, question)"""
    return [re.fullmatch(r"(\w+) \| (?:(.*?) )?\| (.*)", line).groups("") for line in lines(f"in_scope_{half}.txt")]


def about(intent: Intent) -> str:
    objects = [str(thing) for thing in intent.objects]
    if intent.kind in ("check", "relation"):
        return f" {intent.direction or '?'} ".join(objects)
    return "not " * intent.negated + "".join(objects)


def test_the_sets_have_the_promised_size():
    assert sum(len(lines(f"in_scope_{half}.txt")) for half in HALVES) == 500
    refused = [question for half in HALVES for question in lines(f"out_of_scope_{half}.txt")]
    accepted = [question for half in HALVES for *_, question in paraphrases(half)]
    assert len(refused) == 200
    assert len(set(refused)) == 200
    assert len(set(accepted)) == 500
    assert not set(refused) & set(accepted)
    assert {kind for half in HALVES for kind, *_ in paraphrases(half)} == set(KINDS)


@pytest.mark.parametrize("half", HALVES)
def test_out_of_scope_questions_are_refused(half, record_property):
    questions = lines(f"out_of_scope_{half}.txt")
    answered = [question for question in questions if isinstance(understand(question), Intent)]
    record_property("refused", 1 - len(answered) / len(questions))
    assert len(answered) <= 0.05 * len(questions), answered


@pytest.mark.parametrize("half", HALVES)
def test_paraphrases_are_accepted_and_read_right(half, record_property):
    asked = paraphrases(half)
    refused, misread = [], []
    for kind, topic, question in asked:
        intent = understand(question)
        if isinstance(intent, Refusal):
            refused.append((question, intent.sentence))
        elif (intent.kind, about(intent)) != (kind, topic):
            misread.append((question, intent))
    record_property("refused", len(refused) / len(asked))
    record_property("read right", 1 - (len(refused) + len(misread)) / len(asked))
    assert len(refused) <= 0.02 * len(asked), refused
    assert len(misread) <= 0.02 * len(asked), misread


def test_refusals_are_one_sentence():
    for half in HALVES:
        for question in lines(f"out_of_scope_{half}.txt"):
            answer = understand(question)
            if isinstance(answer, Refusal):
                assert "\n" not in answer.sentence
                assert answer.sentence.endswith(".")
                assert ". " not in answer.sentence
                assert len(answer.sentence) < 300


@pytest.mark.parametrize(
    "question, canonical",
    [
        ("What hue does the disk have?", "what color is the circle ?"),
        ("colour of the little star", "what color is the small star ?"),
        ("which shape is blue?", "what shape is the blue object ?"),
        ("what shape is there?", "what shape is in the image ?"),
        ("is the red cross big or small?", "what size is the red cross ?"),
        ("number of crosses", "how many crosses are there ?"),
        ("count the grey things", "how many gray objects are there ?"),
        ("any circles?", "is there a circle ?"),
        ("is the circle red?", "is there a red circle ?"),
        ("are there no stars", "is there not a star ?"),
        ("isn't there a star?", "is there a star ?"),
        ("is the red star over the blue disc", "is the red star above the blue circle ?"),
        ("is the red star on the left of the blue disc", "is the red star left of the blue circle ?"),
        (
            "which side of the blue disc is the red star on",
            "where is the red star relative to the blue circle ?",
        ),
        ("point at the red star", "point to the red star ."),
        ("where's the red star", "give the box of the red star ."),
        ("whats in the picture", "describe the image ."),
    ],
)
def test_canonical_form_is_what_the_model_was_trained_on(question, canonical):
    intent = understand(question)
    assert isinstance(intent, Intent), intent
    assert intent.canonical() == canonical


def test_every_canonical_form_is_in_the_vocabulary():
    tokenizer = WordTokenizer.small()
    for half in HALVES:
        for _, _, question in paraphrases(half):
            intent = understand(question)
            if isinstance(intent, Intent):
                unknown = [p for p in tokenizer.tokenize(intent.canonical()) if p.startswith(("##", "<"))]
                assert not unknown, (intent.canonical(), unknown)


@pytest.mark.parametrize(
    "sloppy", ["WHAT COLOR IS THE CIRCLE", "  what   color is the circle ??", "what color is the circel"]
)
def test_sloppy_writing(sloppy):
    assert understand(sloppy) == Intent("colour", (Description(shape="circle"),))


@pytest.mark.parametrize("word", ["man", "light", "start", "crown", "read", "night", "paint", "think"])
def test_real_words_are_not_taken_for_misspellings(word):
    assert isinstance(understand(f"is there a {word} in the image?"), Refusal)


@pytest.mark.parametrize(
    "question",
    [
        "is every shape red?",
        "is there a red or blue circle?",
        "are there any circles and stars?",
        "what color is the image?",
        "is the picture red?",
        "is the left circle red",
        "is the circle in the center?",
        "which object is left of the circle?",
        "how many colors are there?",
        "how many shapes are not red?",
        "draw a circle",
        "describe the star",
    ],
)
def test_known_words_with_a_meaning_that_was_not_trained(question):
    assert isinstance(understand(question), Refusal)


def test_reason_names_what_is_not_known():
    assert "I do not know the word 'texture'" in understand("what is the texture of the circle?").sentence
    assert "the colours I know" in understand("is there a magenta circle?").sentence
    assert "the shapes I know" in understand("how many hexagons are there?").sentence


@pytest.mark.parametrize(
    "question", ["", "   \n", "circle " * 10_000, "x" * 100_000, "is there a star " * (MAX_WORDS // 2)]
)
def test_no_question_at_all(question):
    with pytest.raises(QuestionError) as caught:
        understand(question)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
