"""`vlm-course lab` and `vlm-course update`: the learner's own copies of the notebooks, and JupyterLab on them.

The course's notebooks are copied once into `work/`. A record in `work/` keeps the hash of what was copied, so that an
untouched copy can be told from one that the learner has worked in; the second kind is never written again.
"""

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

FIRST_CHAPTER = "00_two_modalities.ipynb"
RECORD = ".copied.json"


class LabError(ValueError):
    """The notebooks cannot be found or JupyterLab cannot be started; the message is one sentence for the user."""


@dataclass(frozen=True)
class Report:
    """What happened to each notebook: names of files relative to `work/`."""

    copied: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)  # the course has a newer one, the copy was left alone
    replaced: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)  # newer ones written next to the learner's
    blocked: list[str] = field(default_factory=list)  # a *.new.ipynb that the learner has changed stands in the way


def course_root(start: Path | None = None) -> Path:
    """The folder that holds `notebooks/`: the current one, else the checkout that this package is installed from.

    Raises:
        LabError: neither has the notebooks (the package was installed without its repository).
    """
    start = Path.cwd() if start is None else start
    for root in (start, Path(__file__).resolve().parent.parent):
        if (root / "notebooks" / FIRST_CHAPTER).is_file():
            return root
    raise LabError(f"no notebooks/{FIRST_CHAPTER} in {start}: run this in the folder of the course's repository.")


def pending_updates(root: Path) -> list[str]:
    """Names of the copies in `work/` that the course has a newer version of; changes nothing."""
    record = _read_record(root / "work")
    copies = [source for source in _sources(root) if (root / "work" / source.name).exists()]
    return [source.name for source in copies if not _is_current(source, root / "work" / source.name, record)]


def copy_notebooks(root: Path) -> Report:
    """Copy each notebook that `work/` does not have; write no file that is already there."""
    report = Report()
    work, record = _open_work(root)
    for source in _sources(root):
        name, target = source.name, work / source.name
        if not target.exists():
            _replace(target, source.read_bytes())
            record[name] = _hash(source)
            report.copied.append(name)
        elif _is_current(source, target, record):
            record[name] = _hash(source)
            report.kept.append(name)
        else:
            report.outdated.append(name)
    _save(work, record)
    return report


def update_notebooks(root: Path) -> Report:
    """Bring newer notebooks: over copies that the learner never changed, beside the others as `NN_slug.new.ipynb`."""
    report = copy_notebooks(root)
    work, record = _open_work(root)
    for name in list(report.outdated):
        source, target = root / "notebooks" / name, work / name
        newer = target.with_suffix(".new.ipynb")
        if record.get(name) == _hash(target):
            _replace(target, source.read_bytes())
            report.replaced.append(name)
        elif not newer.exists() or _hash(newer) in (record.get(newer.name), _hash(source)):
            _replace(newer, source.read_bytes())
            record[newer.name] = _hash(source)
            report.beside.append(newer.name)
        else:
            report.blocked.append(newer.name)
            continue
        record[name] = _hash(source)
        report.outdated.remove(name)
    _save(work, record)
    return report


def describe(report: Report) -> list[str]:
    """One line for each thing that the learner should know; nothing for notebooks that stay as they are."""
    lines = []
    if report.copied:
        lines.append(f"copied into work/: {', '.join(report.copied)}")
    if report.replaced:
        lines.append(f"replaced, since you had not changed them: {', '.join(report.replaced)}")
    if report.beside:
        lines.append(f"newer versions, written beside yours: {', '.join(report.beside)}")
    if report.blocked:
        lines.append(f"you changed {', '.join(report.blocked)}: rename it, then run `vlm-course update` again")
    outdated = [name for name in report.outdated if f"{name[:-6]}.new.ipynb" not in report.blocked]
    if outdated:
        lines.append(f"the course has a newer version of {', '.join(outdated)}: your copy was left alone.")
        lines.append("`vlm-course update` puts the newer one beside it, or in its place if you never changed it.")
    return lines


