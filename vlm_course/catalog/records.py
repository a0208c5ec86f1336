"""The catalog's records: a model is a set of facts, and every fact has a source, a day and a strength of evidence.

The data lies in `data/*.json`, one file per family. A file has `sources`, {key: {where, evidence, checked}}, and
`models`; a model's `facts` are {field: [value, source key]}. A model that is `like` another takes over kind, access
and every fact that it does not state itself, but not the chapters: a chapter's table has one size of a family. What
nobody could find a source for is absent, never guessed.

To add a model: a row in a file of its family, with `build` where a library has the architecture. The tests recompute
the counts that its facts state, and refuse a fact without a source.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from vlm_course.claims import EVIDENCE

KINDS = ("vision-language model", "vision encoder", "document reader", "robot policy", "image generator")
ACCESS = ("open weights", "architecture published", "closed")

# field -> heading of its column, with its unit; the order is that of a model's page
FIELDS = {
    "developer": "Developer",
    "released": "Released",
    "sizes": "Sizes",
    "parameters": "Parameters",
    "published": "Published size",
    "vision": "Vision tower",
    "vision_parameters": "Tower's parameters",
    "vision_width": "Tower's width",
    "patch_size": "Patch (px)",
    "image_size": "Image (px)",
    "patches": "Patches",
    "resolution": "Large images",
    "bridge": "Bridge",
    "bridge_parameters": "Bridge's parameters",
    "visual_tokens": "Visual tokens",
    "token_rule": "Token rule",
    "fusion": "Fusion",
    "mask": "Attention to the image",
    "language": "Language model",
    "language_parameters": "Language model's parameters",
    "language_width": "Language model's width",
    "layers": "Layers",
    "heads": "Query heads",
    "kv_heads": "Key heads",
    "context": "Context (tokens)",
    "vision_trained": "Tower trained",
    "language_trained": "Language model trained",
    "boxes": "Boxes as text",
    "points": "Points as text",
    "example": "Example of the format",
    "output": "Output",
    "used_by": "Used by",
    "strength": "What it is known for",
    "limits": "Limits that its makers name",
}


@dataclass(frozen=True)
class Source:
    """Where a fact comes from: file, class, paper and section; how strong that is; the day it was looked at."""

    where: str
    evidence: str  # one of vlm_course.claims.EVIDENCE
    checked: str  # ISO date

    def __post_init__(self):
        if self.evidence not in EVIDENCE:
            raise ValueError(f"source {self.where!r}: evidence {self.evidence!r} is none of {EVIDENCE}")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", self.checked):
            raise ValueError(f"source {self.where!r}: checked is {self.checked!r}, not a date like 2026-11-23")
        if not self.where:
            raise ValueError("a source must say where")

    @property
    def strength(self) -> str:
        """The evidence and the day, in words: what comes from memory was not opened on that day."""
        day = "written down" if self.evidence == "from memory" else "checked"
        return f"{self.evidence}, {day} {self.checked}"


@dataclass(frozen=True)
class Fact:
    """One value of one field, with its source. Numbers have the unit of the field's heading; counts are exact."""

    field: str
    value: Any
    source: Source

    def __post_init__(self):
        if self.field not in FIELDS:
            raise ValueError(f"field {self.field!r} is none of {', '.join(FIELDS)}")

    def __str__(self) -> str:
        return f"{self.value:,}" if isinstance(self.value, int) else str(self.value)


