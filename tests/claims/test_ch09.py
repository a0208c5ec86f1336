"""The claims of chapter 9: what frontier models cost and count, by their own classes and processors."""

import math
from dataclasses import replace

import pytest
import torch

from vlm_course import budget
from vlm_course.actions import ActionTokenizer
from vlm_course.costs import visual_tokens
from vlm_course.decoder import Decoder, DecoderConfig
from vlm_course.documents import PAGES, fit_scale, page_pixels, x_height_pixels
from vlm_course.dynamic_tiling import closest_grid, dynamic_token_count
from vlm_course.grounding import Molmo, point
from vlm_course.llava import LLAVA_7B, LLAVA_13B
from vlm_course.merging import bipartite_soft_matching, merge_tokens, merged_forward
from vlm_course.patches import patchify
from vlm_course.resolution import LLAVA_NEXT_RESOLUTIONS, anyres_token_count, divide_to_tiles, resize
from vlm_course.video import video_tokens
from vlm_course.vit import VisionTransformer, ViTConfig

LLAMA_7B = replace(LLAVA_7B.text, vocab_size=32000)
LLAMA_13B = replace(LLAVA_13B.text, vocab_size=32000)
QWEN_7B = DecoderConfig(152064, 3584, layers=28, heads=28, kv_heads=4, mlp_width=18944, max_positions=32768)
QWEN_72B = DecoderConfig(152064, 8192, layers=80, heads=64, kv_heads=8, mlp_width=29568, max_positions=32768)
CARD = "RTX 4090"
FOUR_K = (2160, 3840)
GRID = (24, 24)  # patches of a frame at 336 pixels


def gigabytes(number: float) -> str:
    return f"{number / 1e9:.2f}"


def released_tokens(height: int, width: int) -> int:
    return anyres_token_count((height, width), LLAVA_NEXT_RESOLUTIONS, tile=336, patch=14)


def qwen_tokens(size, most: int) -> int:
    """LLM tokens of an image by transformers' own resizing, with the least and most tokens of qwen-vl-utils."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    height, width = smart_resize(*size, factor=28, min_pixels=4 * 28**2, max_pixels=most * 28**2)
    return height * width // 28**2


@pytest.fixture(scope="module")
def qwen25_vl():
    """qwen25_vl("7B"): transformers' configuration at the sizes of the release."""
    from transformers import Qwen2_5_VLConfig

    sizes = {
        "3B": (2048, 36, 16, 2, 11008, 151936, True),
        "7B": (3584, 28, 28, 4, 18944, 152064, False),
        "72B": (8192, 80, 64, 8, 29568, 152064, False),
    }

    def build(name):
        width, layers, heads, groups, mlp, words, tied = sizes[name]
        text = {
            "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": words,
            "num_key_value_heads": groups, "intermediate_size": mlp, "tie_word_embeddings": tied,
        }  # fmt: skip
        vision = {"hidden_size": 1280, "intermediate_size": 3456 if name == "72B" else 3420, "out_hidden_size": width}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)

    return build


@pytest.mark.claim("9-03", kind="model")
def test_internvl_has_two_encoders_of_one_scale(count, says):
    """Fails if InternVL's ViT gave patches of several scales, or had other sizes."""
    from transformers import InternVLConfig, InternVLVisionConfig, InternVLVisionModel

    large = InternVLVisionConfig(
        hidden_size=3200, num_hidden_layers=45, num_attention_heads=25, intermediate_size=12800, use_qk_norm=True
    )
    with torch.device("meta"):
        towers = InternVLVisionModel(InternVLVisionConfig()), InternVLVisionModel(large)
        patches = towers[0](torch.empty(1, 3, 448, 448)).last_hidden_state.shape[1] - 1
    config = InternVLConfig()
    says(f"{count(towers[0]) / 1e6:.0f} million", f"{count(towers[1]) / 1e9:.2f} billion")
    says(f"{patches:,}", f"{round(patches * config.downsample_ratio**2)}", towers[0].config.image_size[0])
    assert config.image_seq_length == patches * config.downsample_ratio**2


