"""Where the sources and the notebooks of the course lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_course.build.errors import BuildError

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Chapter:
    """One chapter: its source and the two notebooks made from it."""

    slug: str
    root: Path

    @property
    def number(self) -> str:
        return self.slug.split("_")[0]

    @property
    def source(self) -> Path:
        return self.root / "solutions" / f"{self.slug}.py"

    @property
    def solved(self) -> Path:
        return self.root / "solutions" / f"{self.slug}.ipynb"

    @property
    def student(self) -> Path:
        return self.root / "notebooks" / f"{self.slug}.ipynb"


@dataclass(frozen=True)
class Course:
    """A folder with `solutions/` and `notebooks/`; by default the repository that this package lies in."""

    root: Path = REPOSITORY

    def chapters(self, wanted: Sequence[str] | None = None) -> list[Chapter]:
        """The wanted chapters (numbers or slugs) in order; all of them for None or an empty sequence."""
        chapters = [Chapter(path.stem, self.root) for path in sorted(self.root.glob("solutions/[0-9][0-9]_*.py"))]
        if not wanted:
            return chapters
        known = {name: chapter for chapter in chapters for name in (chapter.number, chapter.slug)}
        unknown = [name for name in wanted if name not in known]
        if unknown:
            slugs = ", ".join(chapter.slug for chapter in chapters) or "none"
            raise BuildError(f"There is no chapter {', '.join(unknown)} in solutions/; there are {slugs}.")
        return sorted({known[name] for name in wanted}, key=lambda chapter: chapter.slug)

    def orphans(self) -> list[Path]:
        """Notebooks that no source makes any more."""
        expected = {path for chapter in self.chapters() for path in (chapter.solved, chapter.student)}
        return sorted({*self.root.glob("solutions/*.ipynb"), *self.root.glob("notebooks/*.ipynb")} - expected)
