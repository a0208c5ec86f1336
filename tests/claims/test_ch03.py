"""The claims of chapter 3, held to account by the models that they are about."""

import functools

import pytest
import torch

from vlm_course import chat
from vlm_course.attention import causal_mask
from vlm_course.attention_maps import hidden_states
from vlm_course.catalog import find
from vlm_course.catalog.building import build
from vlm_course.catalog.building import count as count_parts
from vlm_course.fusion import GatedCrossAttention, splice_image_features

IMAGE, NEW_IMAGE = 99, 98


def redrawn(model, std=0.2):
    """The model with every parameter drawn wide: first values of 0.02 hide what flows where."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def llama_config(**changes):
    from transformers import LlamaConfig

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaConfig(**sizes, num_attention_heads=4, **changes)


def clip_config():
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )


@functools.cache
def llava():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    return redrawn(
        LlavaForConditionalGeneration(
            LlavaConfig(vision_config=clip_config(), text_config=llama_config(), image_token_index=IMAGE)
        )
    )


@functools.cache
def idefics():
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    config = IdeficsConfig(
        vocab_size=100, additional_vocab_size=0, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_hidden_layers=2, cross_layer_interval=1, use_resampler=True, qk_layer_norms=False, alpha_type="float",
        alpha_initializer="zeros", dropout=0.0,
        vision_config={"embed_dim": 24, "image_size": 32, "patch_size": 8, "num_attention_heads": 2,
                       "num_hidden_layers": 1, "intermediate_size": 48},
        perceiver_config={"resampler_n_latents": 64, "resampler_depth": 1, "resampler_n_heads": 2,
                          "resampler_head_dim": 8, "qk_layer_norms_perceiver": False},
    )  # fmt: skip
    model = redrawn(IdeficsForVisionText2Text(config))
    for layer in model.model.gated_cross_attn_layers:
        layer.alpha_cross_attn.fill_(0.7), layer.alpha_dense.fill_(-0.4)
    return model


def image(seed=1):
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def idefics_inputs(tail, images=1):
    ids = torch.tensor([[1, 5, *tail]])
    return {
        "input_ids": ids,
        "pixel_values": torch.cat([image(k) for k in range(images)])[None],
        "image_attention_mask": torch.ones(1, ids.shape[1], images, dtype=torch.long),
        "attention_mask": torch.ones_like(ids),
    }


@pytest.mark.claim("3-01", kind="model")
def test_llava_joins_behind_a_tower_and_fuyu_without_one(real_llava, count, says):
    """Fails if Fuyu had a vision tower too, or LLaVA none: then early fusion would mean one thing."""
    llava_tower = count(real_llava("13B").model.vision_tower)
    with torch.device("meta"):
        fuyu = build(find("fuyu-8b"))
    assert {name for name, _ in fuyu.model.named_children()} == {"language_model", "vision_embed_tokens"}
    assert isinstance(fuyu.model.vision_embed_tokens, torch.nn.Linear)
    says(f"{llava_tower / 1e9:.1f} billion")


@pytest.mark.claim("3-02", kind="model")
def test_text_asks_and_the_image_is_asked(says):
    """Fails if Idefics made queries from the image, or if its new layers moved the text while their gates are 0."""
    layer = idefics().model.gated_cross_attn_layers[0]
    assert layer.cross_attn.q_proj.in_features == 32  # the text's width
    assert layer.cross_attn.k_proj.in_features == layer.cross_attn.v_proj.in_features == 24  # the image's
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

    fresh = IdeficsGatedCrossAttentionLayer(idefics().config, layer_idx=0).eval()
    text, media = torch.randn(1, 4, 32), torch.randn(1, 6, 24)
    allowed = torch.zeros(1, 1, 4, 6)
    options = {"image_attention_mask": allowed, "cross_attention_gate": torch.ones(1, 4)}
    assert torch.equal(fresh(text, image_hidden_states=media, **options), text)
    says(0)


@pytest.mark.claim("3-03", kind="model")
def test_a_resampler_fixes_the_number_and_not_the_way_in(says):
    """Fails if Qwen-VL's bridge were a stack like Flamingo's, or if the number of tokens decided how they enter."""
    with torch.device("meta"):
        qwen, flamingo = build(find("qwen-vl")), build(find("flamingo-80b"))
    attentions = [name for name, _ in qwen.bridge.named_modules() if name.split(".")[-1] == "to_q"]
    queries = [weight for name, weight in qwen.bridge.named_parameters() if "quer" in name and weight.dim() == 2]
    assert len(attentions) == 1 and any(weight.shape[0] == 256 for weight in queries)
    assert len(flamingo.resampler.layers) == 6 and find("qwen-vl")["fusion"] != find("flamingo-80b")["fusion"]
    says(256)


@pytest.mark.claim("3-04", kind="model")
def test_spliced_models_take_images_anywhere_too():
    """Fails if LLaVA's class refused a second image between words, or if Flamingo's mask joined the two images."""
    from vlm_course.fusion import media_mask

    two = torch.tensor([[1, *[IMAGE] * 16, 7, 8, *[IMAGE] * 16, 9]])
    logits = [
        llava()(input_ids=two, pixel_values=torch.cat([image(1), image(k)])).logits for k in (2, 3)
    ]  # the second image differs
    assert torch.equal(logits[0][:, :19], logits[1][:, :19]) and not torch.equal(logits[0][:, -1], logits[1][:, -1])
    page = torch.tensor([[1, IMAGE, 7, 8, IMAGE, 9]])
    assert media_mask(page, IMAGE, 2)[0].sum(-1).max() == 1


@pytest.mark.claim("3-05", kind="model")
def test_visual_tokens_look_back_and_never_forward(says):
    """Fails if disturbing one visual token of nine moved an earlier one, or left a later one as it was."""
    from transformers import LlamaModel

    model = redrawn(LlamaModel(llama_config()))
    embeds = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    disturbed = embeds.clone()
    disturbed[0, 5] += 1
    change = model(inputs_embeds=disturbed).last_hidden_state - model(inputs_embeds=embeds).last_hidden_state
    moved = (change[0].abs().amax(-1) > 0).nonzero()[:, 0].tolist()
    *most, last = map(str, moved)
    says(f"{', '.join(most)} and {last}")


@pytest.mark.claim("3-06", kind="function")
def test_a_sentence_stands_before_the_image(says):
    """Fails if LLaVA-1.5's template put the image first, or behind the question."""
    prompt, _ = chat.vicuna_prompt([("What is on the table?", None)])
    before, after = prompt.split("<image>")
    assert len(before.split()) > 20 and "table" in after and "table" not in before
    assert before.rstrip().endswith("USER:")
    says("USER:")


