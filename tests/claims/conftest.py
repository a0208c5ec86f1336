"""Ties a test to the words of the claim that it holds to account."""

import functools
import re

import pytest

from vlm_course.claims import claims


def _truth(id_: str) -> str:
    rows = {row.id: row for row in claims(int(id_.partition("-")[0]))}
    return rows[id_].truth


@pytest.fixture
def says(request):
    """says(text, ...): each text stands in the corrected statement of the test's claim, so a wrong number there fails.

    A number must stand alone: "576" is not found in "1,576". Give `id` where a test has several marks.
    """
    ids = [mark.args[0] for mark in request.node.iter_markers("claim")]

    def check(*texts: object, id: str | None = None) -> None:
        (chosen,) = {id} if id else set(ids)
        assert chosen in ids, f"the test is marked with {ids}, not with {chosen}"
        truth = _truth(chosen)
        for text in map(str, texts):
            found = re.search(rf"(?<![\w.,]){re.escape(text)}(?![\w]|[.,]\d)", truth)
            assert found, f"claim {chosen} does not say {text!r}, which was computed here: {truth}"

    return check


@pytest.fixture(scope="session")
def real_llava():
    """real_llava("7B") or ("13B"): transformers' own class at the sizes of LLaVA-1.5, on the meta device."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {
        "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    }

    @functools.cache
    def build(name: str, vocab_size: int = 32000):
        vision = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
        text = LlamaConfig(vocab_size=vocab_size, **sizes[name])
        with torch.device("meta"):
            return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))

    return build


@pytest.fixture(scope="session")
def count():
    """count(module): its parameters."""
    return lambda module: sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="session")
def small():
    """The shipped model."""
    from vlm_course.pretrained import load_small

    return load_small()


@pytest.fixture(scope="session")
def exam(small):
    """Questions of every kind about 24 scenes that no training saw."""
    from vlm_course.probe_questions import question_set

    return question_set(small.tokenizer, scenes=24, seed=11)


@pytest.fixture(scope="session")
def seen(small, exam):
    """The visual tokens of the exam's scenes, [B, M, D_llm]."""
    import torch

    with torch.no_grad():
        return small.model.encode_images(exam.pixels)


@pytest.fixture(scope="session")
def sharp(small, exam, seen):
    """What the shipped model answers in the exam, the control of every experiment on it."""
    from vlm_course.probe_questions import score

    return score(small.model, exam, seen)


@pytest.fixture(scope="session")
def swapped(small, exam, seen):
    """Its answers when every question comes with another scene."""
    from vlm_course.probe_questions import score

    return score(small.model, exam, seen.roll(1, dims=0))
