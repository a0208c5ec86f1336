"""`vlm-course doctor`: what is installed, what will be used, and what to do about each problem, on one screen."""

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

OK, NOTE, PROBLEM = "ok", "note", "problem"
PACKAGE = Path(__file__).resolve().parent
SHOWN = ("torch", "torchvision", "transformers", "timm", "jupyterlab", "ipywidgets", "matplotlib")
WEIGHTS = ("small_towers.safetensors", "small_language.safetensors")
REINSTALL = "pip install -c constraints.txt -e ."
FREE_GB, MEMORY_GB = 1.0, 3.0  # what training runs and notebooks write; two and a half for a notebook, and the system


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    subject: str
    status: str  # OK, NOTE (works, but worth knowing) or PROBLEM
    found: str
    remedy: str = ""


def examine(folder: Path | None = None) -> list[Finding]:
    """Everything that is looked at, in the order of the table.

    Args:
        folder: where the course would work; the current folder by default.
    """
    folder = Path.cwd() if folder is None else folder
    findings = [_python(), *_packages(), _classes(), _weights(), *_device(), _memory(), _disk(folder)]
    return [*findings, _kernel(), _loopback(), _copies(folder)]


def main() -> int:
    """Prints the table; returns 1 when something has to be mended, else 0."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    findings = examine()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    colours = {OK: "green", NOTE: "yellow", PROBLEM: "red"}
    for finding in findings:
        table.add_row(finding.subject, Text(finding.status, colours[finding.status]), Text(finding.found))
        if finding.remedy:
            table.add_row("", "", Text(f"-> {finding.remedy}", "bold"))
    console = Console(highlight=False)
    console.print(table)
    problems = sum(finding.status == PROBLEM for finding in findings)
    console.print("Everything the course needs is here." if not problems else f"To mend before you start: {problems}.")
    return 1 if problems else 0


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    wanted = importlib.metadata.metadata("vlm-course")["Requires-Python"]
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return Finding("Python", PROBLEM, found, f"Install Python {wanted} and make a new environment.")
    return Finding("Python", OK, found)


def judge_version(requirement: Requirement, installed: str | None) -> Finding:
    """Compare an installed version with the range that pyproject.toml allows."""
    wanted = str(requirement.specifier) or "any version"
    if installed is None:
        return Finding(requirement.name, PROBLEM, f"missing (needs {wanted})", REINSTALL)
    if not requirement.specifier.contains(installed, prereleases=True):
        return Finding(requirement.name, PROBLEM, f"{installed} is outside {wanted}", REINSTALL)
    return Finding(requirement.name, OK, f"{installed} ({wanted})")


def _packages() -> Iterator[Finding]:
    findings = [judge_version(need, _installed(need.name)) for need in _requirements() if need.marker is None]
    shown = [finding for finding in findings if finding.subject in SHOWN or finding.status != OK]
    yield from shown
    others = len(findings) - len(shown)
    if others:
        yield Finding("other packages", OK, f"{others} more, all within their ranges")


def _classes() -> Finding:
    needs = [need for need in _requirements() if need.marker is not None and need.marker.evaluate({"extra": "course"})]
    bad = [judge_version(need, _installed(need.name)) for need in needs]
    bad = [finding.subject for finding in bad if finding.status != OK]
    if not bad:
        return Finding("for classes", OK, f"nbgrader {_installed('nbgrader')} and {len(needs) - 1} more")
    remedy = 'Only for tests and marking: pip install -c constraints.txt -e ".[course]"'
    return Finding("for classes", NOTE, f"missing or out of range: {', '.join(bad)}", remedy)


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in importlib.metadata.requires("vlm-course") or []]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def judge_weights(folder: Path, names: tuple[str, ...] = WEIGHTS) -> Finding:
    """Whether every weight file of the shipped model is there and whole."""
    from safetensors import SafetensorError, safe_open

    for name in names:
        remedy = f"git checkout -- vlm_course/pretrained/{name}"
        try:
            with safe_open(folder / name, framework="numpy") as weights:
                len(weights.keys())
        except FileNotFoundError:
            return Finding("shipped weights", PROBLEM, f"{name} is missing", remedy)
        except (SafetensorError, OSError) as error:
            return Finding("shipped weights", PROBLEM, f"{name}: {error}", remedy)
    size = sum((folder / name).stat().st_size for name in names) / 1e6
    return Finding("shipped weights", OK, f"{len(names)} files, {size:.0f} MB")


def _weights() -> Finding:
    return judge_weights(PACKAGE / "pretrained")


def _device() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways, each of them a finding and not a crash
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield Finding("device", PROBLEM, f"torch cannot be imported: {cause}", REINSTALL)
        return
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        yield Finding(
            "device", OK, f"cuda: {torch.cuda.get_device_name(0)}, {memory:.0f} GB, for training; notebooks: cpu"
        )
    elif torch.backends.mps.is_available():
        yield Finding("device", OK, f"mps (Apple GPU), for training; notebooks: cpu, {threads}")
    else:
        yield Finding("device", OK, f"cpu, {threads}; no GPU is needed")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.0f} GB free"
    if memory.available / 1e9 < MEMORY_GB:
        return Finding("memory", NOTE, found, "A notebook takes up to 2.5 GB: close other programs or kernels.")
    return Finding("memory", OK, found)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 1e9
    if free < FREE_GB:
        return Finding("disk", PROBLEM, f"{free:.1f} GB free", f"Free at least {FREE_GB:.0f} GB where the course lies.")
    return Finding("disk", OK, f"{free:.0f} GB free")


def _kernel() -> Finding:
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # as `vlm-course lab` sets it
    try:
        from jupyter_client.kernelspec import KernelSpecManager

        executable = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except Exception as error:
        return Finding("Jupyter kernel", PROBLEM, f"python3: {error}", "python -m ipykernel install --sys-prefix")
    resolved = shutil.which(executable) or executable
    if os.path.isabs(executable) and os.path.normcase(resolved) != os.path.normcase(sys.executable):
        remedy = "python -m ipykernel install --sys-prefix"
        return Finding("Jupyter kernel", PROBLEM, f"python3 runs another Python, {executable}", remedy)
    return Finding("Jupyter kernel", OK, "python3 runs in this environment")


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)):
            pass
    except OSError as error:
        remedy = "Allow local connections: JupyterLab talks to your browser through 127.0.0.1."
        return Finding("network", PROBLEM, f"127.0.0.1: {error}", remedy)
    return Finding("network", OK, "not needed; local connections work")


def _copies(folder: Path) -> Finding:
    from vlm_course.lab import LabError, course_root, pending_updates

    try:
        root = course_root(folder)
    except LabError as error:
        return Finding("notebooks", PROBLEM, "not found", str(error))
    copies = sorted((root / "work").glob("[0-9][0-9]_*.ipynb"))
    newer = pending_updates(root)
    if newer:
        return Finding("notebooks", NOTE, f"newer than in work/: {', '.join(newer)}", "vlm-course update")
    if not copies:
        return Finding("notebooks", OK, "no copies in work/ yet; `vlm-course lab` makes them")
    return Finding("notebooks", OK, f"your copies are in {os.path.relpath(root / 'work')}")
