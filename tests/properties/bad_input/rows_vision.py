"""Chapters 1 and 2: images, patches, towers, bridges and what they cost."""

import torch
from bad_input_table import NO_ROW, Bool, F, I, row
from PIL import Image
from torch import nn

from vlm_course import bridges, contrastive, patches, qformer, vit

PICTURE = Image.new("RGB", (7, 4))
EMPTY = Image.new("RGB", (0, 4))
NO_PIXELS = ({"image": EMPTY}, "(0, 4)", "at least 1")
NO_PICTURE = ({"image": torch.zeros(3, 4, 4)}, "Tensor", "expected a picture")
BROADCASTS = {"mask.rank": "a mask of fewer axes broadcasts; one of five is refused in test_masks"}

# --- images

row(
    "images.pad_to_square",
    image=PICTURE,
    _bad=[NO_PIXELS, NO_PICTURE, ({"fill": (1, 2)}, "(1, 2)", "three"), ({"fill": (0, 0, 256)}, "256", "0 to 255")],
)
row("images.clip_preprocess", image=PICTURE, _bad=[NO_PIXELS, NO_PICTURE])
row("images.border_colour", image=PICTURE, _bad=[NO_PIXELS, NO_PICTURE])
row("images.small_preprocess", image=PICTURE, _bad=[NO_PIXELS, NO_PICTURE])
row("images.to_pil", pixels=F("3 H W"))

# --- patches

row("patches.patchify", image=F("B C 3r 3c"), patch_size=3)
row(
    "patches.unpatchify",
    patches=F("B 6 9c"),
    patch_size=3,
    grid=(2, 3),
    _bad=[({"grid": (2, 0)}, "(2, 0)", "at least 1"), ({"grid": (-2, -3)}, "(-2, -3)", "at least 1")],
)
row("patches.PatchEmbedding", channels=1, patch_size=2, width=3)
row(
    "patches.PatchEmbedding.forward",
    _on=lambda s: patches.PatchEmbedding(channels=2, patch_size=3, width=4),
    image=F("B C 3r 3c"),
    _fix={"C": 2},
)
row(
    "patches.interpolate_positions",
    positions=F("7 D"),
    old_grid=(2, 3),
    new_grid=(3, 1),
    _bad=[({"new_grid": (0, 3)}, "(0, 3)", "at least"), ({"old_grid": (0, 3)}, "(0, 3)", "at least")],
)

# --- towers

BLOCK = {"width": 6, "heads": 2, "mlp_width": 5, "activation": "gelu"}
VIT = vit.ViTConfig(image_size=(4, 6), patch_size=2, width=8, layers=2, heads=2, mlp_width=6)


def tower():
    return vit.VisionTransformer(VIT)


def text_tower():
    config = contrastive.TextTowerConfig(vocab_size=9, width=8, layers=1, heads=2, mlp_width=6, max_length=5, eos_id=2)
    return contrastive.TextTower(config)


def ids(s):
    return torch.full((s.B, s.T), 2)


PIXELS = {"pixels": F("B C 4 6"), "_fix": {"C": 3}, "_on": lambda s: tower(), "_free": {"interpolate": "true or false"}}
CAPTIONS = {
    "ids": I("B T", ids),
    "_on": lambda s: text_tower(),
    "_bad": [
        ({"ids": torch.full((2, 6), 2)}, "6 tokens", "5"),
        ({"ids": torch.full((2, 3), 1)}, "caption 0", "2"),
        ({"ids": torch.full((2, 3), 9)}, "9", "0 to 8"),
        ({"ids": torch.full((2, 3), -1)}, "-1", "0 to 8"),
    ],
}

