"""What the course says about the lesson and about real models, as far as it can be computed."""

import json
import re
from pathlib import Path

import pytest
import torch

from vlm_course.bridges import CAbstractor, LinearBridge, VisionProjection
from vlm_course.catalog.models import MODELS, by_name
from vlm_course.claims import Claim, ClaimTable, chapters, claims, marks

SOLUTIONS = Path(__file__).parents[2] / "solutions"
STORED = sorted((Path(__file__).parents[2] / "vlm_course" / "claims_data").glob("ch*.json"))


@pytest.mark.parametrize("chapter", [int(file.stem[2:]) for file in STORED])
def test_every_claim_leads_to_a_section_that_exists(chapter):
    sources = [file.read_text(encoding="utf-8") for file in SOLUTIONS.glob(f"{chapter:02d}_*.py")]
    headings = [name for text in sources for name in re.findall(r"^# #+ (.+)$", text, flags=re.MULTILINE)]
    rows = claims(chapter)
    assert len({row.id for row in rows}) == len(rows)
    assert [row.id for row in rows if row.cell and row.cell not in headings] == []


def test_what_is_computed_is_shown_or_tested():
    seen = {mark.id for mark in marks()}
    rows = [row for chapter in chapters() for row in claims(chapter) if row.kind in ("computed", "experiment")]
    assert [row.id for row in rows if not row.cell and row.id not in seen] == []


def test_an_unknown_verdict_is_refused():
    row = json.loads(STORED[0].read_text(encoding="utf-8"))[0] | {"verdict": "so-so"}
    with pytest.raises(ValueError, match="so-so"):
        Claim(chapter=0, **row)


def test_a_chapter_without_claims_is_named():
    with pytest.raises(ValueError, match="chapter 99"):
        claims(99)


def test_the_table_shows_every_claim_in_both_forms_and_escapes_html():
    row = json.loads(STORED[0].read_text(encoding="utf-8"))[0] | {"claim": "1 < 2"}
    bundle = ClaimTable((Claim(chapter=0, **row),))._repr_mimebundle_()
    assert "1 &lt; 2" in bundle["text/html"] and "1 < 2" in bundle["text/plain"]


def _bridge(model):
    match model.bridge:
        case "linear":
            return LinearBridge(model.vision_width, model.llm_width)
        case "mlp":
            return VisionProjection(model.vision_width, model.llm_width)
        case "c-abstractor":
            sizes = {"vision_dim": model.vision_width, "llm_dim": model.llm_width, "queries": model.visual_tokens}
            return CAbstractor(**sizes, grid=(16, 16))


@pytest.mark.parametrize("model", [model for model in MODELS if model.counted], ids=lambda model: model.name)
def test_counted_parameters_are_those_of_the_module(model):
    with torch.device("meta"):
        bridge = _bridge(model)
    assert sum(weight.numel() for weight in bridge.parameters()) == model.bridge_parameters


def test_every_model_has_a_source_and_a_date():
    assert all(model.source and re.fullmatch(r"\d{4}-\d\d-\d\d", model.checked) for model in MODELS)
    assert by_name("LLaVA-1.5 13B").llm_width == 5120
    with pytest.raises(ValueError, match="GPT-9"):
        by_name("GPT-9")
