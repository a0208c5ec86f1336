"""The patchification simulation, driven through its real widgets, and its numbers against a real tower's."""

import pytest
import torch
from PIL import Image

from vlm_course.encoders import counted_flops
from vlm_course.simulations import image_patchification as simulation
from vlm_course.vit import VisionTransformer, ViTConfig


@pytest.fixture(scope="module")
def live():
    return simulation.patchification_simulation(image_size=336, patch_size=14)


@pytest.mark.parametrize("image_size, patch_size", [(336, 14), (672, 14), (672, 28), (224, 56)])
def test_operations_are_those_that_torch_counts_in_a_clip_tower(image_size, patch_size):
    with torch.device("meta"):
        config = ViTConfig(image_size, patch_size, simulation.WIDTH, simulation.LAYERS, 16, simulation.MLP_WIDTH)
        tower = VisionTransformer(config)
    counted = counted_flops(tower, torch.empty(1, 3, image_size, image_size, device="meta"))
    cut = simulation.Cut(image_size, patch_size)
    embedding, linear, attention = cut.flops
    assert (embedding + linear, attention) == counted
    assert cut.tokens == len(tower.positions)


def test_from_336_to_672_scores_grow_sixteenfold_and_the_encoder_fivefold():
    small, large = simulation.Cut(336, 14), simulation.Cut(672, 14)
    assert large.patches**2 / small.patches**2 == 16
    assert large.entries / small.entries == pytest.approx(16, rel=0.01)
    assert sum(large.flops) / sum(small.flops) == pytest.approx(5.02, abs=0.01)


@pytest.mark.parametrize("patch_size", simulation.PATCH_SIZES)
def test_the_linear_map_keeps_all_it_can_hold(patch_size):
    waves = simulation.cosine_waves(patch_size, simulation.WIDTH)
    assert torch.allclose(waves @ waves.T, torch.eye(len(waves)), atol=1e-4), "the waves are orthonormal"
    image = torch.rand(1, 3, 112, 112)
    kept = simulation.squeezed(image, patch_size)
    if 3 * patch_size**2 <= simulation.WIDTH:
        assert torch.equal(kept, image)
    else:
        assert (kept - image).abs().mean() > 0.05, "noise cannot be squeezed"
        flat = torch.full_like(image, 0.25)
        torch.testing.assert_close(simulation.squeezed(flat, patch_size), flat, atol=1e-4, rtol=0)


def test_every_patch_size_divides_every_image_size():
    assert all(size % patch == 0 for size in simulation.IMAGE_SIZES for patch in simulation.PATCH_SIZES)


def test_pictures_are_real_and_square():
    assert simulation.photograph().size == (512, 512)
    assert simulation.scene().size == (96, 96)
    with pytest.raises(ValueError, match="20 x 10"):
        simulation.resized(Image.new("RGB", (20, 10)), 8)


def test_widgets_redraw_picture_and_text(live):
    assert "576 patches, 577 tokens" in live.readout.value
    before = live.figure.value
    live.controls["image_size"].value = 672
    assert live.figure.value != before
    assert "score entries 16 times, operations of the whole encoder 5.02 times" in live.readout.value
    assert "adds pixels, not detail" in live.readout.value
    live.controls["patch_size"].value = 28
    assert "576 patches" in live.readout.value and "2,352 values for 1024 numbers" in live.readout.value
    before = live.figure.value
    live.controls["picture"].value = "scene"
    assert live.figure.value != before and "96 pixels a side" in live.readout.value


def test_static_frame_says_what_the_widgets_say(capsys):
    simulation.patchification_simulation(image_size=224, patch_size=112).first_frame()
    printed = capsys.readouterr().out
    assert "Figure" in printed and "4 patches, 5 tokens" in printed


def test_errors_in_drawing_are_not_swallowed(live):
    live.draw = lambda **values: 1 / 0
    with pytest.raises(ZeroDivisionError):
        live.controls["patch_size"].value = 7
