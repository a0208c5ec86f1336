"""The claims of chapter 8: pages, tiles and tokens as the processors make them, and what coarse pixels do."""

import math

import pytest
import torch
import torch.nn.functional as F

from vlm_course.costs import visual_tokens
from vlm_course.documents import PAGES, dpi_for_x_height, fit_scale, page_pixels, points_to_pixels, x_height_pixels
from vlm_course.llava import LLAVA_7B, LLAVA_13B
from vlm_course.probe_questions import question_set, score
from vlm_course.pruning import flops_kept
from vlm_course.resolution import LLAVA_NEXT_RESOLUTIONS, anyres_token_count
from vlm_course.shape_cropping import choose_grid
from vlm_course.token_resampler import TokenResampler, distinct_tokens
from vlm_course.video import sample_by_rate, video_tokens

LETTER = page_pixels(PAGES["letter"], 300)
SQUARE = (336, 336)


@pytest.fixture(scope="module")
def qwen_positions():
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig().text_config.max_position_embeddings


@pytest.mark.claim("8-01", kind="function")
def test_pixels_of_a_page(says):
    """Fails if a letter page at 300 dots per inch had other sides."""
    height, width = LETTER
    tall, wide = page_pixels(PAGES["a4"], 300)
    says(f"{width} x {height}", f"{wide} x {tall}")


@pytest.mark.claim("8-02", kind="function")
def test_how_much_a_page_shrinks(says):
    """Fails if a page shrank tenfold in width when it is squashed, or by another factor when padded."""
    padded = 1 / fit_scale(LETTER, SQUARE)
    squashed = LETTER[1] / SQUARE[1]
    says(f"{padded:.1f}", f"{squashed:.1f}")
    assert squashed < 8


def ink_height(text: str, points: float, scale: float) -> float:
    """Height in pixels of black on white, by its area: drawn large with a real font, shrunk, summed."""
    import numpy as np
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    size = round(points_to_pixels(points, 300))
    font = ImageFont.truetype(font_manager.findfont("DejaVu Serif"), size)
    picture = Image.new("L", (400, 200), 255)
    ImageDraw.Draw(picture).text((50, 50), text, font=font, fill=0)
    small = picture.resize((round(400 * scale), round(200 * scale)), Image.Resampling.LANCZOS)
    dark = (255 - torch.from_numpy(np.array(small, dtype=np.float32))).amax(1)
    return float((dark / dark.max()).clamp(0, 1).sum())


@pytest.mark.claim("8-03", kind="experiment")
def test_letters_of_12_points_after_shrinking(says):
    """Fails if letters of 12 points, drawn and shrunk to 336 pixels, were one or two pixels tall."""
    scale = fit_scale(LETTER, SQUARE)
    em, x = points_to_pixels(12, 300) * scale, x_height_pixels(12, 300, scale=scale)
    says(f"{points_to_pixels(12, 300):.0f} pixels", f"{em:.1f}", f"{x:.1f}")
    assert abs(ink_height("xxx", 12, scale) - x) < 0.8
    assert ink_height("Hgp", 12, scale) > 4  # from the top of H to the foot of g


