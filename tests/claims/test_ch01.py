"""The claims of chapter 1: what CLIP's tower is made of, what it costs, which of its outputs its loss trains."""

import pytest
import torch
import torch.nn.functional as F

from vlm_course import encoder_study, encoders
from vlm_course.budget import vit_flops as flops_by_budget
from vlm_course.llava import LLAVA_7B
from vlm_course.patches import patchify
from vlm_course.resolution import LLAVA_NEXT_RESOLUTIONS, anyres_token_count
from vlm_course.vit import VisionTransformer

LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 336,
}  # fmt: skip


@pytest.fixture(scope="module")
def tower():
    """transformers' own class at the size of CLIP ViT-L/14-336, on the meta device."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        return CLIPVisionModel(CLIPVisionConfig(**LARGE)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip():
    """The whole of CLIP ViT-L/14-336, on the meta device."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 49407}
    with torch.device("meta"):
        return CLIPModel(CLIPConfig(text_config=text, vision_config=LARGE, projection_dim=768)).requires_grad_(False)


def pixels_of(size: int) -> torch.Tensor:
    return torch.empty(1, 3, size, size, device="meta")


def narrow(size: int = 336, **changes):
    """A real tower of one narrow layer with as many tokens as CLIP's, with numbers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return CLIPVisionModel(CLIPVisionConfig(**{**sizes, "patch_size": 14, "image_size": size, **changes})).eval()


@pytest.fixture
def small_clip(redraw):
    """A CLIP of four blocks with random numbers."""
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {**size, "vocab_size": 60, "max_position_embeddings": 8, "eos_token_id": 59}
    return redraw(CLIPModel(CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8})))


@pytest.mark.claim("1-01", kind="model")
def test_what_chopping_and_adding_leaves_out(tower, says):
    """Fails if CLIP's tower had no learned map of the patches, a bias in it, or no class token and first norm."""
    convolution = tower.embeddings.patch_embedding
    assert convolution.bias is None and convolution.kernel_size == convolution.stride == (14, 14)
    assert tower.embeddings.class_embedding.shape == (1024,) and isinstance(tower.pre_layrnorm, torch.nn.LayerNorm)
    says(f"stride {convolution.stride[0]}", "without bias")
    real = narrow(56).embeddings.patch_embedding
    image = torch.randn(1, 3, 56, 56)
    by_matrix = patchify(image, 14) @ real.weight.flatten(1).T
    torch.testing.assert_close(by_matrix, real(image).flatten(2).transpose(1, 2), atol=1e-5, rtol=0)


@pytest.mark.claim("1-02", kind="model")
def test_the_grid(tower, says):
    """Fails if CLIP's convolution made another grid of 336 x 336 pixels."""
    rows, columns = tower.embeddings.patch_embedding(pixels_of(336)).shape[2:]
    says(f"{rows} x {columns}", rows * columns)


@pytest.mark.claim("1-03", kind="model")
def test_a_patch_has_588_values_not_pixels(tower, says):
    """Fails if a filter of the patch embedding read another number of values, or gave another width."""
    filters = tower.embeddings.patch_embedding.weight
    says(filters[0].numel(), filters[0, 0].numel(), len(filters))
    assert filters[0].numel() < len(filters)


@pytest.mark.claim("1-04", kind="model")
def test_the_class_token_has_a_position(tower, says):
    """Fails if there were as many positions as patches."""
    rows, width = tower.embeddings.position_embedding.weight.shape
    says(f"{rows} x {width}")


@pytest.mark.claim("1-05", kind="model")
def test_attention_runs_over_577_tokens(tower, says):
    """Fails if the class token were dropped before the end of CLIP's tower, or layers and heads were others."""
    seen = []
    hooks = [
        layer.self_attn.q_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
        for layer in tower.encoder.layers
    ]
    tower(pixels_of(336))
    for hook in hooks:
        hook.remove()
    assert set(seen) == {577}
    says(len(seen), tower.config.num_attention_heads, seen[0], seen[0] - 1)


@pytest.mark.claim("1-06", kind="model")
def test_672_pixels_need_stretched_positions(tower, says):
    """Fails if CLIP took another size as it is, or stretching gave another number of tokens."""
    with pytest.raises(ValueError, match="672"):
        tower(pixels_of(672))
    tokens = tower(pixels_of(672), interpolate_pos_encoding=True).last_hidden_state.shape[1]
    says(f"{tokens:,}", f"{tokens - 1:,}")
    with pytest.raises(ValueError, match="336"):
        with torch.device("meta"):
            VisionTransformer(LLAVA_7B.vision)(pixels_of(672))


