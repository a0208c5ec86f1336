"""Stored times are times of a real machine: none lies below what its data sheet allows, and each says whose it is."""

import pytest

from vlm_course import budget, gpu_times
from vlm_course.llava import LLAVA_7B, LLAVA_13B

H100 = budget.GPUS["H100-80GB"]
CONFIGS = {"7B": LLAVA_7B, "13B": LLAVA_13B}


def floor(stage, config):
    if stage == "vision tower":
        return budget.vit_flops(config.vision, layers=23) / H100.flops
    if stage == "bridge":
        return budget.bridge_flops("mlp", 576, 1024, config.text.width) / H100.flops
    if stage == "prefill":
        return budget.prefill_seconds(config, H100, 626, images=1)
    return budget.decode_seconds(config, H100, 626, 1)


@pytest.mark.parametrize("row", gpu_times.stored().rows, ids=str)
def test_no_measured_time_beats_the_machine(row):
    assert 1000 * floor(row.stage, CONFIGS[row.model]) < row.low <= row.high


def test_the_machine_the_day_and_the_settings_are_named():
    stored = gpu_times.stored()
    assert "H100" in stored.machine and stored.date.startswith("20") and stored.source
    assert "transformers" in stored.conditions and "626 tokens" in stored.conditions


def test_a_row_is_found_by_stage_model_and_settings():
    stored = gpu_times.stored()
    assert str(stored.find("decode", "7B")) == "27 to 32"
    assert str(stored.find("decode", "13B")) == "44.2"
    assert stored.find("decode", "7B", "static cache, compiled").high < stored.find("decode", "7B").low
    assert stored.find("decode", "13B", "static cache, compiled") is None


@pytest.mark.parametrize("config", [LLAVA_7B, LLAVA_13B], ids=["7B", "13B"])
@pytest.mark.parametrize("gpu", ["A100-80GB", "H100-80GB", "T4"])
def test_the_simple_floor_is_close_to_the_exact_count(config, gpu):
    """Without attention and with the head at every position: within 2 percent of the budget's."""
    machine = budget.GPUS[gpu]
    weights = budget.decoder_parameters(config.text) - config.text.vocab_size * config.text.width
    peaks = machine.flops, machine.bandwidth
    read = 1000 * budget.prefill_seconds(config.text, machine, 626)
    write = 1000 * budget.decode_seconds(config.text, machine, 1, 1)
    assert gpu_times.pass_floor_ms(weights, 626, *peaks) == pytest.approx(read, rel=0.02)
    assert gpu_times.pass_floor_ms(weights, 1, *peaks) == pytest.approx(write, rel=0.02)
