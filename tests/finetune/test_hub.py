"""Names of the hub: what its cache holds is found, what cannot be had is said in a sentence. Nothing is downloaded."""

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from vlm_course.cli import app
from vlm_course.finetune import command, hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which is switched off."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put(cache, folder: str, name: str, text: str):
    """As the hub's library lays files out: a name, and the snapshot that it stands for."""
    snapshot = cache / folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    (cache / folder / "refs").mkdir(exist_ok=True)
    (cache / folder / "refs" / "main").write_text("a" * 40)
    (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
    (snapshot / name).write_text(text)
    return snapshot / name


def test_what_names_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    names = ("llava-hf/llava-1.5-7b-hf", "mine/model", "small", "/a/b", "~/model", "a/b/c", "./a")
    assert [name for name in names if hub.is_checkpoint(name)] == ["llava-hf/llava-1.5-7b-hf"]


def test_what_the_cache_holds_needs_no_network(cache):
    config = put(cache, "models--me--model", "config.json", "{}")
    assert hub.checkpoint("me/model") == config.parent
    file = put(cache, "datasets--me--talk", "parts/one.json", "[]")
    assert hub.records("hub:me/talk/parts/one.json") == file


@pytest.mark.parametrize("fetch, name", [(hub.checkpoint, "me/model"), (hub.records, "hub:me/talk/one.json")])
def test_what_cannot_be_had_is_one_sentence(cache, fetch, name):
    with pytest.raises(ValueError, match=f"^{name} cannot be fetched, since HF_HUB_OFFLINE forbids the hub: name a"):
        fetch(name)


def test_a_name_of_another_form():
    for name in ("hub:me/one.json", "hub:me/talk/one.txt", "me/talk/one.json"):
        with pytest.raises(ValueError, match=r"expected hub:owner/name/file\.json"):
            hub.records(name)


def test_the_command_says_it_without_a_traceback(cache, tmp_path):
    with pytest.raises(ValueError, match="me/model cannot be fetched"):
        command.load_model("me/model")
    data = ["--data", "hub:me/talk/one.json", "--out", str(tmp_path / "run"), "--device", "cpu"]
    alone = CliRunner().invoke(app, ["finetune", *data])
    assert isinstance(alone.exception, ValueError) and "give the folder" in str(alone.exception)
    beside = CliRunner().invoke(app, ["finetune", *data, "--images", str(tmp_path)])
    assert "one.json cannot be fetched" in str(beside.exception)