row("vit.quick_gelu", x=F("A"), _free={"x.rank": "works on every number alone", "x.A=0": "nothing in, nothing out"})
row(
    "vit.ViTConfig",
    image_size=4,
    patch_size=2,
    width=4,
    layers=1,
    heads=2,
    mlp_width=3,
    _bad=[({"image_size": (4, 0)}, "0", "at least 1"), ({"image_size": (4,)}, "(4,)", "two")],
)
row("vit.SelfAttention", width=4, heads=2, _bad=[({"heads": 3}, "4", "3")])
row("vit.SelfAttention.forward", _on=lambda s: vit.SelfAttention(6, 2), x=F("B T D"), _fix={"D": 6})
row("vit.MLP", width=4, mlp_width=2, activation="gelu", _bad=[({"activation": "relu"}, "relu", "gelu")])
row("vit.MLP.forward", _on=lambda s: vit.MLP(6, 3, "gelu"), x=F("B T D"), _fix={"D": 6})
row("vit.TransformerBlock", **BLOCK, _bad=[({"heads": 4}, "6", "4"), ({"activation": "relu"}, "relu", "gelu")])
row("vit.TransformerBlock.forward", _on=lambda s: vit.TransformerBlock(**BLOCK), x=F("B T D"), _fix={"D": 6})
row(
    "vit.init_transformer",
    blocks=lambda s: nn.ModuleList([vit.TransformerBlock(**BLOCK)]),
    _bad=[({"blocks": nn.ModuleList()}, "0 blocks", "at least 1")],
)
row("vit.add_class_and_positions", patches=F("B N D"), class_token=F("D"), positions=F("7 D"), _fix={"N": 6})
row(
    "vit.select_features",
    states=lambda s: list(torch.zeros(3, 2, 5, 4)),
    _free={"layer": "negative ones count from the end, and a list takes several"},
    _bad=[
        ({"states": []}, "0", "at least 1"),
        ({"layer": 3}, "3", "-3 to 2"),
        ({"layer": -4}, "-4", "-3 to 2"),
        ({"layer": []}, "0 layers", "at least 1"),
        ({"strategy": "cls"}, "cls", "default"),
        ({"states": [torch.zeros(2, 5)]}, "2 dimensions", "3"),
        ({"states": [torch.zeros(2, 5, 4), torch.zeros(2, 5, 3)]}, "3", "4"),
        ({"states": [torch.zeros(2, 5, 4), torch.zeros(2, 5, 4, device="meta")]}, "cpu", "meta"),
    ],
)
row("vit.VisionTransformer", config=VIT, _bad=[({"config": {}}, "dict", "ViTConfig")])
row("vit.VisionTransformer.embed", **PIXELS)
row("vit.VisionTransformer.hidden_states", **PIXELS)
row("vit.VisionTransformer.forward", **PIXELS)
row("vit.VisionTransformer.pooled", **PIXELS)
row(
    "vit.VisionTransformer.patch_features",
    **{**PIXELS, "_free": {"layer": "negative ones count from the end"}},
    _bad=[({"layer": 3}, "3", "3 hidden states"), ({"layer": -4}, "-4", "3 hidden states")],
)
row(
    "contrastive.TextTowerConfig",
    vocab_size=9,
    width=8,
    layers=1,
    heads=2,
    mlp_width=6,
    max_length=5,
    eos_id=2,
    _least={"eos_id": 0},
)
row("contrastive.TextTower", config=lambda s: text_tower().config, _bad=[({"config": {}}, "dict", "TextTowerConfig")])
row("contrastive.TextTower.hidden_states", **{**CAPTIONS, "_bad": CAPTIONS["_bad"][:1] + CAPTIONS["_bad"][2:]})
row("contrastive.TextTower.forward", **CAPTIONS)
row(
    "contrastive.contrastive_logits",
    images=F("B E"),
    captions=F("C E"),
    logit_scale=F("1", lambda s: torch.ones(1)),
    _free={"logit_scale.rank": "a scalar may have one axis more"},
)
row("contrastive.ContrastiveModel", vision=lambda s: tower(), text=lambda s: text_tower(), embed_dim=4)
MODEL = {"_on": lambda s: contrastive.ContrastiveModel(tower(), text_tower(), 4)}
row("contrastive.ContrastiveModel.encode_image", pixels=F("B C 4 6"), _fix={"C": 3}, **MODEL)
row("contrastive.ContrastiveModel.encode_text", **{**CAPTIONS, **MODEL})
row("contrastive.ContrastiveModel.forward", pixels=F("B C 4 6"), ids=I("B T", ids), _fix={"C": 3}, **MODEL)
row("contrastive.contrastive_loss", logits=F("B B"))
row("contrastive.sigmoid_loss", logits=F("B B"))

# --- bridges

LAYER = {"dim": 6, "heads": 2, "head_dim": 2, "mlp_ratio": 2, "activation": nn.GELU}
FORMER = {"dim": 6, "vision_dim": 4, "queries": 3, "layers": 2, "heads": 2, "mlp_width": 5}

