"""Tables of the catalog for a notebook page: a row per model, a column per field, and the sources under it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vlm_course.catalog.records import FIELDS, Model, Source, select

MISSING = "not published"


def _short(value: object) -> str:
    """Counts from ten million up are rounded to three significant digits; everything else as it stands."""
    if not isinstance(value, int) or isinstance(value, bool):
        return str(value)
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if value >= 10 * 10**6 and value >= size:
            return f"{value / size:.3g}{unit}" if value < 1000 * size else f"{value / size:,.0f}{unit}"
    return f"{value:,}"


@dataclass(frozen=True)
class CatalogTable:
    """Rows and fields of the catalog, as HTML in a notebook and as plain text elsewhere.

    Small numbers lead from each cell to its source, given below the table with its evidence and the day it was checked.
    """

    rows: tuple[Model, ...]
    fields: tuple[str, ...]
    headings: Mapping[str, str]
    exact: bool = False
    sources: bool = True

    def _cell(self, row: Model, name: str) -> str:
        value = row[name]
        if value is None:
            return MISSING if row.access == "closed" else "-"
        return str(row.facts[name]) if self.exact else _short(value)

    def _numbers(self) -> dict[Source, int]:
        used = (row.facts[name].source for row in self.rows for name in self.fields if name in row.facts)
        return {source: number for number, source in enumerate(dict.fromkeys(used), 1)}

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"text/html": self._repr_html_(), "text/plain": str(self)}

    def _repr_html_(self) -> str:
        numbers = self._numbers() if self.sources else {}
        heads = "".join(
            f'<th scope="col" style="text-align:left">{html.escape(text)}</th>'
            for text in ("Model", *(self.headings[name] for name in self.fields))
        )
        body = ""
        for row in self.rows:
            body += f'<tr><th scope="row" style="text-align:left;vertical-align:top">{html.escape(row.title)}</th>'
            for name in self.fields:
                mark = f"<sup>{numbers[row.facts[name].source]}</sup>" if numbers and name in row.facts else ""
                text = html.escape(self._cell(row, name))
                body += f'<td style="text-align:left;vertical-align:top">{text}{mark}</td>'
            body += "</tr>"
        notes = "".join(f"<li>{html.escape(_note(source))}</li>" for source in numbers)
        under = f"<details><summary>Sources</summary><ol>{notes}</ol></details>" if notes else ""
        return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{under}"

    def __str__(self) -> str:
        numbers = self._numbers() if self.sources else {}
        lines = [["model", *(self.headings[name].lower() for name in self.fields)]]
        for row in self.rows:
            cells = [row.title]
            for name in self.fields:
                mark = f" [{numbers[row.facts[name].source]}]" if numbers and name in row.facts else ""
                cells.append(self._cell(row, name) + mark)
            lines.append(cells)
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        text.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*text, *(f"[{number}] {_note(source)}" for source, number in numbers.items())])


def _note(source: Source) -> str:
    return f"{source.where} ({source.strength})"


def catalog_table(
    fields: Iterable[str],
    *,
    names: Iterable[str] | None = None,
    chapter: int | None = None,
    kind: str | None = None,
    access: str | None = None,
    headings: Mapping[str, str] | None = None,
    exact: bool = False,
    sources: bool = True,
) -> CatalogTable:
    """A table ready to be the last line of a cell.

    Args:
        fields: columns, of `records.FIELDS`.
        names: rows in this order; or leave it out and filter by `chapter`, `kind` and `access`.
        headings: other column titles than those of `records.FIELDS`.
        exact: counts with all their digits instead of three.
        sources: number the sources and list them below.

    Raises ValueError for an unknown field or name, and where no model is left.
    """
    fields = tuple(fields)
    if unknown := [name for name in (*fields, *(headings or {})) if name not in FIELDS]:
        raise ValueError(f"unknown field {unknown[0]!r}; there are {', '.join(FIELDS)}")
    rows = select(names, chapter=chapter, kind=kind, access=access)
    if not rows or not fields:
        raise ValueError(f"the table has {len(rows)} models and {len(fields)} fields: was the filter too narrow?")
    return CatalogTable(rows, fields, {**FIELDS, **(headings or {})}, exact, sources)
