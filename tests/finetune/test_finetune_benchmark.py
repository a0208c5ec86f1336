"""The rows of `benchmarks.finetune` on tiny models and a CPU: what they report is there, what cannot run is said."""

import dataclasses
from functools import partial

import pytest
import torch

from benchmarks import (
    finetune,
    finetune_inference,
    finetune_models,
    finetune_packed,
    finetune_peers,
    finetune_training,
)
from vlm_course.bridges import ShuffleProjection
from vlm_course.decoder import DecoderConfig
from vlm_course.finetune.flops import Floors
from vlm_course.llava import LlavaConfig
from vlm_course.vit import ViTConfig

TINY = LlavaConfig(
    vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=3, heads=2, mlp_width=32),
    text=DecoderConfig(
        vocab_size=2000, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48, max_positions=1024
    ),
    image_id=1999,
)  # fmt: skip
FLOORS = Floors("CPU", 1e10, 1e10)


@pytest.mark.parametrize("mode", ["projector", "lora", "full"])
def test_training_row(mode):
    found = finetune_training.measured(TINY, mode, 2, 12, FLOORS, rank=4, compiled=False)
    assert found["samples_per_s"] > 0 and 0 < found["of_peak"] and found["tokens"] == 16
    assert found["loss"] == pytest.approx(found["plain_loss"], rel=2e-2)
    assert found["first_loss"] == pytest.approx(found["plain_loss"], rel=0.2)


def test_the_row_of_the_222m_class():
    text = dataclasses.replace(TINY.text, tie_embeddings=True)
    vision = dataclasses.replace(TINY.vision, activation="gelu", pre_norm=False)
    config = dataclasses.replace(TINY, vision=vision, text=text, feature_layer=-1, visual_tokens=1)
    bridge = partial(ShuffleProjection, 16, 32, factor=2)
    found = finetune_training.measured(config, "all", 3, 12, FLOORS, bridge=bridge, dtype=torch.float32, compiled=False)
    assert found["samples_per_s"] > 0 and found["tokens"] == 13 and found["first_loss"] < 20


def test_the_peer_of_the_222m_class_is_as_large_as_ours():
    """transformers' SmolVLM has the same weights but for a class token, its position, and the tower's pooling."""
    text = dataclasses.replace(TINY.text, tie_embeddings=True)
    vision = dataclasses.replace(TINY.vision, activation="gelu", pre_norm=False)
    config = dataclasses.replace(TINY, vision=vision, text=text, feature_layer=-1, visual_tokens=1)
    on, theirs = finetune_peers.small_trainer(config, compiled=False)
    batch = finetune_models.one_batch(config, 3, 12)
    before = theirs.model.connector.modality_projection.proj.weight.detach().clone()
    on(batch.ids, batch.pixels, batch.labels)()
    assert not torch.equal(theirs.model.connector.modality_projection.proj.weight, before)
    ours = finetune_models.learner(
        config, "all", dtype=torch.float32, bridge=partial(ShuffleProjection, 16, 32, factor=2)
    )
    count = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert abs(count[0] - count[1]) < 0.02 * count[1], count


def test_mixed_lengths_and_curve_rows(monkeypatch):
    monkeypatch.setattr(finetune_packed, "LLAVA_7B", TINY)
    monkeypatch.setattr(finetune_training, "CURVE", TINY)
    monkeypatch.setattr(finetune_training, "STEPS", 5)
    monkeypatch.setattr(finetune_models, "RANK", 4)
    for name, value in {"ROW": 256, "ROWS": 2}.items():
        monkeypatch.setattr(finetune_packed, name, value)
    documents = finetune_packed._documents(TINY, [40, 30, 90, 55, 31, 200])
    run = finetune.Run("packed", (), 1e9)
    finetune_packed._packed_ours(run, documents, finetune_packed._grouped(TINY, documents, 2))
    assert run.results["ours, packed"]["samples_per_s"] > 0, run.results
    assert run.results["ours, grouped and padded"]["tokens"] >= 6 * 4 + sum([40, 30, 90, 55, 31, 200])
    run = finetune.Run("curve", (), 1e9)
    finetune_training.curve(run, FLOORS)
    for mode in ("projector", "lora", "full"):
        assert run.results[mode]["most_apart"] < 0.1, run.results[mode]


def test_decode_row():
    model = finetune_models.build(TINY).eval()
    ids, pixels = finetune_models.prompt(TINY, 6)
    found = finetune_inference._measured(model, ids, pixels, FLOORS)
    assert found["of_floor"] > 0 and found["worst_regret"] < 0.1 * found["logit_std"] and found["of"] == 20


def test_packed_rows_hold_every_sample_once():
    lengths = [40, 30, 90, 55, 31]
    documents = finetune_packed._documents(TINY, lengths)
    packed = finetune_packed._packed(TINY, documents, 128, 2)
    assert sum(len(batch.pixels) for batch in packed) == 5
    assert sum(int((batch.labels != -100).sum()) for batch in packed) == sum(
        len(l) - sum(x == -100 for x in l) for _, l in documents
    )
    grouped = finetune_packed._grouped(TINY, documents, 2)
    assert [batch.ids.shape[1] for batch in grouped] == [94, 44, 34]
    lengths = finetune_packed.conversation_lengths(500)
    assert min(lengths) >= 30 and max(lengths) <= 1400 and 140 < sorted(lengths)[250] < 180


def test_without_a_gpu_it_says_what_is_skipped(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert finetune.main(["decode", "two-gpus", "--json", str(tmp_path / "found.json")]) == 0
    assert "skipped decode, two-gpus" in capsys.readouterr().out


def test_a_failed_variant_is_reported_and_the_next_one_runs(capsys):
    run = finetune.Run("row", (), 1e9)
    assert run.try_("bad", lambda: 1 / 0) is None
    assert run.try_("good", lambda: {"samples_per_s": 2.0})["samples_per_s"] == 2.0
    assert "ZeroDivisionError" in run.results["bad"]["failed"]
    late = finetune.Run("row", (), -1.0)
    assert late.try_("late", dict) is None and "skipped" in late.results["late"]
    assert late.try_("first", lambda: {"x": 1}, always=True)["x"] == 1