@pytest.mark.claim("9-04", kind="model")
def test_qwen25_vl_sizes_and_windows(qwen25_vl, count, says):
    """Fails if a release had another number of parameters, or its ViT attended globally in every layer."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    for name in ("3B", "7B", "72B"):
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(qwen25_vl(name))
        if name == "3B":
            model.tie_weights()
        says(f"{count(model) / 1e9:.2f}")
    vision = qwen25_vl("7B").vision_config
    says(vision.depth, vision.depth - len(vision.fullatt_block_indexes), f"{vision.window_size} pixels")
    says(f"{vision.spatial_merge_size} x {vision.spatial_merge_size}", f"{vision.temporal_patch_size} frames")


@pytest.mark.claim("9-05", kind="function")
def test_molmo_writes_percent_with_one_decimal():
    """Fails if Molmo's points were pixels, fractions or whole numbers."""
    text = Molmo().write([point(100, 50, "a cup")], (400, 300))
    assert text == '<point x="33.3" y="12.5" alt="a cup">a cup</point>'
    assert Molmo().read('<point x="101" y="5" alt="a"></point>', (1, 1)) == []  # beyond 100 percent
    (read,) = Molmo().read(text, (400, 300))
    assert read.label == "a cup" and math.dist(read.numbers, (100, 50)) < 0.2


