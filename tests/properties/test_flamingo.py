"""The cross-attention decoder: it starts as the decoder it was given, reads the right image, and media read no text."""

import pytest
import torch

from vlm_course.bridges import PerceiverResampler
from vlm_course.decoder import Decoder, DecoderConfig
from vlm_course.flamingo import CrossAttentionDecoder
from vlm_course.fusion import GatedCrossAttention, SquaredReLU

IMAGE = 3
CONFIG = DecoderConfig(vocab_size=40, width=16, layers=3, heads=4, kv_heads=2, mlp_width=24)
IDS = torch.tensor([[1, IMAGE, 7, 8, IMAGE, 9, 10], [1, 5, IMAGE, 6, 7, 8, 9]])


def media(images=2):
    return torch.randn(2, images, 5, 12, generator=torch.Generator().manual_seed(1))


def build(opened=True, **changes):
    torch.manual_seed(0)
    options = {"image_id": IMAGE, "media_dim": 12, "at": (0, 2), "heads": 2, "head_dim": 8} | changes
    model = CrossAttentionDecoder(CONFIG, **options).eval().requires_grad_(False)
    if opened:
        for block in model.cross.values():
            block.attention_gate.fill_(0.7), block.feed_forward_gate.fill_(-0.4)
            for weight in block.parameters():
                if weight.dim() == 2:
                    weight.normal_(std=0.3)
    return model


def test_new_blocks_leave_the_decoder_as_it_was():
    decoder = Decoder(CONFIG).eval()
    model = build(opened=False, decoder=decoder)
    with torch.no_grad():
        assert torch.equal(model(IDS, media()), decoder(decoder.embed(IDS)))


def test_text_reads_the_last_image_before_it_and_only_that():
    model = build()
    other = media()
    other[0, 1] += 1.0
    moved = (model(IDS, other) - model(IDS, media())).abs().amax(-1) > 1e-6
    assert moved[0].tolist() == [False] * 4 + [True] * 3 and not moved[1].any()


def test_the_resampler_fixes_how_many_vectors_are_read():
    model = build(compress=PerceiverResampler(dim=12, queries=4, heads=2, head_dim=4))
    assert model.read(torch.randn(2, 1, 30, 12)).shape == (2, 1, 4, 12)
    assert model(IDS, model.read(torch.randn(2, 2, 9, 12)), logits_to_keep=1).shape == (2, 1, 40)


def test_squared_relu_is_a_different_block():
    torch.manual_seed(0)
    one = GatedCrossAttention(dim=8, media_dim=6, heads=2, head_dim=4).requires_grad_(False)
    two = GatedCrossAttention(dim=8, media_dim=6, heads=2, head_dim=4, activation=SquaredReLU).requires_grad_(False)
    two.load_state_dict(one.state_dict())
    text, seen, mask = torch.randn(1, 3, 8), torch.randn(1, 1, 2, 6), torch.ones(1, 3, 1, dtype=torch.bool)
    one.feed_forward_gate.fill_(0.5), two.feed_forward_gate.fill_(0.5)
    assert (one(text, seen, mask) - two(text, seen, mask)).abs().max() > 1e-3
    assert SquaredReLU()(torch.tensor([-2.0, 3.0])).tolist() == [0.0, 9.0]


def test_blocks_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"before blocks \(0, 3\), but the decoder has the blocks 0 \.\. 2"):
        build(at=(0, 3))
    with pytest.raises(ValueError, match="features has 3 dimensions"):
        build().read(torch.zeros(2, 5, 12))