def image_states(order, question):
    """States of the image's 16 places in transformers' LLaVA, after every layer: [layers + 1, 16, D]."""
    places = [IMAGE] * 16
    ids = torch.tensor([[1, *places, *question] if order == "image first" else [1, *question, *places]])
    out = llava()(input_ids=ids, pixel_values=image(), output_hidden_states=True)
    return torch.stack(out.hidden_states)[:, 0, ids[0] == IMAGE]


@pytest.mark.claim("3-07", kind="model")
def test_the_question_moves_the_image_only_from_in_front():
    """Fails if visual states differed by a single bit behind another question, or did not with the question first."""
    one, two = (image_states("image first", question) for question in ([5, 6, 7], [8, 9, 10]))
    assert torch.equal(one, two)
    assert (one[1:] - one[:-1]).abs().amax((1, 2)).min() > 0.1  # not frozen: every layer changes them
    one, two = (image_states("question first", question) for question in ([5, 6, 7], [8, 9, 10]))
    assert torch.equal(one[0], two[0]) and (one[1:] - two[1:]).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.claim("3-07", kind="experiment")
def test_the_shipped_models_image_does_not_know_the_question(small, seen):
    """Fails if any state of a visual token of the trained model depended on the question behind the image."""
    states = []
    for words in ("what color is the star ?", "how many stars are there ?"):
        ids = torch.tensor([chat.encode_chat(small.tokenizer, [(words, None)], 144)[0]])
        embeds = splice_image_features(small.model.decoder.embed(ids), ids, seen[:1], small.tokenizer.image_id)
        states.append(hidden_states(small.model.decoder, embeds)[:, 0, ids[0] == small.tokenizer.image_id])
    assert torch.equal(*states)


@pytest.mark.claim("3-08", kind="model")
def test_what_the_new_blocks_read_never_depends_on_the_text(says):
    """Fails if Idefics, Flamingo's open relative, let its image states see the text, or if Flamingo were the newer."""
    read = []
    layer = idefics().model.gated_cross_attn_layers[-1].cross_attn.k_proj
    handle = layer.register_forward_pre_hook(lambda _, args: read.append(args[0].clone()))
    try:
        outs = [idefics()(**idefics_inputs(tail)).logits for tail in ([6, 7, 8], [9, 10, 11])]
        other = idefics()(**idefics_inputs([6, 7, 8]) | {"pixel_values": image(7)[None]}).logits
    finally:
        handle.remove()
    assert torch.equal(read[0], read[1]) and not torch.equal(outs[0], outs[1])
    assert not torch.equal(read[0], read[2]) and not torch.equal(outs[0], other)
    assert find("flamingo-80b")["released"] < find("llava-v1-13b")["released"]
    says("April 2022", "April 2023")


