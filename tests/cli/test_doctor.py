"""`vlm-course doctor`: one screen, a remedy for every problem, and an exit code."""

import shutil
import subprocess
import sys

import numpy
import pytest
from packaging.requirements import Requirement
from safetensors.numpy import save_file

from vlm_course import doctor


@pytest.mark.parametrize(
    ("installed", "status"),
    [("2.10.0", doctor.PROBLEM), ("2.11.0", doctor.OK), ("2.12.0.dev20260101", doctor.OK), ("3.0", doctor.PROBLEM)],
)
def test_versions_are_held_against_the_range(installed, status):
    finding = doctor.judge_version(Requirement("torch>=2.11,<3"), installed)
    assert finding.status == status
    assert installed in finding.found
    assert bool(finding.remedy) == (status == doctor.PROBLEM)


def test_a_missing_package_is_a_problem_with_a_remedy():
    finding = doctor.judge_version(Requirement("timm>=1"), None)
    assert (finding.subject, finding.status, finding.remedy) == ("timm", doctor.PROBLEM, doctor.REINSTALL)


def test_missing_and_damaged_weights_are_named(tmp_path):
    names = ("towers.safetensors", "language.safetensors")
    for name in names:
        finding = doctor.judge_weights(tmp_path, names)
        assert (finding.status, finding.found) == (doctor.PROBLEM, f"{name} is missing")
        save_file({"weight": numpy.zeros((4, 4), dtype=numpy.float16)}, tmp_path / name)
    assert doctor.judge_weights(tmp_path, names).status == doctor.OK
    whole = (tmp_path / names[1]).read_bytes()
    (tmp_path / names[1]).write_bytes(whole[: len(whole) // 2])
    finding = doctor.judge_weights(tmp_path, names)
    assert finding.status == doctor.PROBLEM
    assert names[1] in finding.found


def test_it_looks_for_the_files_that_the_package_loads():
    from vlm_course import pretrained

    assert doctor.WEIGHTS == (pretrained.TOWERS, pretrained.LANGUAGE)


def test_a_full_disk_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6))
    statuses = {finding.subject: finding for finding in doctor.examine(tmp_path)}
    assert statuses["disk"].status == doctor.PROBLEM


def test_it_names_what_a_learner_has_to_know():
    subjects = [finding.subject for finding in doctor.examine()]
    assert len(subjects) == len(set(subjects))
    needed = {"Python", "torch", "transformers", "timm", "jupyterlab", "shipped weights", "device", "memory", "disk"}
    assert needed | {"Jupyter kernel", "network", "notebooks"} <= set(subjects)


def test_this_environment_is_healthy_and_fits_one_screen():
    run = subprocess.run([sys.executable, "-m", "vlm_course", "doctor"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_exit_code_and_count_when_something_is_wrong(monkeypatch, capsys):
    wrong = [doctor.Finding("thing", doctor.PROBLEM, "broken", "mend it"), doctor.Finding("other", doctor.NOTE, "odd")]
    monkeypatch.setattr(doctor, "examine", lambda: wrong)
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "mend it" in printed
    assert "To mend before you start: 1." in printed
