"""The files of the package that a chapter reaches, found without running it.

Four rules, from the cells on:

- A module is reached when reached code imports it or names it in a string, lazily or not, or when a reached JSON file
  names it as the home of a class. With it come the packages around it.
- A data file is reached with the subpackage that it lies in, and where a reached module names it, or its folder, in a
  string.
- Graders are looked up by name while a chapter runs, so no import shows them. A chapter reaches its own, and those of
  the exercises that it names (`vlm_course.grading.index`).
- Data that is kept a file a chapter (ch05.json) is reached by that chapter, and by one that asks for its claims.

A cell that starts `vlm-course` reaches everything.
"""

import ast
import re
from pathlib import Path

from vlm_course.grading.index import homes

PACKAGE = "vlm_course"
DOTTED = re.compile(r"\bvlm_course(?:\.\w+)+")
CLASS = re.compile(r'"((?:[a-z_]\w*\.)+[A-Za-z_]\w*)"')  # in JSON: "bridges.VisionProjection"
OF_A_CHAPTER = re.compile(r"ch(\d\d)\.\w+")
ASK_BY_NAME = {"check", "part", "question", "earlier", "exercise"}
ASK_BY_CHAPTER = {"claims", "claim_table"}


def reached_files(cells: str, chapter: str, package: Path) -> list[Path]:
    """The files of the package at `package` that the chapter with this number and these code cells reaches, sorted."""
    if "vlm-course" in cells:
        return _tree(package)
    return sorted(_Search(chapter, package).run(ast.parse(_python(cells))))


class _Search:
    """One chapter's search. `chapters` are those whose data it may read, its own first."""

    def __init__(self, chapter: str, package: Path):
        self.package, self.chapters, self.home = package, {chapter}, f"chapter{chapter}"
        self.graders = homes(package / "grading")
        self.data = {path.relative_to(package).as_posix(): [path] for path in _tree(package) if path.suffix != ".py"}
        self.by_name: dict[str, list[Path]] = {}
        for (file,) in list(self.data.values()):
            self.by_name.setdefault(file.name, []).append(file)
            for folder in file.relative_to(package).parents:
                if folder.parts and not (package / folder / "__init__.py").exists():
                    self.data.setdefault(folder.as_posix(), []).append(file)

    def run(self, cells: ast.Module) -> set[Path]:
        self.chapters |= {f"{number:02d}" for number in _asked(cells, ASK_BY_CHAPTER) if isinstance(number, int)}
        names = {self.home, *(self.graders[text] for text in _strings(cells) if text in self.graders)}
        queue = [self.package / "__init__.py", *self._graders(names), *self._named(cells, None)]
        found: set[Path] = set()
        while queue:
            path = queue.pop()
            if path in found or not path.is_file() or self._of_another_chapter(path):
                continue
            found.add(path)
            queue += self._packages_around(path)
            if path.suffix == ".py":
                tree = ast.parse(path.read_text(encoding="utf-8"))
                asked = {self.graders[name] for name in _asked(tree, ASK_BY_NAME) if name in self.graders}
                queue += self._named(tree, path) + self._graders(asked)
            elif path.suffix == ".json":
                named = CLASS.findall(path.read_text(encoding="utf-8"))
                queue += [file for name in named for file in self._module(f"{PACKAGE}.{name}")]
        return found

    def _graders(self, names: set[str]) -> list[Path]:
        return [path for name in names for path in _tree(self.package / "grading" / name)]

    def _of_another_chapter(self, path: Path) -> bool:
        number = OF_A_CHAPTER.fullmatch(path.name)
        return number is not None and number[1] not in self.chapters

    def _packages_around(self, path: Path) -> list[Path]:
        """The packages that Python imports before a module, with their data."""
        around = [self.package / parent for parent in path.relative_to(self.package).parents if parent.parts]
        packages = [folder for folder in around if (folder / "__init__.py").is_file()]
        places = [folder.relative_to(self.package).as_posix() + "/" for folder in packages]
        data = [files[0] for name, files in self.data.items() if name.startswith(tuple(places)) and len(files) == 1]
        return [folder / "__init__.py" for folder in packages] + data

    def _named(self, tree: ast.Module, path: Path | None) -> list[Path]:
        """Files of the modules that a piece of code imports or names in a string, and of the data that it names."""
        names, texts = set(), _strings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node, path)
                names.update(f"{base}.{alias.name}" for alias in node.names)
        names.update(name for text in texts for name in DOTTED.findall(text))
        beside = path.relative_to(self.package).parent if path else Path()
        data = [
            file
            for text in texts
            for files in (self.data.get(text), self.data.get(f"{beside.as_posix()}/{text}"), self.by_name.get(text))
            for file in files or ()
        ]
        return [file for name in names for file in self._module(name)] + data

    def _absolute(self, node: ast.ImportFrom, path: Path | None) -> str:
        if not node.level or path is None:
            return node.module or ""
        parts = (PACKAGE, *path.relative_to(self.package).parts[:-1])
        return ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])

    def _module(self, name: str) -> list[Path]:
        """The file of the longest leading part of a dotted name that is a module."""
        parts = name.split(".")
        if parts[0] != PACKAGE:
            return []
        for length in range(len(parts), 1, -1):
            stem = self.package.joinpath(*parts[1:length])
            for file in (stem.with_suffix(".py"), stem / "__init__.py"):
                if file.is_file():
                    return [file]
            if stem.is_dir():
                return _tree(stem)
        return []


def _tree(folder: Path) -> list[Path]:
    """What git would track: neither caches nor hidden files."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _python(cells: str) -> str:
    """Cells as Python: magics and shell lines become calls."""
    from IPython.core.inputtransformer2 import TransformerManager

    return TransformerManager().transform_cell(cells)


def _strings(tree: ast.Module) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _asked(tree: ast.Module, functions: set[str]) -> set:
    """The plain first arguments of the calls of these functions."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    called = [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", None)) in functions]
    return {call.args[0].value for call in called if isinstance(call.args[0], ast.Constant)}
