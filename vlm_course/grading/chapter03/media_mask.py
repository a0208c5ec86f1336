"""Exercise: which image a text token may read."""

import torch

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake

IMAGE = 3


def oracle(ids: torch.Tensor, image_id: int, n_images: int) -> torch.Tensor:
    """Reads every row from left to right and keeps the number of the last image in mind."""
    mask = torch.zeros(*ids.shape, n_images, dtype=torch.bool)
    for row in range(ids.shape[0]):
        last = -1
        for place in range(ids.shape[1]):
            if ids[row, place] == image_id:
                last += 1
            if last >= 0:
                mask[row, place, last] = True
    return mask


def cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(layout: list[str], n_images: int) -> Case:
        ids = [[IMAGE if mark == "I" else int(torch.randint(4, 30, (), generator=generator)) for mark in row]
               for row in layout]  # fmt: skip
        return Case({"ids": torch.tensor(ids), "image_id": IMAGE, "n_images": n_images})

    # Two and three images, text before the first one, images side by side, a row without any, room for one more image.
    return [
        case(["ttIttItt", "Ittttttt", "tIItttIt"], 3),
        case(["tttt", "tIIt"], 2),
        case(["tItItItt"], 4),
        case(["Itt", "ttI"], 1),
    ]


def seen(ids, image_id):
    return (ids == image_id).cumsum(1)


def numbers(n_images, start=1):
    return torch.arange(start, n_images + start)


def right(ids, image_id, n_images):
    return seen(ids, image_id)[:, :, None] == numbers(n_images)


def every_earlier_one(ids, image_id, n_images):
    return seen(ids, image_id)[:, :, None] >= numbers(n_images)


def counted_from_zero(ids, image_id, n_images):
    return seen(ids, image_id)[:, :, None] == numbers(n_images, 0)


def not_itself(ids, image_id, n_images):
    before = seen(ids, image_id) - (ids == image_id).long()
    return before[:, :, None] == numbers(n_images)


def everything(ids, image_id, n_images):
    return torch.ones(*ids.shape, n_images, dtype=torch.bool)


def images_of_the_row(ids, image_id, n_images):
    count = (ids == image_id).sum(1)
    return (numbers(n_images) <= count[:, None])[:, None].expand(-1, ids.shape[1], -1)


def only_first(ids, image_id, n_images):
    mask = torch.zeros(*ids.shape, n_images, dtype=torch.bool)
    mask[:, :, 0] = seen(ids, image_id) > 0
    return mask


def counted_over_the_batch(ids, image_id, n_images):
    total = (ids == image_id).flatten().cumsum(0).view_as(ids)
    return total[:, :, None] == numbers(n_images)


def from_the_right(ids, image_id, n_images):
    left = (ids == image_id).flip(1).cumsum(1).flip(1)
    return left[:, :, None] == numbers(n_images)


def markers_alone(ids, image_id, n_images):
    return right(ids, image_id, n_images) & (ids == image_id)[:, :, None]


def before_as_first(ids, image_id, n_images):
    return seen(ids, image_id).clamp(min=1)[:, :, None] == numbers(n_images)


def axes_swapped(ids, image_id, n_images):
    return right(ids, image_id, n_images).transpose(1, 2)


def by_one_hot(ids, image_id, n_images):
    return torch.nn.functional.one_hot(seen(ids, image_id), n_images + 1)[..., 1:].bool()


def image_by_image(ids, image_id, n_images):
    count = seen(ids, image_id)
    return torch.stack([count == number for number in range(1, n_images + 1)], dim=-1)


MEDIA_MASK = Exercise(
    name="media_mask",
    chapter="03",
    title="Build It: the media mask",
    difficulty="medium",
    minutes=15,
    points=3,
    attribute="media_mask",
    twin="vlm_course.fusion:media_mask",
    interface=FunctionInterface(
        {"ids": "tensor [B, T] of integers", "image_id": "integer", "n_images": "integer"},
        "tensor [B, T, n_images] of booleans",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "every earlier image": Mistake(
            "Your tokens read all earlier images: Flamingo's read the last one alone, so compare with ==, not >=.",
            every_earlier_one,
        ),
        "counted from zero": Mistake(
            "Every token of yours reads the image that follows: a running sum counts from 1, so number images from 1.",
            counted_from_zero,
        ),
        "image does not read itself": Mistake(
            "Your <image> token reads the image before it: the running count includes the token itself.", not_itself
        ),
        "everything": Mistake("Every token reads every image: the order of text and images must decide.", everything),
        "all images of the row": Mistake(
            "Your tokens read all images of their row, later ones too: only the last one before counts.",
            images_of_the_row,
        ),
        "only the first": Mistake(
            "Your tokens stay with the first image: behind the second they read that.", only_first
        ),
        "counted over the batch": Mistake(
            "You count on from row to row: every row starts at 0, so sum along dim=1.", counted_over_the_batch
        ),
        "from the right": Mistake("You count from the right: images before a token, not after it.", from_the_right),
        "markers alone": Mistake(
            "Only the <image> tokens read: the text behind them reads the image too.", markers_alone
        ),
        "text before reads the first": Mistake(
            "Text before the first image reads that image: it reads none.", before_as_first
        ),
        "numbers": Mistake(
            "Your mask holds numbers: make it boolean, or attention adds it to the scores and hides nothing.",
            lambda ids, image_id, n_images: right(ids, image_id, n_images).float(),
        ),
        "axes swapped": Mistake("Your result is [B, n_images, T]: tokens come before images.", axes_swapped),
    },
    also_correct={"by one_hot": by_one_hot, "image by image": image_by_image, "by comparison": right},
)
