"""The forward-pass simulation, driven through its real widgets, on the real class with random weights."""

import pytest
import torch

from vlm_course.chat import encode_chat
from vlm_course.generation import generate
from vlm_course.llava import Llava, small_config
from vlm_course.simulations.forward_pass import REST, STAGES, fastest, forward_simulation, record
from vlm_course.tokenizer import WordTokenizer

QUESTIONS = ("Describe the image.", "what color is the star ?")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Llava(small_config(WordTokenizer.small().vocab_size)).eval().requires_grad_(False)
    model.decoder.head.weight.mul_(20)  # a random model whose words differ
    model.decoder.head.weight[[model.config.image_id, WordTokenizer.small().eos_id]] = 0.0
    return model


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 96, 96, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@pytest.fixture(scope="module")
def recordings(model, pixels):
    both = (record(model, WordTokenizer.small(), pixels, QUESTIONS[0], cached=c, limit=5) for c in (True, False))
    return tuple(both)


def test_the_words_are_those_of_generate(model, pixels, recordings):
    tokenizer = WordTokenizer.small()
    ids = torch.tensor([encode_chat(tokenizer, [(QUESTIONS[0], None)], 144)[0]])
    new = generate(model, ids, pixels[None], max_new_tokens=5, eos_id=tokenizer.eos_id)[0].tolist()
    words = tuple(tokenizer.decode([token], skip_special=False) for token in new)
    assert [recording.answer for recording in recordings] == [words, words]
    for recording in recordings:
        assert tuple(one.candidates[0][0] for one in recording.passes) == words


def test_with_a_cache_a_pass_reads_one_token_and_without_it_everything(recordings):
    cached, plain = recordings
    length = len(cached.prompt)
    assert cached.images == 144
    assert [(p.read, p.cached) for p in cached.passes] == [(length, 0)] + [(1, length + i) for i in range(4)]
    assert [(p.read, p.cached) for p in plain.passes] == [(length + i, 0) for i in range(5)]


def test_shapes_are_those_of_the_modules(recordings):
    first, second = recordings[0].passes[:2]
    length = len(recordings[0].prompt)
    vocabulary = WordTokenizer.small().vocab_size
    assert {stage.name: stage.shape for stage in first.stages} == {
        "vision tower": (1, 145, 192),
        "bridge": (1, 144, 256),
        "decoder blocks": (1, length, 256),
        "head": (1, length, vocabulary),
        REST: (),
    }
    assert {stage.name for stage in second.stages} == {"decoder blocks", "head", REST}
    assert second.stage("head").shape == (1, 1, vocabulary)
    assert {stage.name for stage in recordings[1].passes[1].stages} == {*STAGES, REST}


def test_times_add_up(recordings):
    for recording in recordings:
        for one in recording.passes:
            assert all(stage.milliseconds >= 0 for stage in one.stages)
            assert sum(stage.milliseconds for stage in one.stages) == pytest.approx(one.milliseconds, rel=1e-6)
    times = fastest(recordings)
    assert set(times) == {"vision tower", "bridge", "prefill", "decode"} and min(times.values()) > 0
    assert times["bridge"] < times["vision tower"]


def test_probabilities_are_the_models(recordings):
    for one in recordings[0].passes:
        chances = [chance for _, chance in one.candidates]
        assert chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1 + 1e-5


def test_the_model_is_left_as_it_was(model, pixels):
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    record(model, WordTokenizer.small(), pixels, QUESTIONS[1], limit=2)
    assert before == {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="is a batch dimension left"):
        record(model, WordTokenizer.small(), pixels[None], QUESTIONS[1])


def test_widgets_redraw_picture_and_text(model, pixels, capsys):
    simulation = forward_simulation(model, WordTokenizer.small(), pixels, QUESTIONS)
    assert "Pass 1." in simulation.shown.text and "144 of 151 tokens of the prompt are image" in simulation.shown.text
    picture = simulation.figure.value
    simulation.controls["number"].value = 3
    assert simulation.figure.value != picture
    assert "The decoder reads 1 token; 152 are in the cache" in simulation.readout.value
    simulation.controls["cached"].value = False
    assert "The decoder reads 153 tokens; 0 are in the cache" in simulation.readout.value
    simulation.controls["question"].value = QUESTIONS[1]
    assert "color is the star" in simulation.readout.value
    simulation.first_frame()
    assert "Next word:" in capsys.readouterr().out


def test_errors_in_drawing_are_not_swallowed(model, pixels):
    simulation = forward_simulation(model, WordTokenizer.small(), pixels, QUESTIONS[1:])
    simulation.draw = lambda **values: 1 / 0
    with pytest.raises(ZeroDivisionError):
        simulation.controls["number"].value = 2