@dataclass(frozen=True)
class Model:
    """One published model, or one closed one as far as its makers describe it.

    `build` tells `catalog.building` how to make the module on the meta device; None where that is not possible.
    """

    name: str
    title: str
    kind: str
    access: str
    facts: Mapping[str, Fact]
    aliases: tuple[str, ...] = ()
    chapters: tuple[int, ...] = ()
    build: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"model {self.name}: kind {self.kind!r} is none of {KINDS}")
        if self.access not in ACCESS:
            raise ValueError(f"model {self.name}: access {self.access!r} is none of {ACCESS}")
        if self.access == "closed" and self.build:
            raise ValueError(f"model {self.name} is closed, but has a configuration to build")

    def __getitem__(self, name: str) -> Any:
        """The value of a field, None where no source was found. Raises ValueError for a field that does not exist."""
        if name not in FIELDS:
            raise ValueError(f"field {name!r} is none of {', '.join(FIELDS)}")
        return self.facts[name].value if name in self.facts else None

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every source of this model once, in the order of the fields."""
        return tuple(dict.fromkeys(fact.source for fact in self.facts.values()))

    def __str__(self) -> str:
        lines = [f"{self.title} ({self.kind}, {self.access})"]
        lines += [f"  {FIELDS[fact.field]}: {fact} [{fact.source.evidence}]" for fact in self.facts.values()]
        return "\n".join([*lines, *(f"  - {s.where} ({s.strength})" for s in self.sources)])


def parse(document: Mapping[str, Any], known: Mapping[str, Model] | None = None) -> list[Model]:
    """The models of one file, checked. `known`: models that a `like` may name beside those of this file."""
    sources = {key: Source(**source) for key, source in document["sources"].items()}
    models = dict(known or {})
    own = []
    for row in document["models"]:
        base = row.pop("like", None)
        if base is not None and base not in models:
            raise ValueError(f"model {row['name']} is like {base!r}, which does not stand before it")
        facts = dict(models[base].facts) if base else {}
        for name, (value, key) in row.pop("facts").items():
            if key not in sources:
                raise ValueError(f"model {row['name']}, field {name}: source {key!r} is none of {sorted(sources)}")
            facts[name] = Fact(name, value, sources[key])
        for name in row.pop("without", ()):  # facts of the model it is like that do not hold here
            facts.pop(name)
        for shared in ("kind", "access"):
            if base and shared not in row:
                row[shared] = getattr(models[base], shared)
        row["facts"] = {name: facts[name] for name in FIELDS if name in facts}
        row["aliases"], row["chapters"] = tuple(row.get("aliases", ())), tuple(row.get("chapters", ()))
        models[row["name"]] = model = Model(**row)
        own.append(model)
    return own


@functools.cache
def all_models() -> tuple[Model, ...]:
    """Every model of the catalog, files in the order of their names."""
    rows: dict[str, Model] = {}
    for file in sorted(files("vlm_course.catalog").joinpath("data").iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".json") and file.name != "parts.json":
            for model in parse(json.loads(file.read_text(encoding="utf-8")), rows):
                if model.name in rows:
                    raise ValueError(f"two models are named {model.name!r}")
                rows[model.name] = model
    return tuple(rows.values())


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def find(name: str) -> Model:
    """The model with this name, title or alias; capitals, spaces and hyphens do not matter.

    Raises ValueError with the names that come close.
    """
    keys: dict[str, Model] = {}
    for model in all_models():
        for other in (model.name, model.title, *model.aliases):
            keys.setdefault(_key(other), model)
    if (key := _key(name)) in keys:
        return keys[key]
    close = difflib.get_close_matches(key, keys, n=5, cutoff=0.5)
    close += [other for other in keys if key and key in other and other not in close]
    names = list(dict.fromkeys(keys[other].name for other in close))[:6]
    hint = f"close to it: {', '.join(names)}" if names else f"there are {', '.join(m.name for m in all_models())}"
    raise ValueError(f"no model named {name!r} in the catalog; {hint}")


def select(
    names: Iterable[str] | None = None,
    *,
    chapter: int | None = None,
    kind: str | None = None,
    access: str | None = None,
) -> tuple[Model, ...]:
    """Models by name, in that order, or all that match chapter, kind and access."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {KINDS}")
    if access is not None and access not in ACCESS:
        raise ValueError(f"access {access!r} is none of {ACCESS}")
    rows = all_models() if names is None else tuple(find(name) for name in names)
    return tuple(
        row
        for row in rows
        if (chapter is None or chapter in row.chapters)
        and (kind is None or row.kind == kind)
        and (access is None or row.access == access)
    )
