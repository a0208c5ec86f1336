"""Questions about scenes with exact answers, and whole conversations, as integer tensors made on the device.

Ten kinds of question: colour, shape, size, count, existence (half the answers are "yes"), relation (left, right, above,
below), check (a relation to confirm, half "yes"), point, box and caption. A question names its object without ambiguity:
"the star" only where there is one star, else "the small star", and the kind does not apply to a scene where no object
can be named (`Turns.valid`).

Coordinates in text are whole numbers on a 0..255 grid over the image; `from_grid` returns to pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tokenizer import WordTokenizer
from . import templates
from .scenes import COLOURS, GRID, IMAGE_SIZE, MAX_OBJECTS, SHAPES, SIZES, Scenes, held_out_table
from .templates import ANSWERS, DIRECTIONS, QUESTIONS, SLOTS, compact, fill

KINDS = ("colour", "shape", "size", "count", "existence", "relation", "check", "point", "box", "caption")
LOCATIONS = 256
QUESTION_LENGTH, ANSWER_LENGTH = 24, 5 * MAX_OBJECTS
DOMINANCE = 1.3  # a relation is asked only where one axis differs by this factor more than the other


@dataclass(frozen=True)
class Turns:
    """One question and answer about each of B scenes."""

    kind: Tensor  # [B] long, index into KINDS
    question: Tensor  # [B, 24] ids, padded with 0 at the end
    answer: Tensor  # [B, 30] ids, padded with 0 at the end, without <eos>
    target: Tensor  # [B] long, the object slot that the question is about (0 where it is about no single one)
    valid: Tensor  # [B] bool, whether the kind applies to the scene


def to_grid(pixels: Tensor) -> Tensor:
    """Pixels to whole numbers 0..255."""
    return (pixels * (LOCATIONS / IMAGE_SIZE)).floor().clamp(0, LOCATIONS - 1).long()


def from_grid(grid: Tensor) -> Tensor:
    """Whole numbers 0..255 to pixels, at the middle of the bin: off by at most 0.19 pixels."""
    return (grid + 0.5) * (IMAGE_SIZE / LOCATIONS)


class Dialogs:
    """Makes questions and conversations on one device.

    Args:
        tokenizer: must know every word of `templates.vocabulary()`.
        canonical: always use the first wording of a kind.
    """

    def __init__(self, tokenizer: WordTokenizer | None = None, *, device="cpu", canonical: bool = False):
        self.tokenizer = tok = tokenizer or WordTokenizer.small()
        self.device, self.canonical = torch.device(device), canonical
        ids = lambda words: torch.tensor([tok.id_of(w) for w in words], device=device)  # noqa: E731
        self.size_ids, self.colour_ids, self.shape_ids = ids(SIZES), ids(COLOURS), ids(SHAPES)
        self.plural_ids, self.direction_ids = ids(templates.PLURALS), ids(DIRECTIONS)
        self.row_ids, self.column_ids = ids(templates.ROWS), ids(templates.COLUMNS)
        self.noun_ids, self.nouns_ids = ids(("object", "shape")), ids(("objects", "shapes"))
        self.no, self.yes = tok.id_of("no"), tok.id_of("yes")
        self.first_number = tok.id_of("0")
        self.held_out = held_out_table(device)
        self._questions = {k: self._pad(templates.table(v, tok, device), QUESTION_LENGTH) for k, v in QUESTIONS.items()}
        self._answers = {k: self._pad(templates.table([v], tok, device), ANSWER_LENGTH) for k, v in ANSWERS.items()}
        self._object = templates.table([templates.OBJECT], tok, device)
        self._placed = templates.table([templates.PLACED_OBJECT], tok, device)

    # --- building blocks ----------------------------------------------------------------------------------------------

    @staticmethod
    def _pad(rows: Tensor, length: int) -> Tensor:
        return torch.nn.functional.pad(rows, (0, length - rows.shape[1]))

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, device=self.device)

    def _randint(self, high: int, n: int) -> Tensor:
        return torch.randint(high, (n,), generator=self._generator, device=self.device)

    def _pick(self, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """A random True of each row: [B, K] -> index [B], whether there was one [B]."""
        score = self._rand(*allowed.shape).masked_fill(~allowed, -1.0)
        return score.argmax(1), allowed.any(1)

    def _template(self, group: str, n: int) -> Tensor:
        rows = self._questions[group]
        return rows[self._wording(len(rows), n)]

    def _wording(self, choices: int, n: int) -> Tensor:
        """Which of several wordings each row uses; always the first where they are to be canonical."""
        return self._randint(choices, n) * (not self.canonical)

    def _slots(self, rows: int, /, **values: Tensor) -> Tensor:
        slots = torch.zeros(rows, len(SLOTS), dtype=torch.long, device=self.device)
        for name, value in values.items():
            slots[:, SLOTS.index(name)] = value
        return slots

    def _noun(self, n: int) -> Tensor:
        return self.noun_ids[self._wording(2, n)]

    def _done(self, group: str, kind: str, slots: Tensor, target: Tensor, valid: Tensor):
        """Fill the question of `group` and the answer of `kind`."""
        n = len(slots)
        return fill(self._template(group, n), slots), fill(self._answers[kind].expand(n, -1), slots), target, valid

    def _yes_no(self, question: Tensor, answer: Tensor, target: Tensor, valid: Tensor):
        word = torch.where(answer, self.yes, self.no)
        return question, self._pad(word[:, None], ANSWER_LENGTH), target, valid

    @staticmethod
    def _at(values: Tensor, index: Tensor) -> Tensor:
        """values [B, K, ...] at one slot of each row."""
        return values[torch.arange(len(values), device=values.device), index]

    # --- one method a kind: scenes -> question ids, answer ids, target slot, valid -----------------------------------

    def _attribute(self, scenes: Scenes, named: Tensor):
        """Colour by shape or shape by colour: pick an object whose `named` attribute, alone or with its size, is unique."""
        present = scenes.present
        both = present[:, :, None] & present[:, None, :]
        same = both & (named[:, :, None] == named[:, None, :])
        same_size = same & (scenes.size[:, :, None] == scenes.size[:, None, :])
        unique, unique_with_size = same.sum(2) == 1, same_size.sum(2) == 1
        target, valid = self._pick(present & (unique | unique_with_size))
        needs_size = ~self._at(unique, target)
        return target, valid, torch.where(needs_size, self.size_ids[self._at(scenes.size, target)], 0)

    def _colour(self, scenes: Scenes):
        n = len(scenes)
        target, valid, size = self._attribute(scenes, scenes.shape)
        shape = self.shape_ids[self._at(scenes.shape, target)]
        alone = (scenes.count == 1) & (self._rand(n) < 0.4) & (not self.canonical)
        shape = torch.where(alone, self._noun(n), shape)
        slots = self._slots(n, size=size, shape=shape, colour=self.colour_ids[self._at(scenes.colour, target)])
        return self._done("colour", "colour", slots, target, valid)

    def _shape(self, scenes: Scenes):
        n = len(scenes)
        target, valid, size = self._attribute(scenes, scenes.colour)
        slots = self._slots(
            n,
            size=size,
            noun=self._noun(n),
            colour=self.colour_ids[self._at(scenes.colour, target)],
            shape=self.shape_ids[self._at(scenes.shape, target)],
        )
        question, answer, target, valid = self._done("shape", "shape", slots, target, valid)
        alone = (scenes.count == 1) & (self._rand(n) < 0.4) & (not self.canonical)
        question = torch.where(alone[:, None], self._template("only shape", n), question)
        return question, answer, target, valid

    def _object_slots(self, scenes: Scenes, target: Tensor, suffix: str = "") -> dict[str, Tensor]:
        return {
            "colour" + suffix: self.colour_ids[self._at(scenes.colour, target)],
            "shape" + suffix: self.shape_ids[self._at(scenes.shape, target)],
        }

    def _size(self, scenes: Scenes):
        target, valid = self._pick(scenes.present)
        size = self.size_ids[self._at(scenes.size, target)]
        slots = self._slots(len(scenes), size=size, **self._object_slots(scenes, target))
        return self._done("size", "size", slots, target, valid)

    def _count(self, scenes: Scenes):
        n = len(scenes)
        by = self._rand(n)
        target, valid = self._pick(scenes.present)
        random_one = self._rand(n) < 0.2
        shape = torch.where(random_one, self._randint(len(SHAPES), n), self._at(scenes.shape, target))
        colour = torch.where(random_one, self._randint(len(COLOURS), n), self._at(scenes.colour, target))
        by_shape, by_colour = by < 0.35, (by >= 0.35) & (by < 0.7)
        counted = scenes.present & torch.where(by_shape[:, None], scenes.shape == shape[:, None], True)
        counted &= torch.where(by_colour[:, None], scenes.colour == colour[:, None], True)
        nouns = self.nouns_ids[self._wording(2, n)]
        slots = self._slots(
            n,
            colour=torch.where(by_colour, self.colour_ids[colour], 0),
            noun=torch.where(by_shape, self.plural_ids[shape], nouns),
            n=self.first_number + counted.sum(1),
        )
        return self._done("count", "count", slots, target, valid)

    def _existence(self, scenes: Scenes):
        n, pairs = len(scenes), len(SHAPES) * len(COLOURS)
        target, valid = self._pick(scenes.present)
        # A pair that is not there; in half of the cases its colour and its shape both are, on different objects.
        there = torch.zeros(n, pairs + 1, dtype=torch.bool, device=self.device)
        slot_pair = torch.where(scenes.present, scenes.shape * len(COLOURS) + scenes.colour, pairs)
        there = there.scatter(1, slot_pair, True)[:, :pairs].view(n, len(SHAPES), len(COLOURS))
        shape_there, colour_there = there.any(2), there.any(1)
        likely = (shape_there[:, :, None] & colour_there[:, None, :]) & (self._rand(n, 1, 1) < 0.5)
        score = self._rand(n, len(SHAPES), len(COLOURS)) + likely.float()
        absent = score.masked_fill(there | self.held_out, -1.0).flatten(1).argmax(1)
        absent_shape, has_absent_shape = self._pick(~shape_there)
        absent_colour, _ = self._pick(~colour_there)

        by = self._rand(n)
        answer = self._rand(n) < 0.5
        by_shape = (by < 0.25) & (answer | has_absent_shape)
        by_colour = ~by_shape & (by < 0.5)
        wrong_shape = torch.where(by_shape, absent_shape, absent // len(COLOURS))
        wrong_colour = torch.where(by_colour, absent_colour, absent % len(COLOURS))
        shape = self.shape_ids[torch.where(answer, self._at(scenes.shape, target), wrong_shape)]
        colour = self.colour_ids[torch.where(answer, self._at(scenes.colour, target), wrong_colour)]
        slots = self._slots(
            n,
            shape=torch.where(by_colour, self._noun(n), shape),
            colour=torch.where(by_shape, 0, colour),
        )
        negated = (self._rand(n) < 0.3) & (not self.canonical)
        question = torch.where(negated[:, None], self._template("absence", n), self._template("existence", n))
        return self._yes_no(fill(question, slots), answer ^ negated, target, valid)

    def _two(self, scenes: Scenes):
        """Two objects that clearly differ along one axis: first [B], second [B], direction of the first, valid."""
        k = MAX_OBJECTS
        delta = scenes.centre[:, :, None] - scenes.centre[:, None]  # [B, K, K, 2], first minus second
        ax, ay = delta.abs().unbind(-1)
        clear = (ax > DOMINANCE * ay) | (ay > DOMINANCE * ax)
        clear &= scenes.present[:, :, None] & scenes.present[:, None]
        clear &= ~torch.eye(k, dtype=torch.bool, device=self.device)
        pick, valid = self._pick(clear.flatten(1))
        first, second = pick // k, pick % k
        dx, dy = self._at(delta.flatten(1, 2), pick).unbind(-1)
        direction = torch.where(dx.abs() > dy.abs(), (dx > 0).long(), 2 + (dy > 0).long())
        return first, second, direction, valid

    def _relation(self, scenes: Scenes):
        first, second, direction, valid = self._two(scenes)
        names = self._object_slots(scenes, first) | self._object_slots(scenes, second, "2")
        slots = self._slots(len(scenes), direction=self.direction_ids[direction], **names)
        return self._done("relation", "relation", slots, first, valid)

    def _check(self, scenes: Scenes):
        n = len(scenes)
        first, second, direction, valid = self._two(scenes)
        answer = self._rand(n) < 0.5
        said = torch.where(answer, direction, direction ^ 1)  # the opposite: left <-> right, above <-> below
        names = self._object_slots(scenes, first) | self._object_slots(scenes, second, "2")
        slots = self._slots(n, direction=self.direction_ids[said], **names)
        question = torch.where((said < 2)[:, None], self._template("beside", n), self._template("over", n))
        return self._yes_no(fill(question, slots), answer, first, valid)

    def _located(self, scenes: Scenes, kind: str):
        target, valid = self._pick(scenes.present)
        box = self._at(scenes.box, target)
        place = box if kind == "box" else (box[:, :2] + box[:, 2:]).repeat(1, 2) / 2
        numbers = self.first_number + to_grid(place)
        x1, y1, x2, y2 = numbers.unbind(1)
        slots = self._slots(len(scenes), x1=x1, y1=y1, x2=x2, y2=y2, **self._object_slots(scenes, target))
        return self._done(kind, kind, slots, target, valid)

    def _point(self, scenes: Scenes):
        return self._located(scenes, "point")

    def _box(self, scenes: Scenes):
        return self._located(scenes, "box")

    def _caption(self, scenes: Scenes):
        n = len(scenes)
        always = torch.ones(n, dtype=torch.bool, device=self.device)
        nothing = torch.zeros(n, dtype=torch.long, device=self.device)
        return self._template("caption", n), self.captions(scenes), nothing, always

    # --- what others call ---------------------------------------------------------------------------------------------

    def _each_object(self, scenes: Scenes, template: Tensor, **more: Tensor) -> Tensor:
        """One filled template for every object slot, zeros where there is none: [B, K, L]."""
        n, k = scenes.present.shape
        slots = self._slots(
            n * k,
            size=self.size_ids[scenes.size.flatten()],
            colour=self.colour_ids[scenes.colour.flatten()],
            shape=self.shape_ids[scenes.shape.flatten()],
            **{name: value.flatten() for name, value in more.items()},
        )
        words = fill(template.expand(n * k, -1), slots).view(n, k, -1)
        return words * scenes.present[:, :, None]

    def captions(self, scenes: Scenes) -> Tensor:
        """ "a large red circle, a small blue star." in reading order: [B, 30] ids, padded with 0 at the end."""
        words = self._each_object(scenes, self._object)
        last = torch.arange(MAX_OBJECTS, device=self.device) == scenes.count[:, None] - 1
        mark = torch.where(last, self.tokenizer.id_of("."), self.tokenizer.id_of(",")) * scenes.present
        return compact(torch.cat([words, mark[:, :, None]], 2).flatten(1))[0]

    def contrastive_texts(self, scenes: Scenes) -> Tensor:
        """<bos>, every object with its row and column, <eos>: [B, 38] ids, padded with 0 at the end."""
        row, column = scenes.cell // GRID, scenes.cell % GRID
        words = self._each_object(
            scenes, self._placed, direction=self.row_ids[row], noun=self.column_ids[column]
        ).flatten(1)
        end = words.new_full((len(scenes), 1), self.tokenizer.eos_id)
        return compact(torch.cat([torch.full_like(end, self.tokenizer.bos_id), words, end], 1))[0]

    def ask(self, scenes: Scenes, kind: str, *, generator: torch.Generator | None = None) -> Turns:
        """One question of a kind about every scene.

        Raises:
            ValueError: the kind is unknown, or the scenes are on another device.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        if scenes.device.type != self.device.type:
            raise ValueError(f"the scenes are on {scenes.device}, the dialogs on {self.device}")
        self._generator = generator
        question, answer, target, valid = getattr(self, "_" + kind)(scenes)
        number = torch.full((len(scenes),), KINDS.index(kind), device=self.device)
        return Turns(number, compact(question)[0], compact(answer)[0], target, valid)

    def mixed(self, scenes: Scenes, weights: Tensor, *, generator: torch.Generator | None = None) -> Turns:
        """One question about every scene, its kind drawn by `weights` [10]; existence where the kind does not apply."""
        wanted = torch.multinomial(weights.to(self.device), len(scenes), replacement=True, generator=generator)
        turns = [self.ask(scenes, kind, generator=generator) for kind in KINDS]
        valid = torch.stack([t.valid for t in turns])  # [kinds, B]
        kind = torch.where(self._at(valid.T, wanted), wanted, KINDS.index("existence"))
        choose = lambda name: self._at(torch.stack([getattr(t, name) for t in turns], 1), kind)  # noqa: E731
        return Turns(kind, choose("question"), choose("answer"), choose("target"), choose("valid"))

    def several(self, scenes: Scenes, turns: int, weights: Tensor, *, generator=None) -> list[Turns]:
        """`turns` questions of mixed kinds about every scene, made in one pass."""
        rows = torch.arange(len(scenes), device=self.device).repeat(turns)
        together = self.mixed(scenes[rows], weights, generator=generator)
        parts = [getattr(together, name).chunk(turns) for name in Turns.__dataclass_fields__]
        return [Turns(*part) for part in zip(*parts, strict=True)]

    def conversation(
        self, turns: list[Turns], *, visual_tokens: int, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Several turns about the same scenes as training sequences.

        <bos> <image> x visual_tokens, then for each turn <user> question <assistant> answer <eos>.

        Args:
            visual_tokens: number of <image> placeholders.
            length: cut or pad to this many tokens; None keeps all.

        Returns:
            ids [B, length], padded with <pad> at the end; labels [B, length], unshifted: the answers and their <eos>,
            -100 elsewhere.
        """
        tok, n = self.tokenizer, len(turns[0].kind)
        mark = lambda token: torch.full((n, 1), token, device=self.device)  # noqa: E731
        ids = [mark(tok.bos_id), mark(tok.image_id).expand(n, visual_tokens)]
        learn = [torch.zeros(n, 1 + visual_tokens, dtype=torch.bool, device=self.device)]
        for turn in turns:
            parts = [mark(tok.user_id), turn.question, mark(tok.assistant_id), turn.answer, mark(tok.eos_id)]
            ids += parts
            learn += [torch.full_like(p, i >= 3, dtype=torch.bool) for i, p in enumerate(parts)]
        ids, learn = compact(torch.cat(ids, 1), torch.cat(learn, 1), pad_id=tok.pad_id)
        length = length or ids.shape[1]
        if ids.shape[1] < length:
            ids, learn = (torch.nn.functional.pad(t, (0, length - t.shape[1])) for t in (ids, learn))
        ids, learn = ids[:, :length], learn[:, :length]
        return ids, torch.where(learn & (ids != tok.pad_id), ids, -100)
