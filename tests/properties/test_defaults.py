"""What stands in the signatures and the first weights: the sizes of the cited papers, no bias where they have none."""

import pytest
import torch
from torch import nn

from vlm_course.bridges import CAbstractor, PerceiverResampler, RegBlock, pixel_shuffle
from vlm_course.cache import KVCache
from vlm_course.decoder import DecoderConfig
from vlm_course.fusion import GatedCrossAttention
from vlm_course.llava import LlavaConfig
from vlm_course.loss import response_loss
from vlm_course.packing import FactorisedPositions, axial_phases
from vlm_course.patches import PatchEmbedding
from vlm_course.vit import ViTConfig


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def test_gated_cross_attention_is_flamingos():
    """8 heads of 64, a feed-forward layer of four times the width, no biases but the norms', gates of one number."""
    block = GatedCrossAttention(dim=48, media_dim=32)
    assert block.heads == 8
    assert shapes(block) == {
        "attention_gate": (1,), "feed_forward_gate": (1,), "norm.weight": (48,), "norm.bias": (48,),
        "to_q.weight": (512, 48), "to_k.weight": (512, 32), "to_v.weight": (512, 32), "to_out.weight": (48, 512),
        "feed_forward.0.weight": (48,), "feed_forward.0.bias": (48,), "feed_forward.1.weight": (192, 48),
        "feed_forward.3.weight": (48, 192),
    }  # fmt: skip
    assert block.attention_gate.item() == block.feed_forward_gate.item() == 0


def test_perceiver_resampler_is_flamingos():
    """One layer unless more are asked for, 8 heads of 64, a feed-forward layer of four times the width."""
    bridge = PerceiverResampler(dim=48, queries=5)
    layer = {
        "norm_media.weight": (48,), "norm_media.bias": (48,), "norm_latents.weight": (48,), "norm_latents.bias": (48,),
        "to_q.weight": (512, 48), "to_k.weight": (512, 48), "to_v.weight": (512, 48), "to_out.weight": (48, 512),
        "feed_forward.0.weight": (48,), "feed_forward.0.bias": (48,), "feed_forward.1.weight": (192, 48),
        "feed_forward.3.weight": (48, 192),
    }  # fmt: skip
    outside = {"latents": (5, 48), "norm.weight": (48,), "norm.bias": (48,)}
    assert shapes(bridge) == outside | {f"layers.0.{name}": shape for name, shape in layer.items()}
    assert bridge.layers[0].heads == 8


def test_c_abstractor_is_honeybees():
    """Three RegNet blocks of width 1024 on either side of the pool, then two linear maps; no positions unless asked."""
    with torch.device("meta"):
        bridge = CAbstractor(vision_dim=1024, llm_dim=4096, queries=144, grid=24)
        plain = shapes(bridge)
        placed = shapes(CAbstractor(vision_dim=1024, llm_dim=4096, queries=144, grid=24, positions=True))
    assert len(bridge.before) == len(bridge.after) == 3
    assert {name: shape for name, shape in plain.items() if name.startswith("mlp")} == {
        "mlp.0.weight": (4096, 1024), "mlp.0.bias": (4096,), "mlp.2.weight": (4096, 4096), "mlp.2.bias": (4096,),
    }  # fmt: skip
    assert placed == {"positions": (576, 1024)} | plain
    assert bridge.pool.output_size == 12
    block = {
        "conv1.weight": (1024, 1024, 1, 1), "conv2.weight": (1024, 1, 3, 3), "conv3.weight": (1024, 1024, 1, 1),
        "norm1.weight": (1024,), "norm1.bias": (1024,), "norm2.weight": (1024,), "norm2.bias": (1024,),
        "norm3.weight": (1024,), "norm3.bias": (1024,),
        "squeeze_excite.squeeze.weight": (256, 1024, 1, 1), "squeeze_excite.squeeze.bias": (256,),
        "squeeze_excite.excite.weight": (1024, 256, 1, 1), "squeeze_excite.excite.bias": (1024,),
    }  # fmt: skip
    assert shapes(bridge.before[1]) == block


