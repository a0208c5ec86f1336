"""What a contrastive tower's outputs keep, and which of them its loss trains: the measurements of chapter 1.

Everything is read out by ridge regression, the same for every candidate, so that a better reading means more to read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from vlm_course.contrastive import ContrastiveModel, contrastive_logits, contrastive_loss
from vlm_course.validation import require_shape
from vlm_course.worlds.scenes import COLOURS, GRID, IMAGE_SIZE, SHAPES, SIZES, Scenes, render, sample

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


@dataclass(frozen=True)
class LoneObjects:
    """Scenes with a single object each, whose place is known to a fraction of a pixel."""

    scenes: Scenes
    pixels: Tensor  # [B, 3, 96, 96]

    @cached_property
    def slot(self) -> Tensor:
        """[B], where the one object stands among the scene's slots."""
        return self.scenes.present.int().argmax(1)

    def of(self, values: Tensor) -> Tensor:
        """The object's entry of one of the scenes' tensors: [B, K, ...] -> [B, ...]."""
        return values[torch.arange(len(values)), self.slot]

    @property
    def centre(self) -> Tensor:
        """[B, 2], pixels (x right, y down)."""
        return self.of(self.scenes.centre)

    def inside(self, patch_size: int) -> Tensor:
        """Whether the middle of each patch lies well inside the object: [B, N], in reading order."""
        far = (patch_centres(patch_size) - self.centre[:, None]).norm(dim=-1)  # [B, N]
        return far < 0.8 * self.of(self.scenes.radius)[:, None]


def lone_objects(count: int, *, seed: int) -> LoneObjects:
    """`count` scenes of one object, drawn from a seed."""
    scenes = sample(count, generator=torch.Generator().manual_seed(seed), objects=(1, 1))
    return LoneObjects(scenes, render(scenes, generator=torch.Generator().manual_seed(seed + 1)))


def exchanged(scenes: Scenes, kind: str) -> tuple[Scenes, Tensor]:
    """Scenes of two objects with one property exchanged between the two, and the rows in which that changes anything.

    Args: kind, "colour", "shape", "size" or "place". To exchange the places, everything else is exchanged: a caption
    names the objects in reading order, and that stays. Raises ValueError when a scene has not two objects.
    """
    if not bool((scenes.count == 2).all()):
        raise ValueError(f"the scenes have {sorted(set(scenes.count.tolist()))} objects, expected 2 in each")
    row = torch.arange(len(scenes))
    first, second = scenes.present.int().topk(2, dim=1).indices.unbind(1)  # [B, K] -> 2 x [B]
    changed, new = torch.zeros(len(scenes), dtype=torch.bool), {}
    for name in ("colour", "shape", "size") if kind == "place" else (kind,):
        value = getattr(scenes, name)  # [B, K]
        new[name] = value.clone()
        new[name][row, first], new[name][row, second] = value[row, second], value[row, first]
        changed |= (new[name] != value).any(1)
    return replace(scenes, **new), changed.nonzero()[:, 0]


def placed_objects(scenes: Scenes, row: int) -> list[str]:
    """The objects of one scene as the contrastive captions name them, in reading order: "large red star top left,"."""
    found = []
    for slot in scenes.present[row].nonzero()[:, 0].tolist():
        size, colour, shape, cell = (getattr(scenes, name)[row, slot] for name in ("size", "colour", "shape", "cell"))
        place = f"{ROWS[cell // GRID]} {COLUMNS[cell % GRID]}"
        found.append(f"{SIZES[size]} {COLOURS[colour]} {SHAPES[shape]} {place},")
    return found