@pytest.mark.claim("1-07", kind="model")
def test_entries_of_the_score_matrix_are_not_operations(says):
    """Fails if a layer's attention matrix had another size, or an entry cost one operation."""
    entries = []
    for size in (336, 672):
        model = narrow(size)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            (table,) = model(torch.zeros(1, 3, size, size), output_attentions=True).attentions
        assert table.shape[:2] == (1, 1)
        entries.append(table[0, 0, 1:, 1:].numel())
    says(*(f"{count:,}" for count in entries), f"ratio is {entries[1] // entries[0]}")
    _, attention = encoders.vit_flops(577, 1024, 1, 4096)
    products = attention / 2 / 2 / 577**2  # two operations in a product; scores, and their use
    says(f"{products:,.0f} multiply-adds")


@pytest.mark.claim("1-08", kind="model")
def test_the_whole_tower_grows_fivefold(tower, says):
    """Fails if four times the pixels took four times or sixteen times the operations of the whole tower."""
    counts = [
        encoders.counted_flops(lambda x: tower(x, interpolate_pos_encoding=True), pixels_of(s)) for s in (336, 672)
    ]
    (small, large), shares = [sum(count) for count in counts], [count[1] / sum(count) for count in counts]
    says(f"{large / small:.1f} times", f"{small / 1e12:.2f}", f"{large / 1e12:.2f}")
    says(f"{100 * shares[0]:.1f} %", f"{100 * shares[1]:.0f} %")
    assert counts[1][1] / counts[0][1] == pytest.approx(16, rel=0.01)
    tiles = sum(encoders.counted_flops(tower, torch.empty(4, 3, 336, 336, device="meta")))
    says(f"{tiles / small:.1f} times")
    assert sum(encoders.vit_flops(577, 1024, 24, 4096)) == pytest.approx(flops_by_budget(LLAVA_7B.vision), rel=0.003)


@pytest.mark.claim("1-09", kind="processor")
def test_tokens_still_grow_with_the_pixels(says):
    """Fails if AnyRes or Qwen2-VL gave a larger image no more tokens."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    counts = [anyres_token_count((side, side), LLAVA_NEXT_RESOLUTIONS, tile=336, patch=14) for side in (200, 336, 672)]
    plain = anyres_token_count((672, 672), LLAVA_NEXT_RESOLUTIONS, tile=336, patch=14, newline=False)
    says(f"{plain:,}", f"{counts[-1]:,}")
    assert counts[-1] > counts[0]
    qwen = []
    for side in (224, 448, 896):
        height, width = smart_resize(side, side, factor=28, min_pixels=56 * 56, max_pixels=14 * 14 * 4 * 1280)
        qwen.append(height // 28 * (width // 28))
    assert qwen[1] == pytest.approx(4 * qwen[0]) and qwen[2] == pytest.approx(4 * qwen[1])


@pytest.mark.claim("1-11", kind="model")
def test_clips_size_and_its_two_widths(clip, count, says):
    """Fails if the tower had another size, or the vector that is compared were as wide as a token."""
    found = encoders.measure(encoders.CLIP_L)
    assert found.parameters == count(clip.vision_model)
    vector = clip.get_image_features(pixel_values=pixels_of(336))
    vector = getattr(vector, "pooler_output", vector)
    says(f"{found.parameters:,}", found.width, vector.shape[-1])


@pytest.mark.claim("1-12", kind="model")
def test_siglip_with_and_without_its_pooling(count, says):
    """Fails if the tower had another size or width, or a class token."""
    import timm

    found = encoders.measure(encoders.SIGLIP_SO400M)
    with torch.device("meta"):
        bare = timm.create_model("vit_so400m_patch14_siglip_gap_224", pretrained=False, num_classes=0)
    says(f"{found.parameters / 1e6:.1f}M", f"{count(bare) / 1e6:.1f}M", found.width)
    assert found.extra_tokens == 0


@pytest.mark.claim("1-13", kind="model")
def test_eva_g(says):
    """Fails if EVA's ViT-g had another size, width or depth."""
    found = encoders.measure(encoders.EVA_G)
    says(f"{found.parameters:,}", found.width, f"{found.layers} layers")


