"""Chapter 4's study: the same tiny model tuned on captions only, on short questions only, and on all instructions.

Every run starts from a decoder that first read conversations of all ten kinds without any image, as Vicuna could hold
a conversation before it became LLaVA. Then bridge and decoder learn, for the same number of steps on the same images;
only the instructions differ. Afterwards each model is asked every kind of question, and one that no model was trained
on: to count by size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..llava import Llava
from ..measures import answer_many, box_iou, encode_in_batches, read_numbers
from ..tokenizer import WordTokenizer
from ..worlds.dialogs import KINDS, Turns
from ..worlds.scenes import COLOURS, SHAPES, SIZES, Scenes
from ..worlds.templates import DIRECTIONS
from .common import Lab, Measures, Study
from .tiny import learned, tiny_llava

SHORT = ("colour", "shape", "size", "count", "existence", "relation", "check")
KINDS_OF = {"captions": ("caption",), "questions": SHORT, "instructions": KINDS}
NEW = "count by size"  # in no training: "how many small objects are there ?"
OBJECTS = (1, 4)

LANGUAGE_STEPS, STEPS, LR = 200, 700, 2e-3
TURNS, TEXT_LENGTH, LONGEST = 8, 128, 24
POOL, POOL_PART, DRAWS = 131_072, 4096, 2

# The words that a short answer may consist of, by kind.
WORDS = {
    "colour": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "count": tuple(str(n) for n in range(10)),
    "existence": ("yes", "no"),
    "relation": DIRECTIONS,
    "check": ("yes", "no"),
    NEW: tuple(str(n) for n in range(10)),
}


@dataclass(frozen=True)
class Pool:
    """Scenes with `DRAWS` questions of every kind about each, drawn and encoded once for all variants of a seed."""

    features: Tensor  # [n, N, D_vision]
    questions: Tensor  # [n, DRAWS * kinds, 24] ids
    answers: Tensor  # [n, DRAWS * kinds, 30] ids
    kind: Tensor  # [DRAWS * kinds] long, index into KINDS


def make_pool(lab: Lab, n: int) -> Pool:
    """Where a kind does not apply to a scene, a question of existence stands in its place."""
    features, questions, answers = [], [], []
    place = KINDS.index("existence")
    for part, start in enumerate(range(0, n, POOL_PART)):
        scenes, generator = lab.scenes_at(0, part, min(POOL_PART, n - start), objects=OBJECTS)
        seen = lab.features(lab.images(scenes, generator))
        features.append(seen.bfloat16() if lab.cuda else seen)
        asked, told = [], []
        for _ in range(DRAWS):
            turns = [lab.dialogs.ask(scenes, kind, generator=generator) for kind in KINDS]
            for turn in turns:
                valid = turn.valid[:, None]
                asked.append(torch.where(valid, turn.question, turns[place].question).short())
                told.append(torch.where(valid, turn.answer, turns[place].answer).short())
        questions.append(torch.stack(asked, 1))
        answers.append(torch.stack(told, 1))
    kind = torch.arange(len(KINDS), device=lab.device).repeat(DRAWS)
    return Pool(torch.cat(features), torch.cat(questions), torch.cat(answers), kind)


def conversations(
    lab: Lab, pool: Pool, kinds: tuple[str, ...], step: int, batch: int, visual_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One step's rows of the pool [B], their ids and labels [B, T]: one caption each, or `TURNS` turns in any order."""
    generator = torch.Generator(lab.device).manual_seed((lab.seed + 1) * 1_000_000 + step)
    rows = torch.randint(len(pool.features), (batch,), generator=generator, device=lab.device)
    numbers = torch.tensor([KINDS.index(kind) for kind in kinds], device=lab.device)
    allowed = torch.isin(pool.kind, numbers)  # [K]
    order = torch.rand(batch, len(allowed), generator=generator, device=lab.device) + allowed  # [B, K]
    chosen = order.topk(1 if kinds == ("caption",) else TURNS, dim=1).indices  # [B, turns]
    turns = []
    for column in chosen.unbind(1):
        question, answer = pool.questions[rows, column].long(), pool.answers[rows, column].long()
        turns.append(Turns(pool.kind[column], question, answer, column, column >= 0))
    length = 1 + visual_tokens + TEXT_LENGTH if visual_tokens else TEXT_LENGTH
    return rows, *lab.dialogs.conversation(turns, visual_tokens=visual_tokens, length=length)


