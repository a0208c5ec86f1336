"""Which path a machine takes: every combination of what it can have, and looking without a network."""

import itertools
import socket
from pathlib import Path

import pytest
import torch

from vlm_course.decoder import DecoderConfig
from vlm_course.finetune import choose, published, smollm
from vlm_course.finetune.choose import HUB, REPO, SMOLLM, Machine, decide, look, said
from vlm_course.llava import LlavaConfig
from vlm_course.vit import ViTConfig

GB = 10**9
TINY = LlavaConfig(
    vision=ViTConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_width=32),
    text=DecoderConfig(vocab_size=320, width=64, layers=2, heads=2, kv_heads=2, mlp_width=96),
    image_id=300,
)
GPUS = {"none": (None, 0, 0), "tiny": ("T", 4 * GB, 1), "small": ("S", 16 * GB, 1), "large": ("L", 80 * GB, 2)}
CHECKPOINTS = {
    "none": (None, 0, False),
    "folder": (Path("/x/7b"), 14 * GB, False),
    "cache": (Path("/h"), 14 * GB, True),
}


@pytest.mark.parametrize(
    ("gpu", "checkpoint", "hub", "small"), list(itertools.product(GPUS, CHECKPOINTS, HUB, SMOLLM))
)  # fmt: skip
def test_every_combination(gpu, checkpoint, hub, small):
    name, memory, count = GPUS[gpu]
    folder, size, cached = CHECKPOINTS[checkpoint]
    machine = Machine(name, memory, count, folder, size, cached, hub, small)
    choice = decide(machine)
    source = folder is not None or hub == "reachable"
    if gpu == "large" and source:
        expected = 1
    elif gpu in ("small", "large") and small in ("package", "cache"):
        expected = 2
    else:
        expected = 3
    assert choice.path == expected
    assert choice.model == {1: str(folder) if folder else REPO, 2: "SmolLM2", 3: "small"}[expected]
    text = said(machine, choice)
    assert f"Path {expected} of 3" in text and len(text.splitlines()) <= 7 and "None" not in text
    assert str(folder) not in text
    assert (choice.path == 1 or gpu == "none") == (not choice.instead), (
        "another path says what would open an earlier one"
    )


def test_full_where_the_memory_holds_it():
    def mode(memory):
        return decide(Machine("G", memory, 1, Path("x"), 14 * GB)).mode

    assert (mode(40 * GB), mode(80 * GB)) == ("lora", "full")


def test_a_small_checkpoint_needs_a_small_gpu():
    assert decide(Machine("G", 8 * GB, 1, Path("x"), GB)).path == 1


def test_what_a_machine_cannot_have():
    with pytest.raises(ValueError, match="hub"):
        Machine(hub="perhaps")
    with pytest.raises(ValueError, match="smollm"):
        Machine(smollm="perhaps")
    with pytest.raises(ValueError, match="gpus"):
        Machine(gpus=-1)


class TestLooking:
    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch, tmp_path):
        """Any attempt to reach another machine fails the test."""

        def refuse(*_, **__):
            pytest.fail("the network was touched")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("VLM_COURSE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(smollm, "PACKAGE", "no_such_package_xyz")
        import huggingface_hub.constants as constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def test_a_bare_machine(self):
        machine = look()
        assert machine == Machine()
        assert said(machine, decide(machine)).startswith("GPU         no GPU")

    def test_the_hub_is_left_alone_when_it_is_forbidden(self, monkeypatch):
        for value in ("1", "true", "ON"):
            monkeypatch.setenv("HF_HUB_OFFLINE", value)
            assert look(hub=True).hub == "offline"

    def test_the_hub_is_asked_when_named(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(choose, "_reachable", lambda: True)
        assert look(hub=True).hub == "reachable"
        monkeypatch.setattr(choose, "_reachable", lambda: False)
        assert look(hub=True).hub == "not reachable"
        assert look().hub == "not asked"

    def test_no_answer_is_no_hub(self, monkeypatch):
        import huggingface_hub

        def down(*_, **__):
            raise OSError("no route")

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", down)
        assert choose._reachable() is False
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
        assert choose._reachable() is True

    def test_a_gpu_is_named(self, monkeypatch):
        properties = type("P", (), {"name": "NVIDIA Test", "total_memory": 80 * 2**30})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        machine = look()
        assert (machine.gpu, machine.gpus) == ("NVIDIA Test", 2)
        assert "NVIDIA Test, 80 GiB, 2 of them" in said(machine, decide(machine))

    def test_a_folder(self, tmp_path):
        folder = published.random_checkpoint(TINY, tmp_path / "mine", max_shard_bytes=30_000)
        machine = look(folder)
        assert machine.checkpoint == folder and not machine.cached
        assert machine.checkpoint_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 10**5
        sorted(folder.glob("*.safetensors"))[0].unlink()
        with pytest.raises(FileNotFoundError, match="lacks 1 of"):
            look(folder)

    def test_a_folder_that_is_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            look(tmp_path)

    def test_the_hubs_cache(self, tmp_path):
        snapshot = tmp_path / "hub" / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "abc"
        published.random_checkpoint(TINY, snapshot, max_shard_bytes=30_000)
        refs = snapshot.parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text("abc")
        machine = look()
        assert machine.cached and machine.checkpoint is not None and machine.checkpoint.name == "abc"
        assert "the hub's cache" in said(machine, decide(machine))
        sorted(snapshot.glob("*.safetensors"))[0].unlink()
        assert look().checkpoint is None, "half a download is none"

    def test_smollm(self, tmp_path, monkeypatch):
        package = tmp_path / "site" / "hollow_smollm"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / smollm.FILE).touch()
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.setattr(smollm, "PACKAGE", "hollow_smollm")
        assert look().smollm == "package"
        import importlib.util

        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else found(name, *a))
        assert look().smollm == "package without gguf"
        (tmp_path / "cache" / f"smollm2-{smollm.SHA256[:12]}").mkdir(parents=True)
        assert look().smollm == "cache"
