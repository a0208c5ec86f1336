"""How the shipped weights were made, from nothing: four stages on scenes that are drawn while training.

1. contrastive: vision tower and text tower learn which caption belongs to which image (CLIP's loss).
2. language: the decoder reads conversations about scenes that it cannot see, and learns how they go.
3. align: both are frozen; the bridge learns to caption (LLaVA's stage 1).
4. instruct: bridge and decoder learn on conversations of several turns an image (LLaVA's stage 2); the tower stays
   frozen.

Every step draws its data from (seed, stage, step) alone, so a run that was interrupted sees the same data again; and
every operation is one that gives the same bits each time, so a run that is repeated gives the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..contrastive import ContrastiveModel, TextTower, TextTowerConfig, contrastive_loss
from ..decoder import rotary_phases
from ..llava import Llava, LlavaConfig, small_config
from ..loss import response_loss
from ..repeatable import repeatable, with_repeatable_embeddings
from ..tokenizer import WordTokenizer
from ..training import Paused, Stage, fit
from ..vit import VisionTransformer
from ..worlds.dialogs import KINDS, Dialogs
from ..worlds.scenes import render, sample

EMBED_DIM = 128
TEXT_LENGTH = 48  # contrastive texts need 38
TURNS = 8
LANGUAGE_LENGTH, CAPTION_LENGTH, CONVERSATION_LENGTH = 128, 48, 136  # tokens beside the image

STAGES = (
    Stage("contrastive", trains=("",), steps=5000, batch=1024, lr=1e-3),
    Stage("language", trains=("decoder.",), steps=1000, batch=512, lr=2e-3),
    Stage("align", trains=("bridge.",), steps=800, batch=512, lr=2e-3, weight_decay=0.0),
    Stage("instruct", trains=("bridge.", "decoder."), steps=6500, batch=512, lr=1.5e-3),
)

# How often each kind of question is asked in the instruct stage: more of what is harder.
MIX = {
    "colour": 1.0,
    "shape": 1.0,
    "size": 0.7,
    "count": 1.0,
    "existence": 1.3,
    "relation": 1.5,
    "check": 0.8,
    "point": 0.5,
    "box": 1.5,
    "caption": 0.9,
}


def build_contrastive(config: LlavaConfig, tokenizer: WordTokenizer) -> ContrastiveModel:
    """Both towers of the contrastive stage, untrained."""
    text = TextTowerConfig(
        vocab_size=tokenizer.vocab_size,
        width=128,
        layers=4,
        heads=4,
        mlp_width=512,
        max_length=TEXT_LENGTH,
        eos_id=tokenizer.eos_id,
    )
    return ContrastiveModel(VisionTransformer(config.vision), TextTower(text), EMBED_DIM)


def build(tokenizer: WordTokenizer) -> tuple[ContrastiveModel, Llava]:
    """The untrained models. `Llava.vision` and `ContrastiveModel.vision` are one and the same module."""
    config = small_config(tokenizer.vocab_size, image_id=tokenizer.image_id)
    contrastive = build_contrastive(config, tokenizer)
    llava = Llava(config)
    llava.vision = contrastive.vision
    return contrastive, llava


def _objectives(
    contrastive: ContrastiveModel, llava: Llava, dialogs: Dialogs, compile_: Callable, seed: int
) -> dict[str, Callable[[Stage, int], Tensor]]:
    """The loss of one step, by stage."""
    device, tok, config = dialogs.device, dialogs.tokenizer, llava.config
    visual = config.visual_tokens
    draw = compile_(render)
    mix = torch.tensor([MIX[kind] for kind in KINDS], device=device)
    only_captions = torch.tensor([float(kind == "caption") for kind in KINDS], device=device)
    # Made once: left to the compiler, sines and cosines are computed again for every head of every layer.
    places = torch.arange(1 + visual + CONVERSATION_LENGTH, device=device)
    cos, sin = rotary_phases(places, config.text.head_dim, config.text.rope_theta)

    @compile_
    def pair_loss(pixels, texts):
        return contrastive_loss(contrastive(pixels, texts))

    @compile_
    def answer_loss(ids, labels, patches, text: int):
        # `splice_image_features` for rows that all read <bos>, image, text: its index would add gradients in any order.
        words, seen = llava.decoder.embed(ids), llava.bridge(patches)
        embeds = torch.cat([words[:, :1], seen.to(words.dtype), words[:, 1 + visual :]], dim=1)
        phases = cos[: ids.shape[1]], sin[: ids.shape[1]]
        logits = llava.decoder(embeds, phases=phases, logits_to_keep=text)
        return response_loss(logits, labels[:, -text:])

    @compile_
    def text_loss(ids):
        labels = torch.where(ids == tok.pad_id, -100, ids)
        phases = cos[: ids.shape[1]], sin[: ids.shape[1]]
        return response_loss(llava.decoder(llava.decoder.embed(ids), phases=phases), labels)

    def scenes_at(stage: Stage, step: int):
        number = [s.name for s in STAGES].index(stage.name)
        generator = torch.Generator(device).manual_seed((seed * 10 + number) * 1_000_000 + step)
        return sample(stage.batch, generator=generator, device=device), generator

    def contrastive_step(stage: Stage, step: int) -> Tensor:
        scenes, generator = scenes_at(stage, step)
        texts = nn.functional.pad(dialogs.contrastive_texts(scenes), (0, TEXT_LENGTH - 38))
        return pair_loss(draw(scenes, generator=generator), texts)

    def language_step(stage: Stage, step: int) -> Tensor:
        scenes, generator = scenes_at(stage, step)
        turns = dialogs.several(scenes, TURNS, mix, generator=generator)
        return text_loss(dialogs.conversation(turns, visual_tokens=0, length=LANGUAGE_LENGTH)[0])

    def seeing_step(turns: int, weights: Tensor, length: int):
        def step_loss(stage: Stage, step: int) -> Tensor:
            scenes, generator = scenes_at(stage, step)
            talk = dialogs.several(scenes, turns, weights, generator=generator)
            ids, labels = dialogs.conversation(talk, visual_tokens=visual, length=1 + visual + length)
            with torch.no_grad():
                # Not compiled: without gradients the compiled tower gave other bits from call to call (torch 2.11).
                patches = llava.vision.patch_features(draw(scenes, generator=generator), layer=config.feature_layer)
            return answer_loss(ids, labels, patches, length)

        return step_loss

    return {
        "contrastive": contrastive_step,
        "language": language_step,
        "align": seeing_step(1, only_captions, CAPTION_LENGTH),
        "instruct": seeing_step(TURNS, mix, CONVERSATION_LENGTH),
    }


def train_small(
    out: Path | str,
    *,
    device: str = "cuda",
    seed: int = 0,
    stage: str | None = None,
    minutes: float | None = None,
    scale: float = 1.0,
    batch: int | None = None,
    log: Callable[[str], None] = print,
) -> bool:
    """Train the shipped model from nothing, or go on where an earlier call stopped.

    Args:
        out: folder for one checkpoint a stage and, in the end, the weights (see `pretrained.save_small`).
        device: "cuda" compiles the models and computes in bfloat16; "cpu" does neither.
        stage: stop after this stage; None goes to the end.
        minutes: stop in good time, with everything saved, when that many have passed.
        scale, batch: a shorter rehearsal: this share of the steps, this many images a step.

    Returns:
        whether the training is complete.

    Raises:
        ValueError: an unknown stage.
    """
    from . import save_small

    names = [s.name for s in STAGES]
    if stage is not None and stage not in names:
        raise ValueError(f"stage must be one of {', '.join(names)}; got {stage!r}")
    deadline = time.monotonic() + 60 * minutes if minutes else None
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")
    out = Path(out)
    torch.manual_seed(seed)
    tokenizer = WordTokenizer.small()
    contrastive, llava = (with_repeatable_embeddings(m).to(device) for m in build(tokenizer))
    compile_ = partial(torch.compile, dynamic=False) if cuda else lambda function: function
    objectives = _objectives(contrastive, llava, Dialogs(tokenizer, device=device), compile_, seed)
    log(f"{sum(p.numel() for p in {*contrastive.parameters(), *llava.parameters()}):,} parameters in all")
    with repeatable():
        for plan in STAGES:
            plan = replace(plan, steps=max(2, round(plan.steps * scale)), batch=batch or plan.batch)
            try:
                fit(
                    contrastive if plan.name == "contrastive" else llava,
                    plan,
                    lambda step, plan=plan: objectives[plan.name](plan, step),
                    checkpoint=out / f"{plan.name}.pt",
                    autocast=torch.bfloat16 if cuda else None,
                    deadline=deadline,
                    log=log,
                )
            except Paused as pause:
                log(f"{pause}; call again to go on")
                return False
            if plan.name == stage:
                log(f"stopped after stage {stage}, as asked")
                return stage == names[-1]
    save_small(contrastive, llava, out)
    return True
