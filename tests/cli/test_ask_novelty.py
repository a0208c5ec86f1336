"""The warning about images that are no scenes: photographs get it, fresh scenes do not."""

from pathlib import Path

import pytest
import skimage
import torch

from vlm_course.ask import novelty
from vlm_course.image_files import load_image
from vlm_course.images import small_preprocess
from vlm_course.pretrained import load_small

# Photographs inside scikit-image's wheel; its drawings, charts, masks and test patterns are left out.
PHOTOS = """
astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png grass.png gravel.png
horse.png hubble_deep_field.jpg ihc.png microaneurysms.png moon.png motorcycle_left.png motorcycle_right.png page.png
retina.jpg rocket.jpg text.png
""".split()


@pytest.fixture(scope="module")
def model():
    return load_small().model


def photos() -> list[Path]:
    folder = Path(skimage.__file__).parent / "data"
    return [folder / name for name in PHOTOS if (folder / name).is_file()]


@torch.no_grad()
def test_photographs_are_new(model):
    files = photos()
    assert len(files) >= 15
    pixels = torch.stack([small_preprocess(load_image(file, max_side=1024)) for file in files])
    patches = model.vision.patch_features(pixels, layer=model.config.feature_layer)
    new = novelty.load().is_new(patches)
    assert new.float().mean() >= 0.95, [f.name for f, far in zip(files, new, strict=True) if not far]


def test_fresh_scenes_are_not(model):
    shipped = novelty.load()
    features = novelty.scene_features(model, 1000, seed=4242)
    share = (shipped.distance_of_summary(features) > shipped.threshold).float().mean()
    assert share <= 0.01


def test_fit_finds_the_quantile_and_whitens():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator)
    draw = lambda n: torch.randn(n, 8, generator=generator) @ mixing + 3  # noqa: E731
    fitted = novelty.fit(draw(20_000), draw(20_000), quantile=0.99, shrinkage=0.0)
    fresh = fitted.distance_of_summary(draw(20_000))
    assert fresh.square().mean().item() == pytest.approx(8, rel=0.05)  # chi squared with 8 degrees of freedom
    assert (fresh > fitted.threshold).float().mean().item() == pytest.approx(0.01, abs=0.003)
    with pytest.raises(ValueError, match="8 scenes"):
        novelty.fit(draw(8), draw(8))


def test_saved_and_loaded_are_equal(tmp_path):
    fitted = novelty.Novelty(torch.randn(4), torch.randn(4, 4), 3.5)
    novelty.save(fitted, tmp_path / "novelty.safetensors")
    loaded = novelty.load(tmp_path / "novelty.safetensors")
    assert torch.equal(loaded.mean, fitted.mean)
    assert torch.equal(loaded.whitening, fitted.whitening)
    assert loaded.threshold == 3.5
