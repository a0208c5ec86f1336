"""The claims of chapter 2, held to account by the bridges and models that they are about."""

import pytest
import torch
from torch import nn

from vlm_course import bridge_study
from vlm_course.bridges import LinearBridge, PerceiverResampler, VisionProjection
from vlm_course.llava import LLAVA_7B, LLAVA_13B, Llava
from vlm_course.probe_questions import score
from vlm_course.training import freeze_all_but
from vlm_course.worlds.scenes import COLOURS, SHAPES

INSTRUCT = ("bridge.", "decoder.")  # what learns in LLaVA's second stage


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.claim("2-01", kind="model")
def test_both_layers_of_the_13b_bridge_end_at_its_own_width(real_llava, says):
    """Fails if the 13B model had a layer of width 4096 in its bridge, or could read tokens of that width."""
    model = real_llava("13B").model
    ends = [model.multi_modal_projector.linear_1.out_features, model.multi_modal_projector.linear_2.out_features]
    assert ends == [5120, 5120]
    with pytest.raises(RuntimeError):  # the first layer of the language model refuses 4096-wide tokens
        model.language_model(inputs_embeds=torch.empty(1, 4, 4096, device="meta"))
    says(*ends)


@pytest.mark.claim("2-02", kind="model")
def test_layer_by_layer_counts(real_llava, count, says):
    """Fails if a layer of the 13B bridge had another number of parameters, or the 7B sum were not the lesson's."""
    layers = real_llava("13B").model.multi_modal_projector
    says(*(f"{count(part):,}" for part in (layers.linear_1, layers.linear_2, layers)))
    assert count(real_llava("7B").model.multi_modal_projector) == 20_979_712


@pytest.mark.claim("2-03", kind="model")
def test_share_of_the_language_model(real_llava, count, says):
    """Fails if a bridge were another share of its own language model, or 0.16 % were either's."""
    parts = {name: real_llava(name) for name in ("7B", "13B")}
    bridges = {name: count(model.model.multi_modal_projector) for name, model in parts.items()}
    decoders = {name: count(model.model.language_model) + count(model.lm_head) for name, model in parts.items()}
    own = [100 * bridges[name] / decoders[name] for name in parts]
    says(*(f"{share:.3f} %" for share in own))
    assert min(own) > 0.2
    assert f"{100 * bridges['7B'] / decoders['13B']:.2f}" == "0.16"  # where the lesson's number comes from


@pytest.mark.claim("2-04", kind="model")
def test_5120_is_the_width_of_the_embeddings(real_llava, says):
    """Fails if Vicuna-13B's embeddings were 4096 wide or its feed-forward layers 5120."""
    model = real_llava("13B").model.language_model
    says(model.embed_tokens.weight.shape[1], f"{model.layers[0].mlp.up_proj.out_features:,}")
    assert model.embed_tokens.weight.shape[1] == model.layers[0].self_attn.o_proj.out_features


@pytest.mark.claim("2-05", kind="model")
def test_the_width_in_the_middle_is_that_of_the_language_model(real_llava):
    """Fails if the bridge had an intermediate width of its own, as the lesson's exercise supposes."""
    for name in ("7B", "13B"):
        model = real_llava(name)
        assert model.model.multi_modal_projector.linear_1.out_features == model.config.text_config.hidden_size


@pytest.mark.claim("2-06", kind="model")
@pytest.mark.parametrize("config", [LLAVA_7B, LLAVA_13B], ids=["7B", "13B"])
def test_the_second_stage_trains_nearly_everything(config, count, says):
    """Fails if in stage 2 less than 95 % of the parameters learned, that is if the bridge were alone with the work."""
    model = on_meta(lambda: Llava(config))
    names = set(freeze_all_but(model, INSTRUCT))
    learned = sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)
    assert learned / count(model) > 0.95
    assert count(model.bridge) / learned < 0.005
    says("95 %")


@pytest.mark.claim("2-07", kind="model")
def test_version_1_has_256_tokens(count, says):
    """Fails if CLIP ViT-L/14 at 224 pixels gave 576 patches, or a linear bridge to 5120 had 4 million parameters."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024, num_hidden_layers=1, num_attention_heads=16, image_size=224, patch_size=14
    )
    tower = on_meta(lambda: CLIPVisionModel(config))
    tokens = tower(torch.empty(1, 3, 224, 224, device="meta")).last_hidden_state.shape[1] - 1
    says(tokens, f"{count(on_meta(lambda: LinearBridge(1024, 5120))):,}")
    assert tokens != 576


@pytest.mark.claim("2-08", kind="model")
def test_bridge_in_millions(real_llava, count, says):
    """Fails if the 13B bridge had the lesson's 21 million parameters, or the bridge dropped tokens."""
    for name in ("7B", "13B"):
        bridge = real_llava(name).model.multi_modal_projector
        says(f"{count(bridge) / 1e6:.1f} million")
        assert bridge(torch.empty(1, 576, 1024, device="meta")).shape[1] == 576
    says(576)


@pytest.mark.claim("2-09", kind="model")
def test_neither_resampler_has_100_million_parameters(count):
    """Fails if Flamingo's resampler, rebuilt, were far from 194 million, or Qwen-VL's layer far from 80 million."""
    flamingo = on_meta(lambda: PerceiverResampler(dim=1536, queries=64, depth=6, heads=16, head_dim=128))
    assert abs(count(flamingo) / 194e6 - 1) < 0.05
    width, vision, queries = 4096, 1664, 256  # Qwen-VL: keys and values from ViT-bigG's 1664 channels
    attention = on_meta(lambda: nn.MultiheadAttention(width, num_heads=32))
    qwen = count(attention) + vision * width + queries * width + 2 * 2 * width
    assert abs(qwen / 0.08e9 - 1) < 0.1


