"""Preprocessing against transformers' CLIP image processor (its PIL backend), and patches against a convolution."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_course.images import clip_preprocess, pad_to_square
from vlm_course.patches import PatchEmbedding, patchify


def noise(width, height, mode="RGB"):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [336, 224, 15])
@pytest.mark.parametrize("width, height", [(336, 336), (640, 480), (480, 641), (100, 37), (31, 500), (1, 1), (3, 2)])
def test_clip_preprocess_equals_transformers(width, height, size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    image = noise(width, height)
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(clip_preprocess(image, size=size), expected.float(), rtol=0, atol=1e-5)


def test_padding_equals_llava_pixel_by_pixel():
    for width, height in ((5, 9), (9, 5), (8, 3), (4, 4)):
        image = noise(width, height)
        square = np.array(pad_to_square(image))
        side = max(width, height)
        expected = np.full((side, side, 3), (122, 116, 104), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        expected[top : top + height, left : left + width] = np.array(image)
        assert (square == expected).all()


@pytest.mark.parametrize("shape, patch", [((2, 3, 32, 48), 8), ((1, 1, 7, 21), 7), ((3, 4, 6, 4), 1)])
@torch.no_grad()
def test_patch_embedding_equals_a_strided_convolution(shape, patch):
    image = torch.randn(shape)
    embedding = PatchEmbedding(channels=shape[1], patch_size=patch, width=10, bias=True)
    embedding.bias.normal_()
    expected = torch.nn.functional.conv2d(image, embedding.weight, embedding.bias, stride=patch).flatten(2).mT
    torch.testing.assert_close(embedding(image), expected, rtol=0, atol=1e-5)


def test_patch_order_equals_siglip2_but_for_the_channels_place():
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    image = torch.randn(3, 8, 12)
    theirs = torch.as_tensor(convert_image_to_patches(image.numpy(), 4))
    ours = patchify(image[None], 4)[0].unflatten(1, (3, 4, 4)).permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(ours, theirs)