def has_display() -> bool:
    """Whether a browser can be opened for the person at the keyboard."""
    if os.environ.get("SSH_CONNECTION"):
        return False
    if sys.platform.startswith("linux"):
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return True


def start(root: Path, *, browser: bool | None = None, port: int | None = None, wait: float = 90.0) -> int:
    """Run JupyterLab in `work/` until it is stopped, with chapter 0 open or its address printed.

    Args:
        root: the folder that holds `work/`.
        browser: open a browser; None opens one where there is a display.
        port: the first port to try; None leaves the choice to Jupyter.
        wait: seconds until a server that does not answer counts as failed.

    Returns:
        JupyterLab's exit code; 0 after Ctrl-C or SIGTERM.
    """
    browser = has_display() if browser is None else browser
    token = secrets.token_hex(24)
    command = [sys.executable, "-m", "jupyterlab", "--log-level=WARN", "--LabApp.log_level=WARN"]
    command += [f"--ServerApp.root_dir={root / 'work'}", f"--LabApp.default_url=/lab/tree/{FIRST_CHAPTER}"]
    command += [] if browser else ["--no-browser"]
    command += [] if port is None else [f"--port={port}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # in a container; Jupyter refuses root unless told
        command.append("--allow-root")
    # A token from the environment keeps Jupyter from printing its own, longer notice. The kernels of this
    # environment come before those that another Python has registered for the user.
    environment = {**os.environ, "JUPYTER_TOKEN": token, "JUPYTER_PREFER_ENV_PATH": "1"}
    # In a session of its own the server does not get the terminal's Ctrl-C, at which it would ask whether to stop.
    server = subprocess.Popen(command, cwd=root / "work", env=environment, start_new_session=True)
    stopped = []

    def stop(number, frame):
        (server.kill if stopped else server.terminate)()  # asked twice, do not wait for a server that hangs
        stopped.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, stop)
    address = _await_address(server, wait)
    if address is None and not stopped:
        server.terminate()
        raise LabError("JupyterLab did not start: its messages are above; `vlm-course doctor` looks for the cause.")
    if not stopped:
        print("Chapter 0 is here; Ctrl-C stops JupyterLab:", flush=True)
        print(f"\n    {address}lab/tree/{FIRST_CHAPTER}?token={token}\n", flush=True)
    code = server.wait()
    return 0 if stopped else code


def _await_address(server: subprocess.Popen, wait: float) -> str | None:
    from jupyter_core.paths import jupyter_runtime_dir

    facts = Path(jupyter_runtime_dir()) / f"jpserver-{server.pid}.json"
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline and server.poll() is None:
        try:
            return json.loads(facts.read_text())["url"]
        except (OSError, ValueError):  # not written yet, or half written
            time.sleep(0.1)
    return None


def _sources(root: Path) -> list[Path]:
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def _open_work(root: Path) -> tuple[Path, dict[str, str]]:
    work = root / "work"
    work.mkdir(exist_ok=True)
    return work, _read_record(work)


def _read_record(work: Path) -> dict[str, str]:
    try:
        record = json.loads((work / RECORD).read_text())
    except (OSError, ValueError):  # lost or damaged: then every copy that differs counts as the learner's own
        record = {}
    return record if isinstance(record, dict) else {}


def _is_current(source: Path, copy: Path, record: dict[str, str]) -> bool:
    """Whether the copy was made from this very version of the course's notebook, or is equal to it."""
    return record.get(source.name) == _hash(source) or _hash(copy) == _hash(source)


def _save(work: Path, record: dict[str, str]) -> None:
    _replace(work / RECORD, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def _replace(target: Path, content: bytes) -> None:
    """Write a whole file or nothing: a copy that was cut short would be taken for the learner's."""
    partial = target.with_name(f".{target.name}.partial")
    partial.write_bytes(content)
    partial.replace(target)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
