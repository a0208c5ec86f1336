"""The claims of chapter 6: what learns, what it costs, and what breaks, counted and tried."""

import copy

import pytest
import torch

from vlm_course import budget
from vlm_course.decoder import DecoderConfig
from vlm_course.fusion import splice_image_features
from vlm_course.llava import LLAVA_7B, LLAVA_13B, Llava, LlavaConfig
from vlm_course.loss import response_loss
from vlm_course.training import freeze_all_but
from vlm_course.vit import ViTConfig
from vlm_course.worlds.dialogs import Dialogs
from vlm_course.worlds.scenes import render, sample

ALIGN, INSTRUCT = ("bridge.",), ("bridge.", "decoder.")  # LLaVA's two stages
PRICE = 2  # dollars for a GPU-hour, the lesson's


def learned(config, stage):
    """Parameters that learn and parameters in all, of our own LLaVA on the meta device."""
    with torch.device("meta"):
        model = Llava(config)
    names = set(freeze_all_but(model, stage))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(sizes[name] for name in names), sum(sizes.values())


@pytest.mark.claim("6-02", kind="arithmetic")
def test_sizes_of_both_sets(says):
    """Fails if the published parts did not add up to 158K and 665K, so that one of them were another set's."""
    for parts in ((58, 23, 77), (150, 515)):
        says(f"{sum(parts)}K", *(f"{part}K" for part in parts))


@pytest.mark.claim("6-03", kind="model")
def test_an_mlp_in_front_of_vicuna_13b_has_31_million_parameters(real_llava, count, says):
    """Fails if an MLP of 21 million parameters could stand in front of Vicuna-13B."""
    bridge = count(real_llava("13B").model.multi_modal_projector)
    assert abs(bridge / 21e6 - 1) > 0.3
    says(f"{bridge / 1e6:.1f} million")


@pytest.mark.claim("6-04", kind="model")
def test_shares_that_learn_in_each_stage(real_llava, count, says):
    """Fails if stage 1 or 2 trained another share of either model, such as 0.16 % of the 13B."""
    for name in ("7B", "13B"):
        model = real_llava(name).model
        total = count(real_llava(name))
        bridge = count(model.multi_modal_projector)
        second = total - count(model.vision_tower)
        says(f"{100 * bridge / total:.3f} %", f"{100 * second / total:.2f} %")


@pytest.mark.claim("6-08", kind="arithmetic")
def test_gpu_hours_are_hours_times_gpus(says):
    """Fails if 4 and 20 were GPU-hours: then the lesson's own prices would be 8 and 40 dollars."""
    hours = [price / PRICE for price in (64, 320)]
    assert [8 * 4, 8 * 20] == hours
    says(*(f"{value:.0f}" for value in hours))


@pytest.mark.claim("6-09", kind="arithmetic")
def test_prices_of_the_models_that_exist(says):
    """Fails if the published hours of a model cost 384 dollars."""
    hours = {"1.5-13B": (5.5, 20), "1.5-7B": (3.5, 10), "v1-13B": (4, 10)}
    prices = {name: 8 * PRICE * sum(stages) for name, stages in hours.items()}
    assert 384 not in prices.values()
    says(*(f"{price:.0f}" for price in prices.values()))


def peak_hours() -> dict[str, float]:
    """Hours at the GPUs' peak for the operations of both pretrainings, forward and backward."""
    text = DecoderConfig(32000, 5120, 40, 40, 40, 13824, max_positions=4096)
    vision = ViTConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096)
    llama = 3 * budget.decoder_flops(text, 4096, logits=4096) / 4096 * 2e12
    clip = 3 * budget.vit_flops(vision) * 32 * 400e6  # the text tower adds under a tenth
    return {"CLIP": clip / 125e12 / 3600, "Llama": llama / 312e12 / 3600}


REPORTED = {"CLIP": 256 * 12 * 24, "Llama": 368_640}


@pytest.mark.claim("6-10", kind="function")
def test_pretraining_both_towers_costs_less_than_a_million(says):
    """Fails if the operations of both pretrainings could not be done in the reported hours, or these cost billions."""
    for name, hours in peak_hours().items():
        assert 0.1 < hours / REPORTED[name] < 0.6  # a usual share of the peak: the reported hours are of this order
        says(f"{REPORTED[name]:,}", f"{round(hours, -3):,.0f}")
    assert 0.85e6 < PRICE * sum(REPORTED.values()) < 0.95e6
    says("0.9 million")


@pytest.mark.claim("6-11", kind="function")
def test_from_scratch_is_a_thousand_times_more_and_not_a_million(says):
    """Fails if the two pretrainings were not of the order of a thousand LLaVA-1.5-13Bs."""
    price = 8 * PRICE * (5.5 + 20)
    assert 700 < PRICE * sum(peak_hours().values()) / price < PRICE * sum(REPORTED.values()) / price < 3000
    says(f"{round(PRICE * sum(REPORTED.values()) / price, -2):,.0f}")


@pytest.mark.claim("6-15", kind="function")
def test_clip_took_tens_of_thousands_of_hours(says):
    """Fails if CLIP's 12.8 billion pairs needed more than the reported hours at the V100's peak, let alone billions."""
    assert peak_hours()["CLIP"] < REPORTED["CLIP"] < 1e5
    says(f"{REPORTED['CLIP']:,}", f"{round(peak_hours()['CLIP'], -3):,.0f}")


