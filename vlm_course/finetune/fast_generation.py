"""Greedy answers at the speed of the memory: a static cache, and a step of a few kernels recorded once.

`generation.generate` stays the plain way, for batches, sampling and padding. This one answers a single prompt, on any
device; on a CUDA device the step is Triton kernels in a CUDA graph, elsewhere plain torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vlm_course.decoder import Decoder, DecoderBlock, RMSNorm, SelfAttention, SwiGLU
from vlm_course.finetune.decode_plain import PlainStep, State
from vlm_course.finetune.prefill import PlainOps, Prefill, TritonOps, capture
from vlm_course.llava import Llava
from vlm_course.validation import checks, counts, require_shape

LOOK_EVERY = 16  # tokens between two looks for the end of the answer: each look waits for the device
_PLAIN = {Decoder, DecoderBlock, SelfAttention, SwiGLU, RMSNorm, nn.ModuleList, nn.Linear, nn.Embedding}


def _check_model(self, model, *, capacity=1024, tune=False, graphs=None, pdl=None) -> None:
    if type(model) is not Llava:
        raise ValueError(f"model is a {type(model).__name__}, expected a Llava")
    other = sorted({type(part).__name__ for part in model.decoder.modules() if type(part) not in _PLAIN})
    if other:
        raise ValueError(f"the decoder holds {', '.join(other)}, expected its own layers alone: call merge_lora first")
    most = model.config.text.max_positions
    if capacity > most:
        raise ValueError(f"capacity is {capacity}, but the model has {most} positions")


def _check_prompt(
    self, ids: Tensor, pixels: Tensor | None = None, *, image_features: Tensor | None = None,
    max_new_tokens: int, eos_id: int | None = None,
) -> None:  # fmt: skip
    require_shape(ids, "ids", "B T", floating=False, B=1, hint="generation.generate answers batches")
    if ids.shape[1] + max_new_tokens > self.capacity:
        raise ValueError(
            f"{ids.shape[1]} tokens and {max_new_tokens} new ones do not fit in capacity={self.capacity}: "
            "build FastGenerator with more"
        )
    if pixels is not None and image_features is not None:
        raise ValueError("got both pixels and image_features: pass the images once")
    placeholders = int((ids == self.model.config.image_id).sum())
    images = next((len(image) for image in (pixels, image_features) if image is not None), 0)
    per_image = self.model.config.visual_tokens if image_features is None else image_features.shape[1]
    if placeholders != images * per_image:
        raise ValueError(
            f"the prompt has {placeholders} placeholders but {images} images give {images} x {per_image} = "
            f"{images * per_image} features"
        )


def milliseconds(run: Callable[[], object], *, repeats: int = 3, graph: bool = True) -> float:
    """Time of a function of GPU kernels, the least of `repeats`; as a recorded graph, so that no launch counts."""
    replay = capture(run).replay if graph else run
    replay()
    taken = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return min(taken)


class FastGenerator:
    """Answers prompts of one image or more with a `Llava`, greedily.

    capacity: tokens of prompt and answer together. tune: time a few block sizes of each kernel (CUDA; 15 s). graphs:
    record CUDA graphs; by default on CUDA. pdl: programmatic dependent launch; by default where it works.
    The weights of query, key and value, and of gate and up, are laid side by side in place; the model stays usable.
    A model whose weights are replaced (not overwritten) afterwards needs a new FastGenerator.
    """

    @counts(capacity=2)
    @checks(_check_model)
    def __init__(
        self,
        model: Llava,
        *,
        capacity: int = 1024,
        tune: bool = False,
        graphs: bool | None = None,
        pdl: bool | None = None,
    ):
        device = next(model.parameters()).device
        cuda = device.type == "cuda"
        self.model, self.capacity, self.cuda = model, capacity, cuda
        self.graphs = cuda if graphs is None else graphs
        self.warm_up_s, self.times, began = 0.0, {}, time.perf_counter()
        banned = model.config.image_id
        with torch.no_grad():
            if cuda:
                from vlm_course.finetune.decode_launch import LaunchedStep, early_start_works, splits_for

                new = early_start_works(device) if pdl is None else pdl
                processors = torch.cuda.get_device_properties(device).multi_processor_count
                self.state = State(model.decoder, capacity, splits_for(model.config.text.kv_heads, processors))
                self.step = LaunchedStep(model.decoder, self.state, banned, pdl=new)
                self.prefill = Prefill(model, self.step, TritonOps(), graphs=self.graphs)
                if tune:
                    self.state.length.fill_(min(640, capacity - 1))
                    self.times = self.step.tune(milliseconds)
            else:
                self.state = State(model.decoder, capacity)
                self.step = PlainStep(model.decoder, self.state, banned)
                self.prefill = Prefill(model, self.step, PlainOps(), graphs=False)
            self.forward: Callable[[], object] = self.step
            if self.graphs and cuda:
                self.state.length.fill_(1)
                self.forward = capture(self.step).replay
                torch.cuda.synchronize()
        self.warm_up_s = time.perf_counter() - began

    @counts(max_new_tokens=1, eos_id=0)
    @checks(_check_prompt)
    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        pixels: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
        max_new_tokens: int,
        eos_id: int | None = None,
    ) -> Tensor:
        """ids [1, T], placeholders expanded -> the new ids [1, up to max_new_tokens], ending with eos_id if it came.

        The images as `pixels` [n, 3, H, W] or as `image_features` [n, M, D]. <image> is never written.
        The same ids as `generation.generate`, except where two words are equally likely within rounding.
        """
        self.prefill(ids[0], pixels, image_features)
        done = 1
        while done < max_new_tokens:
            steps = max_new_tokens - done if eos_id is None else min(LOOK_EVERY, max_new_tokens - done)
            for _ in range(steps):
                self.forward()
            done += steps
            if eos_id is not None and bool((self.state.tokens[:done] == eos_id).any()):
                break
        new = self.state.tokens[:done].clone()
        if eos_id is not None:
            ends = (new == eos_id).nonzero()
            if len(ends):
                new = new[: int(ends[0]) + 1]
        return new[None]
