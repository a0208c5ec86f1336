"""Chapters 3 to 6: masks, fusion, the loss, the decoder, the whole model, answers, conversations, training."""

import torch
from bad_input_table import NO_ROW, Bool, F, I, row
from torch import nn

from vlm_course import cache, decoder, fusion
from vlm_course.llava import Llava, LlavaConfig
from vlm_course.tokenizer import WordTokenizer
from vlm_course.training import Stage
from vlm_course.vit import ViTConfig

NAN = float("nan")
IN_OTHER_WORDS = "refused in other words, which say how many placeholders there are; see below"
MORE_IDS = {"ids.B+1": IN_OTHER_WORDS, "ids.8+1": IN_OTHER_WORDS}
EXTRA = ({"ids": torch.full((3, 8), 3)}, "8 placeholders", "6 features")
BROADCASTS = "a mask of fewer axes broadcasts; one of five is refused below"

# --- attention

row("attention.causal_mask", length=3, _least={"length": 0, "offset": 0})
row("attention.padding_mask", attention_mask=Bool("B S"))
row("attention.prefix_mask", lengths=I("B"), length=3)
row("attention.block_mask", documents=I("B T"))
row("attention.queries_mask", queries=I("B S"), length=3, documents=I("B 3"))
row("attention.media_attention_mask", media=Bool("B T i"), tokens_per_image=2)
ATTEND = {"q": F("B H T d"), "k": F("B H S d")}
MASKED = {
    "mask": Bool("B H T S"), "_low": {"B": 2, "H": 2, "T": 2, "S": 2}, "_free": {"mask.rank": BROADCASTS},
    "_bad": [({"mask": torch.ones(1, 1, 1, 1, 1) > 0}, "5 dimensions", "2 to 4"),
             ({"mask": torch.ones(1, 1)}, "float32", "bool")],
}  # fmt: skip
row("attention.attend", **ATTEND, v=F("B H S e"), **MASKED)
row("attention.attention_weights", **ATTEND, **MASKED)

# --- fusion

IMAGE = 7


def spliced(s):
    return torch.full((s.B, 2), IMAGE)


row("fusion.splice_image_features", embeds=F("B 2 D"), ids=I("B 2", spliced), features=F("B 2 D"), image_id=IMAGE,
    _low={"B": 2}, _free={"image_id": "any id may stand for the image; a wrong one finds no placeholder"},
    _bad=[({"image_id": 5}, "0 placeholders", "does the prompt lack"),
          ({"image_id": -1}, "0 placeholders", "does the prompt lack")])  # fmt: skip
row("fusion.expand_image_placeholder", ids=[1, IMAGE], image_id=IMAGE, count=3, _least={"image_id": 0})
MEDIA = {
    "ids": I("B T"),
    "image_id": IMAGE,
    "n_images": 2,
    "_fix": {"B": 3, "T": 4},
    "_least": {"image_id": 0, "eos_id": 0},
    "_free": {"ids.B+1": "one row more", "ids.T+1": "one token more"},
    "_bad": [({"ids": torch.full((3, 4), IMAGE)}, "4 image tokens", "2")],
}
row("fusion.media_mask", **MEDIA)
row("fusion.packed_media_mask", **MEDIA, eos_id=2)
NO_ROW["fusion.SquaredReLU"] = "works on every number alone"
NO_ROW["fusion.SquaredReLU.forward"] = "works on every number alone"
GATED = {"dim": 4, "media_dim": 6, "heads": 2, "head_dim": 3}
row("fusion.GatedCrossAttention", **GATED)
row(
    "fusion.GatedCrossAttention.forward",
    _on=lambda s: fusion.GatedCrossAttention(**GATED),
    text=F("B T D"),
    media=F("B i M C"),
    mask=Bool("B T i"),
    _fix={"D": 4, "C": 6},
)

# --- loss

