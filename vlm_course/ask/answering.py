"""From what a question asks to an answer: which questions the shipped model is asked, and what becomes of its replies.

The model was trained on questions that name their objects in a few ways ("the red star") and that are about objects in
the image. So a question that names less ("where is the star?") is completed from the model's own description of the
image, and what a question presupposes is asked first: an object that is not there is reported, not described.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from .drawing import Mark
from .reader import Reader
from .scope import Description, Intent

# What a question has to say about an object to be one of those that the model was trained on; else colour and shape.
_NAMED_BY = {
    "colour": ({"shape"},),
    "shape": ({"colour"},),
    "count": (set(), {"colour"}, {"shape"}),
    "existence": ({"colour"}, {"shape"}, {"colour", "shape"}),
}


@dataclass(frozen=True)
class Found:
    """An answer, its probability, and the objects that it is about, as far as they are known."""

    text: str
    probability: float
    objects: tuple[Description, ...] = ()


def answer(reader: Reader, intent: Intent) -> Found:
    """Answer an intent, with as few questions to the model as it takes."""
    if intent.kind == "caption":
        scene, reply = reader.describe()
        return Found(reply.text, reply.probability, tuple(scene))
    named = [{slot for slot, value in asdict(thing).items() if value} for thing in intent.objects] or [set()]
    trained = all(slots in _NAMED_BY.get(intent.kind, ({"colour", "shape"},)) for slots in named)
    if intent.kind in ("count", "existence"):
        return _about_all(reader, intent, trained)
    if intent.kind in ("colour", "shape") and not intent.objects:
        trained = True
    if not trained:
        return _resolved(reader, intent)
    things = intent.objects or (Description(),)
    reply, *presences = reader.ask(intent.canonical(), *map(_presence, things))
    for thing, presence in zip(things, presences, strict=True):
        if presence.text in ("no", "0"):
            return Found(f"I see no {thing or 'object'} in the image.", presence.probability)
        if presence.text not in ("yes", "1"):
            return _resolved(reader, intent)
    slot = {"colour": "colour", "shape": "shape"}.get(intent.kind)
    if slot:
        things = (replace(things[0], **{slot: reply.text}),)
    return Found(reply.text, reply.probability, things)


def _presence(thing: Description) -> str:
    """The question whose answer tells whether there is exactly one: colour and shape together never occur twice."""
    kind = "existence" if thing.colour and thing.shape else "count"
    return Intent(kind, (thing,) if thing else ()).canonical()


def _about_all(reader: Reader, intent: Intent, trained: bool) -> Found:
    """Count or existence; what the model has no wording for ("small circles") is looked up in its description."""
    if trained:
        (reply,) = reader.ask(intent.canonical())
        return Found(reply.text, reply.probability, intent.objects)
    scene, reply = reader.describe()
    matches = _matching(scene, *intent.objects)
    if intent.kind == "count":
        return Found(str(len(matches)), reply.probability, tuple(matches))
    return Found("yes" if bool(matches) != intent.negated else "no", reply.probability, tuple(matches))


def _resolved(reader: Reader, intent: Intent) -> Found:
    """Complete the names of the objects ("the star") from the model's description of the image, then ask."""
    scene, caption = reader.describe()
    full = []
    for thing in intent.objects or (Description(),):
        matches = _matching(scene, thing)
        if not matches:
            return Found(f"I see no {thing or 'object'} in the image.", caption.probability)
        if len(matches) > 1:
            listed = " and ".join(f"a {match}" for match in matches)
            return Found(f"I see {len(matches)} that fit: {listed}; ask about one of them.", caption.probability)
        full += matches
    asked = tuple(_as_trained(intent.kind, thing, scene) for thing in full)
    (reply,) = reader.ask(replace(intent, objects=asked).canonical())
    return Found(reply.text, reply.probability, tuple(full))


def _matching(scene: list[Description], thing: Description = Description()) -> list[Description]:  # noqa: B008 (frozen)
    wanted = {slot: value for slot, value in asdict(thing).items() if value}
    return [seen for seen in scene if wanted.items() <= asdict(seen).items()]


def _as_trained(kind: str, thing: Description, scene: list[Description]) -> Description:
    """The name that the training's questions give to an object: the size only where it is needed."""
    if kind not in ("colour", "shape"):
        return replace(thing, size="")
    name = Description(shape=thing.shape) if kind == "colour" else Description(colour=thing.colour)
    return name if len(_matching(scene, name)) == 1 else replace(name, size=thing.size)


def point_out(reader: Reader, intent: Intent, found: Found) -> list[Mark]:
    """Where the objects of the answer are, as the model points to them, in pixels of the reader's image."""
    things = found.objects
    if intent.kind in ("box", "point") and things:
        place = reader.place(found.text)
        return [Mark(str(things[0]), place)] if place else []
    if intent.kind in ("count", "existence"):
        if found.text in ("0", "yes" if intent.negated else "no"):
            return []
        things = _matching(reader.describe()[0], *intent.objects)
    things = [replace(thing, size="") for thing in things if thing.colour and thing.shape]
    if not things:
        return []
    replies = reader.ask(*(Intent("box", (thing,)).canonical() for thing in things))
    places = [(thing, reader.place(reply.text)) for thing, reply in zip(things, replies, strict=True)]
    return [Mark(str(thing), place) for thing, place in places if place]
