"""The claims of chapter 5, held to account by transformers' own classes, their processors, and counted operations."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm_course import budget, gpu_times
from vlm_course.bridges import LinearBridge
from vlm_course.catalog.models import by_name
from vlm_course.chat import vicuna_prompt
from vlm_course.llava import LLAVA_7B, LLAVA_13B, Llava
from vlm_course.trace import trace_config
from vlm_course.training import freeze_all_but

A100, H100 = budget.GPUS["A100-80GB"], budget.GPUS["H100-80GB"]
TOKENS = 626


def clip_tower(layers=24, image_size=336):
    """transformers' CLIP ViT-L/14, on the meta device."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16,
        image_size=image_size, patch_size=14,
    )  # fmt: skip
    with torch.device("meta"):
        return CLIPVisionModel(config)


@pytest.fixture(scope="module")
def tiny():
    """transformers' LLaVA with random weights, small enough to run."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=49)).eval()


def flops(run):
    """Operations of everything that runs, and of attention's scores alone."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    counts = counter.get_flop_counts()["Global"]
    scores = sum(
        value for operation, value in counts.items() if "attention" in str(operation) or "bmm" in str(operation)
    )
    return sum(counts.values()), scores


@pytest.fixture(scope="module")
def prefill_flops(real_llava):
    """Operations of transformers' 13B decoder for 626 tokens, the head at the last one, scores counted as causal."""
    model = real_llava("13B")
    embeds, last = torch.empty(1, TOKENS, 5120, device="meta"), torch.empty(1, 1, 5120, device="meta")
    total, scores = flops(lambda: (model.model.language_model(inputs_embeds=embeds), model.lm_head(last)))
    return total - scores * (TOKENS - 1) / (2 * TOKENS)


@pytest.fixture(scope="module")
def step_bytes(real_llava, count):
    """16-bit weights that a decoding step of 13B reads, and keys and values of 626 tokens, in bytes."""
    model = real_llava("13B")
    language = model.model.language_model
    out = language(inputs_embeds=torch.empty(1, TOKENS, 5120, device="meta"), use_cache=True)
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in out.past_key_values.layers)
    weights = count(language) - count(language.embed_tokens) + count(model.lm_head)
    return 2 * weights, 2 * cached


@pytest.mark.claim("5-01", kind="model")
def test_two_versions_of_llava(says, count):
    """Fails if a tower at 224 pixels gave 576 patches, or the first version's bridge had two layers."""
    first, later = by_name("LLaVA v1 13B"), by_name("LLaVA-1.5 13B")
    for row in (first, later):
        tower = clip_tower(layers=1, image_size=row.image_size)
        states = tower(torch.empty(1, 3, row.image_size, row.image_size, device="meta")).last_hidden_state
        assert states.shape[1] - 1 == row.visual_tokens
        says(f"{row.image_size} pixels", f"{row.visual_tokens} tokens")
    with torch.device("meta"):
        assert count(LinearBridge(first.vision_width, first.llm_width)) == first.bridge_parameters
    assert (first.bridge, later.bridge) == ("linear", "mlp")


@pytest.mark.claim("5-02", kind="model")
def test_features_are_those_of_layer_minus_two_without_the_class_token(tiny, says):
    """Fails if transformers' LLaVA read the last layer, or kept the class token."""
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = tiny.model.get_image_features(pixel_values=pixels)
        features = features if torch.is_tensor(features) else getattr(features, "pooler_output", features)
        got = torch.cat([part.reshape(-1, 24) for part in features])
        states = tiny.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        wanted = tiny.model.multi_modal_projector(states[-2][:, 1:])[0]
        torch.testing.assert_close(got, wanted)
        assert (got - tiny.model.multi_modal_projector(states[-1][:, 1:])[0]).abs().max() > 1e-3
    says(tiny.config.vision_feature_layer)


@pytest.mark.claim("5-03", kind="model")
def test_both_layers_have_all_tokens_and_the_loss_reads_one(says):
    """Fails if the last layer had no patches, or if CLIP's loss sent a gradient to them."""
    from transformers import CLIPConfig, CLIPModel

    out = clip_tower()(torch.empty(1, 3, 336, 336, device="meta"), output_hidden_states=True)
    assert out.hidden_states[-1].shape == out.hidden_states[-2].shape
    assert out.pooler_output.shape == (1, 1024)
    says(out.hidden_states[-1].shape[1], out.hidden_states[-1].shape[2])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=sizes | {"vocab_size": 20, "eos_token_id": 19},
            vision_config=sizes | {"image_size": 16, "patch_size": 8},
        )
    )
    ids = torch.tensor([[1, 2, 19], [3, 4, 19]])
    out = model(input_ids=ids, pixel_values=torch.randn(2, 3, 16, 16), return_loss=True)
    last = out.vision_model_output.last_hidden_state
    (gradient,) = torch.autograd.grad(out.loss, last)
    assert gradient[:, 0].abs().sum() > 0 and gradient[:, 1:].abs().sum() == 0


