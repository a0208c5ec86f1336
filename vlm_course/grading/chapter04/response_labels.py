"""Exercise: from characters to labels, without losing the first word or the end mark."""

import random

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake

IGNORE = -100


def oracle(ids: list, offsets: list, spans: list) -> tuple:
    labels = []
    for token, (start, end) in zip(ids, offsets, strict=True):
        label = IGNORE
        for character in range(start, end):
            for first, last in spans:
                if first <= character < last:
                    label = token
        labels.append(label)
    return tuple(labels)


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)
    out = []
    for turns in (1, 2, 3):
        ids, offsets, spans, place = [draw.randint(300, 399)], [(0, 0)], [], 0  # <s> covers no character

        def token(length: int, ids=ids, offsets=offsets):
            nonlocal place
            ids.append(draw.randint(10, 299))
            offsets.append((place, place + length))
            place += length

        for turn in range(turns):
            for _ in range(draw.randint(2, 4)):
                token(draw.randint(2, 6))
            glued = turn != 1  # the space before an answer is part of its first token, or a token of its own
            if not glued:
                token(1)
            start = place + glued
            token(draw.randint(3, 6))
            for _ in range(draw.randint(0, 2)):
                token(draw.randint(2, 5))
            token(4)  # </s>
            spans.append((start, place))
        if turns == 3:
            token(5)  # an open question at the end
        out.append(Case({"ids": ids, "offsets": offsets, "spans": spans}))
    return out


def touching(inside, other=IGNORE):
    """Labels by a rule on (start, end, first, last)."""

    def answer(ids, offsets, spans):
        return [
            token if any(inside(start, end, first, last) for first, last in spans) else other
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]

    return answer


overlap = touching(lambda s, e, a, b: s < b and e > a)


def characters(ids, offsets, spans):
    """The characters of all responses as a set."""
    learned = {place for first, last in spans for place in range(first, last)}
    return [t if learned & set(range(*o)) else IGNORE for t, o in zip(ids, offsets, strict=True)]


def span_by_span(ids, offsets, spans):
    """Start from a row of -100 and fill in one response after the other."""
    labels = [IGNORE] * len(ids)
    for first, last in spans:
        for place, (start, end) in enumerate(offsets):
            if max(start, first) < min(end, last):
                labels[place] = ids[place]
    return labels


def without_end(ids, offsets, spans):
    labels = overlap(ids, offsets, spans)
    ends = {last for _, last in spans}
    return [IGNORE if end in ends else label for label, (_, end) in zip(labels, offsets, strict=True)]


def per_span(ids, offsets, spans):
    return [label for span in spans for label in overlap(ids, offsets, [span])]


def inverted(ids, offsets, spans):
    labels = overlap(ids, offsets, spans)
    return [token if label == IGNORE else IGNORE for token, label in zip(ids, labels, strict=True)]


RESPONSE_LABELS = Exercise(
    name="response_labels",
    chapter="04",
    title="Build It: labels",
    difficulty="medium",
    minutes=10,
    points=3,
    attribute="response_labels",
    twin="vlm_course.chat:response_labels",
    interface=FunctionInterface(
        {
            "ids": "list of ids",
            "offsets": "list of (start, end), one a token",
            "spans": "list of (start, end), one a response",
        },
        "list of labels",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "only tokens wholly inside": Mistake(
            "You lose the first word of a response where its token begins with the space before it: sharing one "
            "character is enough.",
            touching(lambda s, e, a, b: a <= s and e <= b),
        ),
        "the token before too": Mistake(
            "You keep the token that ends where a response begins: its last character lies before the span.",
            touching(lambda s, e, a, b: s < b and e >= a and e > s),
        ),
        "the token behind too": Mistake(
            "You keep the token that begins where a response ends: a span's end is excluded.",
            touching(lambda s, e, a, b: s <= b and e > a),
        ),
        "shifted": Mistake(
            "Your labels are shifted by one: leave them where the tokens are, the loss shifts.",
            lambda i, o, s: [*overlap(i, o, s)[1:], IGNORE],
        ),
        "inverted": Mistake(
            "You kept the prompt and masked the responses: it is the other way round.",
            inverted,
        ),
        "zero for -100": Mistake(
            "You mark what is not learned by 0: that is the id of a token. The mark is -100.",
            touching(lambda s, e, a, b: s < b and e > a, other=0),
        ),
        "a mask": Mistake(
            "You return a mask: a label is the token's own id.",
            lambda i, o, s: [int(label != IGNORE) for label in overlap(i, o, s)],
        ),
        "only the last response": Mistake(
            "Only the last response has labels: every answer of the conversation is learned.",
            lambda i, o, s: overlap(i, o, s[-1:]),
        ),
        "only the first response": Mistake(
            "Only the first response has labels: every answer of the conversation is learned.",
            lambda i, o, s: overlap(i, o, s[:1]),
        ),
        "end mark masked": Mistake(
            "You masked the last token of each response, the end mark: without it the model never learns to stop.",
            without_end,
        ),
        "everything": Mistake("Every token has its id as its label: nothing is masked.", lambda i, o, s: list(i)),
        "from the first response on": Mistake(
            "From the first response on you keep everything, later questions too.",
            lambda i, o, s: overlap(i, o, [(s[0][0], max(e for _, e in o))]),
        ),
        "a list for every span": Mistake(
            "You return a row of labels for every span, one behind the other: there is one label a token.", per_span
        ),
    },
    also_correct={"sets of characters": characters, "span by span": span_by_span},
)
