"""`vlm-course lab` and `update`: what they write into work/, and what they leave alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from vlm_course import lab

CHAPTERS = ("00_two_modalities.ipynb", "02_projection_bridge.ipynb")


def notebook(text):
    cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": text}
    return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def root(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in CHAPTERS:
        (tmp_path / "notebooks" / name).write_text(notebook("first edition"))
    return tmp_path


def publish(root, text, name=CHAPTERS[0]):
    (root / "notebooks" / name).write_text(notebook(text))


def copy_of(root, name=CHAPTERS[0]):
    return root / "work" / name


def visible(root):
    return sorted(path.name for path in (root / "work").iterdir() if not path.name.startswith("."))


def test_first_start_copies_every_notebook(root):
    assert lab.copy_notebooks(root).copied == list(CHAPTERS)
    assert visible(root) == list(CHAPTERS)
    assert copy_of(root).read_bytes() == (root / "notebooks" / CHAPTERS[0]).read_bytes()


def test_second_start_writes_no_notebook(root):
    lab.copy_notebooks(root)
    before = [copy_of(root, name).stat().st_mtime_ns for name in CHAPTERS]
    report = lab.copy_notebooks(root)
    assert (report.copied, report.kept) == ([], list(CHAPTERS))
    assert before == [copy_of(root, name).stat().st_mtime_ns for name in CHAPTERS]
    assert lab.describe(report) == []


@pytest.mark.parametrize("command", [lab.copy_notebooks, lab.update_notebooks])
@pytest.mark.parametrize("lost_record", [False, True])
def test_changed_copy_is_never_written(root, command, lost_record):
    lab.copy_notebooks(root)
    copy_of(root).write_text(notebook("my answers"))
    publish(root, "second edition")
    if lost_record:
        (root / "work" / lab.RECORD).unlink()
    for _ in range(3):
        command(root)
    assert copy_of(root).read_text() == notebook("my answers")


def test_lab_leaves_even_an_untouched_copy_and_says_so(root):
    lab.copy_notebooks(root)
    publish(root, "second edition")
    report = lab.copy_notebooks(root)
    assert report.outdated == [CHAPTERS[0]] == lab.pending_updates(root)
    assert copy_of(root).read_text() == notebook("first edition")
    assert "vlm-course update" in " ".join(lab.describe(report))


def test_update_replaces_an_untouched_copy(root):
    lab.copy_notebooks(root)
    publish(root, "second edition")
    assert lab.update_notebooks(root).replaced == [CHAPTERS[0]]
    assert copy_of(root).read_text() == notebook("second edition")
    assert visible(root) == list(CHAPTERS)
    assert lab.describe(lab.copy_notebooks(root)) == []


def test_update_puts_the_newer_one_beside_a_changed_copy(root):
    lab.copy_notebooks(root)
    copy_of(root).write_text(notebook("my answers"))
    publish(root, "second edition")
    assert lab.update_notebooks(root).beside == ["00_two_modalities.new.ipynb"]
    assert copy_of(root, "00_two_modalities.new.ipynb").read_text() == notebook("second edition")
    assert lab.describe(lab.copy_notebooks(root)) == [], "an edition that was delivered is not announced again"
    publish(root, "third edition")
    assert lab.update_notebooks(root).beside == ["00_two_modalities.new.ipynb"]
    assert copy_of(root, "00_two_modalities.new.ipynb").read_text() == notebook("third edition")


def test_update_does_not_write_over_a_newer_one_that_was_worked_in(root):
    lab.copy_notebooks(root)
    copy_of(root).write_text(notebook("my answers"))
    publish(root, "second edition")
    lab.update_notebooks(root)
    newer = copy_of(root, "00_two_modalities.new.ipynb")
    newer.write_text(notebook("my second answers"))
    publish(root, "third edition")
    report = lab.update_notebooks(root)
    assert report.blocked == [newer.name]
    assert newer.read_text() == notebook("my second answers")
    assert any("rename" in line for line in lab.describe(report))


def test_a_deleted_copy_comes_back(root):
    lab.copy_notebooks(root)
    copy_of(root).unlink()
    assert lab.copy_notebooks(root).copied == [CHAPTERS[0]]


def test_an_interrupted_copy_leaves_no_notebook_behind(root, monkeypatch):
    def full_disk(self, content):
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(lab.Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        lab.copy_notebooks(root)
    monkeypatch.undo()
    assert visible(root) == []
    assert lab.copy_notebooks(root).copied == list(CHAPTERS)


def test_outside_a_checkout_the_error_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "__file__", str(tmp_path / "site-packages" / "vlm_course" / "lab.py"))
    with pytest.raises(lab.LabError, match=re.escape(str(tmp_path))):
        lab.course_root(tmp_path)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"DISPLAY": ":0"}, True),
        ({"WAYLAND_DISPLAY": "w"}, True),
        ({"DISPLAY": ":0", "SSH_CONNECTION": "x"}, False),
    ],
)
def test_display_on_linux(monkeypatch, environment, expected):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert lab.has_display() is expected


@pytest.mark.serial
@pytest.mark.timeout(150)
def test_the_printed_address_serves_chapter_0(root):
    """A real JupyterLab: the address is printed, the copies are served, Ctrl-C ends it with exit code 0."""
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, "-m", "vlm_course", "lab", "--port", "8991"]
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        started, address = time.monotonic(), None
        for line in process.stdout:
            if found := re.search(r"(http://\S+/)lab/tree/00_two_modalities\.ipynb\?token=(\w+)", line):
                address, token = found.groups()
                break
        assert address, "no address was printed"
        assert time.monotonic() - started < 60
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{address}api/contents/?token={token}", timeout=30) as answer:
            names = [entry["name"] for entry in json.load(answer)["content"]]
        assert set(CHAPTERS) <= set(names)
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
    assert code == 0
