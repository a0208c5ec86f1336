"""What all studies share: the laboratory that a run gets, and the loop over variants and seeds.

A run is one variant with one seed. It leaves one JSON file, and a run whose file exists is skipped, so an interrupted
study goes on with the same call.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import rotary_phases
from ..fusion import splice_image_features
from ..llava import Llava
from ..loss import response_loss
from ..pretrained import Small, load_small
from ..training import Paused, Stage, fit
from ..worlds.dialogs import Dialogs
from ..worlds.scenes import Scenes, render, sample
from .results import save_weights

BATCH, REHEARSAL_BATCH = 512, 16
TEST_SEED = 3_000_000_000  # scenes to measure on; those of training have seeds far below

Measures = dict[str, Any]  # name -> number, or name -> Measures


@dataclass(frozen=True)
class Study:
    """An experiment: what it asks, what differs between its variants, and how one run of a variant goes.

    `train(variant, lab)` trains with the lab's seed and returns (measures, weights): numbers, nested by name as deep as
    wanted, and the tensors worth shipping (None: nothing).
    """

    name: str
    question: str
    variants: Mapping[str, str]  # name -> what is particular about it
    train: Callable[[str, Lab], tuple[Measures, dict[str, Tensor] | None]]
    data: str = "scenes drawn on the device while training, in the train split of vlm_course.worlds.scenes"
    # Variant -> the seed whose weights a chapter loads, where it is not 0: one that learned what the chapter looks at.
    ships: Mapping[str, int] = field(default_factory=dict)

    def shipped_seed(self, variant: str, seeds: int) -> int:
        """Whose weights are kept, of seeds 0 .. seeds - 1."""
        seed = self.ships.get(variant, 0)
        return seed if seed < seeds else 0


@dataclass
class Lab:
    """Where one run happens: device, seed, size of the rehearsal, and the loop.

    Attributes:
        scale: share of the steps; below 1 it is a rehearsal, with smaller batches too.
        tests: scenes to measure on.
        shared: values that runs of one call hand on to the next, such as a compiled function or a warm start.
    """

    small: Small
    seed: int = 0
    scale: float = 1.0
    folder: Path = Path("runs/study")
    deadline: float | None = None
    log: Callable[[str], None] = print
    progress: Callable[[float], None] = lambda share: None
    shared: dict = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        return next(self.small.model.parameters()).device

    @cached_property
    def dialogs(self) -> Dialogs:
        return Dialogs(self.small.tokenizer, device=self.device)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def rehearsal(self) -> bool:
        return self.scale < 1.0

    @property
    def tests(self) -> int:
        return 1000 if not self.rehearsal else 32

    def compiled(self, function: Callable) -> Callable:
        """The function compiled once for all runs of this call; on a CPU the function itself.

        It must be defined at the top of a module: what differs between runs (the model) is an argument.
        """
        if not self.cuda:
            return function
        if function not in self.shared:
            self.shared[function] = torch.compile(function, dynamic=False)
        return self.shared[function]

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """What the bridge gets to see: [B, 3, H, W] -> [B, N, D_vision]."""
        model = self.small.model
        return self.compiled(_features)(model.vision, pixels, model.config.feature_layer)

    def images(self, scenes: Scenes, generator: torch.Generator) -> Tensor:
        """The images of scenes, with noise from the generator: [B, 3, 96, 96]."""
        return self.compiled(render)(scenes, generator=generator)

    def scenes_at(self, number: int, step: int, batch: int, **options) -> tuple[Scenes, torch.Generator]:
        """The training scenes of one step; `number` tells the stages of a run apart. The same for every variant."""
        generator = torch.Generator(self.device)
        generator.manual_seed(((self.seed + 1) * 10 + number) * 1_000_000 + step)
        return sample(batch, generator=generator, device=self.device, **options), generator

    def test_scenes(self, n: int | None = None, **options) -> tuple[Scenes, torch.Generator]:
        """Scenes that no training saw; every run gets the same."""
        generator = torch.Generator(self.device).manual_seed(TEST_SEED)
        return sample(n or self.tests, generator=generator, device=self.device, **options), generator

    def fit(
        self,
        model: nn.Module,
        loss_at: Callable[[int, int], Tensor],
        *,
        name: str,
        steps: int,
        lr: float,
        trains: tuple[str, ...] = ("bridge.", "decoder."),
        batch: int = BATCH,
        weight_decay: float = 0.05,
    ) -> None:
        """Train `trains` of the model for `steps` steps; `loss_at(step, batch)` is the loss of one step.

        In a rehearsal there are fewer steps and smaller batches. Raises `Paused` at the deadline: the run goes on
        there the next time.
        """
        steps = max(2, round(steps * self.scale))
        batch = min(batch, REHEARSAL_BATCH) if self.rehearsal else batch
        checkpoint = self.folder / "checkpoints" / f"{name}-{self.seed}.pt"
        stage = Stage(name, trains=trains, steps=steps, batch=batch, lr=lr, weight_decay=weight_decay)

        def step_loss(step: int) -> Tensor:
            self.progress((step + 1) / steps)
            return loss_at(step, batch)

        fit(
            model,
            stage,
            step_loss,
            checkpoint=checkpoint,
            autocast=torch.bfloat16 if self.cuda else None,
            deadline=self.deadline,
            log=self.log,
        )
        model.eval()

    def answer_loss(
        self, model: Llava, ids: Tensor, labels: Tensor, pixels: Tensor | None = None, *, patches: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch of conversations [B, T] about images [B, 3, H, W], in a compiled pass on a GPU.

        Give `patches` [B, N, D_vision] instead of pixels where `features` has encoded the images before. Keep T the
        same from step to step: another T is another compilation.
        """
        text = ids.shape[1] - 1 - model.config.visual_tokens
        patches = self.features(pixels) if patches is None else patches
        return self.compiled(_answer_loss)(model, ids, labels, patches, text, self.phases(model, ids.shape[1]))

    def phases(self, model: Llava, length: int) -> tuple[Tensor, Tensor]:
        """The rotary phases of positions 0 .. length - 1, made once.

        Left to the compiler, sines and cosines are computed again for every head of every layer.
        """
        text = model.config.text
        key = "phases", length, text.head_dim, text.rope_theta
        if key not in self.shared:
            places = torch.arange(length, device=self.device)
            self.shared[key] = rotary_phases(places, text.head_dim, text.rope_theta)
        return self.shared[key]

    def text_loss(self, model: Llava, ids: Tensor) -> Tensor:
        """The loss of a batch of texts [B, T] on every token but <pad>, without images."""
        labels = torch.where(ids == self.small.tokenizer.pad_id, -100, ids)
        return self.compiled(_text_loss)(model, ids, labels, self.phases(model, ids.shape[1]))