row("loss.response_loss", logits=F("B T V"), labels=I("B T"), _fix={"V": 4}, _low={"T": 2},
    _free={"ignore": "any number that is no id", "logits.T=0": "the shape is named in full",
           "logits.V+1": "more words than the labels use"},
    _bad=[({"labels": torch.full((3, 2), -100)}, "-100", "no response"),
          ({"labels": torch.full((3, 2), 4)}, "4", "0 to 3")])  # fmt: skip
row(
    "loss.instruction_loss",
    log_probs=F("N"),
    mask=Bool("N"),
    _fix={"N": 3},
    _bad=[({"mask": torch.zeros(3)}, "0 of 3", "response")],
)
row("loss.answer_weights", lengths=[2, 3], _bad=[({"lengths": []}, "[]", "at least 1"), ({"lengths": [0]}, "0")])
row("loss.division_factor", context_tokens=3, response_tokens=2, _least={"context_tokens": 0})

# --- decoder

CONFIG = decoder.DecoderConfig(vocab_size=9, width=8, layers=2, heads=2, kv_heads=1, mlp_width=6, max_positions=30)
NO_CONFIG = ({"config": {}}, "dict", "DecoderConfig")
row(
    "decoder.DecoderConfig",
    vocab_size=9,
    width=8,
    layers=2,
    heads=2,
    kv_heads=1,
    mlp_width=6,
    _least={"head_dim": 2},
    _bad=[({"kv_heads": 3}, "2", "3"), ({"width": 7}, "7", "2"), ({"head_dim": 3}, "3", "even")],
)
ANY_RANK = {"x.rank": "any axes before the last"}
row("decoder.RMSNorm", dim=4)
row("decoder.RMSNorm.forward", _on=lambda s: decoder.RMSNorm(4), x=F("B T D"), _fix={"D": 4}, _free=ANY_RANK)
row("decoder.SwiGLU", dim=4, hidden=3)
row("decoder.SwiGLU.forward", _on=lambda s: decoder.SwiGLU(4, 3), x=F("B T D"), _fix={"D": 4}, _free=ANY_RANK)
row(
    "decoder.rotary_phases",
    positions=I("B T"),
    head_dim=4,
    theta=100.0,
    _least={"head_dim": 2},
    _free={"positions.rank": "one row of positions for the whole batch"},
    _bad=[({"head_dim": 3}, "3", "even"), ({"positions": torch.zeros(1, 1, 1).long()}, "3 dimensions", "1 or 2")],
)
row(
    "decoder.apply_rotary",
    x=F("B H T 6"),
    cos=F("T 3"),
    sin=F("T 3"),
    _low={"T": 2},
    _bad=[({"cos": torch.rand(2, 2)}, "(2, 2)", "expected")],
)
row("cache.KVCache", layers=2, _least={"capacity": 0})


def filled(s):
    full = cache.KVCache(1)
    full.update(0, torch.rand(3, 2, 4, 6), torch.rand(3, 2, 4, 6))
    return full


row(
    "cache.KVCache.update",
    _on=filled,
    layer=0,
    keys=F("B H T d"),
    values=F("B H T d"),
    _fix={"B": 3, "H": 2, "d": 6},
    _least={"layer": 0},
    _bad=[({"layer": 1}, "1", "1 layers")],
)
row(
    "cache.KVCache.select",
    _on=filled,
    rows=I("n"),
    _least={"room": 0},
    _bad=[({"rows": torch.tensor([3])}, "3", "0 to 2"), ({"rows": torch.tensor([-1])}, "-1", "0 to 2")],
)


def phases(s):
    return decoder.rotary_phases(torch.arange(s.T), 4)


