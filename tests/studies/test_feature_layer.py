"""Chapter 5's study: a rehearsal of a few steps, end to end, and that each variant reads its own layer."""

import pytest
import torch

from vlm_course.pretrained import load_small
from vlm_course.studies import study
from vlm_course.studies.common import Lab, run_study
from vlm_course.studies.feature_layer import BLIND, LAYERS, draw, layer_features, load_variant
from vlm_course.studies.results import load_results


@pytest.fixture(scope="module")
def small():
    return load_small()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    run_study(study("feature-layer"), seeds=1, out=out, scale=0.003, log=lambda _: None)
    return load_results("feature-layer", out)


def test_a_rehearsal_measures_every_variant_beside_its_controls(results):
    assert results.rehearsal
    assert set(results.variants) == {*LAYERS, BLIND}
    for variant in results.variants:
        assert {"colour", "relation", "all", "box error", "loss"} <= set(
            results.record["variants"][variant]["measures"]
        )
        for column in ("model", "swapped", "majority"):
            assert 0 <= results.mean(variant, "all", column) <= 1
    majority = {results.mean(variant, "colour", "majority") for variant in results.variants}
    assert len(majority) == 1  # the same questions for everyone


def test_every_variant_reads_its_own_layer(small):
    lab = Lab(small, scale=0.003)
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    found = layer_features(lab, pixels)
    for name, layer in LAYERS.items():
        torch.testing.assert_close(found[name], small.model.vision.patch_features(pixels, layer=layer))
    assert not found[BLIND].any()
    ours = [found[name] for name in LAYERS]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(ours) for b in ours[:i])


def test_a_seed_always_draws_the_same_and_another_seed_something_else(small):
    one, again, other = (draw(Lab(small, seed=seed, scale=0.003), 0, 4) for seed in (0, 0, 1))
    assert torch.equal(one.ids, again.ids) and torch.equal(one.features["last"], again.features["last"])
    assert not torch.equal(one.ids, other.ids)


def test_a_shipped_variant_is_loaded_with_its_layer(results, small):
    for name, layer in LAYERS.items():
        model = load_variant(results, name, small)
        assert model.config.feature_layer == layer
        pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
        features = small.model.vision.patch_features(pixels, layer=layer)
        torch.testing.assert_close(model.encode_images(pixels), model.bridge(features))
