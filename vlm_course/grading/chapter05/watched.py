"""A model that notes how it is used, for the exercises that write an answer token by token."""

from dataclasses import dataclass, field
from functools import cache

import torch

from vlm_course.grading.chapter05.tiny import EOS_ID, pictures, prompt, read_alone, tiny_llava
from vlm_course.grading.exercise import Case
from vlm_course.plain import PlainLlava


@dataclass(frozen=True)
class Notes:
    """What a model was made to do, call by call of its parts."""

    read: list[int] = field(default_factory=list)  # tokens that the decoder read
    held: list[int] = field(default_factory=list)  # tokens in its cache before that
    images: list[int] = field(default_factory=list)  # images that were encoded


def watched(seed: int) -> tuple[PlainLlava, Notes]:
    """The model, and the notes that fill up while it runs."""
    reference = tiny_llava(seed)
    model = PlainLlava(reference.config)
    model.load_state_dict(reference.state_dict())
    model.eval().requires_grad_(False)
    notes = Notes()

    def note(module, arguments, keywords):
        notes.read.append((arguments[0] if arguments else keywords["embeds"]).shape[1])
        cache = keywords.get("cache")
        notes.held.append(0 if cache is None else cache.length)

    model.decoder.register_forward_pre_hook(note, with_kwargs=True)
    model.bridge.register_forward_pre_hook(lambda module, arguments: notes.images.append(len(arguments[0])))
    return model, notes


def greedy(seed: int, ids: torch.Tensor, pixels: torch.Tensor, max_new_tokens: int, eos_id: int) -> list[int]:
    """The oracle: the whole row read alone for every token, by a loop over the scores."""
    model, row, new = tiny_llava(seed), ids[0].tolist(), []
    while len(new) < max_new_tokens and eos_id not in new:
        scores = read_alone(model, row + new, pixels)[-1].tolist()
        new.append(max(range(len(scores)), key=scores.__getitem__))
    return new


@cache
def cases(seed: int) -> list[Case]:
    """One prompt that runs to the limit, one whose answer ends early, one whose earlier turn ended with <eos>.

    The weights are those of the first seed whose answer shows what the case is for.
    """

    def case(ends: bool, limit: int, earlier_end: bool, start: int) -> Case:
        for number in range(start, start + 400):
            ids = prompt(number, text=(2, 5))
            if earlier_end:
                ids = [*ids[:-3], EOS_ID, *ids[-2:]]
            row, pixels = torch.tensor([ids]), pictures(number, 1)
            new = greedy(number, row, pixels, limit + 2, EOS_ID)
            # Different words, so that a repeated or a forgotten one shows; the end early, or not even two steps later.
            ended = EOS_ID in new
            varied = len(set(new)) >= min(3, limit)
            if varied and (3 <= len(new) < limit if ends else not ended):
                names = ("seed", "ids", "pixels", "max_new_tokens", "eos_id")
                return Case(dict(zip(names, (number, row, pixels, limit, EOS_ID), strict=True)))
        raise ValueError(f"no weights among {start} to {start + 400} show ends={ends}")

    first = 1_000 * seed
    return [case(False, 6, False, first), case(True, 8, False, first + 400), case(False, 5, True, first + 800)]
