"""What must hold for every shape: patches, the towers, the bridges and the preprocessing of images."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_course.bridges import CAbstractor, LinearBridge, PerceiverResampler, VisionProjection, pixel_shuffle
from vlm_course.contrastive import ContrastiveModel, TextTower, TextTowerConfig, contrastive_loss, sigmoid_loss
from vlm_course.images import border_colour, clip_preprocess, pad_to_square, small_preprocess, to_pil
from vlm_course.patches import interpolate_positions, patchify, unpatchify
from vlm_course.vit import VisionTransformer, ViTConfig

small = st.integers(1, 5)
CLOSE = {"rtol": 0, "atol": 1e-5}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def tower(image_size=(8, 12), layers=2, **changes):
    return VisionTransformer(ViTConfig(image_size, 4, width=8, layers=layers, heads=2, mlp_width=16, **changes)).eval()


def text_tower(**changes):
    sizes = {"vocab_size": 20, "width": 8, "layers": 2, "heads": 2, "mlp_width": 16, "max_length": 10, "eos_id": 2}
    return TextTower(TextTowerConfig(**{**sizes, **changes})).eval()


# ------------------------------------------------------------------------------------------------------ patches


@given(batch=small, channels=small, rows=small, cols=small, patch=small)
def test_patchify_loses_nothing_and_reads_row_by_row(batch, channels, rows, cols, patch):
    image = torch.arange(batch * channels * rows * cols * patch**2).reshape(batch, channels, rows * patch, cols * patch)
    patches = patchify(image, patch)
    assert patches.shape == (batch, rows * cols, channels * patch**2)
    for k in range(rows * cols):
        top, left = k // cols * patch, k % cols * patch
        assert torch.equal(patches[:, k], image[:, :, top : top + patch, left : left + patch].flatten(1))
    assert torch.equal(unpatchify(patches, patch, (rows, cols)), image)


@pytest.mark.parametrize(
    "call, numbers",
    [
        (lambda: patchify(torch.zeros(1, 3, 9, 8), 4), "height is 9.*4"),
        (lambda: patchify(torch.zeros(1, 3, 8, 10), 4), "width is 10.*4"),
        (lambda: patchify(torch.zeros(3, 8, 8), 4), "3 dimensions.*expected 4"),
        (lambda: unpatchify(torch.zeros(1, 7, 48), 4, (2, 3)), "N = 7.*expected 6"),
        (lambda: unpatchify(torch.zeros(1, 6, 47), 4, (2, 3)), "47.*16"),
        (lambda: interpolate_positions(torch.zeros(576, 4), (24, 24), (12, 12)), "576.*expected 577"),
        (lambda: interpolate_positions(torch.zeros(5, 4), (2, 2), (0, 3)), r"\(0, 3\)"),
        (lambda: ViTConfig(30, 8, 32, 3, 4, 64), "30.*8"),
        (lambda: ViTConfig((32, 30), 8, 32, 3, 4, 64), "width is 30.*8"),
        (lambda: ViTConfig(32, 8, 30, 3, 4, 64), "30.*4"),
        (lambda: ViTConfig(32, 8, 32, 3, 4, 64, activation="swish"), "swish.*quick_gelu"),
        (lambda: tower()(torch.zeros(1, 3, 8, 8)), "W = 8.*expected 12"),
        (lambda: tower()(torch.zeros(1, 1, 8, 12)), "C = 1.*expected 3"),
        (lambda: tower().patch_features(torch.zeros(1, 3, 8, 12), 3), "3.*2 blocks.*3 hidden"),
        (lambda: text_tower()(torch.ones(1, 11, dtype=torch.long)), "11.*10"),
        (lambda: text_tower()(torch.tensor([[1, 2], [3, 3]])), "caption 1 .*2"),
        (lambda: text_tower()(torch.ones(1, 3)), "float32.*integer"),
        (lambda: text_tower(eos_id=20), "20.*20"),
        (lambda: contrastive_loss(torch.zeros(3, 4)), "3 images.*4 captions"),
        (lambda: sigmoid_loss(torch.zeros(3, 4)), "3 images.*4 captions"),
        (lambda: LinearBridge(6, 4)(torch.zeros(1, 2, 5)), "D = 5.*expected 6"),
        (lambda: VisionProjection(1024, 8)(torch.zeros(1, 2, 768)), "D = 768.*expected 1024"),
        (lambda: VisionProjection(6, 4)(torch.zeros(2, 6)), "2 dimensions.*expected 3"),
        (lambda: PerceiverResampler(dim=6, queries=4)(torch.zeros(1, 2, 5)), "D = 5.*expected 6"),
        (lambda: CAbstractor(vision_dim=4, llm_dim=4, queries=143, grid=24), "143.*121 or 144"),
        (lambda: abstractor(4, (4, 6))(torch.zeros(1, 25, 6)), "N = 25.*expected 24.*CLS"),
        (lambda: abstractor(4, (4, 6))(torch.zeros(1, 24, 7)), "D = 7.*expected 6"),
        (lambda: pixel_shuffle(torch.zeros(1, 577, 2)), "577.*576"),
        (lambda: pixel_shuffle(torch.zeros(1, 9, 2)), "rows is 3.*2"),
        (lambda: pixel_shuffle(torch.zeros(1, 9, 2), 2, grid=(2, 4)), "9.*8"),
        (lambda: to_pil(torch.zeros(2, 3, 4, 4)), r"\[2, 3, 4, 4\]"),
    ],
)
def test_a_mismatch_names_both_numbers(call, numbers):
    with pytest.raises(ValueError, match=numbers):
        call()


# --------------------------------------------------------------------------------------------------- the towers


@given(rows=small, cols=small, layers=st.integers(1, 3), pre_norm=st.booleans(), batch=st.integers(1, 3))
@torch.no_grad()
def test_the_tower_takes_any_grid_and_its_features_are_its_hidden_states(rows, cols, layers, pre_norm, batch):
    model = tower((4 * rows, 4 * cols), layers, pre_norm=pre_norm)
    assert model.config.grid == (rows, cols) and model.config.n_patches == rows * cols
    pixels = torch.randn(batch, 3, 4 * rows, 4 * cols)
    states = model.hidden_states(pixels)
    assert [state.shape for state in states] == [(batch, 1 + rows * cols, 8)] * (layers + 1)
    for layer in range(-layers - 1, layers + 1):
        assert torch.equal(model.patch_features(pixels, layer), states[layer][:, 1:])
    assert torch.equal(model(pixels), states[-1])


@given(rows=small, cols=small, new_rows=small, new_cols=small)
def test_interpolation_keeps_cls_and_constants_and_knows_rows_from_columns(rows, cols, new_rows, new_cols):
    positions = torch.randn(1 + rows * cols, 3)
    new = interpolate_positions(positions, (rows, cols), (new_rows, new_cols))
    assert new.shape == (1 + new_rows * new_cols, 3)
    assert torch.equal(new[0], positions[0])
    cells = positions[1:].reshape(rows, cols, 3).transpose(0, 1).reshape(-1, 3)
    turned = interpolate_positions(torch.cat([positions[:1], cells]), (cols, rows), (new_cols, new_rows))
    expected = new[1:].reshape(new_rows, new_cols, 3).transpose(0, 1).reshape(-1, 3)
    torch.testing.assert_close(turned[1:], expected, **CLOSE)
    constant = interpolate_positions(torch.ones(1 + rows * cols, 1), (rows, cols), (new_rows, new_cols))
    torch.testing.assert_close(constant, torch.ones_like(constant), **CLOSE)


@torch.no_grad()
def test_interpolating_to_the_own_size_changes_nothing():
    model, pixels = tower(), torch.randn(1, 3, 8, 12)
    assert torch.equal(model(pixels, interpolate=True), model(pixels))


@torch.no_grad()
def test_without_positions_the_tower_cannot_tell_the_patches_order(redraw):
    model = redraw(tower())
    pixels = torch.randn(1, 3, 8, 12)
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    shuffled = unpatchify(patchify(pixels, 4)[:, order], 4, (2, 3))
    assert (model.patch_features(shuffled) - model.patch_features(pixels)[:, order]).abs().max() > 1e-2
    model.positions.zero_()
    torch.testing.assert_close(model.patch_features(shuffled), model.patch_features(pixels)[:, order], **CLOSE)


@given(length=st.integers(2, 10), data=st.data())
@torch.no_grad()
def test_a_caption_ends_at_its_first_end_token(length, data):
    model = text_tower()
    end = data.draw(st.integers(0, length - 1))
    ids = torch.randint(3, 20, (2, length))
    ids[:, end] = 2
    padded = ids.clone()
    padded[:, end + 1 :] = data.draw(st.sampled_from([0, 2, 7]))
    torch.testing.assert_close(model(padded), model(ids), **CLOSE)
    torch.testing.assert_close(model(ids[:, : end + 1]), model(ids), **CLOSE)
    if end:
        changed = ids.clone()
        changed[:, 0] = (ids[:, 0] - 2) % 17 + 3
        assert not torch.allclose(model(changed), model(ids), rtol=0, atol=1e-5)


@torch.no_grad()
def test_logits_are_cosines_times_a_bounded_scale():
    model = ContrastiveModel(tower(), text_tower(), embed_dim=6)
    pixels, ids = torch.randn(3, 3, 8, 12), torch.tensor([[1, 5, 2], [1, 6, 2], [7, 2, 0]])
    image, text = model.encode_image(pixels), model.encode_text(ids)
    for features in (image, text):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3), **CLOSE)
    torch.testing.assert_close(model(pixels, ids), image @ text.T / 0.07)
    model.logit_scale.fill_(50.0)
    torch.testing.assert_close(model(pixels, ids), 100 * image @ text.T)


@given(pairs=st.integers(1, 8))
def test_contrastive_loss_is_symmetric_and_ln_b_when_nothing_is_known(pairs):
    assert contrastive_loss(torch.full((pairs, pairs), 3.0)).item() == pytest.approx(np.log(pairs), abs=1e-5)
    logits = 3 * torch.randn(pairs, pairs)
    order = torch.randperm(pairs)
    for loss in (contrastive_loss, sigmoid_loss):
        torch.testing.assert_close(loss(logits), loss(logits.T))
        torch.testing.assert_close(loss(logits), loss(logits[order][:, order]))
        assert loss(100 * torch.eye(pairs) - 50) < 1e-3


def test_a_new_model_starts_quiet():
    """Residual branches are small at initialisation, so depth does not blow the stream up, and every weight learns."""
    model = ContrastiveModel(
        VisionTransformer(ViTConfig(96, 8, 192, 6, 6, 768)),
        TextTower(
            TextTowerConfig(vocab_size=100, width=128, layers=4, heads=4, mlp_width=512, max_length=16, eos_id=2)
        ),
        embed_dim=64,
    )
    pixels, ids = torch.randn(4, 3, 96, 96), torch.randint(3, 100, (4, 6))
    ids[:, -1] = 2
    for states in (model.vision.hidden_states(pixels), model.text.hidden_states(ids)):
        assert states[-1].std() < 2 * states[0].std() + 0.5
    loss = contrastive_loss(model(pixels, ids))
    assert loss < 2 * np.log(4)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@torch.no_grad()
def test_the_towers_compile_without_a_graph_break(in_one_graph):
    model = ContrastiveModel(tower(), text_tower(), embed_dim=6).eval()
    pixels, ids = torch.randn(2, 3, 8, 12), torch.tensor([[1, 5, 2], [1, 6, 2]])
    compiled = in_one_graph(model)
    torch.testing.assert_close(compiled(pixels, ids), model(pixels, ids), **CLOSE)
    bridge = in_one_graph(PerceiverResampler(dim=8, queries=3))
    assert bridge(model.vision.patch_features(pixels)).shape == (2, 3, 8)


def test_sizes_of_the_published_models():
    with torch.device("meta"):
        assert count(VisionTransformer(ViTConfig(336, 14, 1024, 24, 16, 4096))) == 303_507_456
        assert count(VisionProjection(1024, 4096)) == 20_979_712
        assert count(VisionProjection(1024, 5120)) == 31_467_520


# -------------------------------------------------------------------------------------------------- the bridges


def abstractor(queries, grid, **changes):
    sizes = {"vision_dim": 6, "llm_dim": 5, "hidden": 8, "depth": 1}
    return CAbstractor(queries=queries, grid=grid, **{**sizes, **changes}).eval()


@given(batch=small, patches=st.integers(1, 30), queries=small, depth=st.integers(1, 2))
@torch.no_grad()
def test_bridges_shapes_and_independence_of_the_samples(batch, patches, queries, depth):
    features = torch.randn(batch, patches, 6)
    resampler = PerceiverResampler(dim=6, queries=queries, depth=depth, heads=2, head_dim=3)
    for bridge, shape in (
        (LinearBridge(6, 10), (batch, patches, 10)),
        (VisionProjection(6, 10), (batch, patches, 10)),
        (resampler, (batch, queries, 6)),
    ):
        out = bridge(features)
        assert out.shape == shape
        torch.testing.assert_close(out[-1:], bridge(features[-1:]), **CLOSE)
    order = torch.randperm(patches)
    torch.testing.assert_close(resampler(features[:, order]), resampler(features), **CLOSE)


@torch.no_grad()
def test_the_projection_is_not_linear():
    bridge = VisionProjection(6, 10)
    for layer in (bridge.mlp[0], bridge.mlp[2]):
        layer.bias.zero_()
    a, b = torch.randn(2, 1, 4, 6)
    assert (bridge(a + b) - bridge(a) - bridge(b)).abs().max() > 1e-3


@torch.no_grad()
def test_the_resampler_reads_the_image_and_leaves_its_latents_alone(redraw):
    bridge = redraw(PerceiverResampler(dim=6, queries=3, heads=2, head_dim=3))
    before = bridge.latents.clone()
    one, other = bridge(torch.randn(2, 9, 6))
    assert (one - other).abs().max() > 1e-3 and torch.equal(bridge.latents, before)


@given(rows=small, cols=small, side=st.integers(1, 4), positions=st.booleans())
@torch.no_grad()
def test_c_abstractor_gives_its_number_of_tokens_for_any_grid(rows, cols, side, positions):
    bridge = abstractor(side**2, (rows, cols), positions=positions)
    assert bridge(torch.randn(2, rows * cols, 6)).shape == (2, side**2, 5)


@torch.no_grad()
def test_c_abstractor_keeps_rows_apart_from_columns(redraw):
    bridge = redraw(abstractor(4, (8, 16)))
    features = torch.randn(1, 8, 16, 6)
    changed = features.clone()
    changed[:, :2, 10:] += 1  # in the upper right quarter, more than the two convolutions' reach from the others
    for block in (bridge.before, bridge.after):
        block[0].squeeze_excite.excite.weight.zero_()  # the gates look at the whole image
    bridge.after[0].conv2.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # and so do 2x2 maps
    moved = (bridge(changed.flatten(1, 2)) - bridge(features.flatten(1, 2))).abs().amax(dim=(0, 2))
    assert moved[1] > 1e-3 and moved[[0, 2, 3]].max() < 1e-6


@given(batch=small, rows=small, cols=small, factor=st.integers(1, 3), width=small)
def test_pixel_shuffle_puts_each_square_side_by_side(batch, rows, cols, factor, width):
    grid = (rows * factor, cols * factor)
    x = torch.arange(batch * grid[0] * grid[1] * width).reshape(batch, -1, width)
    out = pixel_shuffle(x, factor, grid=grid)
    assert out.shape == (batch, rows * cols, factor**2 * width)
    cells = x.reshape(batch, *grid, width)
    for k in range(rows * cols):
        top, left = k // cols * factor, k % cols * factor
        assert torch.equal(out[:, k], cells[:, top : top + factor, left : left + factor].flatten(1))


# -------------------------------------------------------------------------------------------------- the images


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(width=st.integers(1, 40), height=st.integers(1, 40), size=st.integers(1, 24))
def test_preprocessing_takes_every_shape(width, height, size):
    image = noise(width, height)
    for pixels in (clip_preprocess(image, size=size), small_preprocess(image, size=size)):
        assert pixels.shape == (3, size, size) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() and pixels.max() <= 1
    side = max(width, height)
    square = pad_to_square(image)
    assert square.size == (side, side)
    left, top = (side - width) // 2, (side - height) // 2
    assert (np.array(square)[top : top + height, left : left + width] == np.array(image)).all()


def test_the_small_models_own_pictures_pass_unchanged():
    image = noise(96, 96)
    assert (np.array(to_pil(small_preprocess(image))) == np.array(image)).all()
    assert to_pil(torch.full((3, 2, 2), 7.0)).getpixel((0, 0)) == (255, 255, 255)


def test_padding_continues_the_background():
    image = Image.new("RGB", (60, 20), (10, 200, 30))
    image.paste((255, 0, 0), (20, 5, 40, 15))
    assert border_colour(image) == (10, 200, 30)
    padded = to_pil(small_preprocess(image, size=60))
    assert padded.getpixel((30, 2)) == (10, 200, 30) and padded.getpixel((30, 30)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (9, 5), "white").convert(mode)
    torch.testing.assert_close(small_preprocess(image, size=8), torch.ones(3, 8, 8))
    assert clip_preprocess(image, size=8).shape == (3, 8, 8)


def test_the_package_imports_nothing_heavy():
    modules = "images patches vit contrastive bridges validation convert.clip convert.timm"
    code = (
        f"import sys, importlib\nfor m in {modules.split()}: importlib.import_module('vlm_course.' + m)\n"
        "print([m for m in ('transformers', 'timm', 'torchvision', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