X = {
    "x": F("B T D"),
    "phases": phases,
    "mask": None,
    "cache": None,
    "layer": 0,
    "_fix": {"D": 8},
    "_least": {"layer": 0},
}
row("decoder.SelfAttention", config=CONFIG, _bad=[NO_CONFIG])
row("decoder.SelfAttention.forward", _on=lambda s: decoder.SelfAttention(CONFIG), **X)
row("decoder.DecoderBlock", config=CONFIG, _bad=[NO_CONFIG])
row("decoder.DecoderBlock.forward", _on=lambda s: decoder.DecoderBlock(CONFIG), **X)
row("decoder.Decoder", config=CONFIG, _bad=[NO_CONFIG])
WORDS = [({"ids": torch.full((3, 2), 9)}, "9", "0 to 8"), ({"ids": torch.full((3, 2), -1)}, "-1", "0 to 8")]
row("decoder.Decoder.embed", _on=lambda s: decoder.Decoder(CONFIG), ids=I("B T"), _bad=WORDS)
row("decoder.Decoder.new_cache", _on=lambda s: decoder.Decoder(CONFIG), _least={"capacity": 0})
row("decoder.Decoder.forward", _on=lambda s: decoder.Decoder(CONFIG), embeds=F("B T D"), positions=I("B T"),
    mask=Bool("B 1 T T"), _fix={"D": 8}, _low={"B": 2, "T": 2}, _least={"logits_to_keep": 0},
    _free={
        "mask.rank": BROADCASTS,
        "mask.1+1": "a mask for each of the two heads",
        "positions.rank": "one row of positions for the whole batch",
    },
    _bad=[({"embeds": torch.zeros(1, 31, 8), "positions": None, "mask": None}, "31 tokens", "30")])  # fmt: skip

# --- the whole model

VIT = ViTConfig(image_size=(4, 6), patch_size=2, width=6, layers=2, heads=2, mlp_width=5)
LLAVA = {"vision": VIT, "text": CONFIG, "image_id": 3}
ON_LLAVA = {"_on": lambda s: Llava(LlavaConfig(**LLAVA))}


def prompt(s):
    return torch.cat([torch.full((s.B, 6), 3), torch.full((s.B, 2), 5)], dim=1)


PIXELS = {"pixels": F("B C 4 6"), "_fix": {"C": 3}, "_low": {"B": 2}}
row("llava.LlavaConfig", **LLAVA, _least={"image_id": 0},
    _free={"feature_layer": "negative ones count from the end"},
    _bad=[({"bridge": "conv"}, "conv", "mlp"), ({"image_id": 9}, "9", "9"), ({"feature_layer": 3}, "3", "3 hidden"),
          ({"feature_layer": -4}, "-4", "3 hidden")])  # fmt: skip
row("llava.small_config", vocab_size=9, _least={"image_id": 0})
row("llava.Llava", config=LlavaConfig(**LLAVA), _bad=[({"config": {}}, "dict", "LlavaConfig")])
row("llava.Llava.encode_images", **ON_LLAVA, **PIXELS)
row("llava.Llava.new_cache", **ON_LLAVA, _least={"capacity": 0})
row("llava.Llava.forward", **ON_LLAVA, ids=I("B 8", prompt), **PIXELS, attention_mask=Bool("B 8"), positions=I("B 8"),
    _least={"logits_to_keep": 0},
    _free={"positions.rank": "one row of positions for the whole batch"} | MORE_IDS,
    _bad=[({"image_features": torch.zeros(3, 6, 8)}, "both", "once"), EXTRA])  # fmt: skip

# --- answers

row(
    "generation.top_p_filter",
    probabilities=F("B V", lambda s: torch.rand(s.B, s.V) + 0.1),
    top_p=0.5,
    _free={"probabilities.rank": "any axes before the last"},
    _bad=[({"top_p": 1.5}, "1.5", "1")],
)
row("generation.choose_token", logits=F("B V"), _bad=[({"top_p": 1.5, "temperature": 1.0}, "1.5", "1")])
ANSWER = {"model": lambda s: Llava(LlavaConfig(**LLAVA)), "ids": I("B 8", prompt), "max_new_tokens": 2}
row("generation.greedy_generate", **ANSWER, **PIXELS, _free=MORE_IDS, _bad=[EXTRA])
row("generation.generate", **ANSWER, **PIXELS, attention_mask=Bool("B 8"), _least={"eos_id": 0}, _free=MORE_IDS,
    _bad=[EXTRA, ({"image_features": torch.zeros(3, 6, 8)}, "both", "once"), ({"top_p": 1.5}, "1.5", "1"),
          ({"attention_mask": torch.arange(8).expand(3, 8) < 7}, "padding", "left")])  # fmt: skip

