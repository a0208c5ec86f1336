"""Page geometry by hand-checked numbers and round trips; layout positions against LayoutLM in transformers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LayoutLMConfig
from transformers.models.layoutlm.modeling_layoutlm import LayoutLMEmbeddings

from vlm_course import documents
from vlm_course.documents import PAGES, LayoutEmbedding, normalise_boxes, token_boxes

positive = st.floats(0.1, 5000)

# ----------------------------------------------------------------------------------------------- page geometry


@pytest.mark.parametrize(
    "page, dpi, pixels",
    [("letter", 300, (3300, 2550)), ("letter", 72, (792, 612)), ("a4", 300, (3508, 2480)), ("legal", 100, (1400, 850))],
)
def test_pages_in_pixels(page, dpi, pixels):
    assert documents.page_pixels(PAGES[page], dpi) == pixels


def test_twelve_points_on_a_page_squeezed_to_336_pixels():
    scale = documents.fit_scale(documents.page_pixels(PAGES["letter"], 300), (336, 336))
    assert 1 / scale == pytest.approx(9.82, abs=0.005)
    assert documents.points_to_pixels(12, 300) == 50
    assert documents.points_to_pixels(12, 300) * scale == pytest.approx(5.1, abs=0.05)
    assert documents.x_height_pixels(12, 300, scale=scale) == pytest.approx(2.5, abs=0.05)
    assert documents.x_height_pixels(12, 300, x_height=0.448) == pytest.approx(22.4)


def test_fit_scale_is_that_of_the_tighter_side():
    assert documents.fit_scale((100, 400), (50, 100)) == 0.25
    assert documents.fit_scale((400, 100), (100, 50)) == 0.25
    assert documents.fit_scale((10, 10), (30, 20)) == 2


@given(font=positive, pixels=positive, share=st.floats(0.3, 0.7))
def test_resolution_for_an_x_height_and_back(font, pixels, share):
    dpi = documents.dpi_for_x_height(font, pixels, x_height=share)
    assert documents.x_height_pixels(font, dpi, x_height=share) == pytest.approx(pixels)


def test_ten_pixels_of_x_height_at_ten_points_need_144_dpi():
    assert documents.dpi_for_x_height(10, 10) == pytest.approx(144)


# ------------------------------------------------------------------------------------------------------- boxes


@st.composite
def pages(draw):
    height, width = draw(st.integers(1, 4000)), draw(st.integers(1, 4000))
    words = draw(st.integers(0, 6))
    sides = [width, height, width, height]
    corners = [[draw(st.integers(0, side)) for side in sides] for _ in range(words)]
    boxes = [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners]
    return torch.tensor(boxes, dtype=torch.long).reshape(words, 4), (height, width)


@given(pages())
def test_boxes_are_normalised_as_for_the_published_models(case):
    boxes, (height, width) = case
    expected = [
        [int(1000 * (v / side)) for v, side in zip(b, [width, height] * 2, strict=True)] for b in boxes.tolist()
    ]
    got = normalise_boxes(boxes, (height, width))
    assert got.tolist() == expected
    assert got.dtype == torch.long
    assert torch.equal(normalise_boxes(boxes.float(), (height, width)), got)


@pytest.mark.parametrize("side", [500, 612, 997, 1000])
def test_every_coordinate_of_a_page_is_rounded_as_for_the_published_models(side):
    """In float32 a few coordinates of pages with sides of 500 or 1000 come out one too low."""
    x = torch.arange(side + 1)
    boxes = torch.stack([x, x, x, x], dim=1)
    expected = [int(1000 * (value / side)) for value in range(side + 1)]
    assert normalise_boxes(boxes, (side, side))[:, 0].tolist() == expected


def test_the_whole_page_is_0_to_1000_and_x_goes_with_the_width():
    assert normalise_boxes(torch.tensor([0, 0, 612, 792]), PAGES["letter"]).tolist() == [0, 0, 1000, 1000]
    assert normalise_boxes(torch.tensor([[306.0, 198.0, 612.0, 396.0]]), PAGES["letter"]).tolist() == [
        [500, 250, 1000, 500]
    ]


def test_pieces_of_a_word_share_its_box_and_special_tokens_have_none():
    boxes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    got = token_boxes(boxes, [None, 0, 1, 1, None])
    assert got.tolist() == [[0] * 4, [1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 8], [0] * 4]
    assert token_boxes(boxes, []).shape == (0, 4)


# --------------------------------------------------------------------------------------------- layout positions


def random_boxes(batch, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 1001, (batch, tokens, 2, 2), generator=generator).sort(dim=2).values
    return corners.flatten(2)  # [B, T, (left, top), (right, bottom)]


@torch.no_grad()
def test_layout_positions_equal_those_of_layoutlm(redraw):
    config = LayoutLMConfig(
        vocab_size=10, hidden_size=12, num_attention_heads=2, max_position_embeddings=16, hidden_dropout_prob=0.0
    )
    theirs = redraw(LayoutLMEmbeddings(config))
    theirs.LayerNorm = nn.Identity()  # what is added before it can then be seen
    for table in (theirs.position_embeddings, theirs.token_type_embeddings):
        table.weight.zero_()
    ours = LayoutEmbedding(12)
    ours.load_state_dict(
        {
            f"{name}.weight": getattr(theirs, f"{name[0]}_position_embeddings").weight
            for name in ("x", "y", "height", "width")
        }
    )
    boxes, words = random_boxes(3, 7), torch.randn(3, 7, 12)
    expected = theirs(inputs_embeds=words, bbox=boxes)
    torch.testing.assert_close(words + ours(boxes), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_each_coordinate_is_seen():
    embedding, box = LayoutEmbedding(8), torch.tensor([[[10, 20, 300, 400]]])
    for side in range(4):
        moved = box.clone()
        moved[..., side] += 1
        assert not torch.equal(embedding(moved), embedding(box))
    swapped = box[..., [1, 0, 3, 2]]
    assert not torch.allclose(embedding(swapped), embedding(box))


def test_gradients_reach_only_the_rows_that_are_used():
    embedding = LayoutEmbedding(4)
    embedding(torch.tensor([[[10, 20, 300, 400]]])).sum().backward()
    rows = {
        name: table.weight.grad.any(dim=1).nonzero().flatten().tolist() for name, table in embedding.named_children()
    }
    assert rows == {"x": [10, 300], "y": [20, 400], "height": [380], "width": [290]}


def test_sizes_of_the_tables():
    embedding = LayoutEmbedding(8)
    assert sum(parameter.numel() for parameter in embedding.parameters()) == 4 * 1024 * 8
    assert 0.01 < embedding.x.weight.std() < 0.03
    assert embedding(torch.tensor([[[0, 0, 1023, 1023]]])).shape == (1, 1, 8)


# ----------------------------------------------------------------------------------------------------- bad input

NAN = float("nan")
BOX = torch.tensor([[0, 0, 10, 10]])


@pytest.mark.parametrize(
    "call, numbers",
    [
        (lambda: documents.points_to_pixels(0, 300), "points is 0.*above 0"),
        (lambda: documents.points_to_pixels(12, NAN), "dpi is nan.*finite"),
        (lambda: documents.points_to_pixels("12", 300), "points is '12'.*number"),
        (lambda: documents.page_pixels((792, 612, 1), 300), "3 numbers, expected 2"),
        (lambda: documents.page_pixels((792, -612), 300), "width of page is -612.*above 0"),
        (lambda: documents.page_pixels((0, 612), 300), "height of page is 0.*above 0"),
        (lambda: documents.page_pixels((792, 612), -1), "dpi is -1.*above 0"),
        (lambda: documents.fit_scale((5, 0), (336, 336)), "width of size is 0"),
        (lambda: documents.fit_scale((5, 5), (float("inf"), 336)), "height of canvas is inf.*finite"),
        (lambda: documents.x_height_pixels(-12, 300), "font_points is -12"),
        (lambda: documents.x_height_pixels(12, 0), "dpi is 0"),
        (lambda: documents.x_height_pixels(12, 300, scale=0), "scale is 0"),
        (lambda: documents.x_height_pixels(12, 300, x_height=0), "x_height is 0"),
        (lambda: documents.dpi_for_x_height(0, 5), "font_points is 0"),
        (lambda: documents.dpi_for_x_height(5, 0), "pixels is 0"),
        (lambda: documents.dpi_for_x_height(5, 5, x_height=-1), "x_height is -1"),
        (lambda: normalise_boxes(BOX[:, :3], (10, 10)), r"\[1, 3\].*4"),
        (lambda: normalise_boxes(torch.tensor(3), (10, 10)), r"\[\].*4"),
        (lambda: normalise_boxes(torch.tensor([[0, 0, NAN, 5]]), (10, 10)), "1 of 4.*NaN.*expected 0"),
        (lambda: normalise_boxes(BOX, (10, 9)), r"\(left, right\) = \(0, 10\).*<= 9"),
        (lambda: normalise_boxes(BOX, (9, 10)), r"\(top, bottom\) = \(0, 10\).*<= 9"),
        (lambda: normalise_boxes(-BOX, (10, 10)), r"\(0, -10\)"),
        (lambda: normalise_boxes(torch.tensor([[-1, 0, 5, 5]]), (10, 10)), r"\(-1, 5\).*0 <= left"),
        (lambda: normalise_boxes(torch.tensor([[5, 5, 4, 6]]), (10, 10)), r"\(5, 4\).*left <= right"),
        (lambda: normalise_boxes(torch.tensor([[5, 5, 6, 4]]), (10, 10)), r"\(5, 4\).*top <= bottom"),
        (lambda: normalise_boxes(BOX, (10, 0)), "width of page is 0"),
        (lambda: token_boxes(BOX, [1]), r"1\.\.1.*0\.\.0"),
        (lambda: token_boxes(BOX, [0, -1]), r"-1\.\.0.*0\.\.0"),
        (lambda: token_boxes(BOX[0], [0]), "1 dimensions.*expected 2"),
        (lambda: token_boxes(BOX[:, :3], [0]), r"4 = 3.*expected 4"),
        (lambda: LayoutEmbedding(0), "width is 0"),
        (lambda: LayoutEmbedding(8)(BOX), "2 dimensions.*expected 3"),
        (lambda: LayoutEmbedding(8)(BOX[None].float()), "float32.*integer"),
        (lambda: LayoutEmbedding(8)(BOX[None] + 1020), r"1030.*<= 1023"),
        (lambda: LayoutEmbedding(8, coordinates=10)(BOX[None]), r"\(0, 10\).*<= 9"),
        (lambda: LayoutEmbedding(8)(BOX[None, :, [2, 1, 0, 3]]), r"\(10, 0\).*left <= right"),
        (lambda: LayoutEmbedding(8)(BOX[None].to("meta")), "meta.*cpu"),
    ],
)
def test_bad_input_names_both_sides(call, numbers):
    with pytest.raises(ValueError, match=numbers):
        call()
