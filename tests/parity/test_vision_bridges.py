"""The bridges against transformers, and the C-Abstractor against timm's RegNet stage, which Honeybee is built from."""

import re

import pytest
import torch
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import nn

from vlm_course.bridges import CAbstractor, PerceiverResampler, VisionProjection, pixel_shuffle

CLOSE = {"rtol": 0, "atol": 1e-5}


@torch.no_grad()
def test_vision_projection_equals_llavas_projector(redraw):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=24), text_config=LlamaConfig(hidden_size=40, num_attention_heads=4)
    )
    theirs = redraw(LlavaMultiModalProjector(config))
    ours = VisionProjection(24, 40)
    names = {"mlp.0": "linear_1", "mlp.2": "linear_2"}
    state = theirs.state_dict()
    ours.load_state_dict({f"{our}.{kind}": state[f"{their}.{kind}"] for our, their in names.items()
                          for kind in ("weight", "bias")})  # fmt: skip
    features = 3 * torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(features), theirs(features), **CLOSE)


@pytest.mark.parametrize("depth", [1, 3])
@torch.no_grad()
def test_perceiver_resampler_equals_idefics(redraw, depth):
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(vision_config={"embed_dim": 32}, perceiver_config={"qk_layer_norms_perceiver": False})
    theirs = redraw(IdeficsPerceiverResampler(config, embed_dim=32, depth=depth, n_heads=4, head_dim=12, n_latents=6))
    ours = PerceiverResampler(dim=32, queries=6, depth=depth, heads=4, head_dim=12, activation=nn.ReLU).eval()
    names = {
        "context_layer_norm": "norm_media", "latents_layer_norm": "norm_latents", "output_proj": "to_out",
        "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v",
        "1.ln": "feed_forward.0", "1.fc": "feed_forward.1", "1.c_proj": "feed_forward.3",
        "blocks": "layers", "layer_norm": "norm",
    }  # fmt: skip
    state = {}
    for name, tensor in theirs.state_dict().items():
        for their, our in names.items():
            if their != "layer_norm" or name.startswith("layer_norm"):
                name = name.replace(their, our)
        state[name.replace(".0.norm", ".norm").replace(".0.to_", ".to_")] = tensor
    ours.load_state_dict(state)
    for length in (1, 7, 50):
        media = torch.randn(2, length, 32)
        torch.testing.assert_close(ours(media), theirs(media), **CLOSE)


class Honeybee(nn.Module):
    """Honeybee's C-Abstractor from timm's parts."""

    def __init__(self, *, vision_dim, llm_dim, queries, hidden, depth, mlp_depth, grid):
        super().__init__()
        self.grid = grid
        kinds = {"act_layer": nn.SiLU, "norm_layer": LayerNorm2d}
        self.before = RegStage(depth, vision_dim, hidden, stride=1, dilation=1, **kinds)
        self.pool = nn.AdaptiveAvgPool2d(round(queries**0.5))
        self.after = RegStage(depth, hidden, hidden, stride=1, dilation=1, **kinds)
        layers = [nn.Linear(hidden, llm_dim)]
        for _ in range(mlp_depth - 1):
            layers += [nn.SiLU(), nn.Linear(llm_dim, llm_dim)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, features):
        x = features.transpose(1, 2).reshape(len(features), -1, *self.grid)
        return self.mlp(self.after(self.pool(self.before(x))).flatten(2).transpose(1, 2))


def our_c_abstractor_name(name):
    name = re.sub(r"\.b(\d+)\.", lambda found: f".{int(found[1]) - 1}.", name)  # timm counts its blocks from 1
    name = re.sub(r"\.conv(\d)\.conv\.", r".conv\1.", name)
    name = re.sub(r"\.conv(\d)\.bn\.", r".norm\1.", name)
    name = name.replace(".se.fc1.", ".squeeze_excite.squeeze.").replace(".se.fc2.", ".squeeze_excite.excite.")
    return name.replace(".downsample.conv.", ".shortcut.0.").replace(".downsample.bn.", ".shortcut.1.")


@pytest.mark.parametrize(
    "sizes",
    [
        {"vision_dim": 32, "llm_dim": 40, "queries": 4, "hidden": 48, "depth": 2, "mlp_depth": 2, "grid": (6, 6)},
        {"vision_dim": 48, "llm_dim": 20, "queries": 9, "hidden": 48, "depth": 3, "mlp_depth": 1, "grid": (5, 7)},
        {"vision_dim": 24, "llm_dim": 20, "queries": 1, "hidden": 16, "depth": 1, "mlp_depth": 3, "grid": (1, 3)},
    ],
)
@torch.no_grad()
def test_c_abstractor_equals_the_regnet_oracle(redraw, sizes):
    theirs = redraw(Honeybee(**sizes))
    ours = CAbstractor(**sizes).eval()
    ours.load_state_dict({our_c_abstractor_name(name): tensor for name, tensor in theirs.state_dict().items()})
    features = torch.randn(2, sizes["grid"][0] * sizes["grid"][1], sizes["vision_dim"])
    torch.testing.assert_close(ours(features), theirs(features), **CLOSE)


@pytest.mark.parametrize("llm_dim, count", [(4096, 36_808_192), (5120, 47_296_000)])
def test_c_abstractor_has_honeybees_size(llm_dim, count):
    with torch.device("meta"):
        bridge = CAbstractor(vision_dim=1024, llm_dim=llm_dim, queries=144, grid=24)
    assert sum(parameter.numel() for parameter in bridge.parameters()) == count


def test_pixel_shuffle_equals_internvl_and_idefics():
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.internvl.modeling_internvl import InternVLModel

    for side, factor in ((4, 2), (6, 3), (6, 2), (3, 1)):
        x = torch.arange(2 * side * side * 5, dtype=torch.float32).reshape(2, side * side, 5)
        ours = pixel_shuffle(x, factor)
        idefics = Idefics3Connector.pixel_shuffle(None, x, factor)
        assert torch.equal(ours, idefics)
        if factor in (1, 2):  # InternVL takes 1/factor, a float, which refuses thirds
            internvl = InternVLModel.pixel_shuffle(None, x.reshape(2, side, side, 5), 1 / factor)
            assert torch.equal(ours, internvl.flatten(1, 2))
