"""The published layout: transformers loads what we save, we load it back, and a crash leaves nothing half."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlm_course.bridges import LinearBridge
from vlm_course.convert import llava as convert
from vlm_course.decoder import DecoderConfig
from vlm_course.finetune import published, smollm
from vlm_course.finetune.lora import add_lora, merge_lora
from vlm_course.finetune.tokenizers import ChatMLAdapter, for_small, for_smollm
from vlm_course.llava import LLAVA_7B, Llava, LlavaConfig
from vlm_course.pretrained import load_small
from vlm_course.vit import ViTConfig

TINY = LlavaConfig(
    vision=ViTConfig(image_size=32, patch_size=8, width=24, layers=3, heads=4, mlp_width=64),
    text=DecoderConfig(
        vocab_size=320, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48, rope_theta=500.0, norm_eps=1e-3
    ),
    image_id=300,
)
TIED = replace(TINY, text=replace(TINY.text, tie_embeddings=True))


def inputs(config):
    ids = torch.tensor([[1, 5] + [config.image_id] * config.visual_tokens + [7, 9, 11]])
    return ids, torch.randn(1, 3, *config.vision.image_hw, generator=torch.Generator().manual_seed(3))


def logits(model, config):
    ids, pixels = inputs(config)
    with torch.no_grad():
        if isinstance(model, Llava):
            return model(ids, pixels)
        return model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", [10**9, 40_000], ids=["one file", "shards"])
def test_transformers_loads_it_with_equal_logits_and_so_do_we(config, shard, redraw, tmp_path):
    model = redraw(Llava(config))
    folder = published.save_published(model, tmp_path / "out", max_shard_bytes=shard)
    names = sorted(file.name for file in folder.glob("model*"))
    if shard == 10**9:
        assert names == ["model.safetensors"]
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(names) == 1 + len(set(index["weight_map"].values())) > 3
        assert names[0] == f"model-00001-of-{len(names) - 1:05}.safetensors"
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
        assert all((folder / name).stat().st_size < 2 * shard for name in names)
    theirs, loading = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    torch.testing.assert_close(logits(theirs.eval(), config), logits(model, config), atol=1e-5, rtol=1e-5)
    ours = convert.load_llava(folder)
    assert torch.equal(logits(ours, config), logits(model, config))
    assert (ours.decoder.head.weight is ours.decoder.token_embedding.weight) == config.text.tie_embeddings


def test_what_transformers_saves_is_read_too(redraw, tmp_path):
    model = redraw(Llava(TIED))
    convert.as_transformers(model).save_pretrained(tmp_path, max_shard_size="60KB")
    assert torch.equal(logits(convert.load_llava(tmp_path), TIED), logits(model, TIED))


def test_the_names_are_those_of_the_hub(redraw):
    names = published.published_state(redraw(Llava(TINY)))
    for name in (
        "language_model.model.layers.2.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.bias",
        "vision_tower.vision_model.pre_layrnorm.weight",
    ):
        assert name in names, name


def test_another_precision(redraw, tmp_path):
    model = redraw(Llava(TINY))
    folder = published.save_published(model, tmp_path / "half", dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.lm_head.weight, model.decoder.head.weight.bfloat16())


class TestSmolLM:
    @pytest.fixture
    def model(self, tiny_smollm):
        torch.manual_seed(0)
        return smollm.smollm_llava(load_small(), folder=tiny_smollm)

    def test_the_whole_of_path_two_goes_there_and_back(self, model, tiny_smollm, tmp_path):
        adapter = for_smollm(tiny_smollm)
        folder = published.save_published(model, tmp_path / "out", adapter=adapter)
        theirs = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        torch.testing.assert_close(logits(theirs, model.config), logits(model, model.config), atol=1e-4, rtol=1e-4)
        ours, again = published.load_published(folder)
        assert isinstance(again, ChatMLAdapter)
        assert torch.equal(logits(ours, model.config), logits(model, model.config))
        assert theirs.config.text_config.eos_token_id == adapter.eos_id == theirs.generation_config.eos_token_id

    def test_the_processor_writes_the_prompt_that_was_trained(self, model, tiny_smollm, tmp_path):
        adapter = for_smollm(tiny_smollm)
        processor = AutoProcessor.from_pretrained(
            published.save_published(model, tmp_path / "out", adapter=adapter), use_fast=True
        )
        talk = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a star"}]},
            {"role": "user", "content": [{"type": "text", "text": "what color?"}]},
        ]
        text = processor.apply_chat_template(talk, add_generation_prompt=True)
        given = processor(images=Image.new("RGB", (96, 96), (255, 0, 51)), text=text, return_tensors="pt")
        ids, _ = adapter.encode_chat([("what is it?", "a star"), ("what color?", None)], 144)
        assert given["input_ids"][0].tolist() == ids
        torch.testing.assert_close(given["pixel_values"][0, :, 0, 0], torch.tensor([1.0, -1.0, -0.6]))

    def test_files_beside_the_weights_can_be_taken_over(self, model, tiny_smollm, tmp_path):
        first = published.save_published(model, tmp_path / "first", adapter=for_smollm(tiny_smollm))
        second = published.save_published(model, tmp_path / "second", like=first)
        beside = {file.name for file in first.iterdir()} - {"config.json", "model.safetensors"}
        assert beside and all((second / name).read_bytes() == (first / name).read_bytes() for name in beside)

    def test_the_courses_words_have_no_processor(self, tmp_path):
        folder = published.save_published(load_small().model, tmp_path / "out", adapter=for_small())
        assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_merged_lora_is_saved_and_unmerged_is_refused(redraw, tmp_path):
    model = redraw(Llava(TINY))
    add_lora(model, rank=2, alpha=4)
    with pytest.raises(ValueError, match="merge_lora first"):
        published.save_published(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_lora(model)
    published.save_published(model, tmp_path / "out")


class TestRandomFolder:
    def test_it_loads_everywhere(self, tmp_path):
        folder = published.random_checkpoint(TINY, tmp_path / "r", max_shard_bytes=30_000, dtype=torch.float32)
        model, adapter = published.load_published(folder)
        assert adapter.image_id == TINY.image_id and adapter.eos_id == 2
        theirs = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        torch.testing.assert_close(logits(theirs, TINY), logits(model, TINY), atol=1e-5, rtol=1e-5)
        assert model.config == TINY
        assert 0.018 < model.decoder.head.weight.std().item() < 0.022
        assert (model.decoder.norm.weight == 1).all() and (model.bridge.mlp[0].bias == 0).all()
        assert not torch.equal(model.decoder.blocks[0].mlp.up.weight, model.decoder.blocks[1].mlp.up.weight)
        assert adapter.decode(adapter.encode("café <image> 星")) == "café <image> 星"
        ids, _ = adapter.encode_chat([("what?", "that")], TINY.visual_tokens)
        assert ids.count(TINY.image_id) == TINY.visual_tokens and max(ids) < TINY.text.vocab_size

    def test_the_same_seed_gives_the_same_bytes(self, tmp_path):
        def folder(name, seed):
            return published.random_checkpoint(TINY, tmp_path / name, seed=seed) / "model.safetensors"

        assert folder("a", 0).read_bytes() == folder("b", 0).read_bytes() != folder("c", 1).read_bytes()

    def test_it_never_holds_more_than_a_shard(self, tmp_path, monkeypatch):
        from safetensors import torch as files

        held = []
        save = files.save_file
        monkeypatch.setattr(files, "save_file", lambda tensors, *a, **k: held.append(
            sum(t.nbytes for t in tensors.values())) or save(tensors, *a, **k))  # fmt: skip
        published.random_checkpoint(TINY, tmp_path / "r", max_shard_bytes=30_000)
        assert len(held) > 3 and max(held) <= 30_000

    def test_the_real_layout_has_the_real_size(self):
        with torch.device("meta"):
            state = published.published_state(Llava(LLAVA_7B))
        assert len(state) == 686
        assert sum(t.numel() for t in state.values()) == 7_063_427_072

    def test_a_vocabulary_too_small_for_bytes(self):
        with pytest.raises(ValueError, match="no room for 256 bytes"):
            published.byte_adapter(replace(TINY, text=replace(TINY.text, vocab_size=100), image_id=99))


class TestWhole:
    def test_what_is_there_stays_unless_told(self, redraw, tmp_path):
        model = redraw(Llava(TINY))
        published.save_published(model, tmp_path / "out")
        with pytest.raises(FileExistsError, match="replace=True"):
            published.save_published(model, tmp_path / "out")
        published.save_published(redraw(model, seed=2), tmp_path / "out", replace=True)
        assert torch.equal(logits(convert.load_llava(tmp_path / "out"), TINY), logits(model, TINY))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_crash_leaves_the_old_one(self, redraw, tmp_path, monkeypatch):
        model = redraw(Llava(TINY))
        published.save_published(model, tmp_path / "out")
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        monkeypatch.setattr(published, "_write", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            published.save_published(redraw(model, seed=2), tmp_path / "out", replace=True)
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestErrors:
    def test_another_bridge(self, tmp_path):
        config = replace(TINY, bridge="linear")
        with pytest.raises(ValueError, match="weights are missing"):
            published.save_published(Llava(config), tmp_path / "out")
        assert isinstance(Llava(config).bridge, LinearBridge)

    def test_no_config(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            published.load_published(tmp_path)

    def test_a_missing_shard(self, tmp_path):
        folder = published.random_checkpoint(TINY, tmp_path / "r", max_shard_bytes=30_000)
        sorted(folder.glob("model-*"))[1].unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks 1 of \d+ weight files \(model-00002"):
            published.load_published(folder)

    def test_no_weights(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no \.safetensors"):
            published.check_complete(tmp_path)

    def test_a_tokenizer_of_another_model(self, tmp_path):
        folder = published.random_checkpoint(TINY, tmp_path / "r")
        config = json.loads((folder / "config.json").read_text())
        key = next(name for name in ("image_token_index", "image_token_id") if name in config)
        (folder / "config.json").write_text(json.dumps(config | {key: 299}))
        with pytest.raises(ValueError, match=r"<image> is 300 in the tokenizer .* and 299"):
            published.load_published(folder)
