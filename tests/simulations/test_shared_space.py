"""The simulations of chapter 0, driven through their real widgets on a small untrained model."""

import html
import io
import re

import pytest
import torch

from vlm_course.contrastive import ContrastiveModel, TextTower, TextTowerConfig
from vlm_course.llava import Llava, small_config
from vlm_course.simulations import figures, shared_space
from vlm_course.tokenizer import WordTokenizer
from vlm_course.vit import VisionTransformer
from vlm_course.worlds import scenes

N = 4


@pytest.fixture(scope="module")
def tokenizer():
    return WordTokenizer(["a", "what", "colour", "is", "the", *scenes.SHAPES, *scenes.COLOURS, *scenes.SIZES])


@pytest.fixture(scope="module")
def world():
    sample = scenes.sample(N, generator=torch.Generator().manual_seed(0), objects=(1, 3))
    return scenes.render(sample, generator=torch.Generator().manual_seed(1)), [
        ", ".join(sample.describe(i)) for i in range(N)
    ]


@pytest.fixture(scope="module")
def contrastive(tokenizer):
    torch.manual_seed(7)
    text = TextTowerConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=1, heads=2, mlp_width=64, max_length=32, eos_id=2
    )
    vision = small_config(tokenizer.vocab_size).vision
    return ContrastiveModel(VisionTransformer(vision), TextTower(text), 32).eval()


def padded(tokenizer, captions):
    rows = [torch.tensor([*tokenizer.encode(caption), tokenizer.eos_id]) for caption in captions]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)


@pytest.fixture
def towers(contrastive, tokenizer, world):
    pixels, captions = world
    models = {"trained": contrastive, "untrained": shared_space.untrained(contrastive)}
    spaces = {
        name: shared_space.two_towers(model, pixels, padded(tokenizer, captions)) for name, model in models.items()
    }
    return shared_space.two_towers_simulation(pixels, captions, spaces)


def prompt(tokenizer, question, visual_tokens=144):
    ids = [
        tokenizer.bos_id,
        *[tokenizer.image_id] * visual_tokens,
        tokenizer.user_id,
        *tokenizer.encode(question),
        tokenizer.assistant_id,
    ]
    return torch.tensor(ids)


@pytest.fixture(scope="module")
def llava(tokenizer):
    torch.manual_seed(0)
    return Llava(small_config(tokenizer.vocab_size)).eval()


@pytest.fixture
def merging(llava, tokenizer, world):
    questions = ["what colour is the star", "what colour is the small circle", "what is the red", "is the cross red"]
    return shared_space.merging_simulation(
        llava, tokenizer, world[0], [prompt(tokenizer, question) for question in questions]
    )


def shown(simulation):
    """What a reader sees: the picture's source and the words under it."""
    return simulation.figure.value, re.sub("<[^>]+>", " ", simulation.readout.value)


@pytest.mark.parametrize(("name", "value"), [("scene", 2), ("tower", "untrained")])
def test_every_control_of_the_two_towers_changes_figure_and_text(towers, name, value):
    before = shown(towers)
    towers.controls[name].value = value
    after = shown(towers)
    assert after[0] != before[0] and after[1] != before[1]


@pytest.mark.parametrize(("name", "value"), [("layer", 6), ("scene", 3)])
def test_every_control_of_the_merging_stream_changes_figure_and_text(merging, name, value):
    before = shown(merging)
    merging.controls[name].value = value
    after = shown(merging)
    assert after[0] != before[0] and after[1] != before[1]


def test_the_text_names_the_selected_scene_and_its_own_caption(towers, world):
    towers.controls["scene"].value = 3
    assert "Scene 3" in shown(towers)[1] and world[1][3] in shown(towers)[1]


def test_the_stated_rank_is_the_rank_by_brute_force(towers, contrastive, tokenizer, world):
    pixels, captions = world
    with torch.inference_mode():
        image = contrastive.encode_image(pixels[1:2])
        cosines = [float(image @ contrastive.encode_text(padded(tokenizer, [caption])).T) for caption in captions]
    rank = 1 + sum(cosine > cosines[1] for cosine in cosines)
    towers.controls["scene"].value = 1
    assert f"Its own caption is number {rank} of {N}" in shown(towers)[1]
    assert f"Cosine with its own caption {cosines[1]:.2f}" in shown(towers)[1]


def test_the_untrained_control_is_another_model_of_the_same_shapes(contrastive):
    control = shared_space.untrained(contrastive)
    assert [w.shape for w in control.parameters()] == [w.shape for w in contrastive.parameters()]
    assert not torch.equal(control.image_projection.weight, contrastive.image_projection.weight)
    again = shared_space.untrained(contrastive)
    assert all(torch.equal(one, two) for one, two in zip(control.parameters(), again.parameters(), strict=True))


def test_words_do_not_depend_on_the_picture_before_the_first_block(merging, llava, tokenizer, world):
    here = shared_space.journey(
        llava, tokenizer, prompt(tokenizer, "what colour is the star"), world[0][0], -torch.ones(3, 96, 96)
    )
    assert here.effect[0].abs().max() == 0 and (here.effect[1:] > 0).all()
    assert here.patches.shape == (7, 144, 256) and here.texts.shape == (7, 7, 256) and len(here.words) == 7
    assert "No word depends on the picture yet." in shown(merging)[1]


def test_the_last_layer_answers_as_the_whole_model_does(llava, tokenizer, world):
    ids = prompt(tokenizer, "what colour is the star")
    here = shared_space.journey(llava, tokenizer, ids, world[0][0], -torch.ones(3, 96, 96))
    with torch.inference_mode():
        word = llava(ids[None], world[0][:1])[0, -1].argmax()
    assert here.answers[-1] == tokenizer.decode([word], skip_special=False) and len(here.answers) == 7


def test_a_picture_that_equals_the_control_moves_nothing(llava, tokenizer, world):
    pixels = world[0][0]
    assert (
        shared_space.journey(llava, tokenizer, prompt(tokenizer, "what is red"), pixels, pixels).effect.abs().max() == 0
    )


def test_a_prompt_without_a_picture_is_refused(llava, tokenizer, world):
    ids = torch.tensor(tokenizer.encode("what is red"))
    with pytest.raises(ValueError, match="placeholder"):
        shared_space.journey(llava, tokenizer, ids, world[0][0], world[0][0])


def test_the_plane_keeps_all_of_flat_data_and_names_unequal_widths():
    flat = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        2, 7, generator=torch.Generator().manual_seed(1)
    )
    (first, second), kept = shared_space.principal_plane(flat[:12], flat[12:])
    assert first.shape == (12, 2) and second.shape == (8, 2) and kept == pytest.approx(1)
    assert torch.allclose(
        torch.cdist(torch.cat([first, second]), torch.cat([first, second])), torch.cdist(flat, flat), atol=1e-4
    )
    with pytest.raises(ValueError, match=r"\[128, 192\]"):
        shared_space.principal_plane(torch.randn(3, 192), torch.randn(3, 128))


def test_the_picture_carries_its_alt_text_and_is_the_same_bytes_each_time(towers):
    first, again = towers.frame().picture(), towers.frame().picture()
    assert first.data == again.data
    assert html.escape(first.alt) in first.html() and len(first.alt.split()) > 15


def test_without_webp_a_figure_is_a_png_of_the_same_pixels(towers, monkeypatch):
    from PIL import Image, features

    def pixels(picture):
        return picture.kind, Image.open(io.BytesIO(picture.data)).convert("RGB")

    kind, small = pixels(towers.frame().picture())
    monkeypatch.setattr(features, "check", lambda name: False)
    other, large = pixels(towers.frame().picture())
    assert (kind, other) == ("webp", "png") and small.tobytes() == large.tobytes()


def test_the_picture_beside_the_widget_is_the_same_bytes(towers, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    towers.first_frame()
    assert shown[0].html() == towers.figure.value


def test_the_first_frame_needs_no_widget(towers, capsys):
    towers.first_frame()
    assert "Scene 0, trained towers" in capsys.readouterr().out


def test_an_error_while_drawing_is_not_swallowed(towers):
    towers.draw = lambda **values: 1 / 0
    with pytest.raises(ZeroDivisionError):
        towers.controls["scene"].value = 1


def test_a_figure_without_a_description_is_refused():
    figure, _ = figures.axes()
    with pytest.raises(ValueError, match="alt text"):
        figures.picture(figure, "a figure")


def test_a_batch_is_not_drawn_as_one_scene():
    _, ax = figures.axes()
    with pytest.raises(ValueError, match="batch dimension"):
        figures.draw_scene(ax, torch.zeros(1, 3, 96, 96))
