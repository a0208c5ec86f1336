"""Exercise: several conversations in one row, without a leak."""

import itertools
import random

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake

IGNORE = -100


def oracle(ids: list, labels: list) -> tuple:
    row, targets, documents, positions = [], [], [], []
    for number in range(len(ids)):
        for place in range(len(ids[number])):
            row.append(ids[number][place])
            targets.append(IGNORE if place == 0 else labels[number][place])
            documents.append(number)
            positions.append(place)
    return tuple(row), tuple(targets), tuple(documents), tuple(positions)


def cases(seed: int) -> list[Case]:
    draw = random.Random(seed)

    def document(length: int, learned: int) -> tuple[list[int], list[int]]:
        ids = [draw.randint(10, 99) for _ in range(length)]
        return ids, [IGNORE] * (length - learned) + ids[length - learned :]

    sizes = [(draw.randint(4, 7), 3), (draw.randint(4, 7), 2), (draw.randint(3, 5), 2)]
    # Some texts are learned from their first token on, as in pre-training.
    whole = [(n, n) for n in (draw.randint(2, 4), draw.randint(5, 6), 1)]
    out = []
    for plan in (sizes, whole, [*whole[:2], sizes[0]]):
        documents = [document(*size) for size in plan]
        out.append(Case({"ids": [d[0] for d in documents], "labels": [d[1] for d in documents]}))
    return out


def build(ids, labels, *, first=True, last=False, restart=True, number=0, start=0, shift=False, reverse=False):
    """The right row with one thing changed."""
    if reverse:
        ids, labels = ids[::-1], labels[::-1]
    row, targets, documents, positions = [], [], [], []
    for place, (tokens, learned) in enumerate(zip(ids, labels, strict=True)):
        learned = [*learned[1:], IGNORE] if shift else list(learned)
        if first and not shift:
            learned[0] = IGNORE
        if last:
            learned[-1] = IGNORE
        positions += [start + len(row) * (not restart) + i for i in range(len(tokens))]
        row += tokens
        targets += learned
        documents += [place + number] * len(tokens)
    return row, targets, documents, positions


def changed(**options):
    return lambda ids, labels: build(ids, labels, **options)


def one_document(ids, labels):
    row, targets, documents, positions = build(ids, labels)
    return row, targets, [0] * len(documents), positions


def all_but_the_first(ids, labels):
    """The first document's own first label is kept: nothing stands before it."""
    row, targets, documents, positions = build(ids, labels)
    return row, [labels[0][0], *targets[1:]], documents, positions


def parity(ids, labels):
    row, targets, documents, positions = build(ids, labels)
    return row, targets, [number % 2 for number in documents], positions


def lengths(ids, labels):
    row, targets, documents, positions = build(ids, labels)
    return row, targets, [len(ids[number]) for number in documents], positions


def separated(ids, labels):
    """A 0 between two documents."""
    padded = [[*tokens, 0] for tokens in ids[:-1]] + [ids[-1]]
    learned = [[*targets, IGNORE] for targets in labels[:-1]] + [labels[-1]]
    return build(padded, learned)


def everything_masked(ids, labels):
    row, _, documents, positions = build(ids, labels)
    return row, [IGNORE] * len(row), documents, positions


def chained(ids, labels):
    """itertools instead of loops."""
    chain = itertools.chain.from_iterable
    return (
        list(chain(ids)),
        list(chain([IGNORE, *targets[1:]] for targets in labels)),
        list(chain([n] * len(tokens) for n, tokens in enumerate(ids))),
        list(chain(range(len(tokens)) for tokens in ids)),
    )


def token_by_token(ids, labels):
    """One pass over (document, place) pairs."""
    places = [(n, p) for n, tokens in enumerate(ids) for p in range(len(tokens))]
    return (
        [ids[n][p] for n, p in places],
        [labels[n][p] if p else IGNORE for n, p in places],
        [n for n, _ in places],
        [p for _, p in places],
    )


PACK_ROW = Exercise(
    name="pack_row",
    chapter="04",
    title="Build It: packing without leaks",
    difficulty="hard",
    minutes=20,
    points=5,
    attribute="pack_row",
    twin="vlm_course.packed:pack_row",
    interface=FunctionInterface(
        {"ids": "list of lists of ids", "labels": "list of lists of labels, unshifted"},
        "(ids, labels, document numbers, positions), four lists",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "first label kept": Mistake(
            "The first label of a document is kept: the last token of its neighbour would be trained to predict it.",
            changed(first=False),
        ),
        "last label masked": Mistake(
            "You masked the last label of a document as well, its end mark: the first one is what leaks.",
            changed(last=True),
        ),
        "last label instead of the first": Mistake(
            "You masked each document's last label: labels are unshifted, so it is the first that leaks.",
            changed(first=False, last=True),
        ),
        "first document excepted": Mistake(
            "The first document keeps its first label: mask it too. Nothing predicts it, but a count of labels would "
            "include it.",
            all_but_the_first,
        ),
        "positions run on": Mistake(
            "Your positions run on through the row: they restart at 0 with every document.", changed(restart=False)
        ),
        "positions from 1": Mistake("Your positions begin at 1: they begin at 0.", changed(start=1)),
        "documents from 1": Mistake("Your documents are numbered from 1: number them from 0.", changed(number=1)),
        "one document": Mistake(
            "All tokens have one document number, so all of them would see each other.", one_document
        ),
        "two numbers in turn": Mistake(
            "Your document numbers alternate between two values, so every second document would see the others.", parity
        ),
        "lengths for numbers": Mistake(
            "You give a document's length for its number: two of one length would see each other.", lengths
        ),
        "labels shifted": Mistake(
            "Your labels are shifted by one: leave them where the tokens are, the loss shifts.", changed(shift=True)
        ),
        "separator": Mistake(
            "You put a token between the documents: the mask keeps them apart, nothing is added.", separated
        ),
        "reversed": Mistake("Your documents stand in reverse order.", changed(reverse=True)),
        "nothing to learn": Mistake("All labels are masked: only the first of each document is.", everything_masked),
    },
    also_correct={"itertools": chained, "token by token": token_by_token},
)
