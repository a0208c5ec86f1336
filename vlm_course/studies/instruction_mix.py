"""Chapter 4's study: the same tiny model tuned on captions only, on short questions only, and on all instructions.

Every run starts from the decoder that first read conversations of all ten kinds without any image, as Vicuna could hold
a conversation before it became LLaVA. Then bridge and decoder learn, for the same number of steps on the same images;
only the instructions differ. Afterwards each model is asked every kind of question.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..evaluation import evaluate_scenes
from ..worlds.dialogs import KINDS
from .common import Lab, Measures, Study, learned, tiny_llava

SHORT = ("colour", "shape", "size", "count", "existence", "relation", "check")
KINDS_OF = {"captions": ("caption",), "questions": SHORT, "instructions": KINDS}

LANGUAGE_STEPS, STEPS, LR = 300, 700, 2e-3
TURNS, TEXT_LENGTH = 8, 136


def _conversations(lab: Lab, scenes, kinds: tuple[str, ...], generator, visual_tokens: int) -> tuple[Tensor, Tensor]:
    """Turns of the given kinds about every scene: one caption where there are only captions, else `TURNS` turns."""
    weights = torch.tensor([float(kind in kinds) for kind in KINDS])
    if kinds == ("caption",):
        turns = [lab.dialogs.ask(scenes, "caption", generator=generator)]
    else:
        turns = lab.dialogs.several(scenes, TURNS, weights, generator=generator)
    return lab.dialogs.conversation(turns, visual_tokens=visual_tokens, length=1 + visual_tokens + TEXT_LENGTH)


def train(variant: str, lab: Lab) -> tuple[Measures, dict[str, Tensor]]:
    """One run: warm start without images, then the instructions of the variant, then the exam."""
    model = tiny_llava(lab.small, seed=lab.seed)

    def language_loss(step: int, batch: int) -> Tensor:
        scenes, generator = lab.scenes_at(0, step, batch)
        return lab.text_loss(model, _conversations(lab, scenes, KINDS, generator, 0)[0])

    def seeing_loss(step: int, batch: int) -> Tensor:
        scenes, generator = lab.scenes_at(1, step, batch)
        ids, labels = _conversations(lab, scenes, KINDS_OF[variant], generator, model.config.visual_tokens)
        return lab.answer_loss(model, ids, labels, lab.images(scenes, generator))

    lab.fit(model, language_loss, name="mix-language", steps=LANGUAGE_STEPS, lr=LR, trains=("decoder.",))
    lab.fit(model, seeing_loss, name=f"mix-{variant}", steps=STEPS, lr=LR)
    table = evaluate_scenes(model, lab.small.tokenizer, n=lab.tests, held_out=False)
    return {"exam": table}, learned(model)


STUDY = Study(
    name="instruction-mix",
    question="What can a model do that was tuned on captions only, on short questions only, on all instructions?",
    variants={
        "captions": "one caption an image",
        "questions": "eight short questions an image: colour, shape, size, count, existence, relations",
        "instructions": "eight turns an image of all ten kinds: short questions, points, boxes, captions",
    },
    train=train,
)
