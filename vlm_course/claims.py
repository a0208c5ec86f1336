"""The source lesson's claims and what became of each, as data that a chapter prints and a test counts.

One JSON file per chapter in `claims_data`. Every text is our own wording. A test that would fail if the corrected
statement were false carries `@pytest.mark.claim(id, kind=...)`; `python -m vlm_course.claims` counts both.
"""

from __future__ import annotations

import ast
import html
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

VERDICTS = ("correct", "true for some models", "misleading", "wrong", "cannot be verified")

# How strong the ground is -> which of the four kinds of evidence it belongs to. "From memory" may name a paper that
# nobody opened for this course, or give a reason; neither is a source.
EVIDENCE = {
    "computed here": "computed",
    "experiment here": "experiment",
    "read in source code": "cited",
    "primary publication": "cited",
    "second-hand": "cited",
    "from memory": "unsourced",
}
KINDS = ("computed", "experiment", "cited", "unsourced")

# Where the value that a test looks at comes from.
TEST_KINDS = ("model", "processor", "experiment", "function", "arithmetic")
TESTS = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True)
class Claim:
    """One statement of the lesson.

    Raises ValueError for a verdict or a kind of evidence that the course does not use.
    """

    id: str  # chapter and number, "0-02"
    chapter: int
    claim: str  # what the lesson says, paraphrased
    verdict: str  # one of VERDICTS
    truth: str  # what is true, with its limits
    evidence: str  # one of EVIDENCE: how strong the ground is
    source: str  # where to look: class, file and commit, paper and section
    cell: str  # heading of the section of the notebook that shows it; "" where only reading helps
    review: str = ""  # what an earlier review of this claim had wrong, where we changed it

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise ValueError(f"claim {self.id}: verdict {self.verdict!r} is none of {VERDICTS}")
        if self.evidence not in EVIDENCE:
            raise ValueError(f"claim {self.id}: evidence {self.evidence!r} is none of {tuple(EVIDENCE)}")

    @property
    def kind(self) -> str:
        """One of KINDS: computed, experiment, cited or unsourced."""
        return EVIDENCE[self.evidence]


def chapters() -> tuple[int, ...]:
    """The chapters whose claims are stored."""
    stored = files("vlm_course").joinpath("claims_data").iterdir()
    return tuple(sorted(int(file.name[2:4]) for file in stored if file.name.endswith(".json")))


def claims(chapter: int) -> tuple[Claim, ...]:
    """The claims of one chapter in the lesson's order. Raises ValueError where the chapter has no file yet."""
    file = files("vlm_course").joinpath("claims_data", f"ch{chapter:02d}.json")
    if not file.is_file():
        raise ValueError(f"no claims are stored for chapter {chapter}")
    return tuple(Claim(chapter=chapter, **row) for row in json.loads(file.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class ClaimTable:
    """The claims of a chapter as a table for a notebook, and as plain text elsewhere."""

    rows: tuple[Claim, ...]

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": str(self)}

    def html(self) -> str:
        head = "".join(
            f'<th scope="col" style="text-align:left">{name}</th>'
            for name in ("The lesson says", "Verdict", "What is true", "Evidence")
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(map(self._row, self.rows))}</tbody></table>"

    @staticmethod
    def _row(claim: Claim) -> str:
        shown = f" Section: “{claim.cell}”." if claim.cell else ""
        cells = (claim.claim, claim.verdict, claim.truth + shown, f"{claim.evidence}: {claim.source}")
        return (
            "<tr>"
            + "".join(f'<td style="text-align:left;vertical-align:top">{html.escape(cell)}</td>' for cell in cells)
            + "</tr>"
        )

    def __str__(self) -> str:
        return "\n".join(f"{claim.id} {claim.verdict}: {claim.claim} {claim.truth}" for claim in self.rows)


def claim_table(chapter: int) -> ClaimTable:
    """The claims of one chapter, ready to be the last line of a cell."""
    return ClaimTable(claims(chapter))


@dataclass(frozen=True)
class Mark:
    """One mark above a test: the claim, where the value under test comes from, the test and its docstring."""

    id: str
    kind: str
    test: str
    reason: str


def marks(folder: Path = TESTS) -> tuple[Mark, ...]:
    """The marks of all tests below `folder`, read without running them.

    Raises ValueError for a mark that is not of the form claim("6-03", kind="model") with one of TEST_KINDS.
    """
    return tuple(mark for file in sorted(folder.rglob("test_*.py")) for mark in _marks_of(file))


def _marks_of(file: Path) -> Iterator[Mark]:
    text = file.read_text(encoding="utf-8")
    if "mark.claim(" not in text:
        return
    for node in ast.walk(ast.parse(text)):
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.claim":
                yield _mark(call, f"{file.name}::{node.name}", ast.get_docstring(node) or "")


def _mark(call: ast.Call, test: str, reason: str) -> Mark:
    shown = ast.unparse(call)
    if len(call.args) != 1 or [keyword.arg for keyword in call.keywords] != ["kind"]:
        raise ValueError(f'{test} has {shown}, expected one id and one kind: claim("6-03", kind="model")')
    id_, kind = (ast.literal_eval(value) for value in (call.args[0], call.keywords[0].value))
    if kind not in TEST_KINDS:
        raise ValueError(f"{test} has kind {kind!r} in {shown}, known are {', '.join(TEST_KINDS)}")
    return Mark(id_, kind, test, reason)


def kinds_by_claim(found: tuple[Mark, ...]) -> dict[str, set[str]]:
    """Claim -> the kinds of value that its tests look at."""
    kinds: dict[str, set[str]] = {}
    for mark in found:
        kinds.setdefault(mark.id, set()).add(mark.kind)
    return kinds


def summary(folder: Path = TESTS) -> str:
    """A line for each chapter: claims, verdicts, kinds of evidence, how many have a test, how many of these only a sum.

    Without the repository's tests the last two columns are 0.
    """
    kinds = kinds_by_claim(marks(folder))
    lines = [_line("chapter", _COLUMNS)]
    totals = [0] * len(_COLUMNS)
    for chapter in chapters():
        rows = claims(chapter)
        with_test = [kinds[row.id] for row in rows if row.id in kinds]
        counts = [len(rows)]
        counts += [sum(row.verdict == verdict for row in rows) for verdict in VERDICTS]
        counts += [sum(row.kind == kind for row in rows) for kind in KINDS]
        counts += [len(with_test), sum(found == {"arithmetic"} for found in with_test)]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        lines.append(_line(str(chapter), counts))
    return "\n".join([*lines, _line("all", totals)])


def _line(first: str, cells) -> str:
    return f"{first:<8}" + "".join(
        f"{cell!s:>{max(6, len(name) + 2)}}" for cell, name in zip(cells, _COLUMNS, strict=True)
    )


_COLUMNS = ("rows", *VERDICTS, *KINDS, "tested", "arithmetic")

if __name__ == "__main__":
    print(summary())
