"""Exercise: greedy decoding with a KV cache."""

import torch

from vlm_course.grading.chapter05.watched import cases, greedy, watched
from vlm_course.grading.exercise import Exercise, FunctionInterface, Mistake
from vlm_course.plain import PlainKVCache

READ, SEEN = "tokens that the decoder reads at each step", "images that the tower encodes"


def drive(answer, seed, ids, pixels, max_new_tokens, eos_id):
    """Lets the learner's loop use a model made here, and notes what the loop makes it do.

    It runs twice: a cache that is full when the second call begins ends it, since what follows depends on the past.
    A last pass whose logits nobody uses is not counted: it is a waste, not an error.
    """
    for _ in range(2):
        model, notes = watched(seed)
        new = answer(model, ids, pixels, max_new_tokens, eos_id)
        if notes.held and notes.held[0]:
            return {"new ids": "from a cache that was full at the start", READ: (), SEEN: 0}
    steps = new.shape[1] if isinstance(new, torch.Tensor) and new.ndim == 2 else len(notes.read)
    return {"new ids": new, READ: tuple(notes.read[:steps]), SEEN: sum(notes.images)}


def oracle(seed, ids, pixels, max_new_tokens, eos_id):
    """The tokens of the loop without a cache, the prompt read once, every new token alone."""
    new = greedy(seed, ids, pixels, max_new_tokens, eos_id)
    return {"new ids": torch.tensor([new]), READ: (ids.shape[1], *[1] * (len(new) - 1)), SEEN: len(pixels)}


def loop(model, ids, pixels, limit, eos, *, cache=None, place=-1, stops=True, keep_end=True, feed=None, renew=False):
    """A right loop whose steps can be exchanged one by one."""
    cache = PlainKVCache() if cache is None else cache
    feed = feed or (lambda model, token, ids, new: model.decoder.embed(token))
    embeds, new = model.embed(ids, pixels), []
    for _ in range(limit):
        cache = PlainKVCache() if renew else cache
        token = model.decoder(embeds, cache=cache)[:, place].argmax(-1, keepdim=True)
        if stops and token.item() == eos and not keep_end:
            break
        new.append(token)
        if stops and token.item() == eos:
            break
        embeds = feed(model, token, ids, new)
    return torch.cat(new, 1)


def made(**steps):
    """An answer that differs from the right one in the given steps."""
    return lambda model, ids, pixels, limit, eos: loop(model, ids, pixels, limit, eos, **steps)


def recomputed(model, ids, pixels, limit, eos):
    """The loop without a cache."""
    start = ids.shape[1]
    for _ in range(limit):
        token = model(ids, pixels)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        if token.item() == eos:
            break
    return ids[:, start:]


def image_again(model, ids, pixels, limit, eos):
    """Encodes the image at every step and hands on the last embedding alone."""

    def feed(model, token, ids, new):
        return model.embed(torch.cat([ids, *new], 1), pixels)[:, -1:]

    return loop(model, ids, pixels, limit, eos, feed=feed)


def everything_again(model, ids, pixels, limit, eos):
    """Hands the whole sequence to a decoder that already has it in its cache."""

    def feed(model, token, ids, new):
        return model.decoder.embed(torch.cat([ids, *new], 1))

    return loop(model, ids, pixels, limit, eos, feed=feed)


def all_new_again(model, ids, pixels, limit, eos):
    """Hands over all new tokens at each step, not the newest alone."""
    return loop(
        model, ids, pixels, limit, eos, feed=lambda model, token, ids, new: model.decoder.embed(torch.cat(new, 1))
    )


def never_seen(model, ids, pixels, limit, eos):
    """Embeds the placeholders as words."""
    cache, step, new = PlainKVCache(), ids, []
    for _ in range(limit):
        step = model.decoder(model.decoder.embed(step), cache=cache)[:, -1].argmax(-1, keepdim=True)
        new.append(step)
        if step.item() == eos:
            break
    return torch.cat(new, 1)


def last_word_twice(model, ids, pixels, limit, eos):
    """Fills the cache with the prompt, then starts the loop with the prompt's last word."""
    cache = PlainKVCache()
    model.decoder(model.embed(ids, pixels), cache=cache)
    step, new = ids[:, -1:], []
    for _ in range(limit):
        step = model.decoder(model.decoder.embed(step), cache=cache)[:, -1].argmax(-1, keepdim=True)
        new.append(step)
        if step.item() == eos:
            break
    return torch.cat(new, 1)


