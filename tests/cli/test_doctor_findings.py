"""Every problem that `vlm-course doctor` knows, made on purpose: it is found, named, and has a remedy."""

import importlib.metadata
import platform
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

from vlm_course import doctor, lab


def of(subject, findings):
    return next(finding for finding in findings if finding.subject == subject)


def test_an_old_python_is_a_problem(monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.4")
    finding = of("Python", doctor.examine())
    assert finding.status == doctor.PROBLEM
    assert "3.10.4" in finding.found and ">=3.11" in finding.remedy


def test_what_only_classes_need_is_a_note_and_never_a_problem(monkeypatch):
    version = importlib.metadata.version

    def without_nbgrader(name):
        if name == "nbgrader":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    assert of("for classes", doctor.examine()).status == doctor.OK
    monkeypatch.setattr(importlib.metadata, "version", without_nbgrader)
    finding = of("for classes", doctor.examine())
    assert finding.status == doctor.NOTE
    assert finding.found.endswith("nbgrader") and "[course]" in finding.remedy


def test_a_package_out_of_its_range_is_shown_though_it_is_rarely_looked_at(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "psutil" else version(name))
    finding = of("psutil", doctor.examine())
    assert finding.status == doctor.PROBLEM and "0.0.1 is outside" in finding.found


@pytest.mark.parametrize(
    ("error", "cause"), [(ImportError("no libtorch_cpu.so\nmore"), "no libtorch_cpu.so"), (OSError(), "OSError")]
)
def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch, error, cause):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise error

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    (finding,) = doctor._device()
    assert (finding.status, finding.remedy) == (doctor.PROBLEM, doctor.REINSTALL)
    assert finding.found.endswith(cause)


def test_the_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=80e9))
    (finding,) = doctor._device()
    assert finding.found.startswith("cuda: NVIDIA H100, 80 GB")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    (finding,) = doctor._device()
    assert finding.found.startswith("mps (Apple GPU)")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (finding,) = doctor._device()
    assert finding.found.startswith("cpu") and finding.status == doctor.OK


@pytest.mark.parametrize(("free", "status"), [(0.5e9, doctor.NOTE), (30e9, doctor.OK)])
def test_little_memory_is_a_note(monkeypatch, free, status):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free, total=32e9))
    finding = of("memory", doctor.examine())
    assert finding.status == status and finding.found == f"{free / 1e9:.1f} of 32 GB free"


def test_a_kernel_that_is_missing_or_of_another_python(monkeypatch):
    def missing(self, name):
        raise NoSuchKernel(name)

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", missing)
    finding = of("Jupyter kernel", doctor.examine())
    assert finding.status == doctor.PROBLEM and "ipykernel install" in finding.remedy
    for executable, status in ((sys.executable, doctor.OK), ("/nowhere/bin/python", doctor.PROBLEM)):
        spec = SimpleNamespace(argv=[executable, "-m", "ipykernel_launcher"])
        monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name, spec=spec: spec)
        finding = of("Jupyter kernel", doctor.examine())
        assert finding.status == status
        assert (executable in finding.found) == (status == doctor.PROBLEM)


def test_refused_local_connections_are_a_problem(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    finding = of("network", doctor.examine())
    assert finding.status == doctor.PROBLEM and "Permission denied" in finding.found


def test_the_notebooks_in_work(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "__file__", str(tmp_path / "site-packages" / "vlm_course" / "lab.py"))
    assert of("notebooks", doctor.examine(tmp_path)).status == doctor.PROBLEM
    (tmp_path / "notebooks").mkdir()
    chapter = tmp_path / "notebooks" / "00_two_modalities.ipynb"
    chapter.write_text("first edition")
    assert "no copies" in of("notebooks", doctor.examine(tmp_path)).found
    lab.copy_notebooks(tmp_path)
    found = of("notebooks", doctor.examine(tmp_path))
    assert found.status == doctor.OK and Path(found.found.removeprefix("your copies are in ")).name == "work"
    chapter.write_text("second edition")
    newer = of("notebooks", doctor.examine(tmp_path))
    assert newer.status == doctor.NOTE
    assert (newer.found, newer.remedy) == ("newer than in work/: 00_two_modalities.ipynb", "vlm-course update")
