"""Every shape on the way from pixels to logits, taken from a real forward pass, of a real model or of one without
weights (the meta device), so that LLaVA's 13 billion parameters trace in a second on a laptop.

`trace` takes a `Llava`; `catalog.tracing` has the published models."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from vlm_course.llava import Llava, LlavaConfig


@dataclass(frozen=True)
class TraceRow:
    """One tensor: the stage it belongs to, the module it comes from, its shape with a name for every axis, its dtype
    and what it means."""

    stage: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str
    axes: tuple[str, ...]


# module name pattern -> (stage, axes, meaning) of its output; ":in" stands for its input; the first pattern counts.
# Where a module's output may have different ranks, the axes of each are given, with "|" between them.
Places = Mapping[str, tuple[str, str, str]]

_PLACES: Places = {
    r"vision\.patch_embedding": ("vision", "B N D_vision", "one vector per patch"),
    r"vision\.pre_norm": ("vision", "B 1+N D_vision", "CLS in front, positions added, normalised"),
    r"vision\.blocks\.\d+": ("vision", "B 1+N D_vision", "after a block of the vision tower"),
    r"bridge:in": ("bridge", "B N D_vision", "patch features: the chosen layer, CLS dropped"),
    r"bridge": ("bridge", "B M D_llm", "visual tokens, as wide as word embeddings"),
    r"decoder\.token_embedding": ("fusion", "B T D_llm", "embeddings of all ids, placeholders among them"),
    r"decoder\.blocks\.0:in": ("fusion", "B T D_llm", "visual tokens spliced in at the placeholders"),
    r"decoder\.blocks\.0\.attention\.query": ("decoder", "B T H*d", "queries of all heads, side by side"),
    r"decoder\.blocks\.0\.attention\.key": ("decoder", "B T H_kv*d", "keys: what the KV cache keeps, with the values"),
    r"decoder\.blocks\.0\.attention\.value": ("decoder", "B T H_kv*d", "values"),
    r"decoder\.blocks\.0\.mlp\.gate": ("decoder", "B T D_mlp", "inside the feed-forward layer"),
    r"decoder\.blocks\.\d+": ("decoder", "B T D_llm", "after a block of the language model"),
    r"decoder\.norm": ("decoder", "B T D_llm", "normalised for the head"),
    r"decoder\.head": ("decoder", "B T V", "logits: a score for every word at every position"),
}


def _place(places: Places, name: str) -> tuple[str, str, str] | None:
    return next((place for pattern, place in places.items() if re.fullmatch(pattern, name)), None)


@torch.no_grad()
def trace(model: Llava, ids: Tensor, pixels: Tensor | None = None) -> list[TraceRow]:
    """Runs the model once and notes the shapes: ids [B, T], pixels [n_images, 3, H, W] -> rows in order of execution.

    Equal blocks that follow each other share a row, `vision.blocks.0-22`. Blocks that do not run (the vision tower's
    last, when the layer before it is read) are not in the table. The model is left as it was.
    """
    rows = [row("input", "ids", ids, "B T", "word ids, <image> repeated once per visual token")]
    if pixels is not None:
        rows.append(row("input", "pixels", pixels, "B C H W", "normalised pixels"))
    return trace_call(model, _PLACES, lambda note: model(ids, pixels), rows)


Note = Callable[[str, str, Tensor, str, str], None]  # stage, name, tensor, axes, meaning: adds a row


@torch.no_grad()
def trace_call(
    module: nn.Module, places: Places, call: Callable[[Note], object], rows: Iterable[TraceRow] = ()
) -> list[TraceRow]:
    """Rows of every module that `places` names while `call` runs, behind `rows`; equal blocks are merged.

    `call` gets a function that adds a row of its own, for tensors between modules. The module is left as it was.
    """
    noted = list(rows)
    handles = []
    try:
        for name, child in module.named_modules():
            if place := _place(places, f"{name}:in"):
                hook = _entering(noted, f"{name}:in", place)
                handles.append(child.register_forward_pre_hook(hook, with_kwargs=True))
            if place := _place(places, name):
                handles.append(child.register_forward_hook(_leaving(noted, name, place)))
        call(lambda stage, name, tensor, axes, meaning: noted.append(row(stage, name, tensor, axes, meaning)))
    finally:
        for handle in handles:
            handle.remove()
    return _merge_blocks(noted)


def _entering(rows: list[TraceRow], name: str, place: tuple[str, str, str]) -> Callable[..., None]:
    stage, axes, meaning = place

    def hook(module: nn.Module, inputs: tuple, named: dict) -> None:
        rows.append(row(stage, name, _first_tensor((*inputs, *named.values())), axes, meaning))

    return hook


def _leaving(rows: list[TraceRow], name: str, place: tuple[str, str, str]) -> Callable[..., None]:
    stage, axes, meaning = place

    def hook(module: nn.Module, inputs: tuple, output: object) -> None:
        rows.append(row(stage, name, _first_tensor(output), axes, meaning))

    return hook


def _first_tensor(value: object) -> Tensor:
    """The tensor itself, or the first one in a tuple or in an output of transformers."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if hasattr(value, "values") else value
    return next(item for item in items if isinstance(item, Tensor))


def row(stage: str, name: str, tensor: Tensor, axes: str, meaning: str) -> TraceRow:
    """One row. Raises ValueError where none of the axes given has the tensor's rank."""
    named = next((names for part in axes.split("|") if len(names := part.split()) == tensor.dim()), None)
    if named is None:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but its axes are {axes!r}")
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TraceRow(stage, name, tuple(tensor.shape), dtype, meaning, tuple(named))


def _merge_blocks(rows: Iterable[TraceRow]) -> list[TraceRow]:
    merged: list[TraceRow] = []
    first = 0
    for row in rows:
        block = re.fullmatch(r"((?:.+\.)?(?:blocks|layers|layer)\.)(\d+)", row.name)
        if not block:
            merged.append(row)
        elif merged and merged[-1].name.startswith(block[1]) and replace(merged[-1], name=row.name) == row:
            merged[-1] = replace(row, name=f"{block[1]}{first}-{block[2]}")
        else:
            first = int(block[2])
            merged.append(row)
    return merged


def trace_config(config: LlavaConfig, *, text_tokens: int = 50) -> list[TraceRow]:
    """The trace of a model that is never allocated: one image in front of `text_tokens` words, on the meta device."""
    with torch.device("meta"):
        model = Llava(config)
        ids = torch.zeros(1, config.visual_tokens + text_tokens, dtype=torch.long)
        pixels = torch.zeros(1, config.vision.channels, *config.vision.image_hw)
    return trace(model, ids, pixels)


def format_table(rows: Iterable[TraceRow]) -> str:
    """A plain-text table: stage, name, named shape, dtype, meaning."""
    header = ("stage", "name", "shape", "dtype", "meaning")
    cells = [header]
    for row in rows:
        shape = " ".join(f"{axis}={size}" for axis, size in zip(row.axes, row.shape, strict=True))
        cells.append((row.stage, row.name, f"[{shape}]", row.dtype, row.meaning))
    widths = [max(len(line[column]) for line in cells) for column in range(len(header) - 1)]
    cells.insert(1, tuple("-" * width for width in [*widths, len(header[-1])]))
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]) for line in cells
    )


def to_json(rows: Iterable[TraceRow]) -> str:
    """The same rows as a JSON list of objects with the fields of `TraceRow`."""
    return json.dumps([asdict(row) for row in rows], indent=2)
