"""The measurements of chapter 1 on data whose answer is known, without trained weights."""

import pytest
import torch

from vlm_course import encoder_study
from vlm_course.contrastive import ContrastiveModel, TextTower, TextTowerConfig
from vlm_course.vit import VisionTransformer, ViTConfig


def test_ridge_finds_a_linear_map_and_its_offset():
    x = torch.randn(200, 5, dtype=torch.float64)
    y = x @ torch.randn(5, 2, dtype=torch.float64) + torch.tensor([3.0, -1.0])
    read = encoder_study.ridge(x[:100], y[:100], 1e-9)(x[100:])
    torch.testing.assert_close(read, y[100:], rtol=0, atol=1e-6)
    shrunk = encoder_study.ridge(x[:100], y[:100], 1e9)(x[100:])
    torch.testing.assert_close(shrunk, y[:100].mean(0).expand_as(shrunk), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"n = 4 .*expected 5"):
        encoder_study.ridge(torch.randn(5, 2), torch.randn(4, 1), 1.0)


def test_vectors_that_hold_the_place_are_read_and_others_are_not():
    objects = encoder_study.lone_objects(60, seed=1)
    assert objects.scenes.count.tolist() == [1] * 60
    noise = torch.randn(60, 6)
    told = torch.cat([noise, 0.1 * objects.centre], dim=1)
    blind = encoder_study.error_of_the_mean(objects.centre, train=40)
    assert encoder_study.error_of_vectors(told, objects.centre, train=40, penalty=1e-6) < 0.5
    assert encoder_study.error_of_vectors(noise, objects.centre, train=40) > 0.7 * blind


def test_tokens_that_mark_the_object_give_its_place_to_a_part_of_a_patch():
    objects = encoder_study.lone_objects(40, seed=2)
    inside = objects.inside(8)  # [B, N]
    assert inside.any(1).all() and not inside.all(1).any()
    tokens = torch.stack([inside.float(), torch.randn(inside.shape)], dim=-1)
    assert encoder_study.error_of_tokens(tokens, objects, train=20, patch_size=8) < 3
    mixed = tokens[:, torch.randperm(144)]  # the same tokens at other places
    assert encoder_study.error_of_tokens(mixed, objects, train=20, patch_size=8) > 15


def tiny_clip():
    text = TextTowerConfig(vocab_size=9, width=8, layers=1, heads=2, mlp_width=16, max_length=5, eos_id=2)
    return ContrastiveModel(VisionTransformer(ViTConfig(8, 4, 12, 3, 2, 24)), TextTower(text), embed_dim=6).eval()


def test_state_gradients_are_those_of_the_whole_model(redraw):
    model = redraw(tiny_clip())
    pixels, ids = torch.randn(4, 3, 8, 8), torch.tensor([[1, 3, 2], [1, 4, 2], [1, 5, 2], [1, 6, 2]])
    found = encoder_study.state_gradients(model, pixels, ids)
    assert all(parameter.grad is None for parameter in model.parameters())
    caught = []
    for block in model.vision.blocks:
        block.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    from vlm_course.contrastive import contrastive_loss

    loss = contrastive_loss(model(pixels, ids))
    for gradient, known in zip(torch.autograd.grad(loss, caught), found, strict=False):
        assert gradient[:, 1:].norm().item() == pytest.approx(known.patches, rel=1e-4)
        assert gradient[:, 0].norm().item() == pytest.approx(known.class_token, rel=1e-4)
    assert len(found) == 4 and found[-1].patches == 0 and found[-1].class_token > 0


def test_recall_counts_both_directions():
    similarity = torch.tensor([[2.0, 1.0, 0.0], [3.0, 2.5, 0.0], [0.0, 0.0, 1.0]])
    assert encoder_study.recall_at_one(similarity) == pytest.approx((2 / 3, 2 / 3))
    with pytest.raises(ValueError, match="captions = 2"):
        encoder_study.recall_at_one(torch.zeros(3, 2))


def test_exchanging_touches_one_property_of_the_two_objects():
    from vlm_course.worlds.scenes import sample

    scenes = sample(20, generator=torch.Generator().manual_seed(3), objects=(2, 2))
    swapped, rows = encoder_study.exchanged(scenes, "colour")
    assert 0 < len(rows) <= 20
    for row in range(20):
        before, after = ([words.split() for words in world.describe(row)] for world in (scenes, swapped))
        assert [words[1] for words in after] == [words[1] for words in before][::-1]
        assert [words[::2] for words in after] == [words[::2] for words in before]
        assert (row in rows.tolist()) == (after != before)
    moved, rows = encoder_study.exchanged(scenes, "place")
    assert all(moved.describe(row) == scenes.describe(row)[::-1] for row in range(20))
    assert torch.equal(moved.cell, scenes.cell) and len(rows) > 15
    with pytest.raises(ValueError, match="expected 2"):
        encoder_study.exchanged(sample(2, generator=torch.Generator().manual_seed(3), objects=(3, 3)), "size")


def test_objects_are_named_as_the_training_captions_name_them():
    from vlm_course.tokenizer import WordTokenizer
    from vlm_course.worlds.dialogs import Dialogs
    from vlm_course.worlds.scenes import sample

    tokenizer = WordTokenizer.small()
    scenes = sample(12, generator=torch.Generator().manual_seed(4))
    for row, ids in enumerate(Dialogs(tokenizer).contrastive_texts(scenes)):
        assert " ".join(encoder_study.placed_objects(scenes, row)) == tokenizer.decode(ids)