# --- conversations

TOKENIZER = WordTokenizer.small()
TURNS = [({"turns": []}, "no turns", "at least one"), ({"turns": [("a", None), ("b", "c")]}, "turn 0 of 2")]
row(
    "chat.encode_chat",
    tokenizer=TOKENIZER,
    turns=[("red", "yes")],
    visual_tokens=3,
    _least={"visual_tokens": 0},
    _bad=[*TURNS, ({"turns": [("<image>", "yes")]}, "<image>", "control token")],
)
row("chat.vicuna_prompt", turns=[("a", "b")], _bad=[*TURNS, ({"turns": [("<image>", "b")]}, "turn 0", "<image>")])
row("chat.caption_prompt", caption="a cat", _bad=[({"caption": "<image>"}, "<image>", "once")])
row(
    "chat.response_labels",
    ids=[1, 2],
    offsets=[(0, 1), (1, 2)],
    spans=[(0, 1)],
    _bad=[({"ids": [1]}, "1 ids", "2 offsets"), ({"spans": [(2, 1)]}, "2", "1"), ({"spans": [(-1, 1)]}, "-1")],
)
NO_ROW["chat.encode_vicuna"] = "needs a Hugging Face tokenizer; tests/properties/test_language_data.py has its errors"
row(
    "chat.pad_rows",
    rows=[[1], [2, 3]],
    value=0,
    _free={"value": "an id, or -100 for labels"},
    _bad=[({"rows": []}, "0 rows", "at least 1"), ({"side": "top"}, "top", "left")],
)

# --- training

STAGE = Stage("s", ("0.",), steps=3, batch=2, lr=0.1)


def model(s=None):
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def parts(s):
    return [{"x": torch.zeros(2, 3), "labels": torch.ones(2, 3).long()}]


row("training.Stage", name="s", trains=("a",), steps=3, batch=2, lr=0.1,
    _bad=[({"trains": ()}, "0 parts", "at least 1"), ({"warmup": 2.0}, "2.0", "1"), ({"lrs": (("a", 0.0),)}, "0.0"),
          ({"lr": 0.0}, "0.0", "above 0"), ({"final": 2.0}, "2.0", "1")])  # fmt: skip
NO_ROW["training.Paused"] = "an exception without arguments of its own"
row(
    "training.learning_rate",
    step=0,
    steps=3,
    peak=0.1,
    _least={"step": 0},
    _bad=[({"step": 3}, "step is 3", "3 steps"), ({"warmup": 2.0}, "2.0", "1"), ({"final": 2.0}, "2.0", "1")],
)
row("training.freeze_all_but", model=model, trains=("0.",), _bad=[({"trains": ("2.",)}, "'2.'", "['0', '1']")])
row(
    "training.parameter_groups",
    model=model,
    stage=STAGE,
    _bad=[({"model": model().requires_grad_(False)}, "0 parameters", "at least 1")],
)
row("training.micro_batches", batch={"a": torch.zeros(3, 2), "b": torch.zeros(3)}, size=2,
    _bad=[({"batch": {}}, "at least 1"), ({"batch": {"a": torch.zeros(2), "b": torch.zeros(3)}}, "2", "3"),
          ({"batch": {"a": torch.zeros(0)}}, "0", "at least 1"),
          ({"batch": {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}}, "cpu", "meta")])  # fmt: skip
row("training.accumulated", parts=parts, forward=nn.Identity(), _free={"ignore": "any number that is no id"},
    _bad=[({"parts": []}, "0 parts", "at least 1"), ({"parts": [{"x": 1}]}, "['x']", "labels"),
          ({"parts": [{"labels": torch.zeros(2)}]}, "1 dimensions", "2"),
          ({"parts": [{"labels": torch.full((2, 3), -100)}]}, "0 response tokens", "at least 1")])  # fmt: skip
NO_ROW["training.save_atomically"] = "writes any object that torch.save takes"
NO_ROW["training.fit"] = "tests/training has its errors, which need a folder"