def patch_centres(patch_size: int) -> Tensor:
    """Middle of every patch of a scene in pixels (x, y): [N, 2], in reading order."""
    side = IMAGE_SIZE // patch_size
    place = torch.arange(side * side)
    return (torch.stack([place % side, place // side], dim=-1) + 0.5) * patch_size


def ridge(features: Tensor, targets: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """The linear map that best predicts the targets, with a penalty on its weights: features [n, D], targets [n, K].

    `penalty` counts in units of the features' mean variance, so that it means the same for every candidate. Returns a
    function from features [m, D] to predictions [m, K].
    """
    require_shape(features, "features", "n D")
    require_shape(targets, "targets", "n K", n=len(features))
    x, y = features.double(), targets.double()
    mean, start = x.mean(0), y.mean(0)
    x = x - mean
    strength = penalty * len(x) * x.var()
    weights = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - start))
    return lambda new: (new.double() - mean) @ weights + start


def error_of_vectors(vectors: Tensor, centre: Tensor, *, train: int, penalty: float = 0.01) -> float:
    """Mean distance in pixels between an object's centre and what a linear map reads from one vector an image.

    Args: vectors [B, D]; centre [B, 2]. The first `train` images fit the map, the others judge it.
    """
    read = ridge(vectors[:train], centre[:train], penalty)(vectors[train:])
    return (read - centre[train:]).norm(dim=-1).mean().item()


def error_of_tokens(
    tokens: Tensor, objects: LoneObjects, *, train: int, patch_size: int, penalty: float = 0.001
) -> float:
    """The same from one vector a patch: a linear map, one for all patches, says how much each belongs to the object;
    the centre is the mean of the patches' places, weighted by a softmax over these scores.

    Args: tokens [B, N, D]. The first `train` images fit the map, the others judge it.
    """
    inside = objects.inside(patch_size).double()  # [B, N]
    reader = ridge(tokens[:train].flatten(0, 1), inside[:train].flatten()[:, None], penalty)
    scores = reader(tokens[train:].flatten(0, 1)).view(-1, tokens.shape[1])  # [m*N, 1] -> [m, N]
    places = (scores / 0.05).softmax(dim=1) @ patch_centres(patch_size).double()  # [m, N] x [N, 2] -> [m, 2]
    return (places - objects.centre[train:]).norm(dim=-1).mean().item()


def error_of_the_mean(centre: Tensor, *, train: int) -> float:
    """The control: always answering the mean place of the first `train` objects."""
    return (centre[train:] - centre[:train].mean(0)).norm(dim=-1).mean().item()


@dataclass(frozen=True)
class StateGradient:
    """Length of the loss's gradient at one hidden state, class token and patches apart."""

    class_token: float
    patches: float


def state_gradients(model: ContrastiveModel, pixels: Tensor, ids: Tensor) -> list[StateGradient]:
    """How strongly the contrastive loss pulls at each hidden state of the vision tower: layers+1 of them, in order.

    Args: pixels [B, 3, H, W]; ids [B, T], the images' captions. The model's own gradients stay untouched.
    """
    with torch.no_grad():
        captions = model.text_projection(model.text(ids))  # [B, T] -> [B, E]
        first = model.vision.embed(pixels)  # [B, 3, H, W] -> [B, 1+N, D]
    with torch.enable_grad():
        states = [first.requires_grad_()]
        for block in model.vision.blocks:
            states.append(block(states[-1]))  # [B, 1+N, D] -> [B, 1+N, D]
        images = model.image_projection(model.vision.post_norm(states[-1][:, 0]))  # [B, 1+N, D] -> [B, E]
        loss = contrastive_loss(contrastive_logits(images, captions, model.logit_scale))
        gradients = torch.autograd.grad(loss, states)
    return [StateGradient(g[:, 0].norm().item(), g[:, 1:].norm().item()) for g in gradients]


def recall_at_one(similarity: Tensor) -> tuple[float, float]:
    """Share of images whose nearest caption is their own, and the reverse: similarity [B, B], rows images."""
    require_shape(similarity, "similarity", "images captions", captions=similarity.shape[0])
    own = torch.arange(len(similarity))
    return ((similarity.argmax(1) == own).float().mean().item(), (similarity.argmax(0) == own).float().mean().item())