@pytest.mark.claim("8-04", kind="processor")
def test_a_picture_has_five_views_at_most(says):
    """Fails if the processor of LLaVA-NeXT cut some picture into more than four tiles, or left the thumbnail out."""
    from PIL import Image
    from transformers import LlavaNextImageProcessor

    processor = LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    grids = {tuple(grid) for grid in processor.image_grid_pinpoints}
    assert grids == set(LLAVA_NEXT_RESOLUTIONS)
    sizes = [(3300, 2550), (1000, 1000), (500, 2000), (672, 1344), (30, 40)]
    views = [processor(Image.new("RGB", (w, h)), return_tensors="pt")["pixel_values"].shape[1] for h, w in sizes]
    assert views == [1 + h // 336 * (w // 336) for h, w in (_canvas(size) for size in sizes)] and max(views) == 5
    tokens = max(anyres_token_count((h, w), LLAVA_NEXT_RESOLUTIONS, tile=336, patch=14)
                 for h in range(30, 3600, 150) for w in range(30, 3600, 150))  # fmt: skip
    says("5 views", f"{max(views) * 576:,}", f"{tokens:,}")


def _canvas(size):
    from transformers.image_processing_utils import select_best_resolution

    return select_best_resolution(size, LLAVA_NEXT_RESOLUTIONS)


@pytest.mark.claim("8-05", kind="function")
def test_what_pruning_to_a_thousand_would_save(says):
    """Fails if keeping 1,000 of 5,184 image tokens after two layers left another share of the multiplications."""
    text = LLAVA_7B.text
    sizes = {"layers": text.layers, "width": text.width, "mlp_width": text.mlp_width}
    left = flops_kept(tokens=5184 + 50, images=5184, ratio=1 - 1000 / 5184, layer=2, **sizes)
    says(f"{100 * left:.0f} %")


@pytest.mark.claim("8-06", kind="model")
def test_layout_needs_boxes_and_pixels_do_not():
    """Fails if LayoutLM did without the boxes of words, or Donut's processor handed on anything but pixels."""
    from PIL import Image
    from transformers import DonutImageProcessor, LayoutLMConfig, LayoutLMModel

    config = LayoutLMConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = LayoutLMModel(config).eval()
    ids, column = torch.tensor([[5, 6, 7]]), torch.tensor([[[0, 0, 50, 20], [0, 30, 50, 50], [0, 60, 50, 80]]])
    with torch.no_grad():
        below, beside = model(ids, bbox=column), model(ids, bbox=column[..., [1, 0, 3, 2]])
    assert (below.last_hidden_state - beside.last_hidden_state).abs().max() > 1e-4
    page = Image.new("RGB", (300, 400), "white")
    assert set(DonutImageProcessor(size={"height": 64, "width": 64})(page, return_tensors="pt")) == {"pixel_values"}


@pytest.mark.claim("8-07", kind="function")
def test_the_cut_follows_the_shape_of_the_page(says):
    """Fails if UReader cut a portrait page, the same page in landscape and a strip of as many pixels alike."""
    says("shape")
    grids = [choose_grid(size) for size in ((1200, 800), (800, 1200), (300, 3200))]
    assert grids[0] == grids[1][::-1] and grids[2][0] == 1 and len(set(grids)) == 3
    assert all(rows * cols > 1 for rows, cols in grids)


@torch.no_grad()
@pytest.mark.claim("8-08", kind="function")
def test_dropped_tokens_are_read_all_the_same(says):
    """Fails if TextMonkey's kept tokens did not depend on those that are dropped, as pruning would have it."""
    says("gather from all", "distinct")
    resampler = TokenResampler(8, inner=8, heads=2, keep=3)
    resampler.fc2.weight.normal_()
    tokens = torch.randn(1, 6, 8)
    kept = distinct_tokens(tokens, 3)
    dropped = next(place for place in range(6) if place not in kept)
    changed = tokens.clone()
    changed[0, dropped] *= torch.linspace(1, 1.2, 8)  # little enough to stay among the dropped
    assert torch.equal(distinct_tokens(changed, 3), kept)
    assert (resampler(changed) - resampler(tokens)).abs().max() > 1e-4
    assert torch.equal(
        changed.gather(1, kept[..., None].expand(-1, -1, 8)), tokens.gather(1, kept[..., None].expand(-1, -1, 8))
    )


@pytest.mark.claim("8-10", kind="processor")
def test_nougat_takes_pixels_and_writes_text(says):
    """Fails if Nougat needed words of an OCR program, or its page had another size."""
    import numpy as np
    from PIL import Image
    from transformers import (
        DonutSwinConfig,
        DonutSwinModel,
        MBartConfig,
        MBartForCausalLM,
        NougatImageProcessor,
        VisionEncoderDecoderModel,
    )

    page = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (280, 1))).convert("RGB")
    inputs = NougatImageProcessor()(page, return_tensors="pt")
    assert set(inputs) == {"pixel_values"}
    says("{} x {}".format(*inputs["pixel_values"].shape[2:]))
    swin = DonutSwinModel(DonutSwinConfig(image_size=[32, 32], embed_dim=8, depths=[1], num_heads=[2], window_size=4))
    bart = MBartConfig(
        vocab_size=20, d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, is_decoder=True,
        add_cross_attention=True, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=8,
    )  # fmt: skip
    model = VisionEncoderDecoderModel(encoder=swin, decoder=MBartForCausalLM(bart)).eval()
    with torch.no_grad():
        logits = [model(pixel_values=torch.randn(1, 3, 32, 32), decoder_input_ids=torch.tensor([[0]])).logits
                  for _ in range(2)]  # fmt: skip
    assert logits[0].shape == (1, 1, 20) and not torch.equal(*logits)  # other pixels, other words