def train(variant: str, lab: Lab) -> tuple[Measures, dict[str, Tensor]]:
    """One run: warm start without images, then the instructions of the variant, then the exam."""
    key = ("instruction-mix pool", lab.seed)
    if key not in lab.shared:
        for old in [k for k in lab.shared if isinstance(k, tuple) and k[0] == key[0]]:
            del lab.shared[old]  # the pool of another seed: gigabytes
        lab.shared[key] = make_pool(lab, POOL if not lab.rehearsal else 64)
    pool = lab.shared[key]
    model = tiny_llava(lab.small, seed=lab.seed)

    def language_loss(step: int, batch: int) -> Tensor:
        return lab.text_loss(model, conversations(lab, pool, KINDS, step, batch, 0)[1])

    def seeing_loss(step: int, batch: int) -> Tensor:
        visual = model.config.visual_tokens
        rows, ids, labels = conversations(lab, pool, KINDS_OF[variant], LANGUAGE_STEPS + step, batch, visual)
        return lab.answer_loss(model, ids, labels, patches=pool.features[rows])

    lab.fit(model, language_loss, name="mix-language", steps=LANGUAGE_STEPS, lr=LR, trains=("decoder.",))
    lab.fit(model, seeing_loss, name=f"mix-{variant}", steps=STEPS, lr=LR)
    return examine(model, lab), learned(model)


# --- the exam ---------------------------------------------------------------------------------------------------------


