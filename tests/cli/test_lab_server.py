"""Starting and stopping JupyterLab, with a stand-in for the server: what it is told and what is printed."""

import json
import os
import signal
import sys

import pytest

from vlm_course import lab


class Server:
    """Stands for JupyterLab. `on_wait` is called while the course waits for its end."""

    def __init__(self, folder, *, code=0, url="http://127.0.0.1:8888/", dies=False, on_wait=lambda server: None):
        self.folder, self.code, self.url, self.dies, self.on_wait = folder, code, url, dies, on_wait
        self.pid, self.asked, self.command, self.options = 4242, [], None, None

    def __call__(self, command, **options):
        self.command, self.options = command, options
        if self.url:
            (self.folder / f"jpserver-{self.pid}.json").write_text(json.dumps({"url": self.url}))
        return self

    def poll(self):
        return self.code if self.dies else None

    def terminate(self):
        self.asked.append("terminate")

    def kill(self):
        self.asked.append("kill")

    def wait(self):
        self.on_wait(self)
        return self.code


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(server options, arguments of lab.start) -> (exit code, server); the handlers of signals are put back."""
    (tmp_path / "work").mkdir()
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(runtime))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def start(server=None, **arguments):
        server = Server(runtime, **(server or {}))
        monkeypatch.setattr(lab.subprocess, "Popen", server)
        start.server = server
        return lab.start(tmp_path, wait=0.5, **arguments), server

    yield start
    for number, handler in before.items():
        signal.signal(number, handler)


def test_it_opens_chapter_0_in_work_with_a_token_of_its_own(start, tmp_path, capsys):
    code, server = start(browser=False, port=9001)
    assert code == 0
    assert server.command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert f"--ServerApp.root_dir={tmp_path / 'work'}" in server.command
    assert "--no-browser" in server.command and "--port=9001" in server.command
    token = server.options["env"]["JUPYTER_TOKEN"]
    assert len(token) == 48 and server.options["env"]["JUPYTER_PREFER_ENV_PATH"] == "1"
    assert server.options["cwd"] == tmp_path / "work"
    address = f"http://127.0.0.1:8888/lab/tree/00_two_modalities.ipynb?token={token}"
    assert address in capsys.readouterr().out
    _, other = start(browser=True)
    assert other.options["env"]["JUPYTER_TOKEN"] != token
    assert not {"--no-browser"} & set(other.command) and not any(word.startswith("--port") for word in other.command)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="the system has no root")
@pytest.mark.parametrize("user", [0, 1000])
def test_root_is_allowed_only_where_it_is_root(start, monkeypatch, user):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    _, server = start(browser=False)
    assert ("--allow-root" in server.command) == (user == 0)


def test_the_exit_code_is_jupyters_unless_it_was_stopped(start):
    assert start({"code": 7}, browser=False)[0] == 7
    stopped, server = start({"code": -15, "on_wait": lambda server: os.kill(os.getpid(), signal.SIGINT)}, browser=False)
    assert stopped == 0 and server.asked == ["terminate"]


def test_asked_twice_it_waits_no_longer(start):
    def twice(server):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    assert start({"on_wait": twice}, browser=False)[1].asked == ["terminate", "kill"]


@pytest.mark.parametrize("server", [{"url": None}, {"url": None, "dies": True, "code": 1}])
def test_a_server_that_never_answers_is_an_error(start, server):
    with pytest.raises(lab.LabError, match="did not start"):
        start(server, browser=False)
    assert start.server.asked == ["terminate"]


def test_a_half_written_address_is_read_again(start, tmp_path, monkeypatch, capsys):
    """The first read finds half of the file."""
    reads, read_text = [], lab.Path.read_text

    def slowly(self, *args, **kwargs):
        if self.name.startswith("jpserver"):
            reads.append(self)
            if len(reads) == 1:
                return '{"url": "http'
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(lab.Path, "read_text", slowly)
    assert start(browser=False)[0] == 0
    assert len(reads) == 2 and "http://127.0.0.1:8888/lab/tree" in capsys.readouterr().out


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_have_a_display(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    assert lab.has_display()
    monkeypatch.setenv("SSH_CONNECTION", "1.2.3.4 5 6 7")
    assert not lab.has_display()


def test_every_report_is_put_into_words():
    told = lab.describe(lab.Report(copied=["a.ipynb"], beside=["b.new.ipynb"], outdated=["b.ipynb", "c.ipynb"]))
    assert told[0] == "copied into work/: a.ipynb" and told[1].endswith("b.new.ipynb")
    assert "b.ipynb, c.ipynb" in told[2] and "vlm-course update" in told[3]
    blocked = lab.describe(lab.Report(blocked=["b.new.ipynb"], outdated=["b.ipynb"]))
    assert len(blocked) == 1 and "rename it" in blocked[0]
