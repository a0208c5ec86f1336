"""How far an image is from the scenes that the shipped model was trained on.

The model answers about a photograph as readily as about a drawing, because nothing in its training said when to stop.
The patch features of its own vision tower tell them apart: on fresh scenes they fill a small region, and an image whose
features lie far outside of it is not one of those scenes. Distances are Mahalanobis distances (Lee et al. 2018, arXiv
1807.03888, section 2.1, with a single class), of the patch features' mean over the image.

`python -m vlm_course.ask.novelty` fits again and writes `pretrained/novelty.safetensors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).parents[1] / "pretrained" / "novelty.safetensors"
FIT_SCENES, CALIBRATION_SCENES, QUANTILE = 3000, 3000, 0.997
SEED = 1_900_000_000  # not among the seeds of training or of evaluation


def summary(patches: Tensor) -> Tensor:
    """Patch features [B, N, D] -> one vector an image [B, 2 D]: their mean and their standard deviation."""
    return torch.cat([patches.mean(1), patches.std(1)], 1)  # [B, N, D] -> [B, 2 D]


@dataclass(frozen=True)
class Novelty:
    """A Gaussian fitted to the features of scenes, and the distance that hardly any fresh scene exceeds.

    Attributes:
        mean: [F] of `summary`.
        whitening: [F, F], maps deviations from the mean to independent ones of variance one.
        threshold: distance below which `QUANTILE` of other fresh scenes lie.
    """

    mean: Tensor
    whitening: Tensor
    threshold: float

    def distance(self, patches: Tensor) -> Tensor:
        """Patch features [B, N, D] of the vision tower's penultimate layer -> Mahalanobis distances [B]."""
        return self.distance_of_summary(summary(patches))

    def distance_of_summary(self, features: Tensor) -> Tensor:
        """`summary` [B, F] -> Mahalanobis distances [B]."""
        return ((features - self.mean) @ self.whitening).norm(dim=1)  # [B, F] -> [B]

    def is_new(self, patches: Tensor) -> Tensor:
        """Whether each image is farther away than the threshold: [B] bool."""
        return self.distance(patches) > self.threshold


def fit(features: Tensor, calibration: Tensor, *, quantile: float = QUANTILE, shrinkage: float = 1e-3) -> Novelty:
    """Fit on the `summary` [B, F] of some scenes, set the threshold on those of others.

    Args:
        quantile: share of `calibration` that is to lie below the threshold.
        shrinkage: share of the mean variance that is added to every variance, so that no direction counts endlessly.

    Raises:
        ValueError: fewer scenes than features, so that the covariance would be singular.
    """
    features = features.double()
    n, width = features.shape
    if n <= width:
        raise ValueError(f"{n} scenes cannot fit a covariance of {width} features: take at least {width + 1}")
    mean = features.mean(0)
    covariance = torch.cov(features.T)
    covariance += shrinkage * covariance.diagonal().mean() * torch.eye(width, dtype=torch.double)
    values, vectors = torch.linalg.eigh(covariance)
    whitening = vectors * values.rsqrt()
    fitted = Novelty(mean.float(), whitening.float(), float("inf"))
    threshold = fitted.distance_of_summary(calibration).quantile(quantile).item()
    return Novelty(fitted.mean, fitted.whitening, threshold)


def save(novelty: Novelty, file: Path | str = FILE) -> None:
    from safetensors.torch import save_file

    tensors = {"mean": novelty.mean, "whitening": novelty.whitening.contiguous()}
    save_file(tensors | {"threshold": torch.tensor([novelty.threshold])}, file)


def load(file: Path | str = FILE) -> Novelty:
    """What is shipped.

    Raises:
        FileNotFoundError: it is missing.
    """
    from safetensors.torch import load_file

    if not Path(file).is_file():
        raise FileNotFoundError(
            f"{file} is missing: restore it with git, or make it with python -m vlm_course.ask.novelty"
        )
    tensors = load_file(file)
    return Novelty(tensors["mean"].float(), tensors["whitening"].float(), tensors["threshold"].item())


@torch.no_grad()
def scene_features(model, n: int, *, seed: int, batch: int = 100) -> Tensor:
    """`summary` of `n` fresh scenes as a learner's file would give them, rounded to 8 bits: [n, F]."""
    from ..worlds.scenes import render, sample

    generator = torch.Generator().manual_seed(seed)
    features = []
    for start in range(0, n, batch):
        pixels = render(sample(min(batch, n - start), generator=generator, split="all"), generator=generator)
        pixels = ((pixels + 1) * 127.5).round() / 127.5 - 1
        features.append(summary(model.vision.patch_features(pixels, layer=model.config.feature_layer)))
    return torch.cat(features)


def main() -> None:
    from ..pretrained import load_small

    model = load_small().model
    novelty = fit(
        scene_features(model, FIT_SCENES, seed=SEED), scene_features(model, CALIBRATION_SCENES, seed=SEED + 1)
    )
    save(novelty)
    print(f"threshold {novelty.threshold:.2f}, written to {FILE}")


if __name__ == "__main__":
    main()
