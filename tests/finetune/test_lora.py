"""LoRA: at the start nothing changes, only A and B learn, merging changes nothing, states belong to their layers."""

import copy
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlm_course.decoder import Decoder, DecoderConfig
from vlm_course.finetune.lora import (
    TARGETS,
    LoRALinear,
    add_lora,
    has_lora,
    load_lora,
    lora_budget,
    lora_layers,
    lora_state,
    merge_lora,
    merged_linear,
)
from vlm_course.llava import Llava, LlavaConfig
from vlm_course.training import Stage, freeze_all_but, parameter_groups
from vlm_course.vit import ViTConfig

CONFIG = LlavaConfig(
    vision=ViTConfig(image_size=16, patch_size=8, width=12, layers=2, heads=2, mlp_width=24),
    text=DecoderConfig(vocab_size=40, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24),
    image_id=3,
)
IDS = torch.tensor([[1, 3, 3, 3, 3, 7, 8], [1, 3, 3, 3, 3, 9, 2]])


def tiny(seed=0):
    torch.manual_seed(seed)
    return Llava(CONFIG).eval()


def wide(model, seed=1):
    """Redraw A and B wide: small and zero values hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for matrix in (layer.lora_a, layer.lora_b):
                matrix.copy_(0.3 * torch.randn(matrix.shape, generator=generator))
    return model


def pixels(seed=2):
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 100))
def test_the_layer_is_the_papers_formula(inputs, outputs, rank, bias, seed):
    """Number by number: h_i = sum_j W_ij x_j + b_i + alpha / r * sum_k B_ik sum_j A_kj x_j."""
    rank = min(rank, inputs, outputs)
    torch.manual_seed(seed)
    base = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    layer = LoRALinear(base, rank=rank, alpha=3.0)
    x = torch.randn(2, 3, inputs, dtype=torch.float64)
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)
    nn.init.normal_(layer.lora_b)
    layer.requires_grad_(False)
    for row in range(2):
        for i in range(outputs):
            want = float(base.bias[i]) if bias else 0.0
            for j in range(inputs):
                update = sum(float(layer.lora_b[i, k] * layer.lora_a[k, j]) for k in range(rank))
                want += (float(base.weight[i, j]) + 3.0 / rank * update) * float(x[row, 1, j])
            assert abs(float(layer(x)[row, 1, i]) - want) < 1e-10


def test_a_has_the_scale_of_a_linear_layer():
    """Kaiming uniform with a = sqrt(5), as nn.Linear draws its weights: bounded by 1 / sqrt(in)."""
    torch.manual_seed(0)
    a = LoRALinear(nn.Linear(400, 300), rank=50, alpha=1.0).lora_a
    assert a.abs().max() <= 400**-0.5
    assert abs(float(a.detach().std()) - 400**-0.5 / 3**0.5) < 0.001


@pytest.mark.parametrize("seed", range(3))
def test_at_the_start_nothing_changes(seed):
    model = tiny(seed)
    before = model(IDS, pixels())
    add_lora(model, rank=4, alpha=8)
    torch.testing.assert_close(model(IDS, pixels()), before, rtol=0, atol=0)


def test_only_a_and_b_learn_and_they_are_counted():
    model = tiny()
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    sides = [
        m.in_features + m.out_features for n, m in model.decoder.blocks.named_modules() if isinstance(m, nn.Linear)
    ]
    names = add_lora(model, rank=4, alpha=8)
    assert len(names) == 2 * len(sides) == 2 * len(TARGETS) * CONFIG.text.layers
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(learning) == names and all(name.endswith(("lora_a", "lora_b")) for name in names)
    assert sum(p.numel() for p in learning.values()) == 4 * sum(sides)
    text = CONFIG.text
    budget = lora_budget(text.width, text.kv_heads * text.head_dim, text.mlp_width, text.layers, 4)
    full = sum(p.numel() for p in tiny().decoder.blocks.parameters() if p.dim() == 2)
    assert budget == (4 * sum(sides), full, 32 * sum(sides), 8 * full)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # after the first step only B has moved: with B = 0 the gradient of A is 0
        model(IDS, pixels()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    now = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    for name, value in frozen.items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=0)
    assert all(bool(layer.lora_b.abs().sum() > 0) for _, layer in lora_layers(model))


def test_the_first_gradient_reaches_b_alone():
    layer = LoRALinear(nn.Linear(5, 7), rank=2, alpha=4)
    layer(torch.randn(3, 5)).square().sum().backward()
    assert layer.lora_b.grad.abs().sum() > 0 and layer.lora_a.grad.abs().sum() == 0 and layer.weight.grad is None


def test_merged_equals_unmerged():
    model = wide(add_and_return(tiny(), rank=3, alpha=7))
    want = model(IDS, pixels())
    assert (want - tiny()(IDS, pixels())).abs().max() > 0.1, "the test would not see LoRA"
    names = merge_lora(model)
    assert len(names) == len(TARGETS) * CONFIG.text.layers and not has_lora(model)
    torch.testing.assert_close(model(IDS, pixels()), want, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == set(tiny().state_dict()), "a merged model is a plain one"
    assert not any(p.requires_grad for p in model.parameters())


def add_and_return(model, **options):
    add_lora(model, **options)
    return model


def test_merging_leaves_the_layer_alone():
    layer = LoRALinear(nn.Linear(5, 7), rank=2, alpha=4)
    nn.init.normal_(layer.lora_b)
    weight, x = layer.weight.clone(), torch.randn(3, 5)
    merged = merged_linear(layer)
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight, weight) and merged.weight.data_ptr() != layer.weight.data_ptr()


def test_dropout_only_while_training_and_only_on_the_update():
    layer = LoRALinear(nn.Linear(50, 50), rank=50, alpha=50, dropout=0.25)
    with torch.no_grad():
        layer.lora_a.copy_(torch.eye(50))
        layer.lora_b.copy_(torch.eye(50))
    x = torch.randn(40, 50)
    update = layer.train()(x) - layer.base(x)
    dropped = update.abs() < 1e-6
    assert 0.2 < dropped.float().mean() < 0.3
    torch.testing.assert_close(update, torch.where(dropped, 0.0, x / 0.75), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x), layer.base(x) + x, rtol=1e-4, atol=1e-5)


def test_float32_beside_bfloat16():
    """Small steps survive in float32; the layer computes in the base's dtype and merges with one rounding."""
    model = tiny().bfloat16()
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    wide(model)
    want = model(IDS, pixels().bfloat16())
    assert want.dtype == torch.bfloat16
    layer = model.decoder.blocks[0].mlp.up
    exact = layer.weight.double() + layer.scale * layer.lora_b.double() @ layer.lora_a.double()
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (model.decoder.blocks[0].mlp.up.weight.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_state_goes_to_another_model_and_into_a_file(tmp_path):
    from safetensors.torch import load_file, save_file

    one = wide(add_and_return(tiny(), rank=3, alpha=7))
    save_file(lora_state(one), tmp_path / "lora.safetensors")
    other = add_and_return(tiny(), rank=3, alpha=7)
    load_lora(other, load_file(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(other(IDS, pixels()), one(IDS, pixels()), rtol=0, atol=0)


def test_names_fit_the_training_stage():
    """What add_lora returns names exactly the learning parameters for `freeze_all_but`, the bridge beside them."""
    model = tiny()
    names = add_lora(model, rank=2, alpha=4)
    learning = freeze_all_but(model, [*names, "bridge."])
    assert set(learning) == {*names, *(f"bridge.{n}" for n, _ in model.bridge.named_parameters())}
    groups = parameter_groups(model, Stage("s", tuple(names), steps=1, batch=1, lr=1e-3, lrs=(("bridge.", 2e-5),)))
    assert {group["peak"] for group in groups} == {1e-3, 2e-5}


def test_a_decoder_alone_and_chosen_targets():
    torch.manual_seed(0)
    decoder = Decoder(CONFIG.text)
    names = add_lora(decoder, rank=2, alpha=4, targets=("query", "value"))
    assert {name.split(".")[-2] for name in names} == {"query", "value"}
    llava = tiny()
    assert all(name.startswith("decoder.") for name in add_lora(llava, rank=2, alpha=4, targets=("out",)))
    llava = tiny()
    names = add_lora(llava, rank=2, alpha=4, targets=("fc1",), inside="vision")
    assert names and all(name.startswith("vision.") for name in names)


def test_the_mode_stays():
    model = tiny().train()
    add_lora(model, rank=2, alpha=4, dropout=0.5)
    assert all(module.training for module in model.modules())
    merge_lora(model.eval())
    assert not any(module.training for module in model.modules())


BAD = {
    "rank 0": (lambda m: add_lora(m, rank=0, alpha=1), "rank is 0", "at least 1"),
    "rank too large": (lambda m: add_lora(m, rank=9, alpha=1), "rank is 9", "at most rank 8"),
    "alpha 0": (lambda m: add_lora(m, rank=2, alpha=0), "alpha is 0", "above 0"),
    "dropout 2": (lambda m: add_lora(m, rank=2, alpha=1, dropout=2), "dropout is 2", "0 to 1"),
    "no such target": (lambda m: add_lora(m, rank=2, alpha=1, targets=("q_proj",)), "q_proj", "query"),
    "a word for targets": (lambda m: add_lora(m, rank=2, alpha=1, targets="query"), "'query'", "tuple"),
    "no linear layer": (lambda m: add_lora(m, rank=2, alpha=1, targets=("mlp",)), "is a SwiGLU", "nn.Linear"),
    "nothing to merge": (merge_lora, "0 LoRA layers", "at least 1"),
    "nothing to save": (lora_state, "0 LoRA layers", "at least 1"),
    "a plain layer": (lambda m: merged_linear(nn.Linear(2, 2)), "is a Linear", "LoRALinear"),
    "LoRA of LoRA": (
        lambda m: LoRALinear(LoRALinear(nn.Linear(4, 4), rank=1, alpha=1), rank=1, alpha=1),
        "is a LoRALinear",
        "nn.Linear",
    ),
    "width": (lambda m: LoRALinear(nn.Linear(4, 5), rank=1, alpha=1)(torch.ones(2, 5)), "= 5", "expected 4"),
    "budget": (lambda m: lora_budget(4, 4, 4, 0, 1), "layers is 0", "at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, *words = BAD[case]
    with pytest.raises(ValueError) as error:
        call(tiny())
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_twice_and_merging_twice():
    model = add_and_return(tiny(), rank=2, alpha=4)
    with pytest.raises(ValueError, match="14 LoRA layers already"):
        add_lora(model, rank=2, alpha=4)
    merge_lora(model)
    with pytest.raises(ValueError, match="was it merged"):
        merge_lora(model)


def test_a_refused_call_changes_nothing():
    model = tiny()
    with pytest.raises(ValueError, match="at most rank"):
        add_lora(model, rank=9, alpha=1)
    assert not has_lora(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("decoder.blocks.0.attention.key.lora_a"), "is missing"),
        (lambda s: s.update({"x.lora_a": torch.ones(1)}), "x.lora_a is unknown"),
        (lambda s: s.update({"decoder.blocks.0.mlp.up.lora_a": torch.ones(3, 16)}), "[3, 16], expected [2, 16]"),
        (lambda s: s.update({"decoder.blocks.0.mlp.up.scale": torch.tensor(1.0)}), "is 1, expected 2"),
    ],
    ids=["missing", "unknown", "shape", "scale"],
)
def test_a_state_of_other_layers_is_refused(change, words):
    model = add_and_return(tiny(), rank=2, alpha=4)
    state = copy.copy(lora_state(model))
    change(state)
    with pytest.raises(ValueError) as error:
        load_lora(model, state)
    assert words in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("seed", range(3))
def test_parity_with_peft(seed):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    plain = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4, bias=False))
    ours = copy.deepcopy(plain).eval()
    theirs = get_peft_model(plain, LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], lora_dropout=0.3)).eval()
    add_lora(ours, rank=3, alpha=5, targets=("0", "2"), dropout=0.3)
    wide(ours, seed)
    with torch.no_grad():
        for (_, layer), index in zip(lora_layers(ours), (0, 2), strict=True):
            peer = theirs.base_model.model[index]
            peer.lora_A["default"].weight.copy_(layer.lora_a)
            peer.lora_B["default"].weight.copy_(layer.lora_b)
    x = torch.randn(5, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    merge_lora(ours)
    torch.testing.assert_close(ours(x), theirs.merge_and_unload()(x), rtol=1e-5, atol=1e-6)