@pytest.mark.claim("3-08", kind="model")
def test_a_prefix_mask_does_what_the_lesson_ascribes_to_flamingo():
    """Fails if PaliGemma's image states did not see the prompt behind them."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": "gemma", **sizes, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 100}
    vision = {"model_type": "siglip_vision_model", **sizes, "image_size": 32, "patch_size": 8}
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, vocab_size=100, projection_dim=32
    )
    model = redrawn(PaliGemmaForConditionalGeneration(config))
    states = []
    for question in ([5, 6, 7], [8, 9, 10]):
        ids = torch.tensor([[IMAGE] * 16 + [2, *question]])
        out = model(
            input_ids=ids, pixel_values=image(), token_type_ids=torch.zeros_like(ids), output_hidden_states=True
        )
        states.append(torch.stack(out.hidden_states)[:, 0, :16])
    assert torch.equal(states[0][0], states[1][0]) and not torch.equal(states[0][-1], states[1][-1])


@pytest.mark.claim("3-09", kind="model")
def test_llava_13b_has_13_billion_and_a_third(real_llava, count, says):
    """Fails if transformers' class at the sizes of LLaVA-1.5 13B had another number of parameters."""
    says(f"{count(real_llava('13B', 32064)):,}", "32,064")


@pytest.mark.claim("3-10", kind="model")
def test_flamingo_is_mostly_frozen(says):
    """Fails if the new tenth were a half, or if the parts did not add up to the size that is stated."""
    parts = count_parts(find("flamingo-80b"))
    assert 0.09 < parts["bridge"] / parts["total"] < 0.12
    says(f"{parts['vision'] / 1e6:.0f} million", f"{parts['total'] / 1e9:.1f} billion")


