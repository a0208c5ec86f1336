"""Chapter 5's study: which layer of the vision tower should the bridge read?

A fresh bridge and a fresh tiny decoder learn from the patches of one layer of the shipped tower, which stays frozen.
Only the layer differs: decoder, first weights, images, conversations and their order are the same for every variant of
a seed. The control "blind" gets zeros for features: what the conversations alone teach.

The conversations of a seed are drawn once and kept, with the features of every layer, so that a run costs only its own
arithmetic: 100 batches of 512 images with 8 turns each, gone through ten times (11 GB on the device).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..llava import Llava
from ..pretrained import Small
from ..probe_questions import PROBE_KINDS, QuestionSet, question_set, score
from ..worlds.dialogs import KINDS
from .common import BATCH, REHEARSAL_BATCH, TEST_SEED, Lab, Measures, Study
from .results import Results
from .tiny import learned, tiny_llava

# Name -> place among the tower's hidden states: "last" is the last block's output, "first" that of its first block.
LAYERS = {"last": -1, "penultimate": -2, "third-from-last": -3, "first": 1}
BLIND = "blind"

DRAWN, PASSES = 100, 10  # batches, and how often each is seen
LANGUAGE_STEPS, LR = 200, 2e-3
TURNS, TEXT_LENGTH = 8, 136


@dataclass(frozen=True)
class Batch:
    """Conversations about images, and those images as every layer of the tower gives them."""

    ids: Tensor  # [B, 1 + M + TEXT_LENGTH]
    labels: Tensor  # the same shape, -100 outside the answers
    features: dict[str, Tensor]  # variant -> [B, N, D_vision]


def _states(vision: torch.nn.Module, pixels: Tensor) -> list[Tensor]:
    return vision.hidden_states(pixels)


@torch.no_grad()
def layer_features(lab: Lab, pixels: Tensor) -> dict[str, Tensor]:
    """The patches after each of the layers, one pass of the tower for all: [B, 3, H, W] -> [B, N, D_vision] each."""
    half = torch.bfloat16 if lab.cuda else torch.float32
    states = lab.compiled(_states)(lab.small.model.vision, pixels)
    found = {name: states[layer][:, 1:].to(half) for name, layer in LAYERS.items()}  # without CLS
    return found | {BLIND: torch.zeros_like(found["last"][:1])}


def draw(lab: Lab, number: int, batch: int) -> Batch:
    """Batch `number` of the lab's seed."""
    scenes, generator = lab.scenes_at(0, number, batch)
    talk = lab.dialogs.several(scenes, TURNS, torch.ones(len(KINDS)), generator=generator)
    visual = lab.small.model.config.visual_tokens
    ids, labels = lab.dialogs.conversation(talk, visual_tokens=visual, length=1 + visual + TEXT_LENGTH)
    return Batch(ids, labels, layer_features(lab, lab.images(scenes, generator)))


def drawn(lab: Lab, batch: int) -> list[Batch]:
    """All batches of the lab's seed; those of the seed before are dropped."""
    kept = lab.shared.get("feature-layer batches")
    if kept is None or kept[0] != lab.seed:
        lab.shared.pop("feature-layer batches", None)
        count = max(2, round(DRAWN * lab.scale))
        kept = lab.shared["feature-layer batches"] = lab.seed, [draw(lab, number, batch) for number in range(count)]
    return kept[1]


def train(variant: str, lab: Lab) -> tuple[Measures, dict[str, Tensor] | None]:
    """One run: warm start on the texts alone, then the conversations with the features of one layer, then the exam."""
    model = tiny_llava(lab.small, seed=lab.seed)
    batches = drawn(lab, REHEARSAL_BATCH if lab.rehearsal else BATCH)
    visual = model.config.visual_tokens
    generator = torch.Generator().manual_seed(lab.seed)
    order = torch.cat([torch.randperm(len(batches), generator=generator) for _ in range(PASSES)]).tolist()

    def text_loss(step: int, _: int) -> Tensor:
        ids = batches[step % len(batches)].ids
        return lab.text_loss(model, torch.cat([ids[:, :1], ids[:, 1 + visual :]], dim=1))  # <bos>, then the turns

    def seeing_loss(step: int, _: int) -> Tensor:
        batch = batches[order[step % len(order)]]
        patches = batch.features[variant].expand(len(batch.ids), -1, -1)  # [1 or B, N, D] -> [B, N, D]
        patches = patches if lab.cuda else patches.float()
        return lab.answer_loss(model, batch.ids, batch.labels, patches=patches.contiguous())

    lab.fit(model, text_loss, name="layer-language", steps=LANGUAGE_STEPS, lr=LR, trains=("decoder.",))
    lab.fit(model, seeing_loss, name=f"layer-{variant}", steps=DRAWN * PASSES, lr=LR)
    return exam(model, variant, lab), None if variant == BLIND else learned(model)


def exam(model: Llava, variant: str, lab: Lab) -> Measures:
    """Exact answers to fresh questions by kind, the error of boxes in pixels and the loss, beside two controls:
    "swapped" answers from another scene's features, "majority" gives each kind's most frequent answer."""
    questions = exam_questions(lab)
    features = layer_features(lab, questions.pixels)[variant].float().expand(len(questions.ids), -1, -1)
    with torch.no_grad():
        tokens = model.bridge(features)  # [B, N, D_vision] -> [B, N, D_llm]
    own, other = score(model, questions, tokens), score(model, questions, tokens.roll(1, dims=0))
    table: Measures = {}
    for kind in (*questions.kinds[:-1], None):  # all kinds but the box, then all together
        majority = questions.majority(kind)
        table[kind or "all"] = {"model": own.accuracy(kind), "swapped": other.accuracy(kind), "majority": majority}
    table["box error"] = {"model": own.box_error(), "swapped": other.box_error()}
    table["loss"] = {"model": own.loss, "swapped": other.loss}
    return table


def exam_questions(lab: Lab) -> QuestionSet:
    """The same questions for every run, on the lab's device."""
    key = "feature-layer exam"
    if key not in lab.shared:
        made = question_set(lab.small.tokenizer, scenes=lab.tests, kinds=PROBE_KINDS, seed=TEST_SEED, objects=(1, 6))
        moved = {name: getattr(made, name).to(lab.device) for name in ("pixels", "ids", "labels", "turn", "asked")}
        lab.shared[key] = replace(made, **moved)
    return lab.shared[key]


def load_variant(results: Results, variant: str, small: Small) -> Llava:
    """The shipped model of one variant; its `feature_layer` is the layer that it learned to read."""
    model = results.load(variant, small)
    model.config = replace(model.config, feature_layer=LAYERS[variant])
    return model


STUDY = Study(
    name="feature-layer",
    question="From which layer of the vision tower does the language model learn most about the image?",
    variants={
        "last": "the last block's output, layer -1",
        "penultimate": "the last but one, layer -2: LLaVA's choice",
        "third-from-last": "layer -3",
        "first": "the output of the first block",
        BLIND: "zeros in place of features",
    },
    train=train,
    ships={"first": 2},  # seed 0 had not learned to tell shapes apart
)
