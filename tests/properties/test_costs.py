"""The closed forms of costs.py against modules built on the meta device and torch's own counter of operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlm_course import costs
from vlm_course.bridges import CAbstractor, LinearBridge, PerceiverResampler, ShuffleProjection, VisionProjection
from vlm_course.qformer import QFormer

few = st.integers(1, 4)
few_examples = settings(max_examples=8)  # torch's counter is slow


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def counted_flops(call):
    # The counter does not know the processor's fused attention, so attention runs as two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def agree(bridge, features, parameters, flops, *inputs):
    """The bridge lies on the meta device, so even the published sizes cost nothing."""
    assert parameters == count(bridge)
    bridge.requires_grad_(False)  # the counter follows gradients by hooks, which learned queries trip
    assert flops == counted_flops(lambda: bridge(features.to("meta"), *inputs))


@few_examples
@given(tokens=st.integers(1, 9), vision_dim=few, llm_dim=few)
def test_linear_and_mlp(tokens, vision_dim, llm_dim):
    features = torch.zeros(1, tokens, vision_dim)
    with torch.device("meta"):
        linear, mlp = LinearBridge(vision_dim, llm_dim), VisionProjection(vision_dim, llm_dim)
    flops = [costs.bridge_flops(kind, tokens, vision_dim, llm_dim) for kind in ("linear", "mlp")]
    agree(linear, features, costs.linear_parameters(vision_dim, llm_dim), flops[0])
    agree(mlp, features, costs.projection_parameters(vision_dim, llm_dim), flops[1])


@few_examples
@given(side=few, vision_dim=few, llm_dim=few, factor=st.integers(1, 3))
def test_shuffle(side, vision_dim, llm_dim, factor):
    with torch.device("meta"):
        bridge = ShuffleProjection(vision_dim, llm_dim, factor=factor)
    tokens = (side * factor) ** 2
    parameters = costs.shuffle_parameters(vision_dim, llm_dim, factor=factor)
    flops = costs.shuffle_flops(tokens, vision_dim, llm_dim, factor=factor)
    agree(bridge, torch.zeros(1, tokens, vision_dim), parameters, flops)


@few_examples
@given(tokens=st.integers(1, 9), dim=few, queries=few, depth=few, heads=few, head_dim=few, mlp_ratio=few)
def test_resampler(tokens, **sizes):
    with torch.device("meta"):
        bridge = PerceiverResampler(**sizes)
    flops = costs.resampler_flops(tokens, **sizes)
    agree(bridge, torch.zeros(1, tokens, sizes["dim"]), costs.resampler_parameters(**sizes), flops)


@few_examples
@given(rows=few, cols=few, side=st.integers(1, 3), vision_dim=st.integers(1, 9), llm_dim=few, depth=few,
       hidden=st.integers(1, 9), mlp_depth=few)  # fmt: skip
def test_abstractor(rows, cols, side, **sizes):
    sizes["queries"] = side**2
    with torch.device("meta"):
        bridge = CAbstractor(grid=(rows, cols), **sizes)
    flops = costs.abstractor_flops(rows * cols, **sizes)
    agree(bridge, torch.zeros(1, rows * cols, sizes["vision_dim"]), costs.abstractor_parameters(**sizes), flops)


@few_examples
@given(tokens=st.integers(1, 9), words=st.integers(0, 5), vision_dim=few, queries=few, layers=few, mlp_width=few,
       cross_every=few, vocab_size=st.integers(1, 9), heads=st.integers(1, 3))  # fmt: skip
def test_qformer(tokens, words, vocab_size, heads, **sizes):
    sizes["dim"] = 2 * heads
    with torch.device("meta"):
        bridge = QFormer(**sizes, heads=heads, vocab_size=vocab_size, max_length=7)
        without = QFormer(**sizes, heads=heads)
        ids = [torch.zeros(1, words, dtype=torch.long)] if words else []
    features = torch.zeros(1, tokens, sizes["vision_dim"])
    parameters = costs.qformer_parameters(**sizes, vocab_size=vocab_size, max_length=7)
    agree(bridge, features, parameters, costs.qformer_flops(tokens, **sizes, words=words), *ids)
    agree(without, features, costs.qformer_parameters(**sizes), costs.qformer_flops(tokens, **sizes))


def test_published_sizes():
    """Each paper's own bridge, at its own size, on the meta device."""
    with torch.device("meta"):
        llava, honeybee = VisionProjection(1024, 5120), CAbstractor(vision_dim=1024, llm_dim=4096, queries=144, grid=24)
        internvl, blip2 = ShuffleProjection(3200, 6144), QFormer()
        flamingo = PerceiverResampler(dim=1024, queries=64, depth=6)
    features = torch.zeros(1, 576, 1024)
    mlp = costs.bridge_flops("mlp", 576, 1024, 5120)
    agree(llava, features, costs.projection_parameters(1024, 5120), mlp)
    sizes = {"vision_dim": 1024, "llm_dim": 4096, "queries": 144}
    agree(honeybee, features, costs.abstractor_parameters(**sizes), costs.abstractor_flops(576, **sizes))
    parameters, flops = costs.shuffle_parameters(3200, 6144), costs.shuffle_flops(1024, 3200, 6144)
    agree(internvl, torch.zeros(1, 1024, 3200), parameters, flops)
    agree(blip2, torch.zeros(1, 257, 1408), costs.qformer_parameters(), costs.qformer_flops(257))
    sizes = {"dim": 1024, "queries": 64, "depth": 6}
    parameters = costs.resampler_parameters(**sizes, heads=8, head_dim=64, mlp_ratio=4)
    agree(flamingo, features, parameters, costs.resampler_flops(576, **sizes))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: costs.shuffle_flops(10, 4, 4), r"tokens is 10.*factor\*\*2 = 4"),
        (lambda: costs.bridge_flops("conv", 1, 1, 1), "'conv'.*'linear' or 'mlp'"),
        (lambda: costs.resampler_flops(0, dim=1, queries=1), "tokens is 0.*at least 1"),
    ],
)
def test_bad_numbers(call, words):
    with pytest.raises(ValueError, match=words):
        call()
