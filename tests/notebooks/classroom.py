"""A class in a temporary folder, run by nbgrader's own commands on one notebook."""

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import nbformat

CONFIG = Path(__file__).parents[2] / "nbgrader" / "nbgrader_config.py"


class Classroom:
    """An nbgrader course directory with one assignment, named like its notebook."""

    def __init__(self, folder: Path, name: str, environment: Mapping[str, str]):
        self.folder, self.name, self.environment = folder, name, dict(environment)
        folder.mkdir(parents=True)
        shutil.copy(CONFIG, folder)
        # nbgrader starts alembic by its name, wherever this interpreter was started from.
        self.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        for kind in ("CONFIG", "DATA", "RUNTIME"):
            self.environment[f"JUPYTER_{kind}_DIR"] = str(folder / "jupyter" / kind.lower())

    def generate(self, source):
        """`nbgrader generate_assignment` of a solved notebook; returns the release."""
        self._write("source", source)
        self._nbgrader("generate_assignment", self.name)
        return nbformat.read(self.folder / "release" / self.name / f"{self.name}.ipynb", as_version=4)

    def submit(self, student: str, notebook) -> None:
        self._write(f"submitted/{student}", notebook)

    def autograde(self) -> dict[str, dict[str, float]]:
        """`nbgrader autograde` of everyone; the scores by student and grade id."""
        self._nbgrader("autograde", self.name)
        from nbgrader.api import Gradebook

        with Gradebook(f"sqlite:///{self.folder / 'gradebook.db'}", "vlm") as book:
            submissions = book.assignment_submissions(self.name)
            waiting = [submission.student.id for submission in submissions if submission.needs_manual_grade]
            if waiting:
                raise AssertionError(f"{self.name}: nbgrader wants a person to grade {', '.join(waiting)}")
            return {
                submission.student.id: {
                    grade.name: grade.score for page in submission.notebooks for grade in page.grades
                }
                for submission in submissions
            }

    def _write(self, step: str, notebook) -> None:
        path = self.folder / step / self.name / f"{self.name}.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(notebook, path)

    def _nbgrader(self, *command: str) -> None:
        command = [sys.executable, "-m", "nbgrader", *command]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(f"{' '.join(command[2:])} ended with {done.returncode}:\n{done.stderr[-4000:]}")


PART = re.compile(r"^\w+ = part\(.*\)$", re.MULTILINE)


def solve(release, solved, exercises: Iterable[str], *, keep_ordinary_cells: bool = True):
    """A released notebook in which only the given exercises are solved.

    Without its ordinary cells it grades in seconds; an answer may depend on none of them but for what `part` binds.
    """
    answers = {
        cell.metadata.nbgrader.grade_id: cell.source
        for cell in solved.cells
        if cell.metadata.get("vlm_course", {}).get("exercise") in set(exercises)
    }
    notebook = copy.deepcopy(release)
    if not keep_ordinary_cells:
        for cell in notebook.cells:
            if "nbgrader" not in cell.metadata:
                cell.source = "\n".join(PART.findall(cell.source)) if cell.cell_type == "code" else ""
        notebook.cells = [cell for cell in notebook.cells if cell.source]
    for cell in notebook.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
        cell.source = answers.get(grade_id, cell.source)
    return notebook
