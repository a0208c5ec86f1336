"""Chapter 3's models: four strategies that train, answer and come back from their files."""

import pytest
import torch

from vlm_course.pretrained import load_small
from vlm_course.studies.common import Study, run_study
from vlm_course.studies.fusion_strategies import (
    EXAM,
    QUERIES,
    STRATEGIES,
    STUDY,
    answers,
    build,
    exam_questions,
    in_one_row,
    load,
    logits,
    placeholders,
)
from vlm_course.studies.results import load_results


@pytest.fixture(scope="module")
def small():
    return load_small()


def test_two_conversations_stand_in_one_row():
    ids = torch.tensor([[1, 5, 0, 0], [1, 6, 7, 0], [1, 8, 9, 4], [1, 0, 0, 0]])
    labels = torch.where(ids > 4, ids, -100)
    joined, learned = in_one_row(ids, labels, 0)
    assert joined.tolist() == [[1, 5, 1, 6, 7, 0, 0, 0], [1, 8, 9, 4, 1, 0, 0, 0]]
    assert torch.equal(learned, torch.where(joined > 4, joined, -100))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_reads_its_image_and_its_size_is_shipped_easily(small, strategy):
    model = build(strategy, small, seed=1)
    own = [value for name, value in model.state_dict().items() if not name.startswith("vision.")]
    assert 2 * sum(value.numel() for value in own) < 2_600_000  # bytes in half precision
    if strategy == "cross-attention":
        for block in model.cross.values():
            block.attention_gate.data.fill_(1.0)
    questions = exam_questions(strategy, small, 3)
    assert (questions.ids[0] == small.tokenizer.image_id).sum() == placeholders(strategy, small)
    seen = torch.randn(3, 144, 192, generator=torch.Generator().manual_seed(0))
    moved = [logits(model, questions.ids[:1], image).detach() for image in (seen[:1], seen[1:2])]
    assert (moved[0] - moved[1]).abs().max() > 1e-4
    assert answers(strategy, model, questions, seen).exact.shape == (3, len(EXAM))


def test_interleaved_answers_stand_at_the_questions_own_places(small):
    """Whatever stands before, the predicted words land where the labels are: a model that always says one word."""
    model = build("interleaved", small)
    questions = exam_questions("interleaved", small, 4)
    with torch.no_grad():
        model.decoder.norm.weight.zero_()
    score = answers("interleaved", model, questions, torch.zeros(4, 144, 192), batch=3)
    assert torch.equal(score.predicted >= 0, questions.turn >= 0)


def test_placeholders(small):
    assert [placeholders(s, small) for s in STRATEGIES] == [144, 1, QUERIES, 144]
    with pytest.raises(ValueError, match="'late', expected one of early"):
        build("late", small)


@pytest.mark.parametrize("strategy", ["cross-attention", "resampler", "interleaved"])
def test_a_rehearsal_leaves_weights_that_load(small, tmp_path, strategy):
    one = Study(**{**vars(STUDY), "variants": {strategy: STUDY.variants[strategy]}})
    run_study(one, seeds=1, out=tmp_path, scale=0.0034, log=lambda _: None)
    results = load_results("fusion", tmp_path)
    assert set(results.value(strategy, "exam", "model")) == set(EXAM)
    assert results.rehearsal
    model = load(results, strategy, small)
    assert not any(parameter.requires_grad for parameter in model.parameters())
