"""Exercise: a cache for keys and values."""

import torch

from vlm_course.grading.answers import Failure
from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake

NOT_EMPTY = {"length": "more than 0 in a new cache", "update": ()}


def drive(answer, first, second, layers):
    """Two passes through all layers, then one pass of another cache.

    first, second: keys and values of the new tokens, [2, layers, B, H, T, d]. Returns what every call gave, and the
    lengths before, between and after. A new cache that is not empty ends it: what it holds depends on earlier calls.
    """
    if callable(getattr(answer(), "length", None)):
        raise Failure("error", "length is a method of your cache: keep the @property above it, it is read as a number.")
    if answer().length:
        return NOT_EMPTY
    cache = answer()
    given, lengths = [], [cache.length]
    for keys, values in (first, second):
        for layer in range(layers):
            given += list(cache.update(layer, keys[layer].clone(), values[layer].clone()))
        lengths.append(cache.length)
    other = answer()
    if other.length:
        return NOT_EMPTY
    lengths.append(other.length)
    given += list(other.update(0, first[0][0].clone(), first[1][0].clone()))
    return {"length": tuple(lengths), "update": tuple(given)}


def oracle(first, second, layers):
    """Token by token, into lists."""
    given = []
    for passes in ((first,), (first, second)):
        for layer in range(layers):
            for kind in (0, 1):
                tokens = [part[kind][layer][:, :, t] for part in passes for t in range(part.shape[4])]
                given.append(torch.stack(tokens, 2))
    lengths = (0, first.shape[4], first.shape[4] + second.shape[4], 0)
    return {"length": lengths, "update": (*given, first[0][0], first[1][0])}


def cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(batch: int, heads: int, tokens: int, more: int, width: int, layers: int) -> Case:
        shape = lambda t: (2, layers, batch, heads, t, width)  # noqa: E731
        first, second = (torch.randn(shape(t), generator=generator) for t in (tokens, more))
        return Case({"first": first, "second": second, "layers": layers})

    # As many new tokens as old ones hide a wrong order of shapes, so the second pass is shorter, once a single token.
    return [case(1, 2, 5, 1, 4, 2), case(2, 3, 4, 2, 5, 3), case(3, 1, 2, 2, 2, 2)]


class Variant:
    """A right cache whose steps can be exchanged one by one."""

    axis, shared = 2, False

    def __init__(self):
        self.kept = self.common if self.shared else {}
        self.calls, self.first = 0, None

    def length_of(self):
        return next(iter(self.kept.values()))[0].shape[2] if self.kept else 0

    @property
    def length(self):
        return self.length_of()

    def place(self, layer):
        return layer

    def join(self, old, new):
        return torch.cat([old, new], self.axis)

    def result(self, whole, new):
        return whole

    def update(self, layer, keys, values):
        self.calls += 1
        old, new = self.kept.get(self.place(layer)), (keys, values)
        whole = new if old is None else tuple(self.join(a, b) for a, b in zip(old, new, strict=True))
        self.first = keys.shape[2] if self.first is None else self.first
        self.kept[self.place(layer)] = whole
        return self.result(whole, new)


def made(**changes):
    """A class that differs from the right one in the given attributes."""

    def build():
        cache = type("Changed", (Variant,), changes)
        return cache()

    return build


def shared():
    """A store in the class: every cache, also that of the next question, writes into the same one."""
    if not hasattr(shared, "kept"):
        shared.kept = {}
    return type("Shared", (Variant,), {"shared": True, "common": shared.kept})()


class Pieces:
    """Keeps the pieces and joins them when they are read."""

    def __init__(self):
        self.keys, self.values = [], []

    @property
    def length(self):
        return sum(piece.shape[-2] for piece in self.keys[0]) if self.keys else 0

    def update(self, layer, keys, values):
        if layer == len(self.keys):
            self.keys.append([])
            self.values.append([])
        self.keys[layer].append(keys)
        self.values[layer].append(values)
        return torch.cat(self.keys[layer], -2), torch.cat(self.values[layer], -2)


