"""When memory is exhausted: how many rows fit, found by halving on the very batch that did not."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

Result = TypeVar("Result")


class OutOfMemory(MemoryError):
    """A step that does not fit. The message is one sentence; `fits` is the micro-batch that does, or None."""

    def __init__(self, message: str, fits: int | None = None):
        super().__init__(message)
        self.fits = fits


def let_segments_grow() -> None:
    """Ask CUDA's allocator for segments that grow, before its first use and unless the user asked for something.

    A step that fills the memory to a few GB otherwise fails for want of one free piece: conversations differ in length.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def attempt(run: Callable[[], Result], clean: Callable[[], None]) -> tuple[Result | None, bool]:
    """run() -> (its result, True), or (None, False) when memory is exhausted; then all it held is given back.

    The exception keeps every tensor of the failed pass alive, so it must be gone before anything is tried again.
    """
    try:
        return run(), True
    except torch.OutOfMemoryError:
        pass
    clean()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, False


def halve_until_it_fits(
    run: Callable[[int], Result], failed: int, clean: Callable[[], None]
) -> tuple[Result | None, int | None]:
    """run(failed // 2), run(failed // 4), ... until one fits -> (its result, its rows), or (None, None)."""
    rows = failed // 2
    while rows >= 1:
        result, fits = attempt(partial(run, rows), clean)
        if fits:
            return result, rows
        rows //= 2
    return None, None


def no_fit(tokens: int, mode: str) -> OutOfMemory:
    """Not even one row fits."""
    lighter = {"full": 'mode "lora"', "lora": 'a smaller lora_rank or mode "projector"', "projector": "a smaller model"}
    return OutOfMemory(
        f'Out of memory: not even 1 row of {tokens} tokens fits, so take a smaller max_tokens, dtype "bfloat16" or '
        f"{lighter[mode]}."
    )