def kept_between_calls(model, ids, pixels, limit, eos, cache=PlainKVCache()):  # noqa: B008  (the mistake itself)
    """A cache as a default argument is made once, for all calls."""
    return loop(model, ids, pixels, limit, eos, cache=cache)


def prompt_first(model, ids, pixels, max_new_tokens, eos_id):
    """The prompt before the loop, the decoder's own cache, and the rest of the prompt after its first half."""
    cache, embeds = model.decoder.new_cache(), model.embed(ids, pixels)
    best = int(model.decoder(embeds, cache=cache, logits_to_keep=1).argmax(-1))
    new = [best]
    while best != eos_id and len(new) < max_new_tokens:
        best = int(model.decoder(model.decoder.embed(torch.tensor([[best]])), cache=cache).argmax(-1))
        new.append(best)
    return torch.tensor([new])


def one_pass_too_many(model, ids, pixels, max_new_tokens, eos_id):
    """Runs the decoder behind the last token too: a waste, not an error."""
    cache, new = PlainKVCache(), []
    logits = model.decoder(model.embed(ids, pixels), cache=cache)
    for _ in range(max_new_tokens):
        new.append(logits[0, -1].argmax().view(1, 1))
        logits = model.decoder(model.decoder.embed(new[-1]), cache=cache)
        if new[-1] == eos_id:
            break
    return torch.cat(new, dim=1)


GREEDY_CACHED = Exercise(
    name="greedy_cached",
    chapter="05",
    title="Build It: decoding with the cache",
    difficulty="medium",
    minutes=20,
    points=4,
    attribute="greedy_cached",
    twin="vlm_course.plain:greedy_cached",
    forbidden=(
        "vlm_course.plain:greedy_decode",
        "vlm_course.generation:generate",
        "vlm_course.generation:greedy_generate",
    ),
    interface=FunctionInterface(
        {
            "seed": "integer, for the model's weights",
            "ids": "tensor [1, T]",
            "pixels": "tensor [1, 3, H, W]",
            "max_new_tokens": "integer",
            "eos_id": "integer",
        },
        "dict of the new ids and of how often what was read",
        driver="vlm_course.grading.chapter05.greedy_cached:drive",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "no cache": Mistake(
            "Right tokens, but the decoder reads the whole sequence for each: give it a cache and the new token alone.",
            recomputed,
        ),
        "image at every step": Mistake(
            "The image is encoded at every step: it is in the cache after the first, so embed only the new token.",
            image_again,
        ),
        "everything again": Mistake(
            "You hand the whole sequence over again, behind its copy in the cache: only the new token is new.",
            everything_again,
        ),
        "all new tokens again": Mistake(
            "You hand over all new tokens at each step: those before the newest are in the cache already.",
            all_new_again,
        ),
        "new cache every step": Mistake(
            "Later steps do not find the prompt: make one cache, before the loop, and hand it to every pass.",
            made(renew=True),
        ),
        "image never read": Mistake(
            "The image is never read: model.embed(ids, pixels) embeds the prompt with it, decoder.embed only words.",
            never_seen,
        ),
        "old word again": Mistake(
            "You hand over the prompt's last word at each step: hand over the new token.",
            made(feed=lambda model, token, ids, new: model.decoder.embed(ids[:, -1:])),
        ),
        "no limit": Mistake(
            "Without an <eos> your loop never ends: write at most max_new_tokens.",
            lambda m, i, p, n, e: loop(m, i, p, 10_000, e),
        ),
        "last word twice": Mistake(
            "The last word of the prompt is read twice: the first new token comes from the pass over the prompt.",
            last_word_twice,
        ),
        "cache kept between calls": Mistake(
            "Your cache lives on after the call, so the next question finds the last one's image: make it inside.",
            kept_between_calls,
        ),
        "first position": Mistake(
            "You take the best token of the first position: what comes next is predicted at the last.", made(place=0)
        ),
        "never stops": Mistake("You go on after <eos>: the answer ends there.", made(stops=False)),
        "end left out": Mistake("You leave <eos> out: it belongs to the answer.", made(keep_end=False)),
        "prompt returned too": Mistake(
            "You return the prompt as well: only the new ids are the answer.",
            lambda m, i, p, n, e: torch.cat([i, loop(m, i, p, n, e)], 1),
        ),
        "one token too many": Mistake(
            "You write one token more than max_new_tokens.", lambda m, i, p, n, e: loop(m, i, p, n + 1, e)
        ),
    },
    also_correct={"prompt first, another cache": prompt_first, "one pass too many": one_pass_too_many},
)
