"""Two tiny models: a language model in SmolLM2's format, a GGUF with its tokenizer that the test writes; and a `Llava`
of the course's own words, with conversations about pictures that are drawn for it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_course.decoder import DecoderConfig
from vlm_course.finetune import smollm
from vlm_course.finetune.collate import Collator
from vlm_course.finetune.data import read_records
from vlm_course.finetune.loader import Loader
from vlm_course.finetune.tokenizers import for_small
from vlm_course.llava import Llava, LlavaConfig
from vlm_course.vit import ViTConfig

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>")
WORDS = ("user", "assistant", " the", " is", "what", " color", "red", " red", "circle")
COLOURS = ("red", "green", "blue", "yellow", "white", "black")
LLAMA = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 64, "head_dim": 8}


@dataclass(frozen=True)
class TinyGguf:
    """A file, its hash, and the float32 weights that were written, under ggml's names and in ggml's order."""

    file: Path
    sha256: str
    weights: dict[str, np.ndarray]


def byte_letters() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def vocabulary() -> tuple[list[str], list[str]]:
    """Pieces and merges that make every word of WORDS one token."""
    letters = byte_letters()
    pieces, merges = [*CONTROL, *letters], []
    for word in WORDS:
        spelled = [letters[byte] for byte in word.encode()]
        while len(spelled) > 1:
            merge = f"{spelled[0]} {spelled[1]}"
            spelled = [spelled[0] + spelled[1], *spelled[2:]]
            if spelled[0] not in pieces:
                pieces.append(spelled[0])
                merges.append(merge)
    return pieces, merges


def write_gguf(file: Path, *, family: str = "llama", seed: int = 0, head: bool = False) -> dict[str, np.ndarray]:
    """One tensor of every kind that SmolLM2's file has: Q8_0 for the embedding, Q4_1 for matrices, F32 for norms."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter, quants

    pieces, merges = vocabulary()
    random, d = np.random.default_rng(seed), LLAMA["head_dim"]
    width, keys, hidden = LLAMA["width"], LLAMA["kv_heads"] * d, LLAMA["mlp_width"]
    shapes = {"token_embd.weight": (len(pieces), width), "output_norm.weight": (width,)}
    for i in range(LLAMA["layers"]):
        shapes |= {f"blk.{i}.{name}_norm.weight": (width,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_{name}.weight": (width, width) for name in ("q", "output")}
        shapes |= {f"blk.{i}.attn_{name}.weight": (keys, width) for name in ("k", "v")}
        shapes |= {f"blk.{i}.ffn_{name}.weight": (hidden, width) for name in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down.weight"] = (width, hidden)
    if head:
        shapes["output.weight"] = (len(pieces), width)

    writer, weights = GGUFWriter(file, family), {}
    writer.add_name("tiny")
    writer.add_vocab_size(len(pieces))
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(LLAMA["layers"])
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(LLAMA["heads"])
    writer.add_head_count_kv(LLAMA["kv_heads"])
    writer.add_rope_dimension_count(d)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_merges(merges)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(pieces) - len(CONTROL)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    for name, shape in shapes.items():
        kind = Kind.F32 if len(shape) == 1 else Kind.Q8_0 if name == "token_embd.weight" else Kind.Q4_1
        value = (random.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        stored = quants.quantize(value, kind)
        weights[name] = quants.dequantize(stored, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="session")
def write_tiny_gguf():
    """`write_gguf`, for a test that wants another file."""
    return write_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> TinyGguf:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    weights = write_gguf(file)
    return TinyGguf(file, hashlib.sha256(file.read_bytes()).hexdigest(), weights)


@pytest.fixture(scope="session")
def tiny_smollm(tiny_gguf, tmp_path_factory) -> Path:
    """The cache folder of the tiny model: stands in for SmolLM2 wherever a test must not download it."""
    return smollm.cached(tiny_gguf.file, root=tmp_path_factory.mktemp("cache"), sha256=tiny_gguf.sha256)


@pytest.fixture(scope="session")
def tiny_config():
    """4 x 4 patches, two layers, 64 wide: a step takes milliseconds."""
    adapter = for_small()
    text = DecoderConfig(adapter.vocab_size, width=64, layers=2, heads=4, kv_heads=2, mlp_width=96, max_positions=96)
    vision = ViTConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_width=64)
    return LlavaConfig(vision=vision, text=text, image_id=adapter.image_id)


@pytest.fixture
def tiny(tiny_config):
    """A function that builds the same untrained model again and again."""

    def build():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return Llava(tiny_config)

    return build


@pytest.fixture(scope="session")
def talk_file(tmp_path_factory):
    """24 records of one to three questions about plain pictures; every sixth is a text without an image."""
    folder = tmp_path_factory.mktemp("talk")
    lines = []
    for number in range(24):
        colour = COLOURS[number % len(COLOURS)]
        turns = [("What colour is the object?", colour + "."), ("Is there a circle?", "no."), ("Why?", "because.")]
        talk = []
        for question, answer in turns[: 1 + number % 3]:
            talk += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        record = {"id": str(number), "conversations": talk}
        if number % 6 != 5:
            Image.new("RGB", (40, 30 + number), colour).save(folder / f"{number}.png")
            record["image"] = f"{number}.png"
            talk[0]["value"] = "<image>\n" + talk[0]["value"]
        lines.append(json.dumps(record))
    file = folder / "talk.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def loader(talk_file, tiny_config):
    """A function that makes a `Loader` of these records."""
    records = read_records(talk_file)

    def build(batch=6, *, seed=0, **options):
        return Loader(records, Collator(for_small(), tiny_config, **options), batch, seed)

    return build
