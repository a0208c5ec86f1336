"""Checkpoints in the layout in which LLaVA-1.5 is published: written whole or not at all, and read back.

config.json, model-00001-of-0000N.safetensors with an index, tokenizer and processor: a folder that transformers'
`LlavaForConditionalGeneration.from_pretrained` loads with equal logits, and `convert.llava.load_llava` too. The names
inside are those of the hub's llava-hf/llava-1.5-7b-hf.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_course.convert import State
from vlm_course.convert import llava as convert
from vlm_course.finetune.folders import written_whole
from vlm_course.finetune.lora import has_lora
from vlm_course.finetune.tokenizers import IMAGE, ChatMLAdapter, FastAdapter, TokenizerAdapter, for_folder
from vlm_course.images import CLIP_MEAN, CLIP_STD
from vlm_course.llava import SMALL, Llava, LlavaConfig
from vlm_course.validation import counts

SHARD = 5 * 10**9  # bytes; as large as those on the hub

# transformers' names in memory -> those in the published files, the longer first.
_PUBLISHED = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_BESIDE = ("tokenizer", "special_tokens", "added_tokens", "processor", "preprocessor", "chat_template", "generation")

# What `ChatMLAdapter.encode_chat` writes, for transformers' `apply_chat_template`.
CHATML = (
    "{% for message in messages %}{{ '' if loop.first else '\\n' }}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


def published_state(model: Llava) -> State:
    """The weights under the published names, a tied head left out; tensors are the model's own or views of them.

    Raises ValueError when the model has LoRA that is not merged, or another bridge than LLaVA-1.5's.
    """
    if has_lora(model):
        raise ValueError("the model has LoRA beside its weights, which the published layout does not: merge_lora first")
    return _renamed(convert.to_transformers(model.state_dict()), tied=model.config.text.tie_embeddings)


def _renamed(theirs: Mapping[str, Tensor], *, tied: bool) -> State:
    out = {}
    for name, tensor in theirs.items():
        prefix = next(prefix for prefix in _PUBLISHED if name.startswith(prefix))
        if not (tied and prefix == "lm_head."):
            out[_PUBLISHED[prefix] + name.removeprefix(prefix)] = tensor
    return out


@counts(max_shard_bytes=1)
def save_published(
    model: Llava,
    folder: str | Path,
    *,
    adapter: TokenizerAdapter | None = None,
    like: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD,
    replace: bool = False,
) -> Path:
    """Write a model so that others load it; `folder` appears when it is complete.

    Args:
        adapter: its fast tokenizer is saved too, with a processor (not for the course's own words, which no fast
            tokenizer has).
        like: a published folder that the model was loaded from; its tokenizer and processor files are copied.
        dtype: of the files; by default the model's.
        max_shard_bytes: of weights in one file; a single larger tensor still gets a file of its own.
        replace: write over an older folder.

    Returns:
        the folder.

    Raises:
        FileExistsError: `folder` exists and `replace` is not given.
        ValueError: the model has unmerged LoRA, or a part that the layout has no place for.
    """
    state = published_state(model)
    like_folder = None if like is None else Path(like)
    fast = getattr(adapter, "fast", None)
    config = _config(model.config, adapter, dtype or next(iter(state.values())).dtype)
    with written_whole(folder, replace=replace) as part:
        if like_folder is not None:
            for file in sorted(like_folder.iterdir()):
                if file.name.startswith(_BESIDE) and file.suffix in (".json", ".model", ".jinja"):
                    shutil.copy2(file, part / file.name)
        elif fast is not None:
            _save_processor(part, adapter, model.config)
        config.save_pretrained(part)
        shapes = {name: tensor.shape for name, tensor in state.items()}
        _write(part, shapes, lambda name: state[name].detach(), config.dtype, max_shard_bytes)
    return Path(folder)


def _config(config: LlavaConfig, adapter: TokenizerAdapter | None, dtype: torch.dtype) -> Any:
    theirs = convert.transformers_config(config)
    theirs.architectures, theirs.dtype = ["LlavaForConditionalGeneration"], dtype
    if adapter is not None:  # LlamaConfig assumes Llama's ids
        ids = {"bos_token_id": adapter.bos_id, "eos_token_id": adapter.eos_id, "pad_token_id": adapter.pad_id}
        for name, number in ids.items():
            setattr(theirs.text_config, name, number)
    return theirs


def _write(
    part: Path, shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], Tensor], dtype: torch.dtype, most: int
) -> None:
    """Shards of at most `most` bytes and their index; never more than one shard's tensors are made at a time."""
    from safetensors.torch import save_file

    sizes = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > most:
            shards.append([])
        shards[-1].append(name)
    where = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: make(name).to("cpu", dtype).contiguous() for name in names}
        # A part of a fused tensor is contiguous and yet shares its memory, which the format refuses.
        tensors = {n: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for n, t in tensors.items()}
        save_file(tensors, part / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_processor(part: Path, adapter: FastAdapter, config: LlavaConfig) -> None:
    """Tokenizer, image processor and template: what `LlavaProcessor.from_pretrained` reads."""
    from transformers import CLIPImageProcessor, GenerationConfig, LlavaProcessor

    size = config.vision.image_hw[0]
    mean, std = ((0.5,) * 3, (0.5,) * 3) if config.vision == SMALL.vision else (CLIP_MEAN, CLIP_STD)
    images = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(mean),
        image_std=list(std),
    )
    template = CHATML if isinstance(adapter, ChatMLAdapter) else adapter.fast.chat_template
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=adapter.fast,
        patch_size=config.vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" takes off again
        image_token=IMAGE,
        chat_template=template,
    )
    processor.save_pretrained(part)
    GenerationConfig(eos_token_id=adapter.eos_id, pad_token_id=adapter.pad_id).save_pretrained(part)


