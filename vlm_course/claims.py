"""The source lesson's claims and what became of each, as data that a chapter prints and a test counts.

One JSON file per chapter in `claims_data`. Every text is our own wording.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from importlib.resources import files

VERDICTS = ("correct", "true for some models", "misleading", "wrong", "cannot be verified")
EVIDENCE = ("computed here", "read in source code", "primary publication", "second-hand", "from memory")


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

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise ValueError(f"claim {self.id}: verdict {self.verdict!r} is none of {VERDICTS}")
        if self.evidence not in EVIDENCE:
            raise ValueError(f"claim {self.id}: evidence {self.evidence!r} is none of {EVIDENCE}")


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