def _features(vision: nn.Module, pixels: Tensor, layer: int) -> Tensor:
    return vision.patch_features(pixels, layer=layer)


Phases = tuple[Tensor, Tensor]


def seeing_logits(model: Llava, ids: Tensor, patches: Tensor, keep: int, phases: Phases | None = None) -> Tensor:
    """ids [B, T] and the tower's features [n_images, N, D_vision] -> the last `keep` logits [B, keep, V] (0: all)."""
    embeds, seen = model.decoder.embed(ids), model.bridge(patches)
    embeds = splice_image_features(embeds, ids, seen, model.config.image_id, check=False)
    return model.decoder(embeds, phases=phases, logits_to_keep=keep)


def _answer_loss(model: Llava, ids: Tensor, labels: Tensor, patches: Tensor, text: int, phases: Phases) -> Tensor:
    return response_loss(seeing_logits(model, ids, patches, text, phases), labels[:, -text:])


def _text_loss(model: Llava, ids: Tensor, labels: Tensor, phases: Phases) -> Tensor:
    return response_loss(model.decoder(model.decoder.embed(ids), phases=phases), labels)


# --- running a study --------------------------------------------------------------------------------------------------


def run_study(
    study: Study,
    *,
    device: str = "cpu",
    seeds: int = 3,
    out: Path | str = "runs/study",
    minutes: float | None = None,
    scale: float = 1.0,
    log: Callable[[str], None] = print,
    progress: Callable[[float], None] = lambda share: None,
) -> Path | None:
    """Train and measure every variant with every seed, as far as it is not done yet, and write the table.

    Args:
        seeds: runs of every variant, with seeds 0, 1, ...
        out: folder of the results; one file a run, then `NAME.json` and a `.safetensors` a variant.
        minutes: stop in good time.
        scale: below 1 a rehearsal: this share of the steps, on small batches. Its table says so.
        progress: is told the share that is done, 0 to 1, now and then.

    Returns:
        the table's path, or None when time ran out: the same call goes on.

    Raises:
        ValueError: no seed, or a scale that is not in (0, 1].
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}: a study needs at least one")
    if not 0 < scale <= 1:
        raise ValueError(f"scale is {scale}, expected a share of the steps, above 0 and at most 1")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes if minutes else None
    if torch.device(device).type == "cuda":
        from torch import _dynamo

        torch.set_float32_matmul_precision("high")
        _dynamo.config.recompile_limit = 64  # several models and lengths share one compiled function
    small = load_small(device)
    runs = [(variant, seed) for seed in range(seeds) for variant in study.variants]
    shared: dict = {}
    for number, (variant, seed) in enumerate(runs):
        file = out / f"{study.name}-{variant}-{seed}.json"
        if file.is_file():
            _check_same_scale(file, scale)
            continue
        lab = Lab(
            small,
            seed,
            scale,
            out,
            deadline,
            log,
            partial(lambda share, number: progress((number + share) / len(runs)), number=number),
            shared,
        )
        log(f"{study.name}: {variant}, seed {seed} ({number + 1} of {len(runs)})")
        began = time.monotonic()
        try:
            measures, weights = study.train(variant, lab)
        except Paused as pause:
            log(f"{pause}; call again to go on")
            return None
        if weights is not None and seed == study.shipped_seed(variant, seeds):
            save_weights(weights, out / f"{study.name}-{variant}.safetensors")
        record = {"scale": scale, "minutes": round((time.monotonic() - began) / 60, 2), "measures": measures}
        _write(file, record)
    progress(1.0)
    table = out / f"{study.name}.json"
    _write(table, collect(study, out, seeds=seeds, scale=scale, device=device))
    log(f"written: {table}")
    return table


def _check_same_scale(file: Path, scale: float) -> None:
    stored = json.loads(file.read_text(encoding="utf-8"))["scale"]
    if stored != scale:
        raise ValueError(f"{file} was made with scale {stored}, asked is {scale}: give another folder, or delete it")


def _write(path: Path, record: dict) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def collect(study: Study, out: Path, *, seeds: int, scale: float, device: str) -> dict:
    """The table of a finished study: every measure as mean, spread (highest minus lowest) and the values by seed."""
    variants, minutes = {}, 0.0
    for variant, says in study.variants.items():
        files = [out / f"{study.name}-{variant}-{seed}.json" for seed in range(seeds)]
        records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        minutes += sum(record["minutes"] for record in records)
        variants[variant] = {"says": says, "measures": _over_seeds([record["measures"] for record in records])}
    options = f" --device {device} --seeds {seeds}" + (f" --scale {scale}" if scale < 1 else "")
    card = {
        "data": study.data,
        "seeds": seeds,
        "hardware": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else platform.processor(),
        "minutes": round(minutes, 1),
        "weights_of_seed": {variant: study.shipped_seed(variant, seeds) for variant in study.variants},
        "command": f"vlm-course study {study.name}{options}",
        "torch": torch.__version__,
    }
    return {
        "study": study.name,
        "question": study.question,
        "rehearsal": scale < 1,
        "variants": variants,
        "card": card,
    }


def _over_seeds(values: list) -> dict:
    if isinstance(values[0], dict):
        return {key: _over_seeds([value[key] for value in values]) for key in values[0]}
    rounded = [round(float(value), 5) for value in values]
    spread = max(rounded) - min(rounded)
    return {"mean": round(statistics.fmean(rounded), 5), "spread": round(spread, 5), "values": rounded}
