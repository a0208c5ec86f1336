"""The counting rule against what PyTorch counts, and against the parameters of real models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm_course.decoder import Decoder, DecoderConfig
from vlm_course.finetune.flops import Floors, decoder_weights, measure_floors, median_seconds, step_flops
from vlm_course.llava import LLAVA_7B, Llava, LlavaConfig
from vlm_course.training import freeze_all_but
from vlm_course.vit import ViTConfig

TEXT = DecoderConfig(vocab_size=50, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, max_positions=64)


def test_weights_are_those_of_a_real_decoder():
    decoder = Decoder(TEXT)
    matrices = sum(p.numel() for p in decoder.parameters() if p.dim() > 1)
    assert decoder_weights(TEXT) == matrices - decoder.token_embedding.weight.numel()
    assert decoder_weights(LLAVA_7B.text) == 6_607_339_520


@pytest.mark.parametrize("mode, factor", [("full", 6), ("projector", 4)])
def test_rule_is_what_torch_counts_without_attention(mode, factor):
    config = LlavaConfig(
        vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_width=32), text=TEXT, image_id=3
    )
    model = Llava(config)
    freeze_all_but(model, ("bridge.", "decoder.") if mode == "full" else ("bridge.",))
    embeds = torch.randn(2, 10, 32, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        model.decoder(embeds).sum().backward()
    products = counter.get_flop_counts()["Global"]
    counted = sum(count for op, count in products.items() if "mm" in str(op) and "bmm" not in str(op))
    assert counted == factor * decoder_weights(TEXT) * 20
    tower = step_flops(config, mode, 2, 10) - counted
    vision = sum(p.numel() for p in model.vision.parameters())
    assert tower == 2 * vision * 2 * 5
    assert step_flops(config, mode, 2, 10, images=0) == counted


def test_peers_table_follows():
    """30.7 to 31.1 samples/s at 640 tokens are 69 to 71 % of 747 TFLOP/s."""
    share = Floors("", 747e12, 2.94e12).share(31.1 * step_flops(LLAVA_7B, "projector", 1, 640), 1.0)
    assert share == pytest.approx(0.71, abs=0.02)
    floors = Floors("", 747e12, 2.94e12)
    assert 1e3 * floors.decode_seconds(LLAVA_7B.text) == pytest.approx(4.5, abs=0.1)
    assert 1e3 * floors.prefill_seconds(LLAVA_7B.text, 626) == pytest.approx(11.1, abs=0.3)


def test_floors_are_measured():
    floors = measure_floors("cpu", size=64, elements=1 << 12, dtype=torch.float32)
    assert floors.flops > 0 and floors.bandwidth > 0 and floors.name == "CPU"
    assert median_seconds(lambda: sum(range(1000)), runs=3, warm_up=1) > 0
    with pytest.raises(ValueError, match="mode"):
        step_flops(LLAVA_7B, "half", 1, 640)
