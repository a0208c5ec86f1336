"""Results of studies as a chapter reads them: a table that says where it comes from, and small weight files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..llava import Llava
from ..pretrained import Small
from .tiny import tiny_llava

DATA = Path(__file__).parent / "data"  # the results that come with the course
SCALE = "|scale"  # ends the name of a matrix's scales in a weight file


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a run's weights at a byte a number: matrices as int8 with a float16 scale a row, vectors as float16.

    Symmetric rounding to 255 steps; the study's table was measured before it.
    """
    from safetensors.torch import save_file

    stored = {}
    for name, value in weights.items():
        if value.dim() < 2:
            stored[name] = value.half().contiguous()
            continue
        scale = (value.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-7).half()
        stored[name] = (value.float() / scale.float()).round().clamp(-127, 127).to(torch.int8).contiguous()
        stored[name + SCALE] = scale
    save_file(stored, path)
    path.chmod(0o644)


def load_weights(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """What `save_weights` wrote, as float32 tensors by name."""
    from safetensors.torch import load_file

    stored = load_file(path, device=str(device))
    return {
        name: value.float() * stored[name + SCALE].float() if name + SCALE in stored else value.float()
        for name, value in stored.items()
        if not name.endswith(SCALE)
    }


@dataclass(frozen=True)
class Results:
    """A finished study, as a chapter reads it."""

    record: dict
    folder: Path

    @property
    def rehearsal(self) -> bool:
        return self.record["rehearsal"]

    @property
    def variants(self) -> dict[str, str]:
        return {name: entry["says"] for name, entry in self.record["variants"].items()}

    def value(self, variant: str, *path: str) -> dict:
        """One measure, named by its path: {"mean", "spread", "values"}.

        Raises ValueError, naming what there is, where the table has no such entry.
        """
        here = self.record["variants"]
        for name in (variant, "measures", *path):
            if name not in here:
                raise ValueError(f"the study has no {name!r} here; there is {', '.join(here)}")
            here = here[name]
        return here

    def mean(self, variant: str, *path: str) -> float:
        return self.value(variant, *path)["mean"]

    def spread(self, variant: str, *path: str) -> float:
        return self.value(variant, *path)["spread"]

    def note(self) -> str:
        """One sentence for the reader: where the numbers come from, and a warning when it was a rehearsal."""
        card = self.record["card"]
        made = f"{card['seeds']} seed{'s' * (card['seeds'] > 1)} a variant, {card['minutes']} minutes in all on "
        made += f"{card['hardware'] or 'a CPU'}; made again by: {card['command']}"
        if self.rehearsal:
            return f"REHEARSAL, not a result: a few steps, to show the form of the table. {made}"
        return made

    def reveal(self, prediction: str, right: str, because: str) -> None:
        """`progress.reveal` with the answer that the study gives. A rehearsal decides nothing and says so."""
        from ..progress import reveal

        if self.rehearsal:
            print("These models saw a few steps only, so nothing is decided: the whole study answers the prediction.")
        else:
            reveal(prediction, right, because=because)

    def load(self, variant: str, small: Small, **text) -> Llava:
        """The shipped model of one variant, in float32 and eval mode, behind the given model's vision tower."""
        model = tiny_llava(small, seed=0, **text)
        device = next(small.model.parameters()).device
        weights = load_weights(self.folder / f"{self.record['study']}-{variant}.safetensors", device)
        vision = {name: value for name, value in model.state_dict().items() if name.startswith("vision.")}
        model.load_state_dict(weights | vision)
        return model.eval().requires_grad_(False)


def load_results(name: str, folder: Path | str = DATA) -> Results:
    """The results of a study. Raises ValueError where there are none."""
    file = Path(folder) / f"{name}.json"
    if not file.is_file():
        raise ValueError(f"there are no results of the study {name!r} in {folder}: run `vlm-course study {name}`")
    return Results(json.loads(file.read_text(encoding="utf-8")), Path(folder))
