"""The quick answer is the plain answer: same tokens, whatever the heads, the length and the device's kernels."""

import os
import subprocess
import sys

import pytest
import torch

from vlm_course.decoder import DecoderConfig
from vlm_course.finetune.fast_generation import FastGenerator
from vlm_course.finetune.fused import fuse, intact
from vlm_course.generation import generate, greedy_generate
from vlm_course.llava import Llava, LlavaConfig
from vlm_course.vit import ViTConfig


def tiny(heads: int = 4, kv_heads: int = 2, *, tie: bool = False, activation: str = "quick_gelu") -> Llava:
    torch.manual_seed(heads + kv_heads)
    config = LlavaConfig(
        vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=3, heads=2, mlp_width=32, activation=activation),
        text=DecoderConfig(
            vocab_size=60, width=32, layers=3, heads=heads, kv_heads=kv_heads, mlp_width=72, head_dim=8,
            max_positions=64, tie_embeddings=tie,
        ),
        image_id=3,
    )  # fmt: skip
    model = Llava(config).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)  # decided answers
    return model


def prompt(words: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat([torch.tensor([1, 3, 3, 3, 3]), torch.arange(10, 10 + words)])[None]
    return ids, torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
def test_tokens_equal_the_plain_ones(heads, kv_heads):
    model = tiny(heads, kv_heads)
    ids, pixels = prompt()
    plain = generate(model, ids, pixels, max_new_tokens=20)
    fast = FastGenerator(model, capacity=40)
    assert torch.equal(fast.generate(ids, pixels, max_new_tokens=20), plain)
    assert torch.equal(fast.generate(ids, pixels, max_new_tokens=20), plain)  # nothing is left of the first answer
    shorter, _ = prompt(2)
    again = generate(model, shorter, pixels, max_new_tokens=20)
    assert torch.equal(fast.generate(shorter, pixels, max_new_tokens=20), again)


def test_tokens_equal_greedy_generate_where_no_image_is_written():
    model = tiny()
    with torch.no_grad():  # the simplest loop has no rule against <image>: here the model has none for it either
        model.decoder.head.weight[3] = 0
    ids, pixels = prompt()
    plain = greedy_generate(model, ids, pixels, 16)
    assert 3 not in plain
    assert torch.equal(FastGenerator(model, capacity=40).generate(ids, pixels, max_new_tokens=16), plain)


def test_text_alone_features_and_tied_embeddings():
    model = tiny(tie=True, activation="gelu")
    ids, pixels = prompt()
    fast = FastGenerator(model, capacity=40)
    text = ids[:, 5:]
    assert torch.equal(fast.generate(text, max_new_tokens=9), generate(model, text, max_new_tokens=9))
    features = model.encode_images(pixels).detach()
    plain = generate(model, ids, pixels, max_new_tokens=9)
    assert torch.equal(fast.generate(ids, image_features=features, max_new_tokens=9), plain)


def test_ends_with_the_end_token():
    model = tiny()
    ids, pixels = prompt()
    plain = generate(model, ids, pixels, max_new_tokens=30)[0].tolist()
    eos = plain[4]
    fast = FastGenerator(model, capacity=64).generate(ids, pixels, max_new_tokens=30, eos_id=eos)[0].tolist()
    assert fast == plain[: plain.index(eos) + 1]


def test_the_image_is_read():
    model = tiny()
    ids, pixels = prompt()
    fast = FastGenerator(model, capacity=40)
    first = fast.generate(ids, pixels, max_new_tokens=12)
    other = torch.randn(1, 3, 16, 16) * 3
    assert torch.equal(fast.generate(ids, other, max_new_tokens=12), generate(model, ids, other, max_new_tokens=12))
    assert torch.equal(fast.generate(ids, pixels, max_new_tokens=12), first)


def test_the_model_stays_usable_and_learned_weights_are_seen():
    model = tiny()
    ids, pixels = prompt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = FastGenerator(model, capacity=40)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.load_state_dict({name: value + 0.05 * torch.randn_like(value) for name, value in before.items()})
    plain = generate(model, ids, pixels, max_new_tokens=12)
    assert torch.equal(fast.generate(ids, pixels, max_new_tokens=12), plain)


def test_fuse_is_done_once_and_noticed_when_undone():
    layer = tiny().decoder.blocks[0].attention
    parts = [layer.query.weight, layer.key.weight, layer.value.weight]
    whole = fuse(parts)
    assert intact(whole, parts) and fuse(parts).data_ptr() == whole.data_ptr()
    layer.key.weight.data = layer.key.weight.data.clone()
    assert not intact(whole, parts)
    with pytest.raises(ValueError, match="one width"):
        fuse([layer.query.weight, torch.nn.Parameter(torch.zeros(3, 5))])


def test_bad_input_is_named():
    model = tiny()
    ids, pixels = prompt()
    fast = FastGenerator(model, capacity=16)
    with pytest.raises(ValueError, match="10 tokens and 20 new ones do not fit in capacity=16"):
        fast.generate(ids, pixels, max_new_tokens=20)
    with pytest.raises(ValueError, match="4 placeholders but 0 images"):
        fast.generate(ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="answers batches"):
        fast.generate(ids.repeat(2, 1), pixels, max_new_tokens=2)
    with pytest.raises(ValueError, match="capacity is 100, but the model has 64"):
        FastGenerator(model, capacity=100)
    from vlm_course.finetune.lora import add_lora

    add_lora(model, rank=2, alpha=4)
    with pytest.raises(ValueError, match="merge_lora"):
        FastGenerator(model, capacity=16)


INTERPRETED = """
import torch
from tests_fast import prompt, tiny
from vlm_course.finetune.decode_launch import LaunchedStep
from vlm_course.finetune.decode_plain import PlainStep, State
from vlm_course.finetune.prefill import PlainOps, Prefill, TritonOps

torch.set_grad_enabled(False)
for heads, kv_heads in ((4, 2), (3, 1)):
    model, (ids, pixels) = tiny(heads, kv_heads), prompt()
    seen = []
    for step_of, ops, splits in ((PlainStep, PlainOps(), 1), (LaunchedStep, TritonOps(), 4)):
        state = State(model.decoder, 32, splits)
        step = step_of(model.decoder, state, model.config.image_id)
        Prefill(model, step, ops, graphs=False)(ids[0], pixels, None)
        for _ in range(3):
            step()
        seen.append((state.tokens[:4].tolist(), state.keys.clone(), state.values.clone(), int(state.length)))
    (tokens, keys, values, length), theirs = seen
    assert tokens == theirs[0] and length == theirs[3], (tokens, theirs[0])
    torch.testing.assert_close(keys, theirs[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, theirs[2], atol=1e-5, rtol=1e-5)
print("equal")
"""


def test_kernels_equal_plain_torch_in_triton_s_interpreter(tmp_path):
    pytest.importorskip("triton", reason="the kernels are Triton's, which this system has not")
    (tmp_path / "tests_fast.py").write_text(open(__file__, encoding="utf-8").read(), encoding="utf-8")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr
