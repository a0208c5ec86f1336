"""The catalog as data: complete, sourced, refused where it is wrong, found by its names."""

import copy
import re

import pytest

from vlm_course.catalog import FIELDS, Fact, Source, all_models, catalog_table, find, select
from vlm_course.catalog.models import MODELS
from vlm_course.catalog.records import parse

DOCUMENT = {
    "sources": {"paper": {"where": "A paper, section 1", "evidence": "from memory", "checked": "2026-11-23"}},
    "models": [
        {
            "name": "one",
            "title": "One",
            "kind": "vision-language model",
            "access": "open weights",
            "facts": {"vision": ["a tower", "paper"], "layers": [3, "paper"]},
        }
    ],
}

# what the lesson's tables name, by chapter; see also tests/catalog/test_building.py
TABLES = {
    1: ["CLIP ViT-L/14", "SigLIP", "EVA-CLIP", "DINOv2", "PaliGemma", "InternVL"],
    2: ["LLaVA", "LLaVA-1.5", "Flamingo", "Qwen-VL", "Honeybee"],
    3: ["LLaVA-1.5 13B", "Flamingo", "Qwen-VL", "InternVL", "InternVL 1.5", "Fuyu", "Gemini"],
    7: ["Kosmos-2", "Shikra", "Qwen2.5-VL"],
    8: ["DocOwl", "TextMonkey", "UReader", "Nougat", "GPT-4V", "Gemini"],
    9: ["LLaVA-NeXT", "InternVL 2.5", "Qwen2.5-VL", "Molmo", "GPT-4o", "Gemini 2.0", "Claude Opus 4", "RT-2", "Emu"],
}
OTHERS = ["Qwen2-VL", "OpenVLA", "Donut", "BLIP-2", "InstructBLIP", "DALL-E 3", "NFNet", "InternViT-6B"]


@pytest.mark.parametrize("chapter", TABLES)
def test_what_the_lessons_tables_name_is_there_and_says_where_it_belongs(chapter):
    assert all(find(name)["developer"] for name in TABLES[chapter])
    assert select(chapter=chapter)


def test_what_the_text_names_is_there():
    assert all(find(name).facts for name in OTHERS)


def test_names_are_found_whatever_their_spelling():
    assert find("qwen2.5 vl") is find("Qwen2.5-VL 7B") is find("QWEN2.5-VL-7B")
    assert find("LLaVA-1.5 13B").name == "llava-1.5-13b"


@pytest.mark.parametrize(
    ("wrong", "close"), [("llava-1.6-mistral", "llava-next-mistral-7b"), ("qwen3-vl", "qwen2-vl"), ("zzzz", "fuyu-8b")]
)
def test_an_unknown_name_lists_those_that_come_close(wrong, close):
    with pytest.raises(ValueError, match=f"{wrong}.*{close}"):
        find(wrong)


def test_every_model_has_facts_with_sources_and_names_that_are_its_own():
    names = [model.name for model in all_models()]
    assert len(set(names)) == len(names) and len(names) > 50
    keys = [
        re.sub(r"[^a-z0-9.]+", "-", alias.lower()) for model in all_models() for alias in (model.name, *model.aliases)
    ]
    assert sorted(set(keys)) == sorted(keys), "two models answer to one name"
    for model in all_models():
        assert model["released"] and model["developer"], model.name
        assert all(isinstance(fact.value, (int, str)) and fact.value for fact in model.facts.values()), model.name


def test_a_closed_model_has_no_number_of_its_architecture():
    closed = select(access="closed")
    assert {model.name for model in closed} >= {"gpt-4v", "gpt-4o", "gemini-2.0", "claude-opus-4", "rt-2", "dall-e-3"}
    inside = (
        "parameters",
        "vision_parameters",
        "bridge_parameters",
        "layers",
        "heads",
        "vision_width",
        "visual_tokens",
    )
    for model in closed:
        assert model.build is None
        assert [name for name in inside if model[name] is not None] == []
        assert all(fact.source.where for fact in model.facts.values())


def test_a_number_computed_here_says_with_what():
    for model in all_models():
        for fact in model.facts.values():
            if isinstance(fact.value, int) and fact.source.evidence == "computed here":
                assert model.build, f"{model.name}.{fact.field} cannot have been computed"


