"""Exercise (derivation): how much each conversation of a batch weighs in the mean over response tokens."""

import math
import random
from fractions import Fraction

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(lengths: list) -> tuple:
    total = 0
    for length in lengths:
        total += length
    return tuple(float(Fraction(length, total)) for length in lengths)


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    return [Case({"lengths": [draw.randint(1, 6), *(draw.randint(7, 60) for _ in range(n))]}) for n in (1, 2, 4)]


ANSWER_WEIGHTS = Exercise(
    name="answer_weights",
    chapter="04",
    title="Derivation: who counts how much",
    difficulty="easy",
    minutes=10,
    points=2,
    attribute="answer_weights",
    twin="vlm_course.loss:answer_weights",
    interface=FunctionInterface({"lengths": "list of response tokens, one a conversation"}, "list of weights"),
    oracle=oracle,
    cases=cases,
    mistakes={
        "all equal": Mistake(
            "All your weights are equal: that is the mean of the conversations' own means. Here the mean runs over "
            "tokens.",
            lambda n: [1 / len(n)] * len(n),
        ),
        "inverse": Mistake(
            "Your weights go down with the length: a longer answer has more terms in the sum, so it weighs more.",
            lambda n: [(1 / x) / sum(1 / y for y in n) for x in n],
        ),
        "not divided": Mistake("These are the lengths: divide by their sum, so that the weights add up to 1.", list),
        "by the longest": Mistake(
            "You divide by the longest answer: divide by the sum, so that the weights add up to 1.",
            lambda n: [x / max(n) for x in n],
        ),
        "by the number of conversations": Mistake(
            "You divide by the number of conversations: divide by the number of response tokens.",
            lambda n: [x / len(n) for x in n],
        ),
        "whole-number division": Mistake(
            "You divide with //, which rounds down to 0: use /.", lambda n: [x // sum(n) for x in n]
        ),
        "softmax": Mistake(
            "This is a softmax of the lengths: the weights are in proportion to them.",
            lambda n: [math.exp(x - max(n)) / sum(math.exp(y - max(n)) for y in n) for x in n],
        ),
        "squares": Mistake(
            "Your weights go with the square of the length: its mean already has the divisor once.",
            lambda n: [x * x / sum(y * y for y in n) for x in n],
        ),
        "weight of a token": Mistake(
            "This is the weight of one token: a conversation has as many of them as its answer is long.",
            lambda n: [1 / sum(n)] * len(n),
        ),
        "rounded": Mistake(
            "You rounded to two digits: return the weights themselves.", lambda n: [round(x / sum(n), 2) for x in n]
        ),
    },
    also_correct={
        "token by token": lambda n: [sum(1 / sum(n) for _ in range(x)) for x in n],
        "one minus the others": lambda n: [1 - sum(n[:i] + n[i + 1 :]) / sum(n) for i in range(len(n))],
    },
)
