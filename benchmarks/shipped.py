"""The model that comes with the course: how long it takes to load, and to answer."""

import statistics
import time

import torch

from vlm_course.chat import encode_chat
from vlm_course.generation import generate
from vlm_course.pretrained import load_small


@torch.no_grad()
def shipped(device: str) -> list[str]:
    """Seconds to load after torch is imported, and for one question about one image."""
    start = time.perf_counter()
    small = load_small(device)
    loading = time.perf_counter() - start
    ids, _ = encode_chat(small.tokenizer, [("what color is the circle ?", None)], small.model.config.visual_tokens)
    ids = torch.as_tensor(ids, device=device)[None]
    pixels = torch.zeros(1, 3, 96, 96, device=device)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        generate(small.model, ids, pixels, max_new_tokens=16, eos_id=small.tokenizer.eos_id)
        seconds.append(time.perf_counter() - start)
    question = statistics.median(seconds[2:])
    return [f"shipped: loading {loading:.2f} s (at most 2), one question {question:.3f} s (at most 0.3)"]