def load_published(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Llava, FastAdapter]:
    """A published folder -> the model in eval mode and its tokenizer. Nothing is fetched.

    Raises FileNotFoundError when weights, config or tokenizer are missing, ValueError when they do not fit.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: name the folder that config and weights lie in")
    check_complete(folder)
    adapter = for_folder(folder)
    model = convert.load_llava(folder, dtype=dtype, device=device)
    if adapter.image_id != model.config.image_id:
        raise ValueError(
            f"<image> is {adapter.image_id} in the tokenizer of {folder} and {model.config.image_id} in its config: "
            "do both files belong together?"
        )
    return model, adapter


def check_complete(folder: str | Path) -> None:
    """Raises FileNotFoundError when the folder has no weights, or lacks files that its index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in named if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of {len(named)} weight files ({missing[0]}): finish the download"
            )
    elif not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} holds no .safetensors file: was the download complete?")


@counts(seed=0, max_shard_bytes=1)
def random_checkpoint(
    config: LlavaConfig,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = 2 * 10**9,
    replace: bool = False,
) -> Path:
    """A complete folder in the published layout with random weights, for measuring speed and memory where no checkpoint
    can be had. It says nothing sensible.

    Weights are N(0, 0.02), norms 1, biases 0; they are drawn and written shard by shard, so that a 7B model takes no
    more memory than one shard. The tokenizer knows single bytes. device: where they are drawn, a GPU being faster;
    the values depend on the kind of device. Raises FileExistsError as `save_published`.
    """
    with torch.device("meta"):
        model = Llava(config)
    meta = published_state(model)
    numbers = {name: place for place, name in enumerate(meta)}

    def make(name: str) -> Tensor:
        shape = meta[name].shape
        if len(shape) == 1 and name.endswith((".bias", ".weight")):
            return torch.full(shape, 0.0 if name.endswith(".bias") else 1.0, device=device)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + numbers[name])
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(0.02)

    adapter = byte_adapter(config)
    with written_whole(folder, replace=replace) as part:
        _save_processor(part, adapter, config)
        _config(config, adapter, dtype).save_pretrained(part)
        _write(part, {name: tensor.shape for name, tensor in meta.items()}, make, dtype, max_shard_bytes)
    return Path(folder)


def byte_adapter(config: LlavaConfig) -> FastAdapter:
    """A tokenizer of single bytes with Llama's control tokens and <image> where the config has it.

    Raises ValueError when the vocabulary has no room for the 256 bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = {"<unk>": 0, "<s>": 1, "</s>": 2, IMAGE: config.image_id}
    free = (i for i in range(config.text.vocab_size) if i not in control.values())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = control | dict(zip(letters, free, strict=False))
    if len(vocabulary) < len(control) + len(letters) or config.image_id < 3:
        raise ValueError(f"{config.text.vocab_size} words have no room for 256 bytes and 4 control tokens")
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    return FastAdapter(fast)
