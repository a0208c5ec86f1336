"""Fuyu-style linear patches against transformers: patches, placeholders with newlines, and what enters the decoder."""

import pytest
import torch
from transformers import FuyuConfig
from transformers.models.fuyu.image_processing_fuyu import FuyuImageProcessor
from transformers.models.fuyu.modeling_fuyu import FuyuModel

from vlm_course.fusion import splice_image_features
from vlm_course.fuyu import LinearPatches, fuyu_image_ids

IMAGE, NEWLINE, PATCH, WIDTH = 99, 98, 6, 32


@pytest.fixture
def models():
    # Flat, as stored configurations are: transformers 5.17 reads the width here, 5.23 hands it on to the text model.
    config = FuyuConfig(
        vocab_size=100,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        patch_size=PATCH,
        num_channels=3,
        image_token_id=IMAGE,
    )
    theirs = FuyuModel(config).eval()
    ours = LinearPatches(patch_size=PATCH, width=WIDTH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    ours.linear.load_state_dict(theirs.vision_embed_tokens.state_dict())
    return theirs, ours


@pytest.mark.parametrize("size", [(6, 6), (12, 30), (24, 18)])
def test_linear_patches(models, size):
    theirs, ours = models
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    processor = FuyuImageProcessor(patch_size={"height": PATCH, "width": PATCH})
    patches = processor.patchify_image(pixels, patch_size=processor_size(processor))
    with torch.no_grad():
        expected = theirs.get_image_features(patches).last_hidden_state
        torch.testing.assert_close(ours(pixels), expected, atol=1e-5, rtol=0)


def processor_size(processor):
    from transformers.image_utils import SizeDict

    return SizeDict(height=PATCH, width=PATCH)


def test_what_enters_the_decoder(models):
    """Their forward, stopped before the language model, against our splice of our patches at our placeholders."""
    theirs, ours = models
    pixels = torch.randn(1, 3, 12, 18, generator=torch.Generator().manual_seed(2))
    image = fuyu_image_ids((2, 3), image_id=IMAGE, newline_id=NEWLINE)
    ids = torch.tensor([[1, *image, 5, 6]])
    caught = {}

    def catch(module, args, kwargs):
        caught["embeds"] = kwargs["inputs_embeds"].clone()

    theirs.language_model.register_forward_pre_hook(catch, with_kwargs=True)
    processor = FuyuImageProcessor(patch_size={"height": PATCH, "width": PATCH})
    patches = processor.patchify_image(pixels, patch_size=processor_size(processor))
    with torch.no_grad():
        theirs(ids, patches)  # the second is image_patches in transformers 5.17, pixel_values later
        words = theirs.get_input_embeddings()(ids)
        got = splice_image_features(words, ids, ours(pixels), IMAGE)
    torch.testing.assert_close(got, caught["embeds"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (3, 2)])
def test_placeholders_with_newlines(grid):
    rows, columns = grid
    processor = FuyuImageProcessor(patch_size={"height": PATCH, "width": PATCH})
    height, width = rows * PATCH, columns * PATCH
    theirs = processor.preprocess_with_tokenizer_info(
        torch.zeros(1, 1, 3, height, width),
        torch.ones(1, 1),
        torch.tensor([[height]]),
        torch.tensor([[width]]),
        IMAGE,
        NEWLINE,
        variable_sized=True,
        patch_size={"height": PATCH, "width": PATCH},
    )
    assert fuyu_image_ids(grid, image_id=IMAGE, newline_id=NEWLINE) == theirs["image_input_ids"][0][0].tolist()


def test_bad_input_is_named(models):
    _, ours = models
    with pytest.raises(ValueError, match=r"width is 20, which is no multiple of patch_size = 6"):
        ours(torch.zeros(1, 3, 12, 20))
    with pytest.raises(ValueError, match="C = 1"):
        ours(torch.zeros(1, 1, 12, 18))
    with pytest.raises(ValueError, match=r"grid is \(0, 3\)"):
        fuyu_image_ids((0, 3), image_id=IMAGE, newline_id=NEWLINE)