@pytest.mark.claim("5-04", kind="model")
def test_the_bridge_of_13b_ends_at_5120(real_llava, says):
    """Fails if the bridge into the 13B model ended at 4096."""
    bridge = real_llava("13B").model.multi_modal_projector
    assert bridge.linear_2.out_features == real_llava("13B").model.language_model.embed_tokens.weight.shape[1]
    says(bridge.linear_1.in_features, bridge.linear_2.out_features)
    says(real_llava("7B").model.multi_modal_projector.linear_2.out_features)


@pytest.mark.claim("5-05", kind="model")
@pytest.mark.parametrize("config", [LLAVA_7B, LLAVA_13B], ids=["7B", "13B"])
def test_what_the_decoder_reads_is_as_wide_as_the_decoder(config, says):
    """Fails if a 4096-wide input went into the 5120-wide model."""
    read = next(row for row in trace_config(config, text_tokens=50) if row.name == "decoder.blocks.0:in")
    says(str(list(read.shape[1:])))


@pytest.mark.claim("5-06", kind="model")
def test_vicuna_13b_by_its_parts(real_llava, count, says):
    """Fails if our 13B had other layers, heads or widths than transformers' class with the published sizes."""
    theirs = real_llava("13B", 32064)
    with torch.device("meta"):
        assert count(Llava(LLAVA_13B)) == count(theirs)
    layers = theirs.model.language_model.layers
    config = theirs.config.text_config
    assert (len(layers), config.hidden_size, config.num_attention_heads) == (40, 5120, 40)
    assert layers[0].self_attn.k_proj.out_features == layers[0].self_attn.q_proj.out_features
    says(f"{layers[0].mlp.up_proj.out_features:,}", f"{LLAVA_13B.text.max_positions:,}")


@pytest.mark.claim("5-07", kind="model")
def test_bytes_of_a_real_cache(step_bytes, says):
    """Fails if keys and values of 626 tokens took other than 0.51 GB, or another share of them were image."""
    patches = clip_tower(layers=1)(torch.empty(1, 3, 336, 336, device="meta")).last_hidden_state.shape[1] - 1
    says(f"{100 * patches / TOKENS:.0f} %")
    assert step_bytes[1] == budget.kv_cache_bytes(LLAVA_13B, TOKENS)
    says(f"{step_bytes[1] / 1e9:.2f} GB", f"{step_bytes[1] // TOKENS:,}")


@pytest.mark.claim("5-08", kind="processor")
def test_clips_range_is_not_minus_one_to_one(says):
    """Fails if CLIP's processor gave values between -1 and 1, or SigLIP's did not."""
    from PIL import Image
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    pictures = [Image.new("RGB", (50, 40), colour) for colour in ("black", "white")]
    for processor, one in ((CLIPImageProcessor(), False), (SiglipImageProcessor(), True)):
        low, high = processor(pictures, return_tensors="pt")["pixel_values"].amax(dim=(2, 3)).tolist()
        if one:
            assert low == pytest.approx([-1, -1, -1]) and high == pytest.approx([1, 1, 1])
        else:
            assert min(high) > 1.9
            says(*(f"{value:.2f}" for value in (*low, *high)))


@pytest.mark.claim("5-09", kind="experiment")
def test_preprocessing_depends_on_the_photograph():
    """Fails if a photograph of 12 megapixels took no longer than one of 0.2, so that one number could be true."""
    from PIL import Image

    from vlm_course.images import clip_preprocess

    def least(size):
        picture, times = Image.new("RGB", size, "gray"), []
        for _ in range(3):
            start = time.process_time()
            clip_preprocess(picture)
            times.append(time.process_time() - start)
        return min(times)

    assert least((4000, 3000)) > 2 * least((512, 384))


@pytest.mark.claim("5-10", kind="model")
def test_operations_of_the_tower(says):
    """Fails if the 23 blocks that run cost other than 0.37 TFLOP, or if an A100 could take less than 1.17 ms."""
    tower = clip_tower(layers=23)
    counted, _ = flops(lambda: tower(torch.empty(1, 3, 336, 336, device="meta")))
    says(f"{counted / 1e12:.2f} TFLOP", f"{1000 * counted / A100.flops:.2f} ms")
    stored = gpu_times.stored().find("vision tower", "13B")
    assert stored.low > 1000 * counted / H100.flops
    says(str(stored))