def retrieval(small, scenes, pixels) -> float:
    """Share of scenes whose own description is nearest to their image: what the tower was trained for."""
    texts = Dialogs(small.tokenizer).contrastive_texts(scenes)
    with torch.no_grad():
        images, words = small.contrastive.encode_image(pixels), small.contrastive.encode_text(texts)
    return float((images @ words.T).argmax(1).eq(torch.arange(len(pixels))).float().mean())


@pytest.mark.claim("6-14", kind="experiment")
def test_an_unfrozen_tower_is_ruined_at_a_large_rate_and_not_at_a_small_one(small, says):
    """Fails if unfreezing as such destroyed the tower, or if no rate did."""
    generator = torch.Generator().manual_seed(4)
    scenes, few = (sample(n, generator=generator, objects=(2, 4)) for n in (24, 3))
    pixels, seen = render(scenes, generator=generator), render(few, generator=generator)
    dialogs = Dialogs(small.tokenizer)
    turns = [dialogs.ask(few, "caption", generator=generator)]
    ids, labels = dialogs.conversation(turns, visual_tokens=small.model.config.visual_tokens)
    after = {0: retrieval(small, scenes, pixels)}
    for rate in (1e-5, 3e-3):
        tuned = copy.deepcopy(small)  # the contrastive model and LLaVA share their tower, here too
        freeze_all_but(tuned.model, ("vision.", "bridge."))
        assert tuned.contrastive.vision is tuned.model.vision
        optimizer = torch.optim.AdamW([p for p in tuned.model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
        for _ in range(4):
            optimizer.zero_grad()
            response_loss(tuned.model(ids, seen), labels).backward()
            optimizer.step()
        after[rate] = retrieval(tuned, scenes, pixels)
    assert after[0] > 0.7
    assert after[1e-5] > after[0] - 0.1
    assert after[3e-3] < 0.4 * after[0], after
    says("3e-3", "1e-5")


@pytest.mark.claim("6-16", kind="model")
@pytest.mark.parametrize(("config", "width"), [(LLAVA_7B, 4096), (LLAVA_13B, 5120)], ids=["7B", "13B"])
def test_raw_features_do_not_fit_either_model(config, width, says):
    """Fails if features of width 1024 could be spliced among the words, or 13B expected 4096."""
    embeds = torch.empty(1, 576, config.text.width)
    ids = torch.full((1, 576), config.image_id)
    with pytest.raises(ValueError, match="1024") as error:
        splice_image_features(embeds, ids, torch.empty(1, 576, 1024), config.image_id)
    assert str(width) in str(error.value)
    if width == 5120:
        says(width)


def answers_after(small, kinds, *, steps=40):
    """A new, tiny language model trained on these kinds of question; its first word to "how many", by scene."""
    generator = torch.Generator().manual_seed(2)
    tok, dialogs = small.tokenizer, Dialogs(small.tokenizer, canonical=True)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision=ViTConfig(image_size=24, patch_size=8, width=24, layers=1, heads=2, mlp_width=48),
        text=DecoderConfig(tok.vocab_size, 48, 1, 4, 2, 96),
        image_id=tok.image_id,
    )
    model = Llava(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scenes = sample(40, generator=generator, objects=(1, 4))
    pixels = torch.nn.functional.avg_pool2d(render(scenes, generator=generator), 4)
    conversations = {
        kind: dialogs.conversation([dialogs.ask(scenes, kind, generator=generator)], visual_tokens=9)
        for kind in {*kinds, "count"}
    }
    for step in range(steps):
        ids, labels = conversations[kinds[step % len(kinds)]]
        rows = slice(0, 20) if step // 2 % 2 else slice(10, 30)
        optimizer.zero_grad()
        response_loss(model(ids[rows], pixels[rows]), labels[rows]).backward()
        optimizer.step()
    ids, labels = (part[30:] for part in conversations["count"])  # scenes that it was not trained on
    with torch.no_grad():
        logits = model.eval()(ids, pixels[30:])
    first = (labels >= 0).long().argmax(1)  # where each answer begins
    return [tok.decode(row) for row in logits[torch.arange(len(ids)), first - 1].argmax(-1, keepdim=True)]


@pytest.mark.claim("6-17", kind="experiment")
def test_a_model_of_captions_answers_how_many_with_a_caption(small):
    """Fails if a model trained on captions alone answered "how many" with a number, or one trained on both did not."""
    captions = answers_after(small, ["caption"])
    assert sum(word == "a" for word in captions) > 0.9 * len(captions), captions
    mixed = answers_after(small, ["caption", "count"])
    assert sum(word.isdigit() for word in mixed) > 0.9 * len(mixed), mixed


@pytest.mark.claim("6-18", kind="model")
def test_stage_1_trains_the_projection_alone(says):
    """Fails if anything else than the bridge learned in stage 1, or the bridge had another count."""
    trained, _ = learned(LLAVA_7B, ALIGN)
    with torch.device("meta"):
        names = freeze_all_but(Llava(LLAVA_7B), ALIGN)
    assert names and all(name.startswith("bridge.") for name in names)
    says(f"{trained:,}")


@pytest.mark.claim("6-19", kind="model")
def test_vicuna_13b_and_the_whole_in_millions(real_llava, count, says):
    """Fails if the language model or the whole had the lesson's round number of parameters."""
    model = real_llava("13B")
    decoder = count(model.model.language_model) + count(model.lm_head)
    says(*(f"{number / 1e6:,.1f}" for number in (decoder, count(model), count(real_llava("13B", 32064)))))
    assert round(count(model) / 1e6) != 13_325
