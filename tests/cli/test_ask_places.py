"""What `vlm-course ask` draws and warns of: points and boxes, the right names, nothing where there is nothing."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from vlm_course import ask
from vlm_course.ask import answering, novelty
from vlm_course.ask.answering import Found, point_out
from vlm_course.ask.drawing import Mark, draw_marks
from vlm_course.ask.reader import Reader
from vlm_course.ask.scope import Description, Intent, Refusal, understand

RED_BALL = Description("large", "red", "circle")
SMALL_RED = Description("small", "red", "circle")
BLUE_STAR = Description("small", "blue", "star")


class Scripted:
    """Stands for the reader: a scene, and the replies to the questions for boxes, in order."""

    def __init__(self, scene, *replies):
        self.scene, self.replies, self.asked = scene, list(replies), []
        self.image_size = (960, 480)

    def describe(self):
        return self.scene, None

    def ask(self, *questions, **options):
        self.asked += questions
        return [SimpleNamespace(text=self.replies.pop(0), probability=0.9) for _ in questions]

    def place(self, text):
        return Reader.place(self, text)


def test_a_point_is_drawn_as_a_cross_and_a_box_as_a_frame():
    """Black on white, so that both can be seen on any ground; the picture itself stays as it is."""
    picture = Image.new("RGB", (400, 400), (0, 128, 0))
    drawn = draw_marks(picture, [Mark("here", (100, 200, 100, 200)), Mark("there", (250, 250, 350, 300))])
    assert drawn.size == (400, 400) and picture.getcolors() == [(400 * 400, (0, 128, 0))]
    for x, y in ((100, 200), (93, 200), (107, 200), (100, 195), (100, 207)):
        assert drawn.getpixel((x, y)) == (0, 0, 0), (x, y)
    assert drawn.getpixel((110, 210)) == (0, 128, 0)  # no frame around a point
    assert drawn.getpixel((250, 275)) == drawn.getpixel((300, 300)) == (0, 0, 0)
    assert drawn.getpixel((300, 275)) == (0, 128, 0)


def test_small_pictures_are_enlarged_with_their_marks():
    drawn = draw_marks(Image.new("RGB", (96, 48)), [])
    assert drawn.size == (96 * 8, 48 * 8)


@pytest.mark.parametrize(("text", "place"), [
    ("[0 0 99 99]", True), ("( 10 20 )", True), ("10 20", False), ("[1 2 3]", False), ("red", False),
])  # fmt: skip
def test_places_are_read_only_in_their_own_form(text, place):
    found = Scripted([]).place(text)
    assert (found is not None) is place
    if place:
        left, top, right, bottom = found
        assert 0 <= left <= right <= 960 and 0 <= top <= bottom <= 480


def test_a_count_points_to_what_was_counted():
    reader = Scripted([RED_BALL, SMALL_RED, BLUE_STAR], "[0 0 10 10]", "no box")
    marks = point_out(reader, Intent("count", (Description(colour="red"),)), Found("2", 0.9, ()))
    assert reader.asked == [Intent("box", (Description(colour="red", shape="circle"),)).canonical()] * 2
    assert [mark.label for mark in marks] == ["red circle"]  # the second reply was no place


@pytest.mark.parametrize(
    ("intent", "text"),
    [
        (Intent("count", (RED_BALL,)), "0"),
        (Intent("existence", (RED_BALL,)), "no"),
        (Intent("existence", (RED_BALL,), negated=True), "yes"),
    ],
)
def test_where_nothing_is_nothing_is_asked(intent, text):
    reader = Scripted([RED_BALL])
    assert point_out(reader, intent, Found(text, 0.9, ())) == [] and reader.asked == []


def test_a_thing_without_colour_and_shape_cannot_be_pointed_to():
    reader = Scripted([])
    found = Found("red", 0.9, (Description(colour="red"),))
    assert point_out(reader, Intent("colour", (Description(shape="circle"),)), found) == [] and reader.asked == []


def test_a_name_has_its_size_only_where_another_thing_would_fit_without_it():
    """As the questions of the training have it."""
    name = answering._as_trained
    assert name("colour", BLUE_STAR, [RED_BALL, BLUE_STAR]) == Description(shape="star")
    assert name("colour", SMALL_RED, [RED_BALL, SMALL_RED]) == Description(size="small", shape="circle")
    assert name("shape", SMALL_RED, [RED_BALL, SMALL_RED]) == Description(size="small", colour="red")
    assert name("relation", SMALL_RED, [RED_BALL, SMALL_RED]) == Description(colour="red", shape="circle")


def test_doubt_is_said_and_an_empty_drawing_too(tmp_path, monkeypatch, capsys):
    """A picture without any shape, an answer that is no more likely than not."""
    path = tmp_path / "plain.png"
    Image.new("RGB", (96, 96), "white").save(path)
    monkeypatch.setattr(answering, "answer", lambda reader, intent: Found("no", 0.51, ()))
    monkeypatch.setattr(novelty, "load", lambda: SimpleNamespace(is_new=lambda patches: torch.tensor(True)))
    assert ask.main(path, "is there a red circle?", boxes=tmp_path / "out.png") == 0
    out, warnings = capsys.readouterr()
    assert out == "no\n"
    assert "unlike the drawn scenes" in warnings and "not sure (probability 0.51)" in warnings
    assert "nothing to point to" in warnings and (tmp_path / "out.png").is_file()


def test_two_questions_at_once_are_refused():
    refusal = understand("what colour and what size has the circle?")
    assert isinstance(refusal, Refusal) and "one question at a time" in refusal.sentence


def test_a_missing_measure_of_novelty_says_how_to_make_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"restore it with git, or make it with python -m vlm_course\.ask\.novelty"
    ):
        novelty.load(tmp_path / "novelty.safetensors")


def test_novelty_is_made_by_its_program_from_scenes_of_two_seeds(monkeypatch, tmp_path, capsys):
    seeds, saved = [], []
    draw = torch.Generator().manual_seed(0)

    def features(model, n, *, seed):
        seeds.append((n, seed))
        return torch.randn(300, 4, generator=draw)

    monkeypatch.setattr(novelty, "scene_features", features)
    monkeypatch.setattr(novelty, "save", saved.append)
    novelty.main()
    assert seeds == [(novelty.FIT_SCENES, novelty.SEED), (novelty.CALIBRATION_SCENES, novelty.SEED + 1)]
    assert f"threshold {saved[0].threshold:.2f}" in capsys.readouterr().out


def test_the_word_list_is_written_as_it_is_shipped(tmp_path):
    """python -m vlm_course.pretrained, into another folder, gives the shipped file byte by byte."""
    code = (
        "import runpy, sys\nfrom pathlib import Path\nimport vlm_course.pretrained as pretrained\n"
        "shipped = (pretrained.FOLDER / 'vocabulary.json').read_bytes()\n"
        "pretrained.FOLDER = Path(sys.argv[1])\nrunpy.run_module('vlm_course.pretrained', run_name='__main__')\n"
        "assert (pretrained.FOLDER / 'vocabulary.json').read_bytes() == shipped\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
