"""`vlm-course trace MODEL`: every named shape of a published model, from a forward pass on the meta device.

The pass is the model's own, module by module; only the splice is ours. Transformers finds the placeholders by looking
at the values of the ids, which a tensor without storage has not, so the visual tokens are put in front of the words by
concatenation. The shapes are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from vlm_course.catalog.building import Assembled, build
from vlm_course.catalog.records import Model
from vlm_course.trace import Note, Places, TraceRow, trace, trace_call

_TOWER = r"(?:model\.)?(?:vision_tower|vision_model|visual|vqmodel|vision(?:\.\d+)?|encoder)\.(?:[a-z_]+\.)*"
_LANGUAGE = r"(?:model\.)?(?:(?:language_model|language|text_model|decoder)\.(?:[a-z_]+\.)*)?"

# The layers of a language model are numbered under one of three names; `0` is looked into.
_FIRST = _LANGUAGE + r"(?:layers|blocks)\.0"
_PLACES: Places = {
    r"vision\.\d+\.patch_embed": ("vision", "B N D_vision|B rows columns D_vision", "one vector per patch"),
    _TOWER + r"(?:patch_embeddings?|patch_embed)": (
        "vision",
        "N D_vision|B N D_vision|B D_vision rows columns",
        "one vector per patch",
    ),
    _TOWER + r"(?:blocks|layers|layer)\.\d+": (
        "vision",
        "N D_vision|B tokens D_vision",
        "after a block or stage of the vision tower, with CLS and registers where it has them",
    ),
    r"vision\.(?:stem|stages\.\d+)": ("vision", "B D_vision rows columns", "after a stage of the vision tower"),
    r"model\.visual\.merger": ("bridge", "M D_llm", "2 x 2 patches joined, as wide as word embeddings"),
    r"model\.vision_embed_tokens": ("bridge", "B N D_llm|N D_llm", "raw patches, as wide as word embeddings"),
    r"qformer": ("bridge", "B Q D_qformer", "learned queries (and the instruction) after the Q-Former"),
    r"bridge\.windows": ("bridge", "B Q D_llm", "the queries of each window"),
    r"(?:model\.)?perceiver_resampler|resampler": ("bridge", "B M D_vision", "latents that have read the features"),
    r"bridge:in": ("bridge", "B N D_vision", "features that the bridge gets"),
    r"(?:model\.)?multi_modal_projector|bridge|image_to_text_projection|language_projection": (
        "bridge",
        "M D_llm|B M D_llm",
        "visual tokens, as wide as word embeddings",
    ),
    r"enc_to_dec_proj": ("bridge", "B M D_llm", "visual features, as wide as the decoder"),
    _LANGUAGE + r"(?:embed_tokens|token_embedding)": ("fusion", "B T D_llm", "embeddings of the words"),
    _FIRST + ":in": ("fusion", "B T D_llm", "what the language model gets"),
    r"(?:model\.gated_cross_attn_layers|gated)\.0": (
        "fusion",
        "B T D_llm",
        "after the first gated cross-attention block; the others follow at equal distances",
    ),
    _FIRST + r"\.self_attn\.q_proj": ("decoder", "B T H*d", "queries of all heads, side by side"),
    _FIRST + r"\.self_attn\.k_proj": ("decoder", "B T H_kv*d", "keys: what the KV cache keeps, with the values"),
    _FIRST + r"\.self_attn\.v_proj": ("decoder", "B T H_kv*d", "values"),
    _FIRST + r"\.self_attn\.query_key_value": ("decoder", "B T 3*H*d", "queries, keys and values, side by side"),
    _FIRST + r"\.encoder_attn\.k_proj": ("decoder", "B M H*d", "keys of the cross-attention: the image"),
    _FIRST + r"\.(?:query|key|value)": ("decoder", "B T H*d", "queries, keys, values of all heads"),
    _FIRST + r"\.(?:mlp\.gate_proj|mlp\.dense_h_to_4h|(?:ffn\.|mlp\.)?fc1)": (
        "decoder",
        "B T D_mlp|T D_mlp",
        "inside the feed-forward layer",
    ),
    _LANGUAGE + r"(?:layers|blocks)\.\d+": ("decoder", "B T D_llm", "after a block of the language model"),
    _LANGUAGE + r"(?:norm|final_layernorm|final_layer_norm|layer_norm|layernorm)": (
        "decoder",
        "B T D_llm",
        "normalised for the head",
    ),
    _LANGUAGE + r"(?:lm_head|output_projection)": ("decoder", "B T V", "logits: a score for every word"),
}

# A tower alone: the same places without a prefix.
_TOWER_PLACES: Places = {
    r"patch_embed|embeddings\.patch_embeddings": ("vision", "B N D_vision", "one vector per patch"),
    r"norm_pre": ("vision", "B tokens D_vision", "positions added, and CLS and registers where the tower has them"),
    r"(?:blocks|encoder\.layers|encoder\.layer)\.\d+": ("vision", "B tokens D_vision", "after a block"),
    r"stem|stages\.\d+|final_conv": ("vision", "B D_vision rows columns", "after a stage"),
    r"norm|layernorm": ("vision", "B tokens D_vision", "normalised"),
    r"attn_pool": ("vision", "B D_vision", "pooled by attention"),
}


@contextlib.contextmanager
def _masks_without_values() -> Iterator[None]:
    """Transformers looks into a mask to see whether it can be left out; on the meta device there is nothing to see."""
    from transformers import masking_utils

    before = masking_utils.is_tracing
    masking_utils.is_tracing = lambda *_: True  # as under a compiler, where values are not known either
    try:
        yield
    finally:
        masking_utils.is_tracing = before


def _zeros(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.zeros(*shape, device="meta", dtype=dtype)


def _ids(count: int) -> Tensor:
    return _zeros(1, count, dtype=torch.long)


Run = Callable[[nn.Module, int, Note], None]


def _pixels(note: Note, *shape: int, meaning: str = "normalised pixels") -> Tensor:
    pixels = _zeros(*shape)
    note("input", "pixels", pixels, "N P*P*C|B N P*P*C|B C H W|B tiles C H W", meaning)
    return pixels


def _words(note: Note, count: int, meaning: str = "word ids, without the image's placeholders") -> Tensor:
    ids = _ids(count)
    note("input", "ids", ids, "B T", meaning)
    return ids


def _answer(module: nn.Module, features: Tensor, ids: Tensor, language: nn.Module | None = None, **named) -> None:
    """Runs the language model on [visual tokens, words] and its head. features [M, D_llm] or [n, M, D_llm]."""
    language = module.model.language_model if language is None else language
    words = module.get_input_embeddings()(ids)  # [1, T] -> [1, T, D_llm]
    sequence = torch.cat([features.reshape(1, -1, words.shape[-1]), words], dim=1)  # [1, M + T, D_llm]
    if "position_ids" in named:
        named["position_ids"] = _zeros(3, 1, sequence.shape[1], dtype=torch.long)
    output = language(inputs_embeds=sequence, use_cache=False, **named)
    if not hasattr(output, "logits"):
        module.lm_head(output.last_hidden_state)


def _next(module: nn.Module, text: int, note: Note) -> None:
    pixels = _pixels(note, 1, 5, 3, 336, 336, meaning="an image of 672 x 672 px: itself, and four tiles")
    ids = _words(note, text)
    features = module.model.get_image_features(pixels, torch.tensor([[672, 672]])).pooler_output[0]
    note("bridge", "packed", features, "M D_llm", "tiles put together, padding cut off, a newline token after each row")
    _answer(module, features, ids)


def _qwen(module: nn.Module, text: int, note: Note) -> None:
    from transformers import vision_utils

    grid, visual = torch.tensor([[1, 16, 24]]), module.model.visual
    pixels = _pixels(note, 16 * 24, 1176, meaning="an image of 224 x 336 px: 16 x 24 patches of 14 px, two frames each")
    ids = _words(note, text)
    named = {"position_ids": _zeros(16 * 24, 2, dtype=torch.long)}
    if hasattr(visual, "window_size"):
        index, bounds = vision_utils.get_vision_window_index(
            grid, spatial_merge_size=2, window_size=visual.window_size, patch_size=14
        )
        named |= {"window_index": index.to("meta"), "cu_window_seqlens": bounds}
    features = visual(pixels, grid_thw=grid, **named).pooler_output
    _answer(module, features, ids, position_ids=None)


def _internvl(module: nn.Module, text: int, note: Note) -> None:
    pixels = _pixels(note, 7, 3, 448, 448, meaning="an image of 896 x 1344 px: six tiles and a thumbnail")
    ids = _words(note, text)
    _answer(module, module.model.get_image_features(pixels).pooler_output, ids)


def _fuyu(module: nn.Module, text: int, note: Note) -> None:
    pixels = _pixels(note, 1, 80, 2700, meaning="an image of 240 x 300 px: 8 x 10 patches of 30 px")
    ids = _words(note, text + 8, "word ids, and a newline for each row of patches")
    _answer(module, module.model.vision_embed_tokens(pixels), ids)


def _paligemma(module: nn.Module, text: int, note: Note) -> None:
    pixels, ids = _pixels(note, 1, 3, 224, 224), _words(note, text)
    _answer(module, module.model.get_image_features(pixels).pooler_output, ids)


def _kosmos2(module: nn.Module, text: int, note: Note) -> None:
    pixels = _pixels(note, 1, 3, 224, 224)
    ids = _words(note, 64 + text, "word ids, a placeholder for each of 64 visual tokens")
    features = module.vision_model(pixel_values=pixels).last_hidden_state
    image, _ = module.image_to_text_projection(features)
    module.text_model(input_ids=ids, image_embeds=image, image_embeds_position_mask=_ids(64 + text))


def _qformer(module: nn.Module, text: int, note: Note) -> None:
    pixels, ids = _pixels(note, 1, 3, 224, 224), _words(note, text)
    named = {}
    if type(module).__name__.startswith("Instruct"):
        question = _words(note, text, "the instruction, for the Q-Former")
        named = {"qformer_input_ids": question, "qformer_attention_mask": _ids(text)}
    features = module.get_image_features(pixels, **named).pooler_output
    _answer(module, features, ids, module.language_model)


def _idefics(module: nn.Module, text: int, note: Note) -> None:
    pixels = _pixels(note, 1, 1, 3, 224, 224, meaning="normalised pixels, one image")
    ids = _words(note, text, "word ids, one of them for the image")
    embeds = module.model.embed_tokens.weight[ids]  # the class picks added tokens by value: [1, T] -> [1, T, D_llm]
    note("fusion", "model.embed_tokens", embeds, "B T D_llm", "embeddings of the words")
    mask = _zeros(1, text, 1, dtype=torch.long)
    module(inputs_embeds=embeds, pixel_values=pixels, image_attention_mask=mask, use_cache=False)


def _reader(module: nn.Module, text: int, note: Note) -> None:
    height, width = module.config.encoder.image_size
    pixels = _pixels(note, 1, 3, height, width, meaning="normalised pixels of a page")
    ids = _words(note, text, "ids of the markup so far")
    features = module.encoder(pixels).last_hidden_state
    note("fusion", "features", features, "B M D_vision", "visual features, read by cross-attention")
    module.decoder(input_ids=ids, encoder_hidden_states=features, use_cache=False)


def _emu3(module: nn.Module, text: int, note: Note) -> None:
    pixels = _pixels(note, 1, 3, 512, 512)
    codes = module.model.vqmodel.encode(pixels, torch.tensor([[512, 512]])).image_tokens
    tokens = codes if isinstance(codes, Tensor) else codes[0]
    note("bridge", "codes", tokens, "rows columns|B rows columns", "image codes, which have words of their own")
    ids = _words(note, tokens.numel() + text, "codes and words")
    hidden = module.model.text_model(input_ids=ids, use_cache=False).last_hidden_state
    module.lm_head(hidden)


def _assembled(module: Assembled, text: int, note: Note) -> None:
    bridge = type(module.bridge).__name__
    size, count, meaning = 224, 1, "normalised pixels"
    if bridge in ("HReducer", "WindowedResampler"):
        size, count, meaning = 448, 5, "a page: four crops, and the whole page"
    elif bridge == "QueryResampler":
        size = 448
    elif bridge == "PooledProjection":
        size, count, meaning = 336, 5, "four crops, and the whole image"
    elif bridge == "VisualAbstractor" and module.bridge.positions is not None:
        count, meaning = 5, "a page: the whole page, and four crops"
    pixels, ids = _pixels(note, count, 3, size, size, meaning=meaning), _words(note, text)
    whole = bridge in ("VisualAbstractor", "CausalFormer")  # these read CLS too
    features = torch.cat([_patches(tower, pixels, whole) for tower in module.vision], dim=-1)  # [B, N, D_vision]
    placed = bridge == "VisualAbstractor" and module.bridge.positions is not None
    places = (_zeros(count, 2, dtype=torch.long),) if placed else ()
    tokens = module.bridge(features, *places)  # [B, M, D_llm]
    embeds = module.language.get_input_embeddings()(ids)
    sequence = torch.cat([tokens.reshape(1, -1, embeds.shape[-1]), embeds], dim=1)
    module.language(inputs_embeds=sequence, use_cache=False)


def _patches(tower: nn.Module, pixels: Tensor, whole: bool = False) -> Tensor:
    """The features of a tower from timm, transformers or this course, without class and register tokens unless `whole`
    keeps them."""
    if hasattr(tower, "forward_features"):
        return tower.forward_features(pixels)[:, 0 if whole else getattr(tower, "num_prefix_tokens", 0) :]
    output = tower(pixels)
    return output if isinstance(output, Tensor) else output.last_hidden_state[:, 0 if whole else 1 :]


def _flamingo(module: nn.Module, text: int, note: Note) -> None:
    pixels, ids = _pixels(note, 1, 3, 320, 320), _words(note, text, "word ids, one of them for the image")
    note("decoder", "logits", module(ids, pixels), "B T V", "logits: a score for every word")


_RUNS: dict[str, Run] = {
    "LlavaNextForConditionalGeneration": _next,
    "Qwen2VLForConditionalGeneration": _qwen,
    "Qwen2_5_VLForConditionalGeneration": _qwen,
    "InternVLForConditionalGeneration": _internvl,
    "FuyuForCausalLM": _fuyu,
    "PaliGemmaForConditionalGeneration": _paligemma,
    "Kosmos2ForConditionalGeneration": _kosmos2,
    "Blip2ForConditionalGeneration": _qformer,
    "InstructBlipForConditionalGeneration": _qformer,
    "IdeficsForVisionText2Text": _idefics,
    "VisionEncoderDecoderModel": _reader,
    "Emu3ForConditionalGeneration": _emu3,
    "Assembled": _assembled,
    "Flamingo": _flamingo,
}


def _tower(model: Model) -> Run:
    size = model["image_size"] if isinstance(model["image_size"], int) else 320

    def run(module: nn.Module, text: int, note: Note) -> None:
        module(_pixels(note, 1, 3, size, size))

    return run


def trace_model(model: Model, *, text_tokens: int = 50) -> list[TraceRow]:
    """The shapes of a model of the catalog with one image and `text_tokens` words, in order of execution.

    Raises ValueError, one sentence, for a closed model and for one that no library here has.
    """
    if text_tokens < 1:
        raise ValueError(f"text_tokens is {text_tokens}, but a model needs at least one word to read")
    module = build(model)
    kind = type(module).__name__
    if kind == "Llava":
        config = module.config
        ids = _ids(config.visual_tokens + text_tokens)
        return trace(module, ids, _zeros(1, config.vision.channels, *config.vision.image_hw))
    run = _RUNS.get(kind) or _tower(model)
    places = _PLACES if kind in _RUNS else _TOWER_PLACES
    with _masks_without_values():
        return trace_call(module, places, lambda note: run(module, text_tokens, note))
