"""Notebooks cannot leave the machine; the canary tries to, and would be noticed if it succeeded."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def load(path: Path, name: str):
    """A module of the tests by its file, whatever folder pytest runs in."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load(HERE / "run.py", "notebook_runner")


def canary(environment):
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "canary.ipynb"
        copy.write_text(run.CANARY.read_text(encoding="utf-8"), encoding="utf-8")
        return subprocess.run(run.nbval_command([copy]), env=environment, capture_output=True, text=True)


def test_the_canary_is_refused(tmp_path):
    result = canary(run.offline_environment(tmp_path))
    assert result.returncode == 0 and "4 passed" in result.stdout, result.stdout


def test_without_the_hook_the_canary_fails(tmp_path):
    environment = run.offline_environment(tmp_path)
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    result = canary(environment)
    assert result.returncode == 1 and "2 failed, 2 passed" in result.stdout, result.stdout


@pytest.mark.skipif(not run.namespace_works(), reason="this system does not allow an unprivileged network namespace")
def test_the_namespace_has_loopback_only():
    code = (
        "import json, socket; server = socket.create_server(('127.0.0.1', 0)); "
        "socket.create_connection(server.getsockname(), timeout=2); print(json.dumps(socket.if_nameindex()))"
    )
    command = [*run.NAMESPACE, sys.executable, run.__file__, "--inside", sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [[1, "lo"]]


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("", True),
        (None, True),
        ("0.0.0.0", True),
        ("192.0.2.1", False),
        ("10.0.0.1", False),
        ("169.254.169.254", False),
        ("2001:db8::1", False),
        ("huggingface.co", False),
        (b"example.org", False),
        ("localhost.example.org", False),
    ],
)
def test_what_counts_as_local(host, local):
    code = f"import sitecustomize; print(sitecustomize.is_local({host!r}))"
    environment = os.environ | {"PYTHONPATH": str(HERE.parent / "offline")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(local)