class Buffers:
    """Writes into a buffer with room, and returns a view of the part in use."""

    def __init__(self):
        self.buffers, self.used = {}, {}

    @property
    def length(self):
        return max(self.used.values(), default=0)

    def update(self, layer, keys, values):
        start = self.used.get(layer, 0)
        if layer not in self.buffers:
            batch, heads, _, width = keys.shape
            self.buffers[layer] = torch.zeros(2, batch, heads, 64, width)
        end = self.used[layer] = start + keys.shape[2]
        self.buffers[layer][0, :, :, start:end] = keys
        self.buffers[layer][1, :, :, start:end] = values
        return tuple(self.buffers[layer][:, :, :, :end])


PLAIN_KV_CACHE = Exercise(
    name="plain_kv_cache",
    chapter="05",
    title="Build It: a KV cache",
    difficulty="medium",
    minutes=15,
    points=3,
    attribute="PlainKVCache",
    twin="vlm_course.plain:PlainKVCache",
    forbidden=("vlm_course.decoder:KVCache",),
    interface=FunctionInterface(
        {
            "first": "tensor [2, layers, B, H, T, d], keys and values of the prompt",
            "second": "the same for the tokens after it",
            "layers": "integer",
        },
        "dict of the lengths and of what update returned",
        driver="vlm_course.grading.chapter05.kv_cache:drive",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "along the heads": Mistake(
            "You join along the heads: keys are [B, H, T, d], tokens are dimension 2.", made(axis=1)
        ),
        "along the batch": Mistake(
            "You join along the batch: keys are [B, H, T, d], tokens are dimension 2.", made(axis=0)
        ),
        "along the width": Mistake(
            "You join along the width of a head: keys are [B, H, T, d], tokens are dimension 2.", made(axis=3)
        ),
        "new in front": Mistake(
            "You put the new tokens in front of the old ones: the causal mask takes the last key for the newest.",
            made(join=lambda self, old, new: torch.cat([new, old], 2)),
        ),
        "only the new returned": Mistake(
            "You return the new keys and values alone: attention needs those of all tokens so far.",
            made(result=lambda self, whole, new: new),
        ),
        "old ones lost": Mistake(
            "Your cache keeps only the newest tokens: append to what the layer has stored.",
            made(join=lambda self, old, new: new),
        ),
        "new ones lost": Mistake(
            "Your cache keeps what came first and drops what comes later: append the new tokens.",
            made(join=lambda self, old, new: old),
        ),
        "one store for all layers": Mistake(
            "All your layers write into one store: each needs its own.", made(place=lambda self, layer: 0)
        ),
        "keys twice": Mistake(
            "You return the keys in place of the values.", made(result=lambda self, whole, new: (whole[0], whole[0]))
        ),
        "values first": Mistake(
            "You return values before keys: the order is keys, values.",
            made(result=lambda self, whole, new: whole[::-1]),
        ),
        "length over all layers": Mistake(
            "Your length adds up the layers: it counts tokens, which are the same in every layer.",
            made(length_of=lambda self: sum(keys.shape[2] for keys, _ in self.kept.values())),
        ),
        "length in calls": Mistake(
            "Your length counts calls of update: it must count tokens.", made(length_of=lambda self: self.calls)
        ),
        "length of the prompt": Mistake(
            "Your length stays that of the prompt: new tokens would get the positions of old ones.",
            made(length_of=lambda self: self.first or 0),
        ),
        "length of the layers": Mistake(
            "Your length is the number of layers: it must count tokens.", made(length_of=lambda self: len(self.kept))
        ),
        "shared by all caches": Mistake(
            "All your caches share one store: make it in __init__, not in the class, or questions mix.", shared
        ),
    },
    also_correct={"pieces": Pieces, "buffers": Buffers},
)