@pytest.mark.claim("2-11", kind="model")
def test_c_abstractor_rebuilt_from_timm(count, says):
    """Fails if Honeybee's abstractor, from timm's RegStage, had about 50 million parameters with a 7B model."""
    from timm.layers import LayerNorm2d
    from timm.models.regnet import RegStage

    def stage(inside):
        return RegStage(3, inside, 1024, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)

    for llm in (4096, 5120):
        mlp = (nn.Linear(1024, llm), nn.SiLU(), nn.Linear(llm, llm))
        abstractor = on_meta(lambda mlp=mlp: nn.Sequential(stage(1024), nn.AdaptiveAvgPool2d(12), stage(1024)))
        says(f"{(count(abstractor) + sum(map(count, mlp))) / 1e6:.1f} million")
        assert abstractor(torch.empty(1, 1024, 24, 24, device="meta")).shape[2:].numel() == 144


@pytest.mark.claim("2-12", kind="model")
@pytest.mark.parametrize("features", [1, 49, 576, 2048])
def test_any_number_of_features_becomes_64_tokens(features, says):
    """Fails if the resampler needed 576 features, as the lesson's sentence supposes."""
    resampler = PerceiverResampler(dim=16, queries=64, heads=2, head_dim=8)
    assert resampler(torch.randn(1, features, 16)).shape == (1, 64, 16)
    says("Any number into 64")


@pytest.mark.claim("2-13", kind="experiment")
def test_averaging_four_tokens_costs_every_kind_something(small, exam, seen, sharp):
    """Fails if some kind of question, not only reading and boxes, were as good after averaging."""
    coarse = score(small.model, exam, bridge_study.block_average(seen, 2))
    lost = {kind: sharp.accuracy(kind) - coarse.accuracy(kind) for kind in exam.kinds if kind != "box"}
    assert min(lost.values()) > 0.01, lost  # one answer of 24 is 0.04
    assert coarse.box_error() > 3 * sharp.box_error() + 1


@pytest.mark.claim("2-14", kind="experiment")
def test_visual_tokens_are_farther_from_words_than_words_are(small, exam, seen):
    """Fails if tokens of an object lay as near to a word as words do to each other, or named it no more than chance."""
    vocabulary, scenes = small.tokenizer.words, exam.scenes
    embeddings = small.model.decoder.token_embedding.weight
    words = embeddings[[small.tokenizer.id_of(word) for word in vocabulary]]  # [V, D]
    patch = small.model.config.vision.patch_size
    column, row = (scenes.centre / patch).long().unbind(-1)  # [B, K], the patch in the middle of every object
    middle = seen.gather(1, (row * (96 // patch) + column).clamp(0)[..., None].expand(-1, -1, seen.shape[-1]))
    cosines = bridge_study.cosine_table(middle[scenes.present], words)  # [n, V]
    between = bridge_study.cosine_table(words, words).fill_diagonal_(-1).amax(1).mean()
    assert cosines.amax(1).mean() < between - 0.05
    nearest = [vocabulary[i] for i in cosines.argmax(1).tolist()]
    kinds = zip(scenes.colour[scenes.present].tolist(), scenes.shape[scenes.present].tolist(), strict=True)
    names = [{COLOURS[colour], SHAPES[shape]} for colour, shape in kinds]
    hits = sum(word in own for word, own in zip(nearest, names, strict=True)) / len(names)
    chance = sum(word in own for word in nearest for own in names) / len(names) ** 2
    assert hits > chance + 0.25, (hits, chance)


@pytest.mark.claim("2-15", kind="model")
def test_the_lessons_own_test_passes(count, says):
    """Fails if the class had other shapes, or its biases were not in the count."""
    bridge = VisionProjection(1024, 4096)
    assert bridge(torch.randn(2, 9, 1024)).shape == (2, 9, 4096)
    biases = sum(parameter.numel() for parameter in bridge.parameters() if parameter.dim() == 1)
    assert biases == 2 * 4096
    says(f"{count(bridge):,}")


@pytest.mark.claim("2-16", kind="experiment")
def test_without_a_bridge_shapes_or_meaning_are_missing(small, exam, seen, sharp):
    """Fails if features of another width could be joined, or padded ones beat the most frequent answers."""
    model = small.model
    with torch.no_grad():
        raw = model.vision.patch_features(exam.pixels, layer=model.config.feature_layer)  # [B, N, D_vision]
    with pytest.raises(ValueError, match=str(raw.shape[-1])):
        model(exam.ids, image_features=raw)
    padded = nn.functional.pad(raw, (0, seen.shape[-1] - raw.shape[-1]))
    assert score(model, exam, padded).accuracy() < exam.majority() + 0.1 < sharp.accuracy() - 0.2


@pytest.mark.claim("2-17", kind="model")
def test_the_bridge_changes_width_token_by_token(small, seen):
    """Fails if the bridge mixed tokens or did anything else than map each one to the language model's width."""
    bridge, features = small.model.bridge, torch.randn(1, 5, small.model.config.vision.width)
    with torch.no_grad():
        together, alone = bridge(features), torch.cat([bridge(features[:, i : i + 1]) for i in range(5)], dim=1)
    assert together.shape == (1, 5, small.model.config.text.width)
    torch.testing.assert_close(together, alone)