def count_by_size(scenes: Scenes, tokenizer: WordTokenizer, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ "how many small objects are there ?" and the answers: ids [B, L] each. No template of the world asks this."""
    size = torch.randint(len(SIZES), (len(scenes),), generator=generator, device=scenes.device)
    rows = [tokenizer.encode(f"how many {word} objects are there ?") for word in SIZES]
    question = torch.tensor(rows, device=scenes.device)[size]
    count = (scenes.present & (scenes.size == size[:, None])).sum(1)
    return question, (tokenizer.id_of("0") + count)[:, None]


def read_caption(caption: str) -> list[tuple[str, str, str]]:
    """The objects that a caption names: "a small red star , a large blue cross." -> [(size, colour, shape), ...]."""
    words = caption.replace(",", " ").replace(".", " ").split()
    found = []
    for place in range(len(words) - 2):
        size, colour, shape = words[place : place + 3]
        if size in SIZES and colour in COLOURS and shape in SHAPES:
            found.append((size, colour, shape))
    return found


def answer_from_caption(question: str, caption: str) -> str | None:
    """What somebody who knows only the caption would answer to a question about colour, shape, size or existence.

    None where the caption does not settle it. Questions in canonical wording.
    """
    objects, words = read_caption(caption), question.replace("?", " ").split()
    named = [w for w in words if w in SIZES or w in COLOURS or w in SHAPES]
    fitting = [thing for thing in objects if all(word in thing for word in named)]
    if words[:3] == ["is", "there", "a"]:
        return "yes" if fitting else "no"
    for place, name in enumerate(("size", "color", "shape")):
        if words[1] == name:
            answers = {thing[place] for thing in fitting}
            return answers.pop() if len(answers) == 1 else None
    return None


def well_formed(kind: str, answers: Tensor, tokenizer: WordTokenizer) -> Tensor:
    """Whether each answer [B, L] has the form that its kind asks for, right or wrong: [B] bool."""
    if kind in ("box", "point"):
        count, marks = (4, "[]") if kind == "box" else (2, "()")
        return ~read_numbers(answers, tokenizer, count, marks).isnan().any(1)
    if kind == "caption":
        texts = [tokenizer.decode(row) for row in answers.tolist()]
        whole = [text.endswith(".") and len(read_caption(text)) == text.count(" a ") + 1 for text in texts]
        return torch.tensor(whole, device=answers.device)
    words = torch.tensor([tokenizer.id_of(word) for word in WORDS[kind]], device=answers.device)
    return torch.isin(answers[:, 0], words) & (answers[:, 1:] == tokenizer.pad_id).all(1)


def right(kind: str, given: Tensor, wanted: Tensor, box: Tensor, tokenizer: WordTokenizer) -> Tensor:
    """Whether each answer [B, L] is right: boxes by an overlap above one half, points inside the object, the rest
    word for word. [B] bool."""
    if kind == "box":
        return box_iou(read_numbers(given, tokenizer, 4, "[]"), box).nan_to_num(0.0) > 0.5
    if kind == "point":
        point = read_numbers(given, tokenizer, 2, "()")
        return ((point >= box[:, :2]) & (point <= box[:, 2:])).all(1)
    width = max(given.shape[1], wanted.shape[1])
    pad = lambda t: torch.nn.functional.pad(t, (0, width - t.shape[1]))  # noqa: E731
    return (pad(given) == pad(wanted)).all(1)


@torch.no_grad()
def examine(model: Llava, lab: Lab) -> Measures:
    """Ask every kind of question, in canonical wording, about scenes that no training saw.

    By kind: the share of right answers from the image ("model"), a black image ("blind"), another scene's ("swapped"),
    of the most frequent answer ("majority"), and the share of answers in the form that the question asks for ("form").
    Then how long answers are, and how often the model's own caption holds the answer that it was asked for.
    """
    tok, world = lab.small.tokenizer, type(lab.dialogs)(lab.small.tokenizer, device=lab.device, canonical=True)
    scenes, generator = lab.test_scenes(objects=OBJECTS)
    pixels = lab.images(scenes, generator)
    seen = {"model": pixels, "blind": torch.full_like(pixels, -1.0), "swapped": pixels.roll(1, 0)}
    features = {name: encode_in_batches(model, images, 500) for name, images in seen.items()}
    rows = torch.arange(len(scenes), device=lab.device)
    exam: dict[str, dict[str, float]] = {}
    length: dict[str, float] = {}
    asked: dict[str, tuple[Turns, Tensor]] = {}
    for kind in (*KINDS, NEW):
        if kind == NEW:
            question, wanted = count_by_size(scenes, tok, generator)
            turn = Turns(rows, question, wanted, torch.zeros_like(rows), rows >= 0)
        else:
            turn = world.ask(scenes, kind, generator=generator)
        box = scenes.box[rows, turn.target]
        valid = turn.valid
        for column, tokens in features.items():
            # A control only has to be right or wrong; the model's own answers are read to their end.
            room = LONGEST if column == "model" else int((turn.answer != tok.pad_id).sum(1).max()) + 1
            given = answer_many(model, tok, tokens, rows, turn.question, max_new_tokens=room, batch=1000)
            share = right(kind, given, turn.answer, box, tok)[valid].float().mean().item()
            exam.setdefault(kind, {})[column] = share
            if column == "model":
                asked[kind] = turn, given
                exam[kind]["form"] = well_formed(kind, given, tok)[valid].float().mean().item()
                length[kind] = (given != tok.pad_id).sum(1)[valid].float().mean().item()
        if kind not in ("box", "point"):
            counts = Counter(map(tuple, turn.answer[valid].tolist()))
            exam[kind]["majority"] = counts.most_common(1)[0][1] / int(valid.sum())
    return {"exam": exam, "length": length, "from own caption": _from_caption(asked, tok)}


def _from_caption(asked: dict[str, tuple[Turns, Tensor]], tok: WordTokenizer) -> dict[str, float]:
    """Share of questions whose right answer follows from the caption that the same model writes."""
    captions = [tok.decode(row) for row in asked["caption"][1].tolist()]
    shares = {}
    for kind in ("colour", "shape", "size", "existence"):
        turn = asked[kind][0]
        rows = zip(turn.question.tolist(), turn.answer.tolist(), captions, turn.valid.tolist(), strict=True)
        hits = [answer_from_caption(tok.decode(q), text) == tok.decode(a) for q, a, text, valid in rows if valid]
        shares[kind] = sum(hits) / len(hits)
    return shares


STUDY = Study(
    name="instruction-mix",
    question="What can a model do that was tuned on captions only, on short questions only, on all instructions?",
    variants={
        "captions": "one caption an image",
        "questions": "eight short questions an image: colour, shape, size, count, existence, relations",
        "instructions": "eight turns an image of all ten kinds: short questions, points, boxes, captions",
    },
    train=train,
    data="scenes of one to four objects with questions of ten kinds, drawn from the seed: 131,072 scenes a seed",
    ships={"instructions": 2},  # seed 0 learned much less than the other two
)
