"""The rows of `benchmarks.finetune` on tiny models and a CPU: what they report is there, what cannot run is said."""

import pytest
import torch

from benchmarks import finetune, finetune_inference, finetune_training
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


def test_decode_row():
    model = finetune_inference.build(TINY).eval()
    ids, pixels = finetune_inference.prompt(TINY, 6)
    found = finetune_inference._measured(model, ids, pixels, FLOORS)
    assert found["of_floor"] > 0 and found["worst_regret"] < 0.1 * found["logit_std"] and found["of"] == 20


def test_packed_rows_hold_every_sample_once():
    lengths = [40, 30, 90, 55, 31]
    documents = finetune_training._documents(TINY, lengths)
    packed = finetune_training._packed(TINY, documents, 128, 2)
    assert sum(len(batch.pixels) for batch in packed) == 5
    assert sum(int((batch.labels != -100).sum()) for batch in packed) == sum(
        len(l) - sum(x == -100 for x in l) for _, l in documents
    )
    grouped = finetune_training._grouped(TINY, documents, 2)
    assert [batch.ids.shape[1] for batch in grouped] == [94, 44, 34]
    lengths = finetune_training.conversation_lengths(500)
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