def test_chapter_2s_rows_say_the_same_as_the_catalog():
    for row in MODELS:
        model = find(row.name)
        assert row.visual_tokens == model["visual_tokens"]
        for name, value in [("vision_width", row.vision_width), ("language_width", row.llm_width)]:
            assert value is None or value == model[name], row.name
        if row.counted:
            assert row.bridge_parameters == model["bridge_parameters"]


def test_a_model_takes_over_the_facts_of_the_one_it_is_like():
    document = copy.deepcopy(DOCUMENT)
    two = {"name": "two", "title": "Two", "like": "one", "without": ["vision"], "facts": {"layers": [4, "paper"]}}
    document["models"].append(two)
    one, other = parse(document)
    assert (one["layers"], other["layers"]) == (3, 4)
    assert other.kind == one.kind and other["vision"] is None and one["vision"] == "a tower"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["sources"]["paper"].update(evidence="rumour"), "rumour"),
        (lambda d: d["sources"]["paper"].update(checked="today"), "today"),
        (lambda d: d["sources"]["paper"].update(where=""), "must say where"),
        (lambda d: d["models"][0]["facts"].update(vision=["a tower", "nowhere"]), "nowhere"),
        (lambda d: d["models"][0]["facts"].update(colour=["red", "paper"]), "colour"),
        (lambda d: d["models"][0].update(kind="toy"), "toy"),
        (lambda d: d["models"][0].update(access="leaked"), "leaked"),
        (lambda d: d["models"][0].update(like="three"), "three"),
        (lambda d: d["models"][0].update(access="closed", build={"timm": "x"}), "closed"),
    ],
)
def test_wrong_data_is_refused_with_a_name(change, message):
    document = copy.deepcopy(DOCUMENT)
    change(document)
    with pytest.raises(ValueError, match=message):
        parse(document)


def test_a_field_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="colour"):
        find("fuyu")["colour"]
    with pytest.raises(ValueError, match="colour"):
        Fact("colour", "red", Source("here", "from memory", "2026-11-23"))


def test_the_table_has_a_row_per_model_in_the_order_asked_for():
    table = catalog_table(["bridge", "visual_tokens"], names=["Qwen-VL", "LLaVA-1.5", "GPT-4o"])
    lines = str(table).splitlines()
    assert lines[0].split()[:2] == ["model", "bridge"]
    assert [line.split()[0] for line in lines[2:5]] == ["Qwen-VL", "LLaVA-1.5", "GPT-4o"]
    assert "not published" in lines[4] and "[1]" in lines[2]
    page = table._repr_mimebundle_()["text/html"]
    assert page.count("<tr>") == 4 and "<sup>1</sup>" in page and "<ol>" in page


def test_the_table_rounds_counts_unless_asked_for_all_digits():
    short = str(catalog_table(["parameters", "vision_width"], names=["llava-1.5-13b"], sources=False))
    assert "13.4B" in short and "1,024" in short and "[" not in short
    assert "13,351,494,656" in str(catalog_table(["parameters"], names=["llava-1.5-13b"], exact=True))


def test_the_table_escapes_html():
    page = catalog_table(["example"], names=["kosmos-2"])._repr_html_()
    assert "&lt;phrase&gt;" in page and "<phrase>" not in page


def test_a_table_without_rows_or_with_unknown_fields_is_refused():
    with pytest.raises(ValueError, match="unknown field 'colour'"):
        catalog_table(["colour"])
    with pytest.raises(ValueError, match="0 models"):
        catalog_table(["vision"], chapter=4, access="closed")
    with pytest.raises(ValueError, match="toys"):
        catalog_table(["vision"], kind="toys")
    with pytest.raises(ValueError, match="secret"):
        select(access="secret")


def test_every_field_is_used_and_headed():
    used = {name for model in all_models() for name in model.facts}
    assert used == set(FIELDS)


def test_a_model_prints_its_facts_and_sources():
    text = str(find("fuyu"))
    assert text.startswith("Fuyu-8B") and "9,408,238,592 [computed here]" in text and "checked 2026-11-23" in text


def test_what_comes_from_memory_is_not_called_checked():
    recalled = next(f for model in all_models() for f in model.facts.values() if f.source.evidence == "from memory")
    assert recalled.source.strength == "from memory, written down 2026-11-23"
