"""The maps are those of the pass: with them the layers' outputs can be made again."""

import pytest
import torch
from torch import nn

from vlm_course.attention_maps import attention_maps, hidden_states
from vlm_course.bridges import PerceiverResampler
from vlm_course.decoder import Decoder, DecoderConfig
from vlm_course.flamingo import CrossAttentionDecoder

CONFIG = DecoderConfig(vocab_size=40, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24)
IDS = torch.tensor([[1, 3, 7, 8, 3, 9]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    compress = PerceiverResampler(dim=12, queries=4, depth=2, heads=2, head_dim=4)
    model = CrossAttentionDecoder(
        CONFIG, image_id=3, media_dim=12, at=(1,), heads=2, head_dim=8, compress=compress
    ).requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.3) if weight.dim() == 2 else weight.uniform_(0.5, 1.5)
    return model.eval()


def outputs(model):
    """The maps of one pass, and (input of the output projection) of every watched layer."""
    inputs = {}
    projections = {
        "decoder.blocks.0.attention": model.decoder.blocks[0].attention.out,
        "cross.1": model.cross["1"].to_out,
        "compress.layers.1": model.compress.layers[1].to_out,
    }
    for name, projection in projections.items():
        projection.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    values = {}
    value_maps = {
        "decoder.blocks.0.attention": model.decoder.blocks[0].attention.value,
        "cross.1": model.cross["1"].to_v,
        "compress.layers.1": model.compress.layers[1].to_v,
    }
    for name, projection in value_maps.items():
        projection.register_forward_hook(lambda _, __, out, name=name: values.__setitem__(name, out))
    features = torch.randn(1, 2, 7, 12, generator=torch.Generator().manual_seed(1))
    with attention_maps(model) as maps:
        model(IDS, model.read(features))
    return maps, values, inputs


@pytest.mark.parametrize(
    ("name", "heads"), [("decoder.blocks.0.attention", 2), ("cross.1", 2), ("compress.layers.1", 2)]
)
def test_weights_times_values_are_what_the_layer_made(model, name, heads):
    maps, values, inputs = outputs(model)
    v = values[name].unflatten(-1, (heads, -1)).transpose(1, 2)
    v = v.repeat_interleave(maps[name].shape[1] // heads, dim=1)
    made = (maps[name] @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(made, inputs[name], atol=1e-5, rtol=0)


def test_rows_sum_to_one_or_see_nothing(model):
    maps, _, _ = outputs(model)
    assert maps["cross.1"].shape == (1, 2, 6, 8) and maps["cross.1"][0, :, 0].sum() == 0
    torch.testing.assert_close(maps["cross.1"][0, :, 1:].sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(maps["decoder.blocks.1.attention"].sum(-1), torch.ones(1, 4, 6))
    assert maps["cross.1"][0, :, 1:4, 4:].sum() == 0 and maps["cross.1"][0, :, 4:, :4].sum() == 0


def test_nothing_stays_behind(model):
    with attention_maps(model):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_watched_is_named():
    with pytest.raises(ValueError, match="Linear has no attention layer"), attention_maps(nn.Linear(2, 2)):
        pass
    decoder = Decoder(CONFIG)
    embeds = decoder.embed(IDS)
    with pytest.raises(ValueError, match="without a KV cache"), attention_maps(decoder):
        decoder(embeds, cache=decoder.new_cache())


def test_hidden_states_end_where_the_head_begins():
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).eval()
    embeds = decoder.embed(IDS)
    states = hidden_states(decoder, embeds)
    assert states.shape == (3, 1, 6, 16) and torch.equal(states[0], embeds)
    torch.testing.assert_close(decoder.head(decoder.norm(states[-1])), decoder(embeds))
    everything = torch.ones(6, 6, dtype=torch.bool)
    assert (hidden_states(decoder, embeds, mask=everything)[1:] - states[1:]).abs().max() > 1e-4
