"""Which cause makes a vision-language model name what is not there? Trainings that differ in one thing, and one probe.

Worlds to tune in: `even`, where every kind of object is as frequent as every other; `frequent`, where six kinds are in
many pictures and all others are rare; `together`, where every kind has a partner that usually comes with it. Each with
sharp images, and with images reduced to 24 pixels a side and enlarged again. Every run starts from the same model (of
its seed), which learned in the even world with sharp images. All are measured on the same scenes of the even world, so
that a difference between two of them comes from the tuning.

The probe asks whether an object exists, half of the time truly. The absent objects are drawn at random, or among the
frequent ones, or among partners of what is there. Source: POPE (Li et al. 2023, "Evaluating Object Hallucination in
Large Vision-Language Models", arXiv 2305.10355), section 5; the share of absent objects in captions follows CHAIR
(Rohrbach et al. 2018, "Object Hallucination in Image Captioning", arXiv 1809.02156), section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..llava import Llava
from ..measures import answer, answer_many, encode_in_batches
from ..tokenizer import WordTokenizer
from ..worlds.dialogs import ANSWER_LENGTH, Dialogs
from ..worlds.scenes import COLOURS, IMAGE_SIZE, MAX_OBJECTS, SHAPES, Scenes, held_out_table, render, sample, shades
from .common import Lab, Measures, Study
from .fusion_strategies import BATCH, LENGTH, TURNS, learn, loss, mix_of_questions
from .tiny import learned

WORLDS = ("even", "frequent", "together")
ABSENT = ("random", "frequent", "together")  # how an absent object is chosen
LOW_SIDE = 24  # pixels a side of a reduced image
STEPS, LR = 300, 1e-3

OTHERS_FOR_ONE = 20.0  # how many times as often a frequent object is drawn, one against one
TOGETHER = 0.8  # how often an object's partner stands beside it


# --- the three worlds -------------------------------------------------------------------------------------------------


@cache
def frequent_pairs() -> tuple[int, ...]:
    """Six objects, one of each shape, of different colours: indices shape * len(COLOURS) + colour."""
    allowed, chosen = ~held_out_table(), []
    for shape in range(len(SHAPES)):
        taken = {pair % len(COLOURS) for pair in chosen}
        colour = next(
            c % len(COLOURS)
            for c in range(2 * shape + 1, 2 * shape + 1 + len(COLOURS))
            if allowed[shape, c % len(COLOURS)] and c % len(COLOURS) not in taken
        )
        chosen.append(shape * len(COLOURS) + colour)
    return tuple(chosen)


@cache
def partners() -> Tensor:
    """The partner of every object, [shapes * colours], -1 for one without. A partner has another shape and colour.

    The relation goes both ways: the partner of the partner is the object itself.
    """
    count = len(COLOURS)
    waiting = [int(pair) for pair in (~held_out_table()).flatten().nonzero()[:, 0]]
    order = torch.randperm(len(waiting), generator=torch.Generator().manual_seed(0))
    waiting = [waiting[i] for i in order.tolist()]
    table = torch.full((len(SHAPES) * count,), -1)
    while waiting:
        one = waiting.pop()
        other = next((p for p in waiting if p // count != one // count and p % count != one % count), None)
        if other is not None:
            waiting.remove(other)
            table[one], table[other] = other, one
    return table


def skewed(scenes: Scenes, kind: str, generator: torch.Generator | None = None) -> Scenes:
    """The same places, sizes and grounds with objects as one world has them; scenes of the even world come back as is.

    Raises ValueError for an unknown world.
    """
    if kind not in WORLDS:
        raise ValueError(f"the world is {kind!r}, expected one of {', '.join(WORLDS)}")
    if kind == "even":
        return scenes
    drawn = _frequent if kind == "frequent" else _together
    pair = drawn(len(scenes), scenes.device, generator)  # [B, K], different objects in every row
    # Which slot gets which: slots are in reading order, and partners are not always neighbours.
    rank = torch.rand(pair.shape, generator=generator, device=scenes.device)
    rank = rank.masked_fill(~scenes.present, 2.0).argsort(1).argsort(1)  # present slots hold ranks 0 .. count - 1
    pair = pair.gather(1, rank)
    shape, colour = pair // len(COLOURS), pair % len(COLOURS)
    return replace(scenes, shape=shape, colour=colour, rgb=shades(colour, generator=generator))


def _frequent(n: int, device, generator) -> Tensor:
    """Six different objects a row, drawn one after the other by weight (Gumbel's trick): [n, K]."""
    weight = torch.ones(len(SHAPES) * len(COLOURS), device=device)
    weight[list(frequent_pairs())] = OTHERS_FOR_ONE
    weight[held_out_table(device).flatten()] = 0.0
    uniform = torch.rand(n, len(weight), generator=generator, device=device).clamp(1e-7, 1 - 1e-7)
    return (weight.log() - (-uniform.log()).log()).topk(MAX_OBJECTS, dim=1).indices


def _together(n: int, device, generator) -> Tensor:
    """Three couples a row; with probability 1 - TOGETHER the second of a couple is somebody of another one: [n, K]."""
    table = partners().to(device)
    firsts = (table > torch.arange(len(table), device=device)).nonzero()[:, 0]  # one of every couple, [C]
    couples = torch.rand(n, len(firsts), generator=generator, device=device).topk(MAX_OBJECTS, dim=1).indices
    one = firsts[couples]  # [n, 6]: six different couples, of which three lend only a stranger
    one = torch.where(torch.rand(one.shape, generator=generator, device=device) < 0.5, one, table[one])
    half = MAX_OBJECTS // 2
    kept = torch.rand((n, half), generator=generator, device=device) < TOGETHER
    second = torch.where(kept, table[one[:, :half]], one[:, half:])
    return torch.stack([one[:, :half], second], 2).flatten(1)  # [n, 3, 2] -> [n, 6]


def reduced(pixels: Tensor, side: int | None) -> Tensor:
    """Images at `side` x `side` pixels (means of areas), enlarged again (bilinear): [B, 3, H, W] -> the same shape.

    None leaves them as they are. Raises ValueError for a side outside 1 .. 96.
    """
    if side is None:
        return pixels
    if not 1 <= side <= IMAGE_SIZE:
        raise ValueError(f"side is {side}, but an image of {IMAGE_SIZE} pixels can be reduced to 1 .. {IMAGE_SIZE}")
    small = F.interpolate(pixels, size=(side, side), mode="area")
    return F.interpolate(small, size=pixels.shape[-2:], mode="bilinear", align_corners=False)


# --- the probe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """Questions "is there a red star ?" about scenes, half of them true: for every scene and every way to choose the
    absent object, one of each.
    """

    scenes: Scenes
    pixels: Tensor  # [B, 3, 96, 96]
    image: Tensor  # [Q] the scene that a question is about
    pair: Tensor  # [Q] the object that it asks for, shape * len(COLOURS) + colour
    true: Tensor  # [Q] bool, whether the object is there
    absent: Tensor  # [Q] index into ABSENT, how the absent object of this couple of questions was chosen

    def __len__(self) -> int:
        return len(self.pair)

    def words(self, question: int) -> str:
        return question_about(int(self.pair[question]))

    def ids(self, tokenizer: WordTokenizer) -> Tensor:
        """All questions as ids, [Q, 6]: they are equally long."""
        ids = [tokenizer.encode(question_about(pair)) for pair in range(len(SHAPES) * len(COLOURS))]
        return torch.tensor(ids, device=self.pair.device)[self.pair]


def question_about(pair: int) -> str:
    """Asks for the object shape * len(COLOURS) + colour."""
    return f"is there a {COLOURS[pair % len(COLOURS)]} {SHAPES[pair // len(COLOURS)]} ?"


def probe(n: int, *, generator: torch.Generator | None = None, device="cpu", scenes: Scenes | None = None) -> Probe:
    """Six questions about each of `n` scenes of two to five objects of the even world (or about the scenes given).

    The object that is there is drawn among those of the scene. Among absent ones: a "frequent" one is one of the six of
    the world `frequent`; a "together" one is the partner of an object of the scene, and its partner is not frequent;
    a "random" one is neither. Pairs held out from training are never asked for.
    """
    if scenes is None:
        scenes = sample(n, generator=generator, device=device, objects=(2, 5))
    pixels = render(scenes, generator=generator)
    n, device = len(scenes), scenes.device
    there = objects_in(scenes)  # [B, P]
    frequent = torch.zeros_like(there)
    frequent[:, list(frequent_pairs())] = True
    table = partners().to(device)
    beside = there[:, table.clamp(min=0)] & (table >= 0)  # [B, P]: whose partner is in the scene
    possible = ~there & ~held_out_table(device).flatten()
    choices = {
        "random": possible & ~frequent & ~beside,
        "frequent": possible & frequent & ~beside,
        "together": possible & ~frequent & beside,
    }
    draw = lambda allowed: (  # noqa: E731
        torch.rand(allowed.shape, generator=generator, device=device).masked_fill(~allowed, -1.0).argmax(1)
    )
    rows = torch.arange(n, device=device)
    parts = []
    for number, name in enumerate(ABSENT):
        usable = choices[name].any(1)  # a scene where nothing fits is left out of this third, as a whole
        for true, pair in ((True, draw(there)), (False, draw(choices[name]))):
            parts.append((rows[usable], pair[usable], true, number))
    image, pair = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    true, absent = (torch.cat([torch.full_like(part[0], int(part[i])) for part in parts]) for i in (2, 3))
    return Probe(scenes, pixels, image, pair, true.bool(), absent)


def objects_in(scenes: Scenes) -> Tensor:
    """Which objects a scene holds: [B, shapes * colours] bool."""
    pairs = len(SHAPES) * len(COLOURS)
    pair = torch.where(scenes.present, scenes.shape * len(COLOURS) + scenes.colour, pairs)
    there = torch.zeros(len(scenes), pairs + 1, dtype=torch.bool, device=scenes.device)
    return there.scatter(1, pair, True)[:, :pairs]


def ask(model: Llava, tokenizer: WordTokenizer, questions: Probe, pixels: Tensor) -> Tensor:
    """Whether the model says yes to every question, looking at `pixels` [B, 3, 96, 96]: [Q] bool. Anything but "yes"
    counts as no.
    """
    features = encode_in_batches(model, pixels, 250)
    said = answer_many(model, tokenizer, features, questions.image, questions.ids(tokenizer), max_new_tokens=1)
    return said[:, 0] == tokenizer.id_of("yes")


def scores(yes: Tensor, questions: Probe) -> dict[str, dict[str, float]]:
    """POPE's numbers for every way to choose the absent object.

    "hallucinated" is the share of yes where the true answer is no; "yes" the share of yes over all questions. Precision
    is 0 for a model that never says yes.
    """
    table = {}
    for number, name in enumerate(ABSENT):
        rows = questions.absent == number
        said, true = yes[rows], questions.true[rows]
        hits = (said & true).sum().item()
        table[name] = {
            "accuracy": (said == true).float().mean().item(),
            "precision": hits / max(1, said.sum().item()),
            "recall": hits / true.sum().item(),
            "yes": said.float().mean().item(),
            "hallucinated": said[~true].float().mean().item(),
        }
    return table


def measure(model: Llava, tokenizer: WordTokenizer, questions: Probe, *, side: int | None = None) -> Measures:
    """The probe and its controls: the same questions with a black image, and with another scene's."""
    pixels = reduced(questions.pixels, side)
    seen = {"model": pixels, "blind": torch.full_like(pixels, -1.0), "swapped": pixels.roll(1, 0)}
    return {name: scores(ask(model, tokenizer, questions, image), questions) for name, image in seen.items()}


def named_objects(captions: Tensor, tokenizer: WordTokenizer) -> Tensor:
    """Which objects captions name, a colour followed by a shape: ids [B, L] -> [B, shapes * colours] bool."""
    look = lambda words: torch.tensor([tokenizer.id_of(w) for w in words], device=captions.device)  # noqa: E731
    colour = captions[:, :-1, None] == look(COLOURS)  # [B, L-1, colours]
    shape = captions[:, 1:, None] == look(SHAPES)  # [B, L-1, shapes]
    return (shape[..., None] & colour[:, :, None]).any(1).flatten(1)


def measure_captions(model: Llava, dialogs: Dialogs, questions: Probe, *, side: int | None = None) -> Measures:
    """CHAIR's share of named objects that are not there, what share of those is frequent or a partner, and recall."""
    request = dialogs.tokenizer.encode("describe the image .")
    request = torch.tensor(request, device=questions.pixels.device)
    features = encode_in_batches(model, reduced(questions.pixels, side), 250)
    written = [
        answer(model, dialogs.tokenizer, part, request.expand(len(part), -1), max_new_tokens=ANSWER_LENGTH + 1)
        for part in features.split(250)
    ]
    named, there = named_objects(torch.cat(written), dialogs.tokenizer), objects_in(questions.scenes)
    wrong = named & ~there
    table = partners().to(there.device)
    beside = there[:, table.clamp(min=0)] & (table >= 0)
    count = max(1, wrong.sum().item())
    return {
        "hallucinated": wrong.sum().item() / max(1, named.sum().item()),
        "frequent": wrong[:, list(frequent_pairs())].sum().item() / count,
        "together": (wrong & beside).sum().item() / count,
        "recall": (named & there).sum().item() / there.sum().item(),
    }


# --- the study --------------------------------------------------------------------------------------------------------

VARIANTS = {
    f"{kind}-{name}": (kind, side) for name, side in (("sharp", None), ("reduced", LOW_SIDE)) for kind in WORLDS
}
_SAYS = {
    "even": "every object as frequent as any other",
    "frequent": "six objects drawn 20 times as often as any other",
    "together": "every object has a partner, which stands beside it in 4 cases of 5 where there is room",
}


def train(variant: str, lab: Lab) -> tuple[Measures, dict[str, Tensor]]:
    """One run: the common start (trained once a seed), tuning in one world at one resolution, then the probe."""
    kind, side = VARIANTS[variant]
    model, mix = learn("early", lab), mix_of_questions()
    visual = model.config.visual_tokens

    def loss_at(step: int, batch: int) -> Tensor:
        scenes, generator = lab.scenes_at(1, step, batch)
        scenes = skewed(scenes, kind, generator)
        talk = lab.dialogs.several(scenes, TURNS, mix, generator=generator)
        ids, labels = lab.dialogs.conversation(talk, visual_tokens=visual, length=1 + visual + LENGTH)
        patches = lab.features(reduced(lab.images(scenes, generator), side))
        return lab.compiled(loss)(model, ids, labels, patches, LENGTH, lab.phases(model, ids.shape[1]))

    lab.fit(model, loss_at, name=f"hallucination-{variant}", steps=STEPS, lr=LR, batch=BATCH)
    generator = lab.test_scenes(1)[1]  # the same for every run
    questions = probe(lab.tests, generator=generator, device=lab.device)
    found = measure(model, lab.small.tokenizer, questions, side=side)
    found["captions"] = measure_captions(model, lab.dialogs, questions, side=side)
    return found, learned(model)


STUDY = Study(
    name="hallucination",
    question="Which cause makes a model say that an absent object is there, and how strongly?",
    variants={
        name: f"{_SAYS[kind]}; images {'as they are' if side is None else f'reduced to {side} pixels a side'}"
        for name, (kind, side) in VARIANTS.items()
    },
    train=train,
    data="scenes drawn on the device while training: first the even world with sharp images, then one of three worlds; "
    "measured on scenes of the even world",
)
