"""Closed forms against modules that are built: Flamingo's blocks, what a decoder reads, how long a bridge takes."""

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlm_course import bridge_study
from vlm_course.bridge_study import BridgeCost, count_parameters, milliseconds, reading_flops
from vlm_course.costs import build_projection_13b
from vlm_course.decoder import Decoder, DecoderConfig
from vlm_course.flamingo import cross_attention_parameters, gated_block_parameters
from vlm_course.fusion import GatedCrossAttention

SIZES = [(32, 24, 2, 5), (48, 48, 8, 64), (4096, 1024, 8, 64)]


@pytest.mark.parametrize(("text", "media", "heads", "head_dim"), SIZES)
def test_parameters_of_a_gated_block(text, media, heads, head_dim):
    with torch.device("meta"):
        block = GatedCrossAttention(dim=text, media_dim=media, heads=heads, head_dim=head_dim)
    assert gated_block_parameters(text, media, heads, head_dim) == count_parameters(block)
    attention = sum(count_parameters(part) for part in (block.to_q, block.to_k, block.to_v, block.to_out))
    assert cross_attention_parameters(text, media, heads, head_dim) == attention


def test_the_13b_bridge_ends_in_its_decoders_width():
    with torch.device("meta"):
        assert build_projection_13b()(torch.empty(1, 576, 1024)).shape == (1, 576, 5120)


def test_reading_counts_every_matrix_product_of_the_blocks():
    """All that is left out are the attention's scores: torch's counter sees them beside the same products."""
    config = DecoderConfig(vocab_size=50, width=64, layers=3, heads=4, kv_heads=2, mlp_width=96)
    with torch.device("meta"):
        decoder, tokens = Decoder(config), 5
        embeds = torch.empty(1, tokens, config.width)
    counter = FlopCounterMode(display=False)
    with counter:
        decoder(embeds, logits_to_keep=1)
    counted = {str(operation).split(".")[1]: count for operation, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counted.items() if name in ("mm", "addmm"))
    norms = 2 * config.layers * config.width  # weights that are no matrix, two norms a block
    head = 2 * config.width * config.vocab_size
    assert reading_flops(decoder, tokens) == products - head + 2 * tokens * norms
    assert reading_flops(decoder, 2 * tokens) == 2 * reading_flops(decoder, tokens)


def test_the_time_is_that_of_the_fastest_pass_after_a_warm_up(monkeypatch):
    """Passes of 9 (warming up), 4, 2 and 3 seconds."""
    clock = iter([0, 9, 10, 14, 20, 22, 30, 33])
    monkeypatch.setattr(bridge_study.time, "perf_counter", lambda: next(clock))
    calls = []

    class Bridge(nn.Module):
        def forward(self, features):
            calls.append(torch.is_grad_enabled())
            return features

    assert milliseconds(Bridge(), torch.zeros(1, 2, 3), repeats=3) == 2000
    assert calls == [False] * 4
    monkeypatch.undo()
    assert time.perf_counter() > 0


def test_gigaflops():
    assert BridgeCost("MLP", 1, 576, 24_159_191_040).gigaflops == pytest.approx(24.159191)