def test_reg_block_squeezes_to_a_quarter_and_at_least_one_channel():
    """The quarter is of the channels that come in, as in RegNet; the shortcut has no bias."""
    assert shapes(RegBlock(2, 6))["squeeze_excite.squeeze.weight"] == (1, 6, 1, 1)
    assert shapes(RegBlock(12, 6))["squeeze_excite.squeeze.weight"] == (3, 6, 1, 1)
    assert [name for name in shapes(RegBlock(2, 6)) if name.startswith("shortcut")] == [
        "shortcut.0.weight", "shortcut.1.weight", "shortcut.1.bias",
    ]  # fmt: skip


def test_pixel_shuffle_halves_either_side_unless_told():
    x = torch.arange(16.0).reshape(1, 16, 1)
    assert torch.equal(pixel_shuffle(x), pixel_shuffle(x, 2, grid=(4, 4)))
    assert pixel_shuffle(x)[0, 0].tolist() == [0, 1, 4, 5]
    assert torch.equal(pixel_shuffle(x, 1), x)


def test_first_weights():
    """Patch embedding: a variance of one for white noise of variance one. Learned positions: 0.02."""
    embedding = PatchEmbedding(channels=3, patch_size=8, width=96)
    assert embedding.bias is None
    assert embedding(torch.randn(8, 3, 32, 32)).var().item() == pytest.approx(1, rel=0.05)
    assert PatchEmbedding(channels=1, patch_size=2, width=4, bias=True).bias.abs().max() == 0
    positions = FactorisedPositions(40, 60, 100)
    for table in (positions.rows, positions.columns):
        assert table.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(table.mean().item()) < 0.002
    placed = CAbstractor(vision_dim=100, llm_dim=4, queries=1, hidden=4, depth=1, grid=(6, 10), positions=True)
    assert placed.positions.std().item() == pytest.approx(0.02, rel=0.05)


def test_axial_phases_turn_with_theta_ten_thousand():
    positions = torch.tensor([[[3, 5]]])
    for ours, given in zip(axial_phases(positions, 8), axial_phases(positions, 8, 10000.0), strict=True):
        assert torch.equal(ours, given)
    cos, _ = axial_phases(positions, 8)
    assert cos.shape == (1, 1, 1, 4)
    # Frequencies 1, 1/10, 1/100, 1/1000: the first and third turn with the row, the others with the column.
    torch.testing.assert_close(cos.flatten(), torch.tensor([3.0, 0.03, 0.5, 0.005]).cos())


def test_labels_of_minus_100_do_not_count_unless_told():
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, -100, 3]])
    expected = -(logits[0, 0].log_softmax(-1)[2] + logits[0, 2].log_softmax(-1)[3]) / 2
    torch.testing.assert_close(response_loss(logits, labels), expected)
    torch.testing.assert_close(response_loss(logits, labels.where(labels >= 0, 4), ignore=4), expected)


def test_selected_rows_of_a_cache_go_on_alone():
    """Rows may repeat, the original stays as it was, and room is only room."""
    cache, draw = KVCache(2, capacity=1), torch.Generator().manual_seed(0)
    stored = [tuple(torch.randn(3, 2, 4, 6, generator=draw) for _ in range(2)) for _ in range(2)]
    for layer, (keys, values) in enumerate(stored):
        cache.update(layer, keys, values)
    rows = torch.tensor([2, 0, 2])
    copy = cache.select(rows, room=5)
    more = torch.ones(3, 2, 1, 6)
    for layer, (keys, values) in enumerate(stored):
        ours = copy.update(layer, more, more)
        assert torch.equal(ours[0], torch.cat([keys[rows], more], dim=2))
        assert torch.equal(ours[1], torch.cat([values[rows], more], dim=2))
    assert (cache.length, copy.length) == (4, 5)
    assert KVCache(2).select(rows).length == 0


VISION = ViTConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_width=32)
TEXT = {"vocab_size": 8, "width": 24, "layers": 1, "heads": 4, "kv_heads": 4, "mlp_width": 8}


def test_configurations_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="width 22 is not a multiple of 4 heads"):
        DecoderConfig(**TEXT | {"width": 22})
    with pytest.raises(ValueError, match=r"head_dim is 5.*even"):
        DecoderConfig(**TEXT, head_dim=5)
    assert DecoderConfig(**TEXT | {"width": 22}, head_dim=6).head_dim == 6
    with pytest.raises(ValueError, match=r"'conv'.*known are mlp, linear"):
        LlavaConfig(vision=VISION, text=DecoderConfig(**TEXT), image_id=3, bridge="conv")
