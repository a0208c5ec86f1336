"""Every trick beside the plain computation: the loss, every gradient, and fifty steps."""

import itertools
from dataclasses import replace

import pytest
import torch

from vlm_course.attention import block_mask, causal_mask, queries_mask
from vlm_course.decoder import DecoderConfig
from vlm_course.finetune import fast
from vlm_course.finetune.collate import Batch
from vlm_course.finetune.fast import NotFast, Options, chosen, prepare
from vlm_course.finetune.fast_blocks import Map, attend
from vlm_course.finetune.fast_loss import linear_cross_entropy
from vlm_course.finetune.fast_memory import SPARE, blocks_again, kept_per_token
from vlm_course.finetune.fast_optimizer import RoundingAdamW
from vlm_course.finetune.lora import add_lora
from vlm_course.finetune.losses import plain_loss
from vlm_course.llava import LLAVA_7B, Llava, LlavaConfig
from vlm_course.loss import response_loss
from vlm_course.training import freeze_all_but
from vlm_course.vit import ViTConfig

IMAGE = 3


def tiny(*, kv_heads: int = 2, tie: bool = False) -> Llava:
    torch.manual_seed(7)
    config = LlavaConfig(
        vision=ViTConfig(image_size=16, patch_size=8, width=16, layers=3, heads=2, mlp_width=32),
        text=DecoderConfig(
            vocab_size=60, width=32, layers=3, heads=4, kv_heads=kv_heads, mlp_width=48, max_positions=64,
            tie_embeddings=tie,
        ),
        image_id=IMAGE,
    )  # fmt: skip
    model = Llava(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(rows: int = 2, answers: int = 6, seed: int = 0) -> Batch:
    """An image, a question and an answer a row; the second row's answer is shorter."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 59, (rows, 24), generator=draw)
    ids[:, 1:5] = IMAGE
    labels = torch.full_like(ids, -100)
    for row in range(rows):
        labels[row, 24 - answers + row : 24 - row] = ids[row, 24 - answers + row : 24 - row]
    pixels = torch.randn(rows, 3, 16, 16, generator=draw)
    return Batch(ids, labels, pixels)


def packed(seed: int = 0) -> Batch:
    """Rows of three documents with an image each, and padding."""
    one = batch(seed=seed)
    documents = torch.tensor([[0] * 8 + [1] * 9 + [2] * 5 + [-1] * 2, [3] * 12 + [4] * 12])
    positions = torch.cat([torch.arange(n) for n in (8, 9, 5, 2, 12, 12)]).view(2, 24)
    labels = one.ids.clone()
    labels[(one.ids == IMAGE) | (documents < 0) | (positions == 0)] = -100
    return replace(one, labels=labels, positions=positions, documents=documents)


def gradients(model: Llava, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(model: Llava, one, options: Options | None = None, count: float = 10.0) -> None:
    plain = plain_loss(model, one, count)
    wanted = gradients(model, plain)
    prepare(model, options=options or Options())
    quick = fast.loss(model, one, count)
    torch.testing.assert_close(quick, plain, atol=1e-5, rtol=1e-5)
    found = gradients(model, quick)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def learning(mode: str, **options) -> Llava:
    model = tiny(**options)
    if mode == "projector":
        freeze_all_but(model, ("bridge.",))
    elif mode == "lora":
        names = add_lora(model, rank=4, alpha=8)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_b" in name:
                    parameter.normal_(0, 0.1)
        freeze_all_but(model, ("bridge.", *names))
    elif mode == "full":
        freeze_all_but(model, ("bridge.", "decoder."))
    else:
        freeze_all_but(model, ("",))
    return model


@pytest.mark.parametrize("mode", ["projector", "lora", "full", "all"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_loss_and_gradients_equal_the_plain_ones(mode, kv_heads):
    same(learning(mode, kv_heads=kv_heads), batch())


@pytest.mark.parametrize("mode", ["projector", "lora", "full"])
def test_packed_rows(mode):
    same(learning(mode), packed())


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_blocks_computed_again(mode):
    same(learning(mode), batch(), Options(recompute=2))


def test_tied_embeddings_text_alone_and_every_position():
    same(learning("full", tie=True), batch())
    text = batch()
    text = replace(text, pixels=None)
    text.ids[text.ids == IMAGE] = 9
    same(learning("full"), text)
    same(learning("full"), batch(), Options(answers_only=False))
    same(learning("lora"), batch(answers=23))  # nearly all positions: nothing is left out


def test_without_count_the_mean():
    model, one = learning("full"), batch()
    mean = response_loss(model(one.ids, one.pixels), one.labels)
    torch.testing.assert_close(fast.loss(model, one), mean, atol=1e-5, rtol=1e-5)


def test_dropout_of_adapters_falls_on_their_input_alone():
    model = tiny()
    add_lora(model, rank=4, alpha=8, dropout=0.5)
    one = batch()
    prepare(model)
    torch.manual_seed(0)
    assert fast.loss(model, one, 1.0).item() == pytest.approx(plain_loss(model, one, 1.0).item(), rel=1e-5)  # B is zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(0, 0.3)
    drawn = {round(fast.loss(model, one, 1.0).item(), 4) for _ in range(4)}
    assert len(drawn) > 1
    model.eval()
    same(model, one)


def test_packed_documents_do_not_see_each_other():
    model, one = learning("full"), packed()
    prepare(model)
    alone = one.labels.clone()
    alone[one.documents != 1] = -100  # the loss of document 1
    one = replace(one, labels=alone, ids=one.ids.clone())
    before = fast.loss(model, one, 1.0).item()
    one.ids[0, 5:8], one.ids[0, 17:22] = 11, 12  # its neighbours on both sides
    assert fast.loss(model, one, 1.0).item() == pytest.approx(before, abs=1e-6)
    one.ids[0, 9] = 13
    assert abs(fast.loss(model, one, 1.0).item() - before) > 1e-3


@pytest.mark.parametrize("mode", ["projector", "lora", "full"])
def test_fifty_steps_learn_the_same(mode):
    curves = []
    for quick in (False, True):
        model = learning(mode)
        if quick:
            prepare(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for step in range(50):
            one = batch(seed=step % 3)
            value = (fast.loss if quick else plain_loss)(model, one, 10.0)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[0], curves[1], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("tie", [False, True])
def test_steps_inside_the_backward_pass(recompute, tie):
    """No weight is changed while the backward pass still needs it, also where blocks are computed again."""
    ends = []
    for inside in (False, True):
        model = learning("full", tie=tie)
        prepare(model, options=Options(recompute=recompute))
        optimizer = RoundingAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if inside:
            optimizer.in_backward()
        for step in range(3):
            fast.loss(model, batch(seed=step), 10.0).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, msg=name)


def test_blocks_again_follow_what_is_free(monkeypatch):
    maps = {name: Map("full", (1,)) for name in ("qkv", "out", "gate_up", "down")}
    text, weight = LLAVA_7B.text, torch.nn.Parameter(torch.zeros(1000, 1000))
    free = {"bytes": 80e9}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    needed = kept_per_token(text, {name: m.kind for name, m in maps.items()}) * 6144
    assert blocks_again(text, 6144, maps, [weight], torch.device("cpu")) == 0
    free["bytes"] = SPARE + 20.5 * needed + 4e6  # room for 20 blocks beside the gradient
    assert blocks_again(text, 6144, maps, [weight], torch.device("cpu")) == 12
    free["bytes"] = 1e9
    assert blocks_again(text, 6144, maps, [weight], torch.device("cpu")) == 32
    free["bytes"] = 66e9  # long rows need more beside the blocks: 16 of 1,024 tokens failed with 6 GB left alone
    assert blocks_again(text, 16384, maps, [weight], torch.device("cpu")) > 32 - int(
        (66e9 - SPARE) / (needed / 6144 * 16384)
    )
    frozen = dict.fromkeys(maps, "frozen")
    assert kept_per_token(text, frozen) < kept_per_token(text, dict.fromkeys(maps, "lora"), rank=128)


@pytest.mark.parametrize("part", [1, 7, 100])
def test_cross_entropy_in_parts(part):
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(0, 30, (20,))
    targets[::4] = -100
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum") / 5
    expected = torch.autograd.grad(3 * wanted, (hidden, weight))
    found = linear_cross_entropy(hidden, weight, targets, 5, part=part)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(torch.autograd.grad(3 * found, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="shift and flatten"):
        linear_cross_entropy(hidden, weight, targets[1:], 5)


def test_chosen_positions_and_document_ends():
    one = packed()
    rows, targets, lengths = chosen(one.labels, one.documents)
    assert rows is None and targets.shape == one.labels.shape
    ends = torch.tensor([0, 8, 17, 22, 24, 36, 48], dtype=torch.int32)
    assert torch.equal(lengths[:7], ends) and bool((lengths[7:] == 48).all())
    labels = torch.full((2, 100), -100)
    labels[0, 40:50], labels[1, 90:] = 5, 6
    rows, targets, lengths = chosen(labels, None)
    assert rows.shape == (2, 32) and lengths is None
    assert rows[0, :10].tolist() == list(range(39, 49)) and rows[1, :10].tolist() == list(range(89, 99))
    assert (targets != -100).sum(dim=1).tolist() == [10, 10]


def test_sizes_known_before_give_the_same_choice():
    """What a batch knows from the host spares a look at the device; on the way there it is counted once."""
    one = packed()
    moved = one.to("meta")
    starts = 1 + (one.documents[:, 1:] != one.documents[:, :-1]).sum(dim=1)
    learned = (one.labels[:, 1:] != -100).sum(dim=1)
    assert one.sizes is None and moved.sizes == (int(learned.max()), int(starts.sum()))
    for given, asked in zip(
        chosen(one.labels, one.documents, sizes=moved.sizes), chosen(one.labels, one.documents), strict=True
    ):
        assert given is asked is None or torch.equal(given, asked)
    alone = Batch(one.ids, one.labels).to("meta")
    assert alone.sizes == (int(learned.max()), 0) and alone.to("meta").sizes == alone.sizes
    assert moved.part(0, 1).sizes is None


def test_queries_mask_holds_rows_of_the_other_masks():
    queries = torch.tensor([[4, 0, 5], [2, 2, 1]])
    assert torch.equal(queries_mask(queries, 6)[:, 0], causal_mask(6)[queries])
    documents = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, 1, 2, 2]])
    whole = block_mask(documents)[:, 0]
    rows = torch.stack([whole[b, queries[b]] for b in range(2)])
    assert torch.equal(queries_mask(queries, 6, documents=documents)[:, 0], rows)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_by_lengths_is_attention_by_mask(kv_heads):
    """The flat layout that variable-length attention takes, with a loop over documents in the kernel's place."""
    one = packed()
    _, _, lengths = chosen(one.labels, one.documents)
    q = torch.randn(2, 4, 24, 8)
    k, v = (torch.randn(2, kv_heads, 24, 8) for _ in range(2))

    def by_document(q, k, v, lengths, longest):
        assert q.shape == k.shape == v.shape == (48, 4, 8) and longest == 24
        read = torch.empty_like(q)
        for start, end in itertools.pairwise(lengths.tolist()):
            if end > start:
                part = [t[None, start:end].transpose(1, 2) for t in (q, k, v)]
                alone = torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True)
                read[start:end] = alone[0].transpose(0, 1)
        return read

    by_length = attend(q, k, v, None, lengths, by_document)
    by_mask = attend(q, k, v, block_mask(one.documents), None, None)
    real = one.documents >= 0
    torch.testing.assert_close(by_length[real], by_mask[real], atol=1e-5, rtol=1e-5)


def test_the_model_keeps_its_names_and_its_forward():
    model, one = learning("full"), batch()
    names, before = list(model.state_dict()), model(one.ids, one.pixels)
    prepare(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(one.ids, one.pixels), before)


def test_what_it_does_not_know_is_said():
    model = learning("full")
    prepare(model)
    model.decoder.blocks[0].mlp.up.weight.data = model.decoder.blocks[0].mlp.up.weight.data.clone()
    with pytest.raises(ValueError, match=r"2 weights .* call it again"):
        fast.loss(model, batch())
    model = tiny()
    add_lora(model, rank=2, alpha=4, targets=("attention.query",))
    with pytest.raises(NotFast, match="1 of 3 layers"):
        prepare(model)
    assert fast.ready(model) is plain_loss
    with pytest.raises(NotFast, match="expected a Llava"):
        prepare(model.decoder)
