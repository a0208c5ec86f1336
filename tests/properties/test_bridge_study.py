"""Costs of bridges, block averages, and the fixed questions that chapter 2 measures with."""

import pytest
import torch

from vlm_course.bridge_study import block_average, bridge_cost, cosine_table, four_bridges
from vlm_course.generation import generate
from vlm_course.llava import Llava, small_config
from vlm_course.probe_questions import PROBE_KINDS, Score, question_set, score
from vlm_course.tokenizer import WordTokenizer
from vlm_course.worlds.scenes import COLOURS

COUNTS = {  # parameters at width 4096 and 5120, tokens
    "linear": (4_198_400, 5_248_000, 576),
    "MLP": (20_979_712, 31_467_520, 576),
    "C-Abstractor": (36_808_192, 47_296_000, 144),
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_sizes(name):
    seven, thirteen, tokens = COUNTS[name]
    small, large = (four_bridges(llm_dim=width)[name] for width in (4096, 5120))
    assert bridge_cost(name, small, tokens=576, vision_dim=1024).parameters == seven
    assert bridge_cost(name, large, tokens=576, vision_dim=1024).parameters == thirteen
    assert bridge_cost(name, small, tokens=576, vision_dim=1024).tokens == tokens


def test_flops_are_two_for_a_multiply_add():
    cost = bridge_cost("MLP", four_bridges()["MLP"], tokens=576, vision_dim=1024)
    assert cost.flops == 2 * 576 * (1024 * 4096 + 4096 * 4096)


def test_block_average_is_the_mean_of_each_block():
    tokens = torch.arange(16.0).reshape(1, 16, 1)
    out = block_average(tokens, 2)[0, :, 0].reshape(4, 4)
    assert out.tolist() == [[2.5, 2.5, 4.5, 4.5]] * 2 + [[10.5, 10.5, 12.5, 12.5]] * 2
    assert torch.equal(block_average(tokens, 1), tokens)
    for count, block, words in ((16, 3, "blocks of 3"), (17, 2, "17, expected a square")):
        with pytest.raises(ValueError, match=words):
            block_average(torch.zeros(1, count, 2), block)


def test_cosine_table():
    table = cosine_table(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 3.0], [5.0, 0.0]]))
    assert torch.allclose(table, torch.tensor([[0.0, 1.0], [0.5**0.5, 0.5**0.5]]))


@pytest.fixture(scope="module")
def questions():
    return question_set(WordTokenizer.small(), scenes=5)


def test_every_label_belongs_to_a_turn(questions):
    assert torch.equal(questions.labels >= 0, questions.turn >= 0)
    assert questions.turn.amax(1).tolist() == [len(PROBE_KINDS) - 1] * 5
    end = questions.labels == questions.tokenizer.eos_id
    assert end.sum(1).tolist() == [len(PROBE_KINDS)] * 5  # each answer ends once


def test_perfect_answers_score_one(questions):
    perfect = Score(questions, 0.0, torch.where(questions.turn >= 0, questions.labels, -1))
    assert perfect.accuracy() == 1 and perfect.accuracy("box") == 1 and perfect.box_error() == 0
    row = int(questions.asked[:, 0].nonzero()[0])
    assert perfect.answer(row, "colour") in COLOURS


def test_majority_is_the_most_frequent_answer(questions):
    for k, kind in enumerate(PROBE_KINDS):
        asked = questions.asked[:, k].nonzero()[:, 0].tolist()
        answers = [questions.tokenizer.decode(questions.labels[row][questions.turn[row] == k]) for row in asked]
        assert questions.majority(kind) == max(map(answers.count, answers)) / len(answers)
    counts = questions.asked[:, :-1].sum(0)
    shares = torch.tensor([questions.majority(kind) for kind in PROBE_KINDS[:-1]])
    assert questions.majority() == pytest.approx((shares * counts).sum().item() / counts.sum().item())


def test_one_wrong_word_costs_one_answer(questions):
    predicted = torch.where(questions.turn >= 0, questions.labels, -1)
    row, place = (questions.turn == PROBE_KINDS.index("count")).nonzero()[0].tolist()
    predicted[row, place] += 1
    wrong = Score(questions, 0.0, predicted)
    asked = questions.asked[:, PROBE_KINDS.index("count")].sum().item()
    assert wrong.accuracy("count") == pytest.approx(1 - 1 / asked) and wrong.accuracy("shape") == 1


def test_box_error_is_in_pixels(questions):
    predicted = torch.where(questions.turn >= 0, questions.labels, -1)
    box, first = questions.turn == PROBE_KINDS.index("box"), questions.tokenizer.id_of("0")
    number = box & (questions.labels >= first) & (questions.labels < first + 256)
    off = predicted.clone()
    off[number] = torch.where(off[number] < first + 128, off[number] + 8, off[number] - 8)
    assert Score(questions, 0.0, off).box_error() == pytest.approx(8 * 96 / 256)


def test_scores_agree_with_greedy_generation(questions):
    tokenizer = questions.tokenizer
    torch.manual_seed(3)
    model = Llava(small_config(tokenizer.vocab_size)).eval()
    with torch.no_grad():
        features = model.encode_images(questions.pixels)
    scored = score(model, questions, features)
    first = int((questions.turn[0] == 0).nonzero()[0])
    written = generate(model, questions.ids[:1, :first], image_features=features[:1], max_new_tokens=1)
    assert written[0, 0] == scored.predicted[0, first]