@pytest.mark.claim("9-09", kind="processor")
def test_llava_next_makes_three_views_of_1344_x_672(says):
    """Fails if LLaVA-NeXT's processor cut 1344 x 672 into eight tiles, or some picture cost 5,184 tokens."""
    from PIL import Image
    from transformers import LlavaNextImageProcessor

    processor = LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    views = processor(Image.new("RGB", (1344, 672)), return_tensors="pt")["pixel_values"].shape[1]
    assert max(h * w // 336**2 for h, w in processor.image_grid_pinpoints) == 4
    most = max(released_tokens(h, w) for h in range(40, 3000, 110) for w in range(40, 3000, 110))
    says(f"{views} views", f"{released_tokens(672, 1344):,}", f"{most:,}")


@pytest.mark.claim("9-10", kind="model")
@pytest.mark.parametrize(("side", "tokens"), [(224, 256), (336, 576), (672, 2304), (1344, 9216)])
def test_patches_by_resolution(side, tokens):
    """Fails if a tower of 14-pixel patches gave another number of patches than the lesson's table."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=side, patch_size=14
    )
    with torch.device("meta"):
        assert CLIPVisionModel(config)(torch.empty(1, 3, side, side)).last_hidden_state.shape[1] - 1 == tokens


@pytest.mark.claim("9-11", kind="function")
def test_attention_is_a_part_of_the_prefill(says):
    """Fails if the whole prefill grew like the square of the tokens, or attention were most of it."""

    def share(dense):
        whole = budget.decoder_flops(LLAMA_13B, 9266, dense=dense)
        pairs = 9266**2 if dense else 9266 * 9267 // 2
        return 4 * LLAMA_13B.layers * LLAMA_13B.width * pairs / whole

    growth = budget.decoder_flops(LLAMA_13B, 9216) / budget.decoder_flops(LLAMA_13B, 256)
    says(f"{576**2 / 256**2:.2f}", f"{100 * share(False):.1f} %", f"{100 * share(True):.1f} %", f"{growth:.0f} times")
    assert growth < (9216 / 256) ** 2 / 10


@pytest.mark.claim("9-12", kind="function")
def test_anyres_costs_the_language_model_more_and_the_tower_less(says):
    """Fails if for one picture the thumbnail did not add to the language model's tokens, or tiles saved no pairs."""
    whole, small = visual_tokens(672, 1344, 14), visual_tokens(224, 224, 14)
    tile = visual_tokens(336, 336, 14)
    tiles = 1 + len(divide_to_tiles(torch.empty(1, 672, 1344), 336))
    assert tiles * tile > whole  # the language model reads more
    assert tiles * tile**2 < whole**2  # the tower compares fewer pairs
    ratios = [whole**2, (tiles * tile) ** 2, tiles * tile**2]
    says(f"{whole:,}", f"{tiles * tile:,}", *(f"{pairs / small**2:.0f} times" for pairs in ratios[:2]))
    says(f"{ratios[2] / small**2:.1f}")


@pytest.mark.claim("9-13", kind="function")
def test_a_headline_at_224_is_larger_than_text_at_672(says):
    """Fails if the resolution alone decided: then nothing at 224 pixels were larger than the text at 672."""
    page = page_pixels(PAGES["letter"], 300)
    heights = [
        x_height_pixels(points, 300, scale=fit_scale(page, (side, side))) for points, side in ((48, 224), (12, 672))
    ]
    assert heights[0] > heights[1]
    says(*(f"{height:.1f}" for height in heights))


@pytest.mark.claim("9-14", kind="processor")
def test_a_page_of_text_costs_as_much_as_a_blank_one(says):
    """Fails if Qwen's processor spent more tokens on the part of an image that holds detail."""
    import numpy as np
    from PIL import Image
    from transformers import Qwen2VLImageProcessor

    blank = np.full((420, 600, 3), 255, dtype=np.uint8)
    page = blank.copy()
    page[::2, :300] = 0  # half of it as detailed as can be
    processor = Qwen2VLImageProcessor()
    grids = [
        processor(Image.fromarray(image), return_tensors="pt")["image_grid_thw"].tolist() for image in (blank, page)
    ]
    assert grids[0] == grids[1]
    assert processor.patch_size * processor.merge_size == 28
    says("28 pixels")


@pytest.mark.claim("9-15", kind="processor")
def test_a_4k_image_has_ten_thousand_tokens_or_is_shrunk(says):
    """Fails if a 4K image cost few tokens without being shrunk."""
    most = {limit: qwen_tokens(FOUR_K, limit) for limit in (16384, 1280)}
    says(*(f"{number:,}" for pair in most.items() for number in pair))


@pytest.mark.claim("9-16", kind="model")
def test_the_decoders_of_open_models_are_the_text_models(qwen25_vl):
    """Fails if an open VLM's decoder had parameters that the text model lacks or lacked some of its own."""
    from transformers import (
        InternVLConfig,
        InternVLModel,
        LlamaConfig,
        LlamaModel,
        LlavaNextConfig,
        LlavaNextModel,
        Qwen2_5_VLModel,
        Qwen2Config,
        Qwen2Model,
    )

    text = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    text |= {"num_hidden_layers": 1, "vocab_size": 152000}
    qwen = qwen25_vl("7B")
    for name, value in text.items():
        setattr(qwen.text_config, name, value)
    qwen.vision_config.depth, qwen.vision_config.out_hidden_size = 1, 64
    llama, qwen2 = LlamaConfig(**text), Qwen2Config(**text)
    pairs = (
        (LlavaNextModel, LlavaNextConfig(text_config=llama), LlamaModel(llama)),
        (InternVLModel, InternVLConfig(text_config=qwen2), Qwen2Model(qwen2)),
        (Qwen2_5_VLModel, qwen, Qwen2Model(qwen2)),
    )
    for kind, config, reader in pairs:
        with torch.device("meta"):
            model = kind(config)
        ours, theirs = ({n: p.shape for n, p in m.named_parameters()} for m in (model.language_model, reader))
        assert ours == theirs, kind.__name__
        assert len(list(model.named_parameters())) > len(ours)  # and a tower beside it


@pytest.mark.claim("9-18", kind="function")
@pytest.mark.parametrize(("frames", "total"), [(1, 626), (4, 2354), (30, 17330), (300, 172850)])
def test_tokens_of_a_video(frames, total):
    """Fails if frames of 576 tokens and 50 of text made another sum than the lesson's table."""
    assert video_tokens(frames, GRID) + 50 == total


@pytest.mark.claim("9-19", kind="model")
def test_thirty_frames_fit_qwen25_vl(qwen25_vl, says):
    """Fails if 30 frames fitted into LLaVA-1.5, or not into Qwen2.5-VL."""
    tokens, positions = video_tokens(30, GRID) + 50, qwen25_vl("7B").text_config.max_position_embeddings
    assert LLAVA_13B.text.max_positions < tokens < positions
    says(f"{tokens:,}", f"{LLAVA_13B.text.max_positions:,}", f"{positions:,}")


@pytest.mark.claim("9-20", kind="function")
def test_three_hundred_frames_are_expensive_and_possible(qwen25_vl, says):
    """Fails if the tokens of 300 frames exceeded a million, or their cache a 24 GB card."""
    tokens = video_tokens(300, GRID) + 50
    cache = budget.kv_cache_bytes(QWEN_7B, tokens)
    vision = qwen25_vl("7B").vision_config
    merged = video_tokens(300, GRID, temporal=vision.temporal_patch_size, spatial=vision.spatial_merge_size)
    assert tokens < 1_048_576 and cache < budget.GPUS[CARD].memory
    says(f"{tokens:,}", f"{cache / 1e9:.1f} GB", f"{merged:,}")


@pytest.mark.claim("9-23", kind="arithmetic")
def test_a_whole_slide_is_hundreds_of_4k_images(says):
    """Fails if 15 mm at a quarter of a micrometre were about as many pixels as 3840 x 2160."""
    side = round(15_000 / 0.25)
    says(f"{side:,} x {side:,}", f"{side**2 / math.prod(FOUR_K):.0f} times")


@pytest.mark.claim("9-24", kind="function")
def test_tiles_of_a_4k_image(says):
    """Fails if a 4K image cut at 336 pixels made another number of tiles."""
    padded = torch.empty(1, *(336 * math.ceil(side / 336) for side in FOUR_K))
    tiles = len(divide_to_tiles(padded, 336))
    says(tiles, f"{tiles * 576:,}", f"{(tiles + 1) * 576:,}")
    assert 80 * 576 == 46_080 and tiles != 80


@pytest.mark.claim("9-25", kind="function")
def test_what_46000_tokens_need(says):
    """Fails if no 7B model could hold 46,080 tokens on 24 GB, or all of them could."""
    memory = budget.GPUS[CARD].memory
    llama, quarter, qwen = (
        budget.kv_cache_bytes(LLAMA_7B, 46_080),
        budget.kv_cache_bytes(LLAMA_7B, 46_080, bits=4),
        budget.kv_cache_bytes(QWEN_7B, 46_080),
    )
    says(f"{llama / 1e9:.1f} GB", f"{quarter / 1e9:.1f} GB", f"{gigabytes(qwen)} GB")
    fixed = budget.weight_bytes(QWEN_7B, "int4") + 2 * budget.vit_parameters(LLAVA_7B.vision)
    assert llama > memory > quarter + budget.weight_bytes(LLAMA_7B, "int4")
    says(f"{(fixed + budget.kv_cache_bytes(QWEN_7B, 48_960)) / 1e9:.1f} GB")
    says(f"{(fixed + budget.kv_cache_bytes(QWEN_7B, 146_080)) / 1e9:.1f}")
    need = budget.budget(QWEN_7B, CARD, text_tokens=146_080, new_tokens=200, quantization="int4", chunk=2048)
    assert need.fits and need.prefill > 30
    says(f"{need.prefill:.0f} s")


@pytest.mark.claim("9-26", kind="experiment")
def test_a_lesion_of_one_percent_keeps_its_patches_and_contrast(says):
    """Fails if a drawn lesion of 1 % of a 4K image lost its patches or its contrast at 336 x 336."""
    height, width = FOUR_K
    side = round(math.sqrt(0.01 * height * width))
    image = torch.zeros(1, height, width)
    image[:, 900 : 900 + side, 1700 : 1700 + side] = 1.0
    covered = {}
    for name, size in (("squashed", (336, 336)), ("padded", (189, 336))):
        small = resize(image, size)
        small = torch.nn.functional.pad(small, (0, 0, 0, 336 - size[0]))
        covered[name] = float(patchify(small[None], 14)[0].mean(1).sum())  # patches, by area
        assert small.max() > 0.95
    says(
        f"{side} pixels", *(f"{patches:.1f}" for patches in covered.values()), f"{covered['squashed'] / 10:.1f} patches"
    )


@pytest.mark.claim("9-27", kind="arithmetic")
def test_a_global_view_and_four_to_six_tiles(says):
    """Fails if 5 to 7 views of 576 tokens were 3,000 to 3,500."""
    says(*(f"{576 * (1 + tiles):,}" for tiles in (4, 6)))


@pytest.mark.claim("9-28", kind="processor")
def test_what_the_two_models_make_of_4k(says):
    """Fails if either processor chose regions: a black image and one with a bright corner must cost the same."""
    import numpy as np
    from PIL import Image
    from transformers import GotOcr2ImageProcessor

    corner = np.zeros((*FOUR_K, 3), dtype=np.uint8)
    corner[:200, :200] = 255
    processor = GotOcr2ImageProcessor(
        size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=12
    )
    views = [
        len(processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]) for image in (0 * corner, corner)
    ]
    rows, columns = closest_grid(FOUR_K)
    assert views == [rows * columns + 1] * 2
    assert dynamic_token_count(FOUR_K) == views[0] * 256
    says(f"{columns} x {rows}", f"{dynamic_token_count(FOUR_K):,}", f"{qwen_tokens(FOUR_K, 16384):,}")