@pytest.mark.claim("8-11", kind="arithmetic")
def test_gpt_4v_is_charged_by_tiles(says):
    """Fails if the documented rule gave another number of tokens for 1024 x 1024."""
    scale = min(1, 2048 / 1024, 768 / 1024)
    side = 1024 * scale
    says(85 + 170 * math.ceil(side / 512) ** 2)


def coarse(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    """As many pixels as before, equal in blocks of factor x factor: [B, 3, H, W] -> the same."""
    return F.interpolate(F.avg_pool2d(pixels, factor), scale_factor=factor, mode="nearest")


@pytest.mark.claim("8-12", kind="experiment")
def test_coarse_pixels_are_enough_to_miss_things(small, exam, seen, sharp):
    """Fails if a model whose patches stay as they are answered as well from coarser pixels."""
    model = small.model
    with torch.no_grad():
        blurred = model.encode_images(coarse(exam.pixels, 4))
    assert blurred.shape == seen.shape  # as many patches, as large as before
    full, rough = sharp.accuracy(), score(model, exam, blurred).accuracy()
    assert full > 0.85 and rough < full - 0.15, (full, rough)


@pytest.mark.claim("8-13", kind="function")
def test_two_seconds_of_video(qwen_positions, says):
    """Fails if 10 frames fitted into LLaVA-1.5, or not into Qwen2.5-VL."""
    frames = sample_by_rate(60, 30.0, 5.0)  # two seconds filmed at 30 frames a second
    tokens, positions = video_tokens(len(frames), (24, 24)), LLAVA_13B.text.max_positions
    assert positions < tokens == 5760 < qwen_positions
    says(f"{positions:,}", f"{qwen_positions:,}")


@pytest.mark.claim("8-14", kind="function")
def test_ten_pages(qwen_positions, says):
    """Fails if ten pages at 336 pixels fitted into LLaVA-1.5, or filled the context of Qwen2.5-VL."""
    tokens = 10 * visual_tokens(*SQUARE, 14)
    assert LLAVA_13B.text.max_positions < tokens < qwen_positions / 5
    says(f"{tokens:,}", f"{LLAVA_13B.text.max_positions:,}", f"{qwen_positions:,}")


@pytest.mark.claim("8-15", kind="arithmetic")
def test_tokens_of_a_dense_page(says):
    """Fails if 500 to 700 words, at 60 to 80 words in 100 tokens, were thousands of tokens."""
    least, most = 500 / 0.8, 700 / 0.6
    assert most < 2000
    says(f"{round(least, -2):.0f} to {round(most, -2):,.0f} tokens")


@pytest.mark.claim("8-16", kind="experiment")
def test_coarse_pixels_alone_make_absent_things_present(small):
    """Fails if the image had no part in it: then the same language model would err no more on coarse pixels."""
    tok = small.tokenizer
    questions = question_set(tok, scenes=16, kinds=("existence",) * 6, seed=3)
    no, yes = (questions.labels == tok.id_of(word) for word in ("no", "yes"))

    def wrong(pixels):
        with torch.no_grad():
            said = score(small.model, questions, small.model.encode_images(pixels)).predicted
        return float((said == tok.id_of("yes"))[no].float().mean()), float(
            (said == tok.id_of("no"))[yes].float().mean()
        )

    invented, overlooked = wrong(questions.pixels)
    invented_coarse, overlooked_coarse = wrong(coarse(questions.pixels, 4))
    assert max(invented, overlooked) < 0.1
    assert invented_coarse > invented + 0.02 and overlooked_coarse > overlooked + 0.15


@pytest.mark.claim("8-17", kind="function")
def test_letters_need_pixels(says):
    """Fails if a readable page needed no more patches than a photograph at 336 pixels."""
    dpi = dpi_for_x_height(12, 8)
    patches = visual_tokens(*page_pixels(PAGES["letter"], dpi), 14)
    assert patches > 5 * visual_tokens(*SQUARE, 14)
    says(f"{dpi:.0f} dots", f"{patches:,}")
