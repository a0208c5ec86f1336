"""What a compressing bridge costs in answers when everybody is trained for it: chapter 2's stored comparison.

`python -m vlm_course.bridge_training --out FILE` puts one bridge after another between the shipped vision tower, which
stays frozen, and the shipped decoder. It trains bridge and decoder on the same conversations about scenes, as many for
each bridge, and asks every model the same questions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm_course.bridge_study import count_parameters, resampler_bridge
from vlm_course.bridges import CAbstractor, VisionProjection
from vlm_course.llava import Llava
from vlm_course.loss import response_loss
from vlm_course.pretrained import Small, load_small
from vlm_course.pretrained.recipe import MIX
from vlm_course.probe_questions import question_set, score
from vlm_course.training import Stage, fit
from vlm_course.worlds.dialogs import KINDS, Dialogs
from vlm_course.worlds.scenes import render, sample

PLAN = Stage("instruct", trains=("bridge.", "decoder."), steps=1500, batch=256, lr=1e-3)
TURNS, TEXT = 8, 136  # questions an image, tokens of text


class PooledProjection(nn.Module):
    """Mean of every block x block features, then the MLP. forward: [B, N, D] -> [B, N / block^2, D_llm]."""

    def __init__(self, vision_dim: int, llm_dim: int, *, grid: int, block: int):
        super().__init__()
        self.grid, self.pool = grid, nn.AvgPool2d(block)
        self.projection = VisionProjection(vision_dim, llm_dim)

    def forward(self, features: Tensor) -> Tensor:
        x = features.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # [B, N, D] -> [B, D, h, w]
        return self.projection(self.pool(x).flatten(2).transpose(1, 2))  # -> [B, M, D] -> [B, M, D_llm]


# name -> (visual tokens, constructor); the shipped tower gives 12 x 12 features of width 192, the decoder reads 256
BRIDGES: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "MLP": (144, lambda: VisionProjection(192, 256)),
    "mean of 2 x 2, MLP": (36, lambda: PooledProjection(192, 256, grid=12, block=2)),
    "C-Abstractor": (36, lambda: CAbstractor(vision_dim=192, llm_dim=256, queries=36, hidden=192, depth=2, grid=12)),
    "Perceiver resampler": (36, lambda: resampler_bridge(192, 256, queries=36, depth=2, heads=6, head_dim=32)),
    "mean of 3 x 3, MLP": (16, lambda: PooledProjection(192, 256, grid=12, block=3)),
    "Perceiver resampler, 16": (16, lambda: resampler_bridge(192, 256, queries=16, depth=2, heads=6, head_dim=32)),
}


def model_with(small: Small, tokens: int, bridge: nn.Module) -> Llava:
    """The shipped tower and decoder around another bridge."""
    model = Llava(replace(small.model.config, visual_tokens=tokens), bridge=bridge)
    model.vision.load_state_dict(small.model.vision.state_dict())
    model.decoder.load_state_dict(small.model.decoder.state_dict())
    return model


def train_bridge(model: Llava, dialogs: Dialogs, plan: Stage, *, seed: int, checkpoint: Path, log=print) -> None:
    """Train bridge and decoder on conversations; the same seed draws the same scenes for every bridge."""
    mix, tokens = torch.tensor([MIX[kind] for kind in KINDS]), model.config.visual_tokens
    model.to(dialogs.device)

    def loss(step: int) -> Tensor:
        generator = torch.Generator(dialogs.device).manual_seed(seed * 1_000_000 + step)
        scenes = sample(plan.batch, generator=generator, device=dialogs.device)
        turns = dialogs.several(scenes, TURNS, mix, generator=generator)
        ids, labels = dialogs.conversation(turns, visual_tokens=tokens, length=1 + tokens + TEXT)
        with torch.no_grad():
            patches = model.vision.patch_features(render(scenes, generator=generator), layer=model.config.feature_layer)
        logits = model(ids, image_features=model.bridge(patches), logits_to_keep=TEXT, check=False)
        return response_loss(logits, labels[:, -TEXT:])

    autocast = torch.bfloat16 if dialogs.device.type == "cuda" else None
    fit(model, plan, loss, checkpoint=checkpoint, autocast=autocast, log=log)


@torch.no_grad()
def examine(model: Llava, small: Small, *, scenes: int, seed: int) -> dict[str, float]:
    """Exact answers by kind and the error of boxes, on scenes of one to six objects, a hundred at a time."""
    model.eval().cpu()
    tables = []
    for start in range(0, scenes, 100):
        questions = question_set(
            small.tokenizer,
            scenes=min(100, scenes - start),
            visual_tokens=model.config.visual_tokens,
            seed=seed + start,
            objects=(1, 6),
        )
        result = score(model, questions, model.encode_images(questions.pixels))
        tables.append([result.accuracy(kind) for kind in questions.kinds] + [result.box_error()])
    means = torch.tensor(tables).mean(0).tolist()
    return dict(zip([*questions.kinds, "box error (px)"], (round(value, 4) for value in means), strict=True))


def compare(
    *,
    device: str = "cuda",
    seed: int = 0,
    plan: Stage = PLAN,
    scenes: int = 500,
    names=tuple(BRIDGES),
    folder: Path,
    log=print,
) -> dict:
    """Train and examine every bridge -> the table with how it came about. Checkpoints lie in `folder`."""
    small = load_small()
    dialogs = Dialogs(small.tokenizer, device=device)
    rows = []
    for name in names:
        tokens, build = BRIDGES[name]
        torch.manual_seed(seed)
        model, start = model_with(small, tokens, build()), time.perf_counter()
        checkpoint = folder / f"{name.replace(' ', '_').replace(',', '')}.pt"
        train_bridge(model, dialogs, plan, seed=seed, checkpoint=checkpoint, log=lambda line: None)
        seconds = round(time.perf_counter() - start, 1)
        row = {"bridge": name, "tokens": tokens, "parameters": count_parameters(model.bridge), "seconds": seconds}
        rows.append(row | examine(model, small, scenes=scenes, seed=10_000 + seed))
        log(json.dumps(rows[-1]))
    hardware = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"
    made = {"seed": seed, "steps": plan.steps, "batch": plan.batch, "lr": plan.lr, "scenes": scenes}
    return made | {"hardware": hardware, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=PLAN.steps)
    parser.add_argument("--batch", type=int, default=PLAN.batch)
    parser.add_argument("--checkpoints", type=Path, help="folder for unfinished runs; default: beside the output")
    options = parser.parse_args()
    plan = replace(PLAN, steps=options.steps, batch=options.batch)
    folder = options.checkpoints or options.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    table = compare(device=options.device, seed=options.seed, plan=plan, folder=folder)
    options.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
