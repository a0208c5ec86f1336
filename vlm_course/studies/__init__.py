"""Studies: small experiments in training whose result a chapter shows.

A study trains the same tiny model several times, with one thing changed (a *variant*) and with several seeds, measures
every model beside its controls, and writes one JSON table, the weights of its first seed in half precision, and a card
that says with what data, on which machine and by which command. The results shipped with the course lie in `data/`;
`vlm-course study NAME` makes them again, `--scale` rehearses in a minute on a CPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .common import Study

# Name -> module with a `STUDY`.
STUDIES = {
    "instruction-mix": "vlm_course.studies.instruction_mix",
    "hallucination": "vlm_course.studies.hallucination",
    "fusion": "vlm_course.studies.fusion_strategies",
    "feature-layer": "vlm_course.studies.feature_layer",
}


def study(name: str) -> Study:
    """The study called `name`. Raises ValueError for an unknown name."""
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}; known are {', '.join(STUDIES)}")
    return importlib.import_module(STUDIES[name]).STUDY
