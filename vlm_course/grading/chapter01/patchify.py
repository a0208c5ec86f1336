"""Exercise: an image as a row of patches."""

import torch
import torch.nn.functional as F

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Pixel by pixel."""
    batch, channels, height, width = image.shape
    images = []
    for b in range(batch):
        patches = []
        for top in range(0, height, patch_size):
            for left in range(0, width, patch_size):
                values = []
                for c in range(channels):
                    for row in range(top, top + patch_size):
                        for column in range(left, left + patch_size):
                            values.append(image[b, c, row, column])
                patches.append(torch.stack(values))
        images.append(torch.stack(patches))
    return torch.stack(images)


def cases(seed: int) -> list[Case]:
    draw = torch.Generator().manual_seed(seed)
    # Neither square nor as many channels as a patch has rows: equal numbers hide exchanged ones.
    shapes = [((2, 3, 4, 6), 2), ((1, 2, 9, 3), 3), ((3, 4, 6, 9), 3)]
    return [Case({"image": torch.randn(*shape, generator=draw), "patch_size": p}) for shape, p in shapes]


def cut(image, p, order=(0, 2, 4, 1, 3, 5)):
    """[B, C, H, W] -> six axes in `order` of (batch, channel, row of patches, row, column of patches, column)."""
    B, C, H, W = image.shape
    return image.reshape(B, C, H // p, p, W // p, p).permute(*order)


def ordered(image, p, order):
    B, C, H, W = image.shape
    return cut(image, p, order).reshape(B, (H // p) * (W // p), C * p * p)


def raw_reshape(image, p):
    B, C, H, W = image.shape
    return image.reshape(B, (H // p) * (W // p), C * p * p)


def square_only(image, p):
    side = image.shape[2]
    return ordered(image[..., :side], p, (0, 2, 4, 1, 3, 5))


def by_slices(image, p):
    rows, columns = image.shape[2] // p, image.shape[3] // p
    tiles = [image[:, :, p * r : p * r + p, p * c : p * c + p].flatten(1) for r in range(rows) for c in range(columns)]
    return torch.stack(tiles, dim=1)


def by_convolution(image, p):
    length = image.shape[1] * p * p
    kernels = torch.eye(length, dtype=image.dtype).view(length, image.shape[1], p, p)
    return F.conv2d(image, kernels, stride=p).flatten(2).transpose(1, 2)


PATCHIFY = Exercise(
    name="patchify",
    chapter="01",
    title="Build It: patchify",
    difficulty="medium",
    minutes=15,
    points=4,
    attribute="patchify",
    twin="vlm_course.patches:patchify",
    interface=FunctionInterface(
        {"image": "tensor [B, C, H, W]", "patch_size": "integer that divides H and W"}, "tensor [B, N, C*p*p]"
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "raw reshape": Mistake(
            "You reshape without moving axes: each of your patches is a run of neighbouring pixels of one row.",
            raw_reshape,
        ),
        "column by column": Mistake(
            "Your patches come column by column: read them row by row, like text.",
            lambda x, p: ordered(x, p, (0, 4, 2, 1, 3, 5)),
        ),
        "channel last": Mistake(
            "Inside a patch your channels come last, as in SigLIP 2: here the order is channel, row, column.",
            lambda x, p: ordered(x, p, (0, 2, 4, 3, 5, 1)),
        ),
        "patch transposed": Mistake(
            "Inside a patch you exchanged rows and columns: the order is channel, row, column.",
            lambda x, p: ordered(x, p, (0, 2, 4, 1, 5, 3)),
        ),
        "interleaved": Mistake(
            "You take every H/p-th pixel: a patch is p neighbouring rows and columns, so H splits into (H // p, p).",
            lambda x, p: (
                x.reshape(x.shape[0], x.shape[1], p, x.shape[2] // p, p, x.shape[3] // p)
                .permute(0, 3, 5, 1, 2, 4)
                .reshape(x.shape[0], -1, x.shape[1] * p * p)
            ),
        ),
        "one token a channel": Mistake(
            "You made a token of each channel of a patch: one patch is one token, with all its channels.",
            lambda x, p: cut(x, p, (0, 1, 2, 4, 3, 5)).reshape(x.shape[0], -1, p * p),
        ),
        "batch merged": Mistake(
            "You merged the images of the batch into one row: the first dimension stays B.",
            lambda x, p: cut(x, p).reshape(-1, x.shape[1] * p * p),
        ),
        "grid kept": Mistake(
            "You kept rows and columns of patches as two dimensions: they become one, N = rows * columns.",
            lambda x, p: cut(x, p).flatten(3),
        ),
        "unfold as it comes": Mistake(
            "This is F.unfold's own order, [B, C*p*p, N]: tokens come before their values, so transpose.",
            lambda x, p: F.unfold(x, p, stride=p),
        ),
        "overlapping": Mistake(
            "Your patches overlap, one for every pixel: the stride is the patch size.",
            lambda x, p: F.unfold(x, p).transpose(1, 2),
        ),
        "square only": Mistake(
            "You take the width to be the height: the image need not be square.",
            square_only,
        ),
    },
    also_correct={
        "by slices": by_slices,
        "unfold, transposed": lambda x, p: F.unfold(x, p, stride=p).transpose(1, 2),
        "two Tensor.unfold": lambda x, p: (
            x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        ),
        "a convolution with unit kernels": by_convolution,
    },
)
