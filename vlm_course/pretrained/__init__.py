"""The shipped model: weights in half precision, a card that says how they were made and measured, and their loader.

`python -m vlm_course train small` makes them again; `recipe.py` is how.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..contrastive import ContrastiveModel
from ..decoder import Decoder
from ..llava import Llava
from ..tokenizer import WordTokenizer

FOLDER = Path(__file__).parent
TOWERS, LANGUAGE = "small_towers.safetensors", "small_language.safetensors"


@dataclass(frozen=True)
class Small:
    """The shipped model in float32, in eval mode, with what belongs to it.

    Attributes:
        model: answers questions about images.
        contrastive: compares images with texts; its vision tower is the model's own.
        tokenizer: of both.
    """

    model: Llava
    contrastive: ContrastiveModel
    tokenizer: WordTokenizer

    @cached_property
    def card(self) -> dict:
        """Data, seed, hardware, minutes and the measured table."""
        return json.loads((FOLDER / "small_card.json").read_text(encoding="utf-8"))


def save_small(contrastive: ContrastiveModel, llava: Llava, folder: Path | str) -> list[Path]:
    """Write both weight files in float16: the towers (vision and text), the language side (bridge and decoder).

    Returns:
        the two paths.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    half = lambda model: {k: v.detach().cpu().half().contiguous() for k, v in model.state_dict().items()}  # noqa: E731
    language = {k: v for k, v in half(llava).items() if not k.startswith("vision.")}
    files = {folder / TOWERS: half(contrastive), folder / LANGUAGE: language}
    for path, weights in files.items():
        save_file(weights, path)
    return list(files)


def load_small(device: str | torch.device = "cpu", *, folder: Path | str = FOLDER) -> Small:
    """Load the shipped model.

    Args:
        device: where its float32 weights go.
        folder: where the two weight files lie; the package's own by default.

    Raises:
        FileNotFoundError: a weight file is missing.
    """
    from safetensors.torch import load_file

    from .recipe import build

    tokenizer = WordTokenizer.small()
    # Not on the meta device: drawing first weights there imports the compiler of torch, 1.5 s for nothing.
    with torch.random.fork_rng(devices=[]):
        contrastive, llava = build(tokenizer)
    folder, weights = Path(folder), []
    for name in (TOWERS, LANGUAGE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{name} is missing in {folder}: restore it with git, or make it with `vlm-course train small`"
            )
        weights.append({k: v.float() for k, v in load_file(folder / name, device=str(device)).items()})
    contrastive.load_state_dict(weights[0], assign=True)
    vision = {k: v for k, v in weights[0].items() if k.startswith("vision.")}
    llava.vision = contrastive.vision
    llava.load_state_dict(weights[1] | vision, assign=True)
    for model in (contrastive, llava):
        model.eval().requires_grad_(False)
    if torch.device(device).type == "cpu":
        _lay_in_columns(llava.decoder)
    return Small(llava, contrastive, tokenizer)


def _lay_in_columns(decoder: Decoder) -> None:
    """Stores the decoder's wide matrices column by column: with one token at a time a CPU's BLAS reads them so in half
    the time, and with all threads. Shapes, names and values stay."""
    wide = [linear for block in decoder.blocks for linear in (block.mlp.gate, block.mlp.up)]
    for linear in (*wide, decoder.head):
        linear.weight.data = linear.weight.data.t().contiguous().t()
