"""What a question asks for, in the words that the shipped model was trained on, or why it is refused.

A small model answers anything, a question about people as readily as one about circles. So the words are looked at
before the image is: every word must be in a closed lexicon (`lexicon.py`), the words must name one kind of question,
and nothing may be left over. What passes is rewritten to the canonical form of its kind in `worlds.templates`: "what
hue does the disk have?" reaches the model as "what color is the circle ?".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..worlds.templates import QUESTIONS
from .lexicon import REASON_OF
from .words import NotUnderstood, Token, lex, rewrite

MAX_WORDS = 60


class QuestionError(ValueError):
    """A text that cannot be a question at all (empty, endless). The message is one sentence."""


@dataclass(frozen=True)
class Description:
    """An object by what was said of it; "" where nothing was."""

    size: str = ""
    colour: str = ""
    shape: str = ""

    def __bool__(self) -> bool:
        return bool(self.size or self.colour or self.shape)

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Intent:
    """One question that the model was made for.

    `kind` is one of `worlds.dialogs.KINDS`; `objects` has two descriptions for relation and check, else at most one;
    `direction` belongs to check, `negated` to existence.
    """

    kind: str
    objects: tuple[Description, ...] = ()
    direction: str = ""
    negated: bool = False

    def canonical(self) -> str:
        """The question in the wording that the model was trained on."""
        group = self.kind
        if self.kind == "shape" and not any(self.objects):
            group = "only shape"
        elif self.kind == "existence" and self.negated:
            group = "absence"
        elif self.kind == "check":
            group = "beside" if self.direction in ("left", "right") else "over"
        words = {"{direction}": self.direction, "{noun}": "objects" if self.kind == "count" else "object"}
        for suffix, thing in zip(("", "2"), self.objects or (Description(),), strict=False):
            noun = "object"
            if self.kind == "count":
                noun = f"{thing.shape}{'es' * (thing.shape == 'cross') or 's'}" if thing.shape else "objects"
                words["{noun}"] = noun
            # A template without a place for the size still names it where it was said, before the colour.
            words |= {f"{{size{suffix}}}": thing.size, f"{{colour{suffix}}}": thing.colour}
            words[f"{{shape{suffix}}}"] = thing.shape or noun
            if f"{{size{suffix}}}" not in QUESTIONS[group][0]:
                words[f"{{colour{suffix}}}"] = f"{thing.size} {thing.colour}"
        text = " ".join(words.get(word, word) for word in QUESTIONS[group][0].split())
        return " ".join(text.split())


@dataclass(frozen=True)
class Refusal:
    """A question that the model was not made for, with one sentence for the learner."""

    sentence: str


def understand(question: str) -> Intent | Refusal:
    """Read a question.

    Raises:
        QuestionError: it is empty or longer than `MAX_WORDS` words.
    """
    if not question.strip():
        raise QuestionError('The question is empty: ask, for example, "what color is the circle?".')
    length = len(question.split(maxsplit=MAX_WORDS))
    if length > MAX_WORDS or len(question) > 20 * MAX_WORDS:
        raise QuestionError(f"The question is too long: ask one question of at most {MAX_WORDS} words.")
    try:
        return _intent(lex(rewrite(question)))
    except NotUnderstood as reason:
        return Refusal(
            f"I was not made for this question ({reason}): ask about the color, shape, size, number or place of the "
            "shapes in the image."
        )


def _intent(tokens: list[Token]) -> Intent:
    tokens = _attributes(tokens)
    directions = [t for t in tokens if t.tag == "direction"]
    tokens = _options(tokens)
    tags = {t.tag for t in tokens}
    chunks = _chunks(tokens)
    if directions or "RELATIVE" in tags:
        return _relation(tokens, tags, chunks, {t.value for t in directions})
    if "THAN" in tags:
        raise NotUnderstood(REASON_OF["same"])
    if ("WRITE" in tags and "CAPTION" not in tags) or ("DRAW" in tags and "BOX" not in tags):
        raise NotUnderstood("I look at images and do not make anything")
    thing, named = _merge(chunks), bool(chunks)
    negated = sum(t.tag == "NOT" for t in tokens) % 2 == 1
    polar = not tags & {"WHAT", "HOW", "NAME", "ASK_SIZE"}
    opens = next((t.tag for t in tokens if t.tag != "filler"), "") in {"BE", "DO", "ANY", "IF", "THERE", "NOT"}
    asks_whether = polar and (opens or bool(tags & {"IF", "THERE"}))

    asked = tags & {"COLOUR", "SHAPE", "ASK_SIZE"}
    given = {"COLOUR": thing.colour, "SHAPE": thing.shape, "ASK_SIZE": thing.size}
    if len(asked) > 1 or asks_whether:
        asked = {cue for cue in asked if not given[cue]}
    cues = [("BOX", "box"), ("COUNTING", "count"), ("CAPTION", "caption"), ("POINT", "point"), ("WHERE", "box")]
    kind = next((kind for cue, kind in cues if cue in tags), None)
    if opens and {t.word for t in tokens if t.tag == "WHERE"} == {"find"}:
        kind, asks_whether = None, True  # "can you find a star?" asks whether, "find the star" asks where

    if kind not in ("count", "caption"):
        if "ALL" in tags:
            raise NotUnderstood("I answer about one object, and count them")
        if not tags & {"THERE", "NOT"} and not _image_is_the_place(tokens):
            raise NotUnderstood("I answer about the shapes in the image, not about the image itself")
    if kind == "point" and next(t.tag for t in tokens if t.tag != "filler") == "BE":
        raise NotUnderstood(REASON_OF["same"])
    if kind is None and asked:
        several = {"shapes", "objects", "things", "their", "colors", "colours", "hues", "sizes"} & {
            t.word for t in tokens
        }
        if (len(asked) > 1 or several) and not thing and not negated:
            return Intent("caption")
        if len(asked) > 1:
            raise NotUnderstood("one question at a time")
        (cue,) = asked
        if given[cue] or negated:
            raise NotUnderstood("that is no question about the shapes in the image")
        return Intent({"COLOUR": "colour", "SHAPE": "shape", "ASK_SIZE": "size"}[cue], (thing,) if thing else ())
    if kind is None and tags & {"WHAT", "NAME"} and not negated:
        if thing and not thing.shape:
            return Intent("shape", (thing,))
        if not thing and tags & {"THERE", "IMAGE"}:
            return Intent("caption")
    if kind == "caption" and not thing and not negated:
        return Intent("caption")
    if kind == "count" and not asked and not negated:
        return Intent("count", (thing,) if thing else ())
    if kind in ("box", "point") and thing and not asked and not negated:
        return Intent(kind, (thing,))
    if kind is None and asks_whether and thing and (thing.shape or (named and not tags & {"COLOUR"})):
        return Intent("existence", (thing,), negated=negated)
    raise NotUnderstood("I could not find out what it asks")


def _attributes(tokens: list[Token]) -> list[Token]:
    """Tell asking for a property from naming it: "what shape", "how large", "the number of"."""
    out, before = [], ""
    for i, token in enumerate(tokens):
        after = tokens[i + 1].word if i + 1 < len(tokens) else ""
        tag, counted = token.tag, token.word in ("count", "total") or after == "of"
        if token.word in ("shape", "figure") and (before in ("WHAT", "KIND", "FORM", "'s") or after == "of"):
            tag = "SHAPE"
        elif tag in ("FORM", "KIND"):
            tag = "SHAPE"
        elif tag == "SIZE" or (tag == "size" and before == "HOW"):
            tag = "ASK_SIZE"
        elif (tag == "MANY" and before == "HOW") or (tag == "COUNT" and counted):
            tag = "COUNTING"
        elif tag in ("MANY", "COUNT"):
            raise NotUnderstood("I cannot read numbers, only count shapes")
        elif tag == "PAINTED":
            colour_named = any(t.tag == "colour" for t in tokens)
            tag = "filler" if colour_named else "COLOUR"
        out.append(replace(token, tag=tag))
        before = tag if tag != "filler" else ("'s" if token.word == "'s" else before)
    return out


def _options(tokens: list[Token]) -> list[Token]:
    """ "small or large?" asks for the size as "what size?" does; so do two colours and two shapes for theirs."""
    if not any(t.tag == "OR" for t in tokens):
        return tokens
    for tag, cue in (("direction", "RELATIVE"), ("size", "ASK_SIZE"), ("colour", "COLOUR"), ("shape", "SHAPE")):
        if len({t.value for t in tokens if t.tag == tag}) > 1:
            if tag == "direction":
                return tokens
            if any(t.tag in ("THERE", "ANY") for t in tokens):
                break  # "is there a red or a blue star?"
            left = [t for t in tokens if t.tag not in (tag, "OR")]
            return [*left, Token(cue, cue, "")]
    raise NotUnderstood("one question at a time")


def _chunks(tokens: list[Token]) -> list[tuple[int, Description]]:
    """The descriptions in the order of the text, with the position of each: [small red star], [the object]."""
    chunks: list[tuple[int, Description]] = []
    parts: dict[str, str] = {}
    closed = True
    for i, token in enumerate(tokens):
        if token.tag in ("size", "colour", "shape", "noun"):
            if closed or token.tag in parts or "noun" in parts or "shape" in parts:
                parts, closed = {}, False
                chunks.append((i, Description()))
            parts[token.tag] = token.value
            chunks[-1] = (chunks[-1][0], Description(**{k: v for k, v in parts.items() if k != "noun"}))
        elif token.word == "and" and parts and "noun" not in parts and "shape" not in parts:
            continue
        else:
            closed = True
    return chunks


def _image_is_the_place(tokens: list[Token]) -> bool:
    """Whether "the image" comes only after "in" or the like: "what color is the image?" is about something else."""
    for i, token in enumerate(tokens):
        if token.tag == "IMAGE" and not {"in", "on", "from", "NOT"} & {
            w for t in tokens[max(0, i - 2) : i] for w in (t.word, t.tag)
        }:
            return False
    return True


def _merge(chunks: list[tuple[int, Description]]) -> Description:
    """One description from all that was said: "is the circle red" is about a red circle."""
    merged: dict[str, str] = {}
    for _, chunk in chunks:
        for slot in ("size", "colour", "shape"):
            value = getattr(chunk, slot)
            if value and merged.setdefault(slot, value) != value:
                raise NotUnderstood("I answer about one object, or about where one is relative to another")
    return Description(**merged)


def _relation(tokens, tags, chunks, directions: set[str]) -> Intent:
    """Left of, right of, above, below: a statement to confirm, or the relation itself."""
    things = [(i, chunk) for i, chunk in chunks if chunk]
    other = tags & {"COUNTING", "COLOUR", "SHAPE", "ASK_SIZE", "BOX", "CAPTION", "NOT", "DRAW", "WRITE"}
    if len(things) != 2 or other:
        raise NotUnderstood("where something is can be asked relative to one other object, both of them named")
    (_, first), (_, second) = things
    cue = next(i for i, t in enumerate(tokens) if t.tag in ("direction", "RELATIVE"))
    before_both = cue < things[0][0]
    if before_both and tokens[cue].value in ("left", "right") and tokens[cue + 1].word not in ("of", "from"):
        raise NotUnderstood("where something is can be asked relative to one other object, both of them named")
    if before_both:  # "on which side of the star is the circle", "relative to the star, where ..."
        first, second = second, first
    if len(directions) == 1 and not tags & {"WHAT", "HOW", "WHERE", "OR"}:
        return Intent("check", (first, second), direction=next(iter(directions)))
    if (len(directions) > 1 and "OR" in tags) or (not directions and tags & {"WHAT", "HOW", "WHERE"}):
        # Options before both objects ("left or right of the star: the circle") would swap them, too.
        return Intent("relation", (first, second))
    raise NotUnderstood("one relation at a time")