@pytest.mark.claim("9-29", kind="function")
def test_a_72b_model_does_not_fit_and_a_7b_needs_no_extension(qwen25_vl, says):
    """Fails if 72 billion parameters in 4 bits fitted into 24 GB, or Qwen2.5's 7B had fewer than 32K positions."""
    weights = budget.weight_bytes(QWEN_72B, "int4")
    assert weights > budget.GPUS[CARD].memory
    says(f"{weights / 1e9:.1f} GB", f"{qwen25_vl('7B').text_config.max_position_embeddings:,}")


@pytest.mark.claim("9-30", kind="function")
def test_the_summary_must_read_everything(says):
    """Fails if reading 100,000 tokens cost next to nothing of the 30 seconds."""
    seconds = budget.prefill_seconds(QWEN_7B, CARD, 100_000)
    assert seconds > 0.5 * 30
    says(f"{seconds:.0f} of the 30 seconds")


@pytest.mark.claim("9-31", kind="function")
def test_tome_merges_the_best_pairs_near_or_far_alike_or_not():
    """Fails if ToMe had a threshold, merged neighbours only, or waited until the tower is done."""
    generator = torch.Generator().manual_seed(0)
    unlike = torch.randn(1, 65, 32, generator=generator)  # no two of them alike
    cosines = torch.nn.functional.normalize(unlike, dim=-1) @ torch.nn.functional.normalize(unlike, dim=-1).mT
    assert cosines.triu(1).max() < 0.95
    matching = bipartite_soft_matching(unlike, 9)
    merged, sizes = merge_tokens(unlike, torch.ones(1, 65), matching)
    assert merged.shape[1] == 65 - 9 == bipartite_soft_matching(torch.ones(1, 65, 4), 9).tokens
    places = [matching.assignment[0].eq(place).nonzero().flatten().tolist() for place in range(matching.tokens)]
    pairs = [group for group in places if len(group) > 1]
    columns = [abs((a - 1) % 8 - (b - 1) % 8) + abs((a - 1) // 8 - (b - 1) // 8) for a, b, *_ in pairs]
    assert max(columns) > 1  # on the 8 x 8 grid they do not touch
    assert sizes.max() > 1 and sizes.sum() == 65  # weighted by what a token stands for
    tower = VisionTransformer(ViTConfig(image_size=32, patch_size=4, width=16, layers=3, heads=2, mlp_width=16)).eval()
    with torch.no_grad():
        assert merged_forward(tower, torch.randn(1, 3, 32, 32), 9)[0].shape[1] == 65 - 3 * 9  # in every block


@pytest.mark.claim("9-32", kind="arithmetic")
def test_losses_of_tome_on_imagenet(says):
    """Fails if the published tables showed a loss below 1 % throughout, or two to three times the speed."""
    table = [  # accuracy and images a second, before and after, from the README
        (81.41, 79.30, 953, 1564), (84.57, 82.60, 309, 511), (85.82, 84.26, 95, 167), (86.92, 86.14, 28, 56),
        (85.30, 84.59, 85.7, 167.7), (88.06, 87.80, 9.8, 26.3), (88.55, 88.25, 4.7, 10.8),
    ]  # fmt: skip
    losses, speeds = [a - b for a, b, *_ in table], [after / before for *_, before, after in table]
    says(f"{min(losses):.1f} to {max(losses):.1f} points", f"{min(speeds):.1f} to {max(speeds):.1f} times")


@pytest.mark.claim("9-33", kind="function")
def test_weights_of_a_7b_model_in_four_bits(says):
    """Fails if scales, zero points and 16-bit embeddings added nothing to half a byte a parameter."""
    weights = [budget.weight_bytes(model, "int4") for model in (LLAMA_7B, QWEN_7B)]
    assert min(weights) > 3.7e9
    says(*(gigabytes(number) for number in weights), f"{QWEN_7B.vocab_size:,}")


@pytest.mark.claim("9-34", kind="model")
def test_clip_in_sixteen_bits(real_llava, count, says):
    """Fails if CLIP ViT-L's parameters in two bytes each were another number of gigabytes."""
    says(f"{2 * count(real_llava('7B').model.vision_tower) / 1e9:.3f} GB")


@pytest.mark.claim("9-35", kind="function")
def test_cache_of_4096_tokens(says):
    """Fails if a 7B model's cache of 4,096 tokens in four bits had 1.5 GB; the formula is held to a real cache."""
    tiny = DecoderConfig(20, 32, layers=2, heads=4, kv_heads=2, mlp_width=32)
    model = Decoder(tiny)
    cache = model.new_cache(capacity=9)
    with torch.no_grad():
        model(torch.randn(1, 9, 32), cache=cache)
    one = torch.zeros(1, 2, 1, 8)  # a tenth token: what comes back is all that the cache holds
    real = sum(keys.numel() + values.numel() for keys, values in (cache.update(layer, one, one) for layer in (0, 1)))
    assert budget.kv_cache_bytes(tiny, 10, bits=32) == 4 * real
    says(
        gigabytes(budget.kv_cache_bytes(LLAMA_7B, 4096, bits=4)) + " GB",
        gigabytes(budget.kv_cache_bytes(LLAMA_7B, 4096)),
    )
    says(*(f"{budget.kv_cache_bytes(QWEN_7B, 4096, bits=bits) / 1e9:.3f}" for bits in (4, 16)))


@pytest.mark.claim("9-36", kind="function")
def test_the_whole_budget(says):
    """Fails if the computed terms added up to the lesson's 8 GB, or activations were 2 GB."""
    totals, activations = [], []
    for model in (LLAMA_7B, QWEN_7B):
        activations.append(budget.activation_bytes(model, 4096))
        parts = (
            budget.weight_bytes(model, "int4"),
            2 * budget.vit_parameters(LLAVA_7B.vision),
            budget.kv_cache_bytes(model, 4096, bits=4),
            activations[-1],
        )
        totals.append(sum(parts))
    assert max(totals) < 7e9 and max(activations) < 1e9
    says(f"{3.5 + 0.6 + 1.5 + 2:.1f}", f"{totals[0] / 1e9:.1f} GB", f"{totals[1] / 1e9:.1f}")
    says(*(f"{number / 1e9:.1f}" for number in activations))


@pytest.mark.claim("9-37", kind="model")
def test_actions_are_words_in_rt_2_and_numbers_in_pi0(says):
    """Fails if RT-2's answer were joint angles, or pi0's a distribution over words."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    words = ActionTokenizer(vocab_size=32000)
    shifts, turns, gripper = torch.tensor([0.1, -0.4, 0.9]), torch.tensor([0.0, 0.5, -1.0]), torch.tensor([1.0])
    action = torch.cat([shifts, turns, gripper])
    ids = words.encode(action)
    assert 1 + len(ids) == 8  # the first word says whether to stop
    says(1 + len(ids), words.bins)
    assert (words.decode(ids) - action).abs().max() <= 1 / (words.bins - 1) + 1e-6
    with torch.device("meta"):
        pi0 = PI0ForConditionalGeneration(PI0Config())
    last = pi0.action_out_proj
    assert isinstance(last, torch.nn.Linear) and last.out_features == pi0.config.max_action_dim < 256
    assert not hasattr(pi0, "lm_head")


@pytest.mark.claim("9-38", kind="function")
def test_actions_are_words_that_are_there():
    """Fails if writing actions needed rows that the vocabulary does not have."""
    words = ActionTokenizer(vocab_size=32000)
    ids = words.encode(torch.linspace(-1, 1, 2001))
    assert len(ids.unique()) == words.bins == 256
    embedding = torch.nn.Embedding(32000, 2)  # the language model's, not enlarged
    assert embedding(ids).shape == (2001, 2)
    with pytest.raises(ValueError, match="action words"):
        words.decode(torch.tensor([5]))  # any other word is none: decoding has to be constrained