row("bridges.LinearBridge", vision_dim=3, llm_dim=2)
row("bridges.LinearBridge.forward", _on=lambda s: bridges.LinearBridge(3, 2), features=F("B N D"), _fix={"D": 3})
row("bridges.VisionProjection", vision_dim=3, llm_dim=2)
row(
    "bridges.VisionProjection.forward", _on=lambda s: bridges.VisionProjection(3, 2), features=F("B N D"), _fix={"D": 3}
)
row("bridges.PerceiverLayer", **LAYER)
row(
    "bridges.PerceiverLayer.forward",
    _on=lambda s: bridges.PerceiverLayer(**LAYER),
    media=F("B N D"),
    latents=F("B M D"),
    _fix={"D": 6},
)
row("bridges.PerceiverResampler", dim=6, queries=3)
row(
    "bridges.PerceiverResampler.forward",
    _on=lambda s: bridges.PerceiverResampler(dim=6, queries=3, heads=2),
    features=F("B N D"),
    _fix={"D": 6},
)
row("bridges.LayerNorm2d.forward", _on=lambda s: bridges.LayerNorm2d(3), x=F("B C H W"), _fix={"C": 3})
row("bridges.SqueezeExcite", channels=4, squeezed=2)
row("bridges.SqueezeExcite.forward", _on=lambda s: bridges.SqueezeExcite(4, 2), x=F("B C H W"), _fix={"C": 4})
row("bridges.RegBlock", in_channels=4, channels=2)
row("bridges.RegBlock.forward", _on=lambda s: bridges.RegBlock(4, 2), x=F("B C H W"), _fix={"C": 4})
row(
    "bridges.CAbstractor",
    vision_dim=3,
    llm_dim=2,
    queries=4,
    hidden=2,
    grid=(2, 3),
    depth=1,
    _bad=[({"queries": 5}, "5", "4 or 9"), ({"grid": (2, 0)}, "(2, 0)", "at least 1")],
)
row(
    "bridges.CAbstractor.forward",
    features=F("B 6 D"),
    _fix={"D": 3},
    _on=lambda s: bridges.CAbstractor(vision_dim=3, llm_dim=2, queries=4, hidden=2, grid=(2, 3), depth=1),
)
row(
    "bridges.pixel_shuffle",
    x=F("B 6 D"),
    factor=1,
    grid=(2, 3),
    _bad=[({"grid": None}, "6", "4 or 9"), ({"factor": 2}, "3", "2"), ({"grid": (-2, -3)}, "(-2, -3)", "at least 1")],
)
row("bridges.ShuffleProjection", vision_dim=3, llm_dim=2)
row(
    "bridges.ShuffleProjection.forward",
    _on=lambda s: bridges.ShuffleProjection(3, 2),
    features=F("B 16 D"),
    _fix={"D": 3},
)
row("qformer.PostNormAttention", dim=6, context_dim=4, heads=2, norm_eps=1e-5, _bad=[({"heads": 4}, "6", "4")])
row(
    "qformer.PostNormAttention.forward",
    _on=lambda s: qformer.PostNormAttention(6, 4, 3, 1e-5),
    x=F("B T D"),
    context=F("B S C"),
    mask=Bool("B 1 T S"),
    _fix={"D": 6, "C": 4},
    _low={"B": 2, "T": 2, "S": 2},
    _free=BROADCASTS,
)
row("qformer.PostNormMLP", dim=6, hidden=4, norm_eps=1e-5)
row("qformer.PostNormMLP.forward", _on=lambda s: qformer.PostNormMLP(6, 4, 1e-5), x=F("B T D"), _fix={"D": 6})
row("qformer.QFormerLayer", dim=6, vision_dim=4, heads=3, mlp_width=5, reads=True, words=True, norm_eps=1e-5)
row(
    "qformer.QFormerLayer.forward",
    x=F("B T D"),
    features=F("B N C"),
    queries=1,
    mask=Bool("B 1 1 T"),
    _low={"B": 2, "T": 4},
    _free=BROADCASTS,
    _fix={"D": 6, "C": 4},
    _bad=[({"queries": 9}, "9", "but")],
    _on=lambda s: qformer.QFormerLayer(
        dim=6, vision_dim=4, heads=3, mlp_width=5, reads=True, words=True, norm_eps=1e-5
    ),
)
row("qformer.QFormer", **FORMER, _least={"vocab_size": 0}, _bad=[({"heads": 4}, "6", "4")])
row(
    "qformer.QFormer.forward",
    _on=lambda s: qformer.QFormer(**FORMER, vocab_size=5, max_length=5),
    features=F("B N C"),
    ids=I("B T"),
    attention_mask=Bool("B T"),
    _fix={"C": 4},
    _bad=[
        ({"ids": torch.zeros(3, 6).long(), "attention_mask": None}, "6", "5"),
        ({"ids": None}, "attention_mask", "0 ids"),
    ],
)

# --- costs

SIZES = {"vision_dim": 3, "llm_dim": 2}
row("costs.visual_tokens", height=5, width=7, patch_size=2)
row(
    "costs.pipeline_shapes",
    image_size=8,
    patch_size=2,
    vision_dim=3,
    llm_dim=4,
    text_tokens=5,
    _least={"text_tokens": 0},
)
row("costs.projection_parameters", **SIZES)
row("costs.projection_share", **SIZES, llm_parameters=9)
row("costs.bridge_flops", kind="mlp", tokens=4, **SIZES, _bad=[({"kind": "conv"}, "conv", "linear")])
row("costs.resampler_parameters", dim=3, queries=2, depth=1, heads=2, head_dim=2, mlp_ratio=4)
NO_ROW["costs.build_projection_13b"] = "takes no arguments"
row("costs.linear_parameters", **SIZES)
row("costs.shuffle_parameters", **SIZES)
row("costs.shuffle_flops", tokens=4, **SIZES, _bad=[({"tokens": 5}, "5", "4")])
row("costs.resampler_flops", tokens=4, dim=3, queries=2)
row("costs.abstractor_parameters", **SIZES, queries=4, _bad=[({"queries": 5}, "5", "4 or 9")])
row("costs.abstractor_flops", tokens=9, **SIZES, queries=4, _bad=[({"queries": 5}, "5", "4 or 9")])
row("costs.qformer_parameters", _least={"vocab_size": 0})
row("costs.qformer_flops", tokens=4, _least={"words": 0})
NO_ROW["bridges.LayerNorm2d"] = "its constructor is torch's own LayerNorm's"
