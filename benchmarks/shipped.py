"""The model that comes with the course: how long it takes to load, and to answer."""

import statistics
import time

import torch

from benchmarks.timing import Row
from vlm_course.chat import encode_chat
from vlm_course.generation import generate
from vlm_course.pretrained import load_small


@torch.no_grad()
def shipped(device: str, pairs: int) -> list[Row]:
    """Loading, once torch is imported, and one question about one image, each beside its budget."""
    start = time.perf_counter()
    small = load_small(device)
    loading = time.perf_counter() - start
    ids, _ = encode_chat(small.tokenizer, [("what color is the circle ?", None)], small.model.config.visual_tokens)
    ids = torch.as_tensor(ids, device=device)[None]
    pixels = torch.zeros(1, 3, *small.model.config.vision.image_hw, device=device)
    seconds = []
    for _ in range(2 + pairs):
        start = time.perf_counter()
        generate(small.model, ids, pixels, max_new_tokens=16, eos_id=small.tokenizer.eos_id)
        seconds.append(time.perf_counter() - start)
    question = statistics.median(seconds[2:])
    return [
        Row("shipped-load", "the budget: 2 s", 1e3 * loading, 2000.0, 1.00),
        Row("shipped-question", "the budget: 0.3 s", 1e3 * question, 300.0, 1.00),
    ]