@pytest.mark.claim("1-14", kind="model")
def test_intern_vit_is_no_eva(says):
    """Fails if InternVL's tower were as wide as EVA's ViT-g, or BLIP-2's were not."""
    from transformers import Blip2VisionConfig

    found, eva, blip = encoders.measure(encoders.INTERN_VIT_6B), encoders.measure(encoders.EVA_G), Blip2VisionConfig()
    assert found.width != eva.width == blip.hidden_size and eva.layers == blip.num_hidden_layers + 1
    says(found.width, f"{found.layers} layers", f"{found.parameters / 1e9:.1f} billion", f"{blip.hidden_size}-wide")
    says(f"{blip.num_hidden_layers} layers")


@pytest.mark.claim("1-15", kind="model")
def test_dinov2(says):
    """Fails if DINOv2's ViT-L had another size."""
    found = encoders.measure(encoders.DINOV2_L)
    assert (found.width, found.patch_size) == (1024, 14)
    says(f"{found.parameters:,}", f"{found.image_size} pixels")


@pytest.mark.claim("1-17", kind="model")
@torch.no_grad()
def test_the_image_vector_reads_the_class_token_alone(small_clip, clip, says):
    """Fails if anything of the last layer but the class token reached CLIP's image vector."""
    pixels = torch.randn(2, 3, 32, 32)

    def vector():
        found = small_clip.get_image_features(pixel_values=pixels)
        return getattr(found, "pooler_output", found)

    def overwrite(module, inputs, output):
        states = output[0] if isinstance(output, tuple) else output
        states[:, first:] = 7.0
        return output

    before = vector()
    for first, moves in ((1, False), (0, True)):  # noqa: B007, the hook reads it
        hook = small_clip.vision_model.encoder.layers[-1].register_forward_hook(overwrite)
        after = vector()
        hook.remove()
        assert torch.equal(before, after) != moves
    says(clip.visual_projection.out_features)


@pytest.mark.claim("1-18", kind="model")
def test_the_last_layers_patches_get_no_gradient_at_all(small_clip, says):
    """Fails if the contrastive loss pulled at the last layer's patches, or did not pull at those one layer before."""
    states = []
    for layer in small_clip.vision_model.encoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: states.append(output))
    ids = torch.tensor([[1, 2, 59], [3, 4, 59], [5, 6, 59]])
    loss = small_clip(input_ids=ids, pixel_values=torch.randn(3, 3, 32, 32), return_loss=True).loss
    states = [state[0] if isinstance(state, tuple) else state for state in states]
    pulls = [gradient[:, 1:].abs().max().item() for gradient in torch.autograd.grad(loss, states)]
    assert pulls[-1] == 0 and all(pull > 0 for pull in pulls[:-1])
    says(f"exactly {pulls[-1]:.0f}")


@pytest.mark.claim("1-18", kind="experiment")
@torch.no_grad()
def test_places_can_be_read_from_the_last_layer_as_well(small):
    """Fails if the shipped tower's last layer told less of places than layer -2, by more than half a pixel of 96."""
    objects = encoder_study.lone_objects(110, seed=5)
    states = small.contrastive.vision.hidden_states(objects.pixels)
    last, before = (
        encoder_study.error_of_tokens(states[layer][:, 1:], objects, train=70, patch_size=8) for layer in (-1, -2)
    )
    assert last < before + 0.5
    assert last < encoder_study.error_of_the_mean(objects.centre, train=70) / 4


@pytest.mark.claim("1-19", kind="function")
def test_only_the_larger_patch_is_compressed(says):
    """Fails if patches of 28 on 672 pixels were of another number or size, or 14 x 14 had more values than 1024."""
    coarse, fine = (patchify(torch.zeros(1, 3, 672, 672), size) for size in (28, 14))
    says(f"{coarse.shape[1]} tokens", f"{coarse.shape[2]:,}", fine.shape[2])
    says(coarse.unflatten(2, (3, -1)).shape[3], fine.unflatten(2, (3, -1)).shape[3])
    assert fine.shape[2] < LLAVA_7B.vision.width < coarse.shape[2]


@pytest.mark.claim("1-20", kind="model")
@torch.no_grad()
def test_the_first_step_is_a_convolution_that_does_not_overlap():
    """Fails if a pixel could reach another patch than its own in the first step of CLIP's tower."""
    convolution = narrow(56).embeddings.patch_embedding
    image = torch.randn(1, 3, 56, 56)
    touched = image.clone()
    touched[0, 1, 13, 14] += 1  # the last row of the first row of patches, the first column of its second patch
    moved = (convolution(touched) - convolution(image)).abs().amax(1)[0] > 1e-6
    assert moved.nonzero().tolist() == [[0, 1]]
    assert F.conv2d(image, convolution.weight, stride=14).shape == convolution(image).shape
