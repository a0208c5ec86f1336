"""Draw docs/ask.png: a scene, and what the shipped model really answers about it.  python docs/picture.py"""

import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image

from vlm_course.ask import ask
from vlm_course.images import to_pil
from vlm_course.worlds.scenes import render, sample

QUESTIONS = (
    "What do you see?",
    "What colour is the star?",
    "How many circles are there?",
    "Is there a red triangle?",
    "Is the star left of the blue circle?",
    "Who painted this?",
)
INK, BLUE, BROWN = "#222222", "#2166ac", "#b35806"


def main() -> None:
    generator = torch.Generator().manual_seed(4)
    scenes = sample(400, generator=generator, objects=(4, 4))
    words = [" ".join(scenes.describe(i)) for i in range(len(scenes))]
    row = next(i for i, w in enumerate(words) if w.count("star") == 1 and w.count("circle") == 2 and "blue circle" in w)
    with tempfile.TemporaryDirectory() as folder:
        file, boxed = Path(folder) / "scene.png", Path(folder) / "boxes.png"
        scene = to_pil(render(scenes[[row]], noise=0)[0])
        scene.resize((384, 384), Image.Resampling.BICUBIC).save(file)
        outcomes = [ask(file, question) for question in QUESTIONS]
        ask(file, "Where is the star?", boxes=boxed)
        picture = Image.open(boxed).convert("RGB")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(1, 1.5))
    left.imshow(picture)
    left.set_title('"Where is the star?"', fontsize=11, color=INK)
    left.axis("off")
    right.axis("off")
    for number, outcome in enumerate(outcomes):
        top = 0.97 - number / len(outcomes)
        right.text(0, top, outcome.question, fontsize=11, color=BROWN, va="top", transform=right.transAxes)
        answer = outcome.answer or outcome.error
        right.text(0.02, top - 0.07, answer, fontsize=9.5, color=BLUE, va="top", wrap=True, transform=right.transAxes)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("ask.png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
