"""Video against Qwen2-VL, LLaVA-OneVision and LLaVA-NeXT-Video: frames, tubelets, pooling, positions in three axes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from vlm_course.decoder import apply_rotary, rotary_phases
from vlm_course.video import (
    TemporalPerceiver,
    TubeletEmbedding,
    group_frames,
    merge_frames,
    mrope_phases,
    mrope_positions,
    pool_frames,
    sample_by_rate,
    sample_frames,
    video_tokens,
)

CLOSE = {"rtol": 0, "atol": 1e-5}


def rope_index(types, images=(), videos=(), mask=None):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    stub = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)),
        get_vision_position_ids=lambda *a, **k: Qwen2VLModel.get_vision_position_ids(None, *a, **k),
    )
    positions, deltas = Qwen2VLModel.get_rope_index(
        stub,
        torch.zeros_like(types),
        types,
        torch.tensor(images) if images else None,
        torch.tensor(videos) if videos else None,
        mask,
    )
    return positions, deltas[:, 0]


@st.composite
def conversations(draw):
    """Types [1, T] with the grids of their images and videos: text, visual, text, visual, ..., text."""
    types, images, videos = [0] * draw(st.integers(1, 5)), [], []
    for _ in range(draw(st.integers(0, 4))):
        video = draw(st.booleans())
        grid = (draw(st.integers(1, 6)) if video else 1, 2 * draw(st.integers(1, 4)), 2 * draw(st.integers(1, 4)))
        (videos if video else images).append(grid)
        types += [2 if video else 1] * (grid[0] * grid[1] * grid[2] // 4) + [0] * draw(st.integers(1, 4))
    return torch.tensor([types]), images, videos


@given(conversations())
def test_positions_are_qwen2s(case):
    types, images, videos = case
    theirs = rope_index(types, images, videos)
    ours = mrope_positions(types, images=images, videos=videos, after="extent")
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    if all(frames <= max(rows, columns) // 2 for frames, rows, columns in videos):
        ours = mrope_positions(types, images=images, videos=videos)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@given(conversations())
def test_text_goes_on_behind_everything_before_it(case):
    types, images, videos = case
    positions = mrope_positions(types, images=images, videos=videos)[0][:, 0]
    for place in range(1, types.shape[1]):
        if types[0, place] == 0:
            assert (positions[:, place] == positions[:, :place].max() + 1).all()


def test_positions_by_hand():
    positions, deltas = mrope_positions(torch.tensor([[0, 0, 0] + [1] * 6 + [0]]), images=[(1, 4, 6)])
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6],
    ]
    assert deltas.tolist() == [-3]


def test_a_video_with_more_frames_than_columns():
    types = torch.tensor([[0, 2, 2, 2, 2, 0]])
    paper = mrope_positions(types, videos=[(4, 2, 2)])[0][:, 0]
    library = mrope_positions(types, videos=[(4, 2, 2)], after="extent")[0][:, 0]
    assert paper[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert library[0].tolist() == [0, 1, 2, 3, 4, 2]  # the text stands in the middle of the video
    assert torch.equal(library[:, None], rope_index(types, videos=[(4, 2, 2)])[0])


def test_padded_batch_is_qwen2s_and_images_go_row_by_row():
    types = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    grids = [(1, 2, 4), (1, 2, 2), (1, 2, 2)]
    for attention_mask in (None, mask):
        theirs = rope_index(types, grids, mask=attention_mask)
        ours = mrope_positions(types, images=grids, attention_mask=attention_mask)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_two_images_may_touch():
    positions = mrope_positions(torch.tensor([[1, 1, 1, 0]]), images=[(1, 2, 4), (1, 2, 2)])[0][:, 0]
    assert positions.tolist() == [[0, 0, 2, 3], [0, 0, 2, 3], [0, 1, 2, 3]]


def test_phases_are_qwen2s():
    from transformers import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

    config = Qwen2VLTextConfig(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    positions = torch.randint(0, 50, (3, 2, 7))
    cos, sin = Qwen2VLRotaryEmbedding(config)(torch.zeros(1), positions)  # [B, T, d], both halves alike
    ours = mrope_phases(positions, 16, (2, 3, 3))
    torch.testing.assert_close(ours[0][:, 0], cos[..., :8], **CLOSE)
    torch.testing.assert_close(ours[1][:, 0], sin[..., :8], **CLOSE)


def test_text_turns_as_in_one_dimension():
    positions = torch.arange(5).expand(2, 5)
    x = torch.randn(2, 3, 5, 16)
    expected = apply_rotary(x, *rotary_phases(positions, 16))
    torch.testing.assert_close(apply_rotary(x, *mrope_phases(positions.expand(3, 2, 5), 16, (2, 3, 3))), expected)


@given(st.integers(1, 3000), st.integers(1, 400))
def test_frames_are_spread_evenly(total, frames):
    assume(frames <= total)
    indices = sample_frames(total, frames)
    assert len(indices.unique()) == len(indices) == frames and indices[0] == 0
    if frames > 1:
        assert indices[-1] == total - 1
        exact = np.linspace(0, total - 1, frames)  # LLaVA-NeXT-Video and LLaVA-OneVision cut this to integers
        assert np.abs(indices.numpy() - exact).max() < 1
        gaps = indices.diff()
        assert gaps.max() - gaps.min() <= 1


@given(st.integers(4, 2000), st.sampled_from([10.0, 24.0, 25.0, 29.97, 60.0]), st.sampled_from([0.5, 1.0, 2.0, 3.0]))
def test_frames_by_rate_are_qwen2s(total, video_fps, fps):
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    stub = SimpleNamespace(num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=768)
    metadata = SimpleNamespace(total_num_frames=total, fps=video_fps)
    theirs = Qwen2VLVideoProcessor.sample_frames(stub, metadata, fps=fps)
    ours = sample_by_rate(total, video_fps, fps)
    # Theirs steps in single precision, so it may differ by one frame where the exact place is a whole number.
    assert len(ours) == len(theirs) or len(ours) == len(theirs) - 1
    assert (ours - theirs[: len(ours)]).abs().max() <= 1
    exact = np.arange(len(ours)) * total / len(ours)
    between = np.abs(exact - np.round(exact)) > 1e-3
    assert torch.equal(ours[between], theirs[: len(ours)].long()[between])


def test_rate_is_bounded():
    assert len(sample_by_rate(3000, 30.0, 1.0, max_frames=51)) == 50
    assert len(sample_by_rate(60, 30.0, 1.0)) == 4
    assert sample_by_rate(7, 30.0, 30.0).tolist() == [0, 1, 2, 3, 4, 5]


def test_an_odd_frame_is_repeated():
    frames = torch.arange(5.0)[:, None, None].expand(5, 2, 3)
    assert group_frames(frames)[:, :, 0, 0].tolist() == [[0, 1], [2, 3], [4, 4]]
    assert merge_frames(frames)[:, 0, 0].tolist() == [0.5, 2.5, 4.0]
    assert group_frames(frames, 3)[:, :, 0, 0].tolist() == [[0, 1, 2], [3, 4, 4]]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_merging_frames_never_mixes_patches(frames, size, patches):
    features = torch.randn(frames, patches, 2)
    merged = merge_frames(features, size)
    assert merged.shape == (-(-frames // size), patches, 2)
    for group in range(len(merged)):
        members = [min(group * size + i, frames - 1) for i in range(size)]
        torch.testing.assert_close(merged[group], sum(features[i] for i in members) / size)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 4, 5])
def test_tubelets_are_qwen2s(frames):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    theirs = PatchEmbed(patch_size=4, temporal_patch_size=2, in_channels=3, embed_dim=10)
    ours = TubeletEmbedding(channels=3, patch_size=4, width=10)
    ours.weight.copy_(theirs.proj.weight)
    video = torch.randn(frames, 3, 8, 12)
    patches, groups, rows, columns = Qwen2VLVideoProcessor.patchify(None, video[None], 4, 1, 2)
    assert (groups, rows, columns) == ((frames + 1) // 2, 2, 3)
    torch.testing.assert_close(ours(video).flatten(0, 1), theirs(patches[0]), **CLOSE)


@pytest.mark.parametrize("side", [2, 5, 27])
def test_bilinear_pooling_is_llava_onevisions(side):
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    stub = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(image_size=side * 14, patch_size=14)))
    features = torch.randn(3, side * side, 4)
    theirs = LlavaOnevisionModel.apply_pooling(stub, features)
    torch.testing.assert_close(pool_frames(features, (side, side)), theirs)
    assert theirs.shape[1] == video_tokens(1, (side, side), spatial=2)


@pytest.mark.parametrize("mode", ["average", "max"])
@pytest.mark.parametrize(("side", "stride"), [(24, 2), (5, 2), (7, 3)])
def test_block_pooling_is_llava_next_videos(mode, side, stride):
    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

    vision = SimpleNamespace(image_size=side, patch_size=1, hidden_size=4)
    config = SimpleNamespace(spatial_pool_mode=mode, spatial_pool_stride=stride, vision_config=vision)
    features = torch.randn(2, side * side, 4)
    torch.testing.assert_close(pool_frames(features, (side, side), stride=stride, mode=mode),
                               LlavaNextVideoPooler(config)(features))  # fmt: skip


@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from(["average", "max", "bilinear"]))
def test_pooling_of_any_grid(rows, columns, mode):
    stride = min(2, rows, columns)
    x = torch.arange(rows * columns, dtype=torch.float32).view(1, -1, 1)
    pooled = pool_frames(x, (rows, columns), stride=stride, mode=mode)
    if mode == "bilinear":
        assert pooled.shape[1] == -(-rows // stride) * -(-columns // stride)
        return
    blocks = [
        [r * columns + c for r in range(i, i + stride) for c in range(j, j + stride)]
        for i in range(0, rows - stride + 1, stride)
        for j in range(0, columns - stride + 1, stride)
    ]
    reduce = max if mode == "max" else lambda block: sum(block) / len(block)
    assert pooled.flatten().tolist() == [reduce(block) for block in blocks]


def test_token_counts_of_known_models():
    assert video_tokens(4, (24, 24)) == 2304  # LLaVA-1.5, four frames
    assert video_tokens(32, (27, 27), spatial=2) == 32 * 196  # LLaVA-OneVision
    assert video_tokens(8, (24, 24), spatial=2) == 8 * 144  # LLaVA-NeXT-Video
    assert video_tokens(5, (16, 16), temporal=2, spatial=2) == 3 * 64  # Qwen2-VL


@torch.no_grad()
def test_temporal_perceiver_reads_all_frames_and_their_order():
    perceiver = TemporalPerceiver(dim=8, queries=3, max_frames=6, heads=2, head_dim=4)
    clip = torch.randn(2, 4, 5, 8)
    out = perceiver(clip)
    assert out.shape == perceiver(clip[:, :1]).shape == (2, 3, 8)
    assert not torch.allclose(out, perceiver(clip.flip(1)), atol=1e-4)
    torch.testing.assert_close(out, perceiver(clip.flip(2)), **CLOSE)  # patches of a frame have no order
    for frame in range(4):
        changed = clip.clone()
        changed[:, frame] = torch.randn(2, 5, 8)
        assert not torch.allclose(out, perceiver(changed), atol=1e-4)


TYPES = torch.tensor([[0, 1, 1, 0]])
F7 = torch.zeros(2, 6, 4)
BAD = {
    "more frames": (lambda: sample_frames(3, 4), "4 frames.*of 3"),
    "no frames": (lambda: sample_frames(3, 0), "frames is 0.*at least 1"),
    "no video": (lambda: sample_by_rate(0, 30.0, 1.0), "total is 0.*at least 1"),
    "fps": (lambda: sample_by_rate(9, 30.0, 0.0), "fps is 0.*above 0"),
    "NaN fps": (lambda: sample_by_rate(9, float("nan"), 1.0), "nan"),
    "short video": (lambda: sample_by_rate(1, 30.0, 1.0), "1 frames.*but 2"),
    "bounds": (lambda: sample_by_rate(9, 30.0, 1.0, min_frames=5, max_frames=4), "min_frames 5.*4"),
    "group": (lambda: group_frames(torch.zeros(0, 3)), r"\(0, 3\)"),
    "group size": (lambda: group_frames(torch.zeros(2, 3), 0), "size is 0"),
    "merge rank": (lambda: merge_frames(torch.zeros(2, 3)), "2 dimensions.*expected 3"),
    "tubelet": (lambda: TubeletEmbedding(channels=3, patch_size=4, width=2)(torch.zeros(2, 3, 8, 9)), "width is 9.*4"),
    "channels": (lambda: TubeletEmbedding(channels=3, patch_size=4, width=2)(torch.zeros(2, 1, 8, 8)), "1.*3"),
    "class token": (lambda: pool_frames(torch.zeros(1, 5, 4), (2, 2)), "N = 5.*expected 4"),
    "no frame": (lambda: pool_frames(torch.zeros(0, 4, 4), (2, 2)), "F = 0.*at least 1"),
    "stride": (lambda: pool_frames(F7, (2, 3), stride=3), "stride is 3.*1 to 2"),
    "mode": (lambda: pool_frames(F7, (2, 3), mode="mean"), "'mean'.*'bilinear'"),
    "tokens": (lambda: video_tokens(0, (2, 2)), "frames is 0.*at least 1"),
    "clip width": (lambda: TemporalPerceiver(dim=8, queries=1, max_frames=2)(torch.zeros(1, 1, 1, 4)), "4.*8"),
    "long clip": (lambda: TemporalPerceiver(dim=8, queries=1, max_frames=2)(torch.zeros(1, 3, 1, 8)), "3 frames.*2"),
    "types rank": (lambda: mrope_positions(TYPES[0]), "1 dimensions.*expected 2"),
    "unknown type": (lambda: mrope_positions(TYPES + 2), "0 .text."),
    "no types": (lambda: mrope_positions(TYPES[:0]), "B = 0.*at least 1"),
    "too few grids": (lambda: mrope_positions(TYPES), "2 image tokens.*0 image grids need 0"),
    "too many tokens": (lambda: mrope_positions(TYPES, images=[(1, 2, 2)]), "2 image tokens.*need 1"),
    "split image": (lambda: mrope_positions(torch.tensor([[1, 0, 1]]), images=[(1, 2, 4)]), "row 0 ends 1 tokens"),
    "grid": (lambda: mrope_positions(TYPES, images=[(2, 4)]), r"\(2, 4\).*frames, rows"),
    "odd grid": (lambda: mrope_positions(TYPES, images=[(1, 3, 4)]), "rows.*is 3.*2"),
    "mask": (lambda: mrope_positions(TYPES, images=[(1, 2, 4)], attention_mask=TYPES[:, :3]), r"\(1, 3\).*\(1, 4\)"),
    "empty row": (lambda: mrope_positions(TYPES * 0, attention_mask=TYPES * 0), "0 real tokens"),
    "after": (lambda: mrope_positions(TYPES, images=[(1, 2, 4)], after="end"), "'end'"),
    "axes": (lambda: mrope_phases(torch.zeros(2, 1, 4).long(), 16, (2, 3, 3)), "3 = 2.*expected 3"),
    "sections": (lambda: mrope_phases(torch.zeros(3, 1, 4).long(), 16, (2, 3, 4)), "sum 9.*16"),
    "theta": (lambda: mrope_phases(torch.zeros(3, 1, 4).long(), 16, (2, 3, 3), -1.0), "theta is -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