@pytest.mark.claim("5-11", kind="model")
@pytest.mark.parametrize("name", ["7B", "13B"])
def test_operations_of_the_bridge(real_llava, name, says):
    """Fails if 0.1 ms were not what an A100's peak rate gives, or if an H100 took another order of time."""
    bridge = real_llava(name).model.multi_modal_projector
    counted, _ = flops(lambda: bridge(torch.empty(1, 576, 1024, device="meta")))
    says(f"{1000 * counted / A100.flops:.3f} ms")
    measured = gpu_times.stored().find("bridge", name)
    assert measured.low > 1000 * counted / H100.flops
    says(str(measured))


@pytest.mark.claim("5-12", kind="model")
def test_an_a100_cannot_read_626_tokens_in_30_ms(prefill_flops, says):
    """Fails if the 13B model's operations fitted into 30 ms at an A100's peak rate."""
    a100, h100 = (1000 * prefill_flops / gpu.flops for gpu in (A100, H100))
    assert a100 > gpu_times.LESSON["prefill"] > h100
    assert budget.decoder_flops(LLAVA_13B.text, TOKENS) == pytest.approx(prefill_flops, rel=0.01)
    says(f"{prefill_flops / 1e12:.1f} TFLOP", f"{int(a100)} ms", f"{int(h100)} ms")
    assert gpu_times.stored().find("prefill", "13B").low > h100


@pytest.mark.claim("5-13", kind="model")
def test_floor_of_a_decoding_step(step_bytes, says):
    """Fails if the 13B model's weights and cache could come from memory in another time than 12.9 and 7.8 ms."""
    floors = [1000 * sum(step_bytes) / gpu.bandwidth for gpu in (A100, H100)]
    says(*(f"{floor:.1f} ms" for floor in floors))
    assert max(floors) < gpu_times.LESSON["decode"]
    measured = gpu_times.stored().find("decode", "13B")
    assert measured.low > 2 * gpu_times.LESSON["decode"]
    says(f"{measured.low:.0f} ms")


@pytest.mark.claim("5-14", kind="function")
def test_the_factor_depends_on_the_length_of_the_answer(says):
    """Fails if decoding dominated an answer of one token too, or an A100's floors gave the lesson's factor."""
    lesson = gpu_times.LESSON
    says(f"{100 * lesson['decode'] / (sum(lesson.values()) - lesson['decode']):.1f}")
    read = budget.prefill_seconds(LLAVA_13B, A100, TOKENS, images=1)
    factors = {n: budget.decode_seconds(LLAVA_13B, A100, TOKENS, n) / read for n in (1, 100)}
    says(f"{factors[100]:.0f}")
    assert round(1 / factors[1]) == 4


@pytest.mark.claim("5-15", kind="function")
def test_fewer_visual_tokens_speed_up_the_language_model(says):
    """Fails if reading took as long with a quarter of the visual tokens."""
    full, quarter = (budget.prefill_seconds(LLAVA_13B.text, A100, visual + 50) for visual in (576, 144))
    says(f"{full / quarter:.1f} times")


@pytest.mark.claim("5-16", kind="model")
def test_stage_2_trains_the_language_model_too(count, says):
    """Fails if only the bridge learned in the second stage."""
    with torch.device("meta"):
        model = Llava(LLAVA_13B)
    freeze_all_but(model, ("bridge.", "decoder."))
    learns = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    says(f"{100 * learns / count(model):.1f} %")


@pytest.mark.claim("5-17", kind="model")
def test_the_bridge_is_the_only_new_part(real_llava, says):
    """Fails if LLaVA had a parameter, the bridge's apart, that neither CLIP's tower nor a Llama has."""
    from transformers import LlamaForCausalLM

    model = real_llava("7B")
    with torch.device("meta"):
        llama = LlamaForCausalLM(model.config.text_config)
    parts = {
        name.split(".")[1] if name.startswith("model.") else name.split(".")[0]: None for name in model.state_dict()
    }
    assert set(parts) == {"vision_tower", "multi_modal_projector", "language_model", "lm_head"}
    shapes = lambda module: {name: tensor.shape for name, tensor in module.state_dict().items()}  # noqa: E731
    assert shapes(model.model.vision_tower) == shapes(clip_tower())
    assert shapes(model.model.language_model) == shapes(llama.model)
    says("One")


@pytest.mark.claim("5-18", kind="model")
def test_the_image_stands_where_the_placeholder_stands(tiny, says):
    """Fails if transformers put the features in front of the words, or the template began with the image."""
    ids = torch.tensor([[7, 8, 49, 49, 49, 49, 9]])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = []
    hook = tiny.model.language_model.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(keywords["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        tiny(input_ids=ids, pixel_values=pixels)
    hook.remove()
    words = tiny.get_input_embeddings()(ids)
    as_words = (seen[0] - words).abs().amax(-1)[0] == 0
    assert as_words.tolist() == [True, True, False, False, False, False, True]
    text, _ = vicuna_prompt([("What is in this image?", None)])
    assert text.index("USER:") < text.index("<image>") < text.index("What")
    says('"USER:"')
