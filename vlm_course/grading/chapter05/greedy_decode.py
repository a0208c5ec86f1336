"""Exercise: greedy decoding that reads everything again for each token."""

import torch

from vlm_course.grading.chapter05.watched import cases, greedy, watched
from vlm_course.grading.exercise import Exercise, FunctionInterface, Mistake


def drive(answer, seed, ids, pixels, max_new_tokens, eos_id):
    """Lets the learner's loop use a model made here."""
    return answer(watched(seed)[0], ids, pixels, max_new_tokens, eos_id)


def oracle(seed, ids, pixels, max_new_tokens, eos_id):
    """The new ids as a tensor [1, n]."""
    return torch.tensor([greedy(seed, ids, pixels, max_new_tokens, eos_id)])


def loop(model, ids, pixels, limit, eos, *, place=-1, choose=None, stop=None, keep_end=True, grow=None, later=None):
    """A right loop whose steps can be exchanged one by one."""
    choose = choose or (lambda scores: scores.argmax(-1, keepdim=True))
    stop = stop or (lambda ids, token: token.item() == eos)
    grow = grow or (lambda ids, token: torch.cat([ids, token], 1))
    start, new = ids, []
    for number in range(limit):
        logits = model(ids, pixels if number == 0 or later is None else later(pixels))
        token = choose(logits[:, place])
        ended = stop(torch.cat([start, *new, token], 1), token)
        if ended and not keep_end:
            break
        new.append(token)
        if ended:
            break
        ids = grow(ids, token)
    return torch.cat(new, 1) if new else ids[:, :0]


def made(**steps):
    """An answer that differs from the right one in the given steps."""
    return lambda model, ids, pixels, limit, eos: loop(model, ids, pixels, limit, eos, **steps)


def recursive(model, ids, pixels, max_new_tokens, eos_id):
    """The first token, then the answer to the longer prompt."""
    token = model(ids, pixels)[0, -1].argmax().view(1, 1)
    if token == eos_id or max_new_tokens == 1:
        return token
    longer = torch.cat([ids, token], dim=1)
    return torch.cat([token, recursive(model, longer, pixels, max_new_tokens - 1, eos_id)], dim=1)


def with_a_list(model, ids, pixels, max_new_tokens, eos_id):
    """Ids as a Python list, probabilities instead of logits, and the model's mask given."""
    row, new = ids[0].tolist(), []
    while len(new) < max_new_tokens:
        now = torch.tensor([row + new])
        probabilities = model(now, pixels, torch.ones_like(now)).softmax(-1)
        new.append(int(probabilities[0, -1].argmax()))
        if new[-1] == eos_id:
            break
    return torch.tensor([new])


GREEDY_DECODE = Exercise(
    name="greedy_decode",
    chapter="05",
    title="Build It: greedy decoding",
    difficulty="easy",
    minutes=15,
    points=3,
    attribute="greedy_decode",
    twin="vlm_course.plain:greedy_decode",
    forbidden=("vlm_course.generation:generate", "vlm_course.generation:greedy_generate"),
    interface=FunctionInterface(
        {
            "seed": "integer, for the model's weights",
            "ids": "tensor [1, T]",
            "pixels": "tensor [1, 3, H, W]",
            "max_new_tokens": "integer",
            "eos_id": "integer",
        },
        "tensor [1, n], the new ids",
        driver="vlm_course.grading.chapter05.greedy_decode:drive",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "prompt returned too": Mistake(
            "You return the prompt as well: only the new ids are the answer.",
            lambda m, i, p, n, e: torch.cat([i, loop(m, i, p, n, e)], 1),
        ),
        "first position": Mistake(
            "You take the best token of the first position: what comes next is predicted at the last.", made(place=0)
        ),
        "last but one": Mistake(
            "You read the last but one position: the last already predicts the next token.", made(place=-2)
        ),
        "never stops": Mistake("You go on after <eos>: the answer ends there.", made(stop=lambda ids, token: False)),
        "end left out": Mistake("You leave <eos> out: it belongs to the answer.", made(keep_end=False)),
        "looks for the end everywhere": Mistake(
            "You look for <eos> in the whole sequence: earlier turns end with one too. Look at the new token.",
            made(stop=lambda ids, token: True if bool((ids == 2).any()) else False),
        ),
        "one token too many": Mistake(
            "You write one token more than max_new_tokens.", lambda m, i, p, n, e: loop(m, i, p, n + 1, e)
        ),
        "no limit": Mistake(
            "Without an <eos> your loop never ends: write at most max_new_tokens.",
            lambda m, i, p, n, e: loop(m, i, p, 10_000, e),
        ),
        "one token too few": Mistake(
            "You write one token fewer than max_new_tokens allows.", lambda m, i, p, n, e: loop(m, i, p, n - 1, e)
        ),
        "ids never grow": Mistake(
            "The new token never reaches the model: put it behind the ids before the next step.",
            made(grow=lambda ids, token: ids),
        ),
        "token in front": Mistake(
            "You put the new token in front of the prompt: it belongs behind it.",
            made(grow=lambda ids, token: torch.cat([token, ids], 1)),
        ),
        "last word replaced": Mistake(
            "You overwrite the last word of the sequence: append the new token instead.",
            made(grow=lambda ids, token: torch.cat([ids[:, :-1], token], 1)),
        ),
        "image only at first": Mistake(
            "Only the first step sees the image: the model remembers nothing between calls, so hand it over each time.",
            made(later=torch.zeros_like),
        ),
        "second best": Mistake(
            "You take the second best token: after an ascending sort the best is the last.",
            made(choose=lambda scores: scores.argsort(-1)[:, -2:-1]),
        ),
    },
    also_correct={"recursion": recursive, "a list and probabilities": with_a_list},
)