@pytest.mark.claim("3-11", kind="model")
def test_the_sequence_is_as_long_as_the_text(says):
    """Fails if the 64 latents of an image took places in the sequence of Idefics."""
    inputs = idefics_inputs([6, 7, 8])
    assert idefics()(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    read = []
    handle = (
        idefics()
        .model.gated_cross_attn_layers[0]
        .cross_attn.k_proj.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    )
    idefics()(**inputs)
    handle.remove()
    says(read[0])


@pytest.mark.claim("3-12", kind="model")
def test_qwen_vl_adds_up(says):
    """Fails if the tower were a smaller ViT, or if tower, bridge and language model gave another sum."""
    parts = count_parts(find("qwen-vl"))
    says("ViT-bigG", *(f"{parts[name] / 1e9:.2f}" for name in ("vision", "bridge", "language")))
    says(f"{parts['total'] / 1e9:.2f} billion")


@pytest.mark.claim("3-13", kind="model")
def test_internvl_1_5_has_an_mlp_and_256_tokens_a_tile(says):
    """Fails if transformers' pixel shuffle left another number of tokens, or 1.5 had the lesson's size."""
    from transformers.models.internvl.modeling_internvl import InternVLModel

    tile = InternVLModel.pixel_shuffle(None, torch.zeros(1, 32, 32, 4), scale_factor=0.5)
    parts = count_parts(find("internvl-1.5"))
    says(tile.shape[1] * tile.shape[2], f"{parts['total'] / 1e9:.1f} billion", "InternVL 1.0", "InternVL 1.5")
    assert parts["total"] > 25e9 and "EVA" not in find("internvl-1.5")["vision"] + find("internvl-1.0-7b")["vision"]


@pytest.mark.claim("3-14", kind="function")
def test_a_ninth_of_the_tokens_is_a_ninth_of_the_bill(says):
    """Fails if reading 64 tokens cost the language model more or less than a ninth of reading 576, within a percent."""
    from vlm_course import bridge_study
    from vlm_course.llava import LLAVA_7B, Llava

    with torch.device("meta"):
        decoder = Llava(LLAVA_7B).decoder
    few, many = (bridge_study.reading_flops(decoder, tokens) for tokens in (64, 576))
    assert many / few == pytest.approx(9, rel=0.05)
    says("64", "576", "a ninth")


@pytest.mark.claim("3-17", kind="model")
def test_nfnet_ends_in_1536_channels(says):
    """Fails if the grid of NFNet-F6's features were 1024 wide."""
    import timm

    with torch.device("meta"):
        tower = timm.create_model("nfnet_f6", num_classes=0)
        features = tower.stages(tower.stem(torch.empty(1, 3, 320, 320)))
    says(features.shape[1])
    with torch.device("meta"):
        flamingo = build(find("flamingo-80b"))
    assert flamingo.gated[0].to_k.in_features == features.shape[1] != 1024
    assert flamingo.gated[0].to_k.out_features == 8192


@pytest.mark.claim("3-18", kind="model")
def test_heads_times_width_is_the_width_of_the_text(says):
    """Fails if 64 heads of 128 did not fill the language model's width, or if the resampler gave another number."""
    with torch.device("meta"):
        flamingo = build(find("flamingo-80b"))
    block = flamingo.gated[0]
    assert block.to_q.out_features == block.to_q.in_features == 64 * 128
    says(block.to_q.out_features, block.heads, len(flamingo.resampler.latents))


@functools.cache
def flamingo_block(media_dim):
    with torch.device("meta"):
        return GatedCrossAttention(dim=8192, media_dim=media_dim, heads=64, head_dim=128)


def sizes(block):
    """Parameters of the attention's four matrices, of the feed-forward net, and of all."""
    names = {name: weight.numel() for name, weight in block.named_parameters()}
    four = sum(number for name, number in names.items() if name.startswith("to_"))
    feed_forward = sum(number for name, number in names.items() if name.startswith("feed_forward."))
    return four, feed_forward, sum(names.values())


@pytest.mark.claim("3-19", kind="model")
def test_a_block_weighs_four_times_what_the_lesson_counts(says):
    """Fails if the module's matrices had other sizes, or if the block had no feed-forward net."""
    lesson, _, _ = sizes(flamingo_block(1024))
    four, feed_forward, whole = sizes(flamingo_block(1536))
    millions = [f"{number / 1e6:.1f} million" for number in (lesson, four, feed_forward)]
    blocks = len(build(find("flamingo-80b")).gated)
    says(*millions, f"{whole / 1e6:.0f} million", f"{blocks * whole / 1e9:.2f} billion")


@pytest.mark.claim("3-20", kind="model")
def test_every_weight_of_the_new_layers_is_missing_in_the_language_model():
    """Fails if Idefics took queries or outputs of its cross-attention from the language model that it builds on."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        text = {name for name, _ in LlamaForCausalLM(llama_config()).named_parameters()}
    new = [name for name, _ in idefics().named_parameters() if "gated_cross_attn_layers.0." in name]
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.gate_proj", "alpha_cross_attn", "alpha_dense"):
        assert any(part in name for name in new), part
    assert not text & set(new)
    own = {name for name, _ in idefics().model.layers[0].named_parameters()}
    assert {"self_attn.q_proj.weight", "self_attn.o_proj.weight"} <= own  # and the old ones are still there


@pytest.mark.claim("3-21", kind="model")
def test_the_feed_forward_net_is_most_of_a_block(says):
    """Fails if keys and values, or all of the attention, outweighed the feed-forward net."""
    block = flamingo_block(1536)
    _, feed_forward, whole = sizes(block)
    keys_and_values = block.to_k.weight.numel() + block.to_v.weight.numel()
    assert 0.03 < keys_and_values / whole < 0.04
    says("4 %", f"{100 * feed_forward / whole:.0f} %")


@pytest.mark.claim("3-22", kind="experiment")
def test_text_reads_the_image_through_self_attention_alone(small, exam, seen, sharp, swapped):
    """Fails if answers survived when text may not attend to visual tokens: then there would be another way."""
    from vlm_course.probe_questions import Score

    image_id, decoder = small.tokenizer.image_id, small.model.decoder
    embeds = splice_image_features(decoder.embed(exam.ids), exam.ids, seen, image_id)
    visual = exam.ids == image_id
    blind = causal_mask(exam.ids.shape[1]) & ~(~visual[:, :, None] & visual[:, None, :])
    with torch.no_grad():
        best = decoder(embeds, mask=blind[:, None]).argmax(-1).roll(1, dims=1)
    cut = Score(exam, 0.0, torch.where(exam.turn >= 0, best, -1))
    assert sharp.accuracy() > 0.9 and cut.accuracy() < 0.6
    assert cut.accuracy() < swapped.accuracy() + 0.25
