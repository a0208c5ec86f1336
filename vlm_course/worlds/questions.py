"""One method for every kind of question: scenes in; question ids, answer ids, the object asked about and validity out.

All of it is integer tensor work on the scenes' device. The order of the random draws is part of the recipe of the
shipped weights: another order is other training data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokenizer import WordTokenizer
from . import templates
from .scenes import COLOURS, GRID, IMAGE_SIZE, MAX_OBJECTS, SHAPES, SIZES, Scenes, held_out_table
from .templates import ANSWERS, DIRECTIONS, QUESTIONS, SLOTS, compact, fill

LOCATIONS = 256
QUESTION_LENGTH, ANSWER_LENGTH = 24, 5 * MAX_OBJECTS
DOMINANCE = 1.3  # a relation is asked only where one axis differs by this factor more than the other


def to_grid(pixels: Tensor) -> Tensor:
    """Pixels to whole numbers 0..255."""
    return (pixels * (LOCATIONS / IMAGE_SIZE)).floor().clamp(0, LOCATIONS - 1).long()


def from_grid(grid: Tensor) -> Tensor:
    """Whole numbers 0..255 to pixels, at the middle of the bin: off by at most 0.19 pixels."""
    return (grid + 0.5) * (IMAGE_SIZE / LOCATIONS)


class Questions:
    """Makes single questions on one device; see `Dialogs`, which is what others use."""

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
        """Colour by shape or the reverse: pick an object whose `named` attribute is unique, alone or with its size."""
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

    # --- texts about a whole scene ------------------------------------------------------------------------------------

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
