"""Whatever a learner types: one clear sentence on standard error, exit code 2, no traceback, nothing loaded for it."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from vlm_course import ask

QUESTION = "what color is the circle?"


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (96, 96), "white").save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def assert_one_sentence(text: str) -> None:
    text = text.strip()
    assert text
    assert "\n" not in text
    assert "Traceback" not in text
    assert text.endswith(".")
    assert len(text) < 400


def bad_images(folder):
    (folder / "text.png").write_text("hello\n" * 100)
    (folder / "empty.png").write_bytes(b"")
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:2000])
    return [folder / "missing.png", folder, folder / "text.png", folder / "empty.png", folder / "cut.png", ""]


def test_bad_images(tmp_path, capsys):
    for path in bad_images(tmp_path):
        assert ask.main(path, QUESTION) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert_one_sentence(err)


@pytest.mark.parametrize(
    "question", ["", "  ", "circle " * 10_000, "how many people are there?", "what is the texture of the circle"]
)
def test_bad_questions(image, capsys, question):
    assert ask.main(image, question) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_sentence(err)


def test_bad_targets_of_boxes(image, tmp_path, capsys):
    for target in (tmp_path / "no_such_folder" / "out.png", tmp_path / "out.docx", tmp_path / "out", image):
        assert ask.main(image, QUESTION, boxes=target) == 2
        assert_one_sentence(capsys.readouterr().err)
    with Image.open(image) as unharmed:
        assert unharmed.size == (96, 96)


def test_json_has_the_same_keys_for_an_error(image, capsys):
    assert ask.main(image, "who drew this?", json=True) == 2
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(out)
    assert list(report) == list(ask.Outcome.__dataclass_fields__)
    assert report["answer"] is None
    assert_one_sentence(report["error"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to know the memory in use")
def test_the_program_itself(tmp_path):
    """Through the command line, with 400 MB left to the process once torch is imported: 30,000 x 30,000 needs 900."""
    image = tmp_path / "huge.pgm"
    image.write_bytes(b"P5 30000 30000 255\n" + bytes(1000))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    code = """
import resource, sys, torch
from pathlib import Path
from vlm_course.cli import main

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
main()
"""
    for arguments in ([str(image), QUESTION], [str(tmp_path / "missing.png"), QUESTION], [str(image), "x " * 10_000]):
        command = [sys.executable, "-c", code, "ask", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert result.returncode == 2, result.stderr
        assert_one_sentence(result.stderr)
        assert result.stdout == ""
