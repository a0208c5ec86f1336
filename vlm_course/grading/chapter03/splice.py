"""Exercise: visual features where the placeholders are."""

import torch

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake

IMAGE = 3


def oracle(embeds: torch.Tensor, ids: torch.Tensor, features: torch.Tensor, image_id: int) -> torch.Tensor:
    """Walks through the batch, row after row, and takes the next feature at every placeholder."""
    out, waiting = embeds.clone(), [feature for image in features for feature in image]
    for row in range(ids.shape[0]):
        for place in range(ids.shape[1]):
            if ids[row, place] == image_id:
                out[row, place] = waiting.pop(0)
    return out


def cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    width = int(torch.randint(4, 8, (), generator=generator))

    def case(layout: list[str], per_image: int) -> Case:
        """A row is a string: t a text token, I an image (all its placeholders)."""
        rows = []
        for row in layout:
            ids = [[IMAGE] * per_image if mark == "I" else [int(torch.randint(4, 30, (), generator=generator))]
                   for mark in row]  # fmt: skip
            rows.append([i for part in ids for i in part])
        images = sum(row.count("I") for row in layout)
        embeds = torch.randn(len(rows), len(rows[0]), width, generator=generator)
        features = 2 + torch.randn(images, per_image, width, generator=generator)
        return Case({"embeds": embeds, "ids": torch.tensor(rows), "features": features, "image_id": IMAGE})

    # The image stands at different places, and one row may hold two images while another holds one.
    return [
        case(["ttIttt", "tttItt", "Ittttt"], 3),
        case(["ItIt", "ttII", "IttI"], 2),
        case(["tIttttI", "ttItItt"], 4),
        case(["tttttt", "ttIt"], 3),
        case(["ttI"], 1),
    ]


def _flat(embeds, ids, features, image_id, chosen):
    return torch.where((ids == image_id)[..., None], chosen, embeds)


def right(embeds, ids, features, image_id):
    order = (ids == image_id).flatten().cumsum(0).sub(1).clamp(min=0)
    return _flat(embeds, ids, features, image_id, features.flatten(0, 1)[order].view_as(embeds))


def from_the_start_in_every_row(embeds, ids, features, image_id):
    order = (ids == image_id).cumsum(1).sub(1).clamp(min=0)
    return _flat(embeds, ids, features, image_id, features.flatten(0, 1)[order])


def column_after_column(embeds, ids, features, image_id):
    """Fills the placeholders in the order of the transposed batch."""
    order = (ids == image_id).T.flatten().cumsum(0).sub(1).clamp(min=0)
    chosen = features.flatten(0, 1)[order].view(*ids.T.shape, -1).transpose(0, 1)
    return _flat(embeds, ids, features, image_id, chosen)


def one_feature_an_image(embeds, ids, features, image_id):
    order = (ids == image_id).flatten().cumsum(0).sub(1).clamp(min=0) // features.shape[1]
    return _flat(embeds, ids, features, image_id, features[:, 0][order].view_as(embeds))


def backwards(embeds, ids, features, image_id):
    return right(embeds, ids, features.flip(1), image_id)


def late(embeds, ids, features, image_id):
    return right(embeds, ids, features.flatten(0, 1).roll(1, 0).view_as(features), image_id)


def in_front(embeds, ids, features, image_id):
    """Features first, then the text, whatever the ids say."""
    rows, used = [], 0
    for row in range(len(ids)):
        text = embeds[row][ids[row] != image_id]
        count = int((ids[row] == image_id).sum())
        rows.append(torch.cat([features.flatten(0, 1)[used : used + count], text]))
        used += count
    return torch.stack(rows)


def added(embeds, ids, features, image_id):
    return torch.where((ids == image_id)[..., None], embeds + right(embeds, ids, features, image_id), embeds)


def inverted(embeds, ids, features, image_id):
    order = (ids != image_id).flatten().cumsum(0).sub(1).clamp(min=0) % features.flatten(0, 1).shape[0]
    return torch.where((ids != image_id)[..., None], features.flatten(0, 1)[order].view_as(embeds), embeds)


def text_lost(embeds, ids, features, image_id):
    return torch.where((ids == image_id)[..., None], right(embeds, ids, features, image_id), 0.0)


def untouched(embeds, ids, features, image_id):
    return embeds


def images_alone(embeds, ids, features, image_id):
    return features


def by_masked_scatter(embeds, ids, features, image_id):
    return embeds.masked_scatter((ids == image_id)[..., None], features)


def by_index(embeds, ids, features, image_id):
    out = embeds.clone()
    out[ids == image_id] = features.reshape(-1, features.shape[-1])
    return out


SPLICE = Exercise(
    name="splice_image_features",
    chapter="03",
    title="Build It: splice at <image>",
    difficulty="medium",
    minutes=15,
    points=3,
    attribute="splice_image_features",
    twin="vlm_course.fusion:splice_image_features",
    interface=FunctionInterface(
        {
            "embeds": "tensor [B, T, D]",
            "ids": "tensor [B, T] of integers",
            "features": "tensor [n_images, M, D]",
            "image_id": "integer",
        },
        "tensor [B, T, D]",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "every row starts again": Mistake(
            "Every row of yours takes the features of the first image: the next row goes on where the last one ended.",
            from_the_start_in_every_row,
        ),
        "column after column": Mistake(
            "You fill the placeholders column after column, so rows exchange their images: go row after row.",
            column_after_column,
        ),
        "one feature an image": Mistake(
            "All placeholders of an image get its first feature: each of them takes the next one.", one_feature_an_image
        ),
        "backwards": Mistake("The features of each image stand in reverse order.", backwards),
        "off by one": Mistake(
            "Your features are shifted by one: the first placeholder takes feature 0, so subtract 1 from the count.",
            late,
        ),
        "in front": Mistake("You put the image in front of the text: it belongs where its placeholders are.", in_front),
        "added": Mistake(
            "You add features to the placeholder's own embedding: they replace it, and <image> means nothing.", added
        ),
        "inverted": Mistake("Your mask is inverted: features went to the text tokens.", inverted),
        "text lost": Mistake("The text is gone: tokens that are no placeholder keep their embedding.", text_lost),
        "untouched": Mistake("The embeddings came back as they were: no feature was put in.", untouched),
        "images alone": Mistake("You return the features alone: the whole sequence is wanted.", images_alone),
    },
    also_correct={
        "by masked_scatter": by_masked_scatter,
        "by index": by_index,
        "by a loop": oracle,
        "by cumulative sum": right,
    },
)
