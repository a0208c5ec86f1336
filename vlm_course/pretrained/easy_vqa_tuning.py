"""The shipped model tuned on easy-VQA's training split: only the bridge learns, in a file of its own of 0.2 MB.

`python -m vlm_course.pretrained.easy_vqa_tuning` makes it again on two CPU cores. `ask` never uses it: it answers about
pictures of a single circle, rectangle or triangle, and its table on scenes shows what that costs.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from ..easy_vqa import easy_vqa_images, easy_vqa_questions, pad_sequences
from ..loss import response_loss
from ..training import Stage, fit
from . import FOLDER, Small, load_small

FILE = "easy_vqa_bridge.safetensors"
STAGE = Stage("easy-vqa", trains=("bridge.",), steps=250, batch=32, lr=5e-4, weight_decay=0.0, warmup=0.05)
QUESTIONS_PER_IMAGE = 8


def load_tuned(device: str = "cpu", *, folder: Path | str = FOLDER) -> Small:
    """The shipped model with the bridge tuned on easy-VQA.

    Raises:
        FileNotFoundError: its file is missing.
    """
    from safetensors.torch import load_file

    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is missing: make it with `python -m vlm_course.pretrained.easy_vqa_tuning`"
        )
    small = load_small(device, folder=folder)
    weights = {name: value.float() for name, value in load_file(path, device=str(device)).items()}
    small.model.bridge.load_state_dict(weights)
    return small


def patch_features(small: Small, batch: int = 50) -> tuple[Tensor, list[int]]:
    """Frozen features of every training image in half precision: [images, N, D], and the image ids."""
    from PIL import Image

    from ..images import small_preprocess

    paths = easy_vqa_images("train")
    numbers, out = sorted(paths), []
    for start in range(0, len(numbers), batch):
        images = [small_preprocess(Image.open(paths[i]).convert("RGB")) for i in numbers[start : start + batch]]
        with torch.no_grad():
            features = small.model.vision.patch_features(torch.stack(images), layer=small.model.config.feature_layer)
        out.append(features.half())
    return torch.cat(out), numbers


def conversations(small: Small) -> dict[int, list[list[int]]]:
    """Every training question with its answer as ids, by image."""
    tok = small.tokenizer
    turns: dict[int, list[list[int]]] = defaultdict(list)
    for question, answer, image in zip(*easy_vqa_questions("train"), strict=True):
        turns[image].append([tok.user_id, *tok.encode(question), tok.assistant_id, tok.id_of(answer), tok.eos_id])
    return turns


def tune(checkpoint: Path, *, stage: Stage = STAGE, seed: int = 0) -> Small:
    """Train the bridge on the training split, resumable from `checkpoint`."""
    small = load_small()
    model, tok = small.model, small.tokenizer
    features, numbers = patch_features(small)
    turns = conversations(small)

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_000 + step)
        rows = torch.randint(len(numbers), (stage.batch,), generator=generator)
        ids, labels = [], []
        for row in rows.tolist():
            mine = turns[numbers[row]]
            order = torch.randperm(len(mine), generator=generator)[:QUESTIONS_PER_IMAGE].tolist()
            head = [tok.bos_id] + [tok.image_id] * model.config.visual_tokens
            ids.append(head + [i for k in order for i in mine[k]])
            labels.append([-100] * len(head) + [i for k in order for i in [-100] * (len(mine[k]) - 2) + mine[k][-2:]])
        visual = model.bridge(features[rows].float())
        logits = model(pad_sequences(ids, tok.pad_id), image_features=visual)
        return response_loss(logits, pad_sequences(labels, -100))

    fit(model, stage, loss_at, checkpoint=checkpoint)
    model.eval().requires_grad_(False)
    return small


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the weights (default: the package's own)")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/easy_vqa.pt"), help="to go on from if interrupted"
    )
    arguments = parser.parse_args()
    small = tune(arguments.checkpoint)
    save_file({k: v.half().contiguous() for k, v in small.model.bridge.state_dict().items()}, arguments.out / FILE)


if __name__ == "__main__":
    main()
