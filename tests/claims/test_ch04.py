"""The claims of chapter 4, held to account by transformers' models, the shipped one and the chapter's study."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from vlm_course import chat
from vlm_course.loss import division_factor, response_loss
from vlm_course.studies.results import load_results
from vlm_course.studies.tiny import tiny_llava

IMAGE, M = 199, 16


@pytest.fixture(scope="module")
def theirs():
    """A small random LlavaForConditionalGeneration: 16 visual tokens, image token 199."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


@pytest.fixture
def ids():
    """Four words, the image, six words: [1, 26]. The last three are the answer."""
    return torch.tensor([[1, 5, 6, 7, *[IMAGE] * M, 11, 12, 13, 14, 15, 2]])


@pytest.fixture(scope="module")
def study():
    results = load_results("instruction-mix")
    assert not results.rehearsal, "a rehearsal shows nothing: run `vlm-course study instruction-mix`"
    return results


@pytest.fixture(scope="module")
def fast_tokenizer():
    """A byte-pair tokenizer trained on the spot with Llama's habits: a mark for spaces, <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<image>"]
    corpus = [chat.VICUNA_SYSTEM, "USER: What is it? ASSISTANT: A cat. Sure? Yes, a cat.\n"] * 4
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=200, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.claim("4-03", kind="experiment")
def test_a_model_on_captions_sees_what_it_does_not_say(study):
    """Fails if the model on captions answered as well as others, or if its own captions did not hold the answers."""
    for kind in ("colour", "shape"):
        asked = study.mean("captions", "exam", kind, "model")
        assert asked < study.mean("questions", "exam", kind, "model") - 0.2
        assert study.mean("captions", "from own caption", kind) > asked + 0.2
        assert study.mean("captions", "exam", kind, "form") < 0.5


@pytest.mark.claim("4-04", kind="experiment")
def test_a_model_on_short_answers_stays_short(study):
    """Fails if the model on questions wrote descriptions as long, or as right, as the one that was shown some."""
    length = {name: study.mean(name, "length", "caption") for name in ("questions", "instructions")}
    assert length["questions"] < length["instructions"] - 3
    assert study.mean("questions", "exam", "caption", "model") < study.mean("instructions", "exam", "caption", "model")


@pytest.mark.claim("4-05", kind="processor")
def test_only_answers_and_their_ends_have_labels(fast_tokenizer):
    """Fails if a word of the system text, the questions or the image had a label, or an end mark had none."""
    turns = [("What is it?", "A cat."), ("Sure?", "Yes, a cat.")]
    ids, labels = chat.encode_vicuna(fast_tokenizer, turns, 5, image_id=3)
    kept = [token for token, label in zip(ids, labels, strict=True) if label != chat.IGNORE]
    assert fast_tokenizer.decode(kept).replace(" ", "") == "Acat.</s>Yes,acat.</s>"
    assert all(label in (chat.IGNORE, token) for token, label in zip(ids, labels, strict=True))


@pytest.mark.claim("4-06", kind="model")
def test_the_gradient_passes_through_tokens_without_a_label(theirs, ids):
    """Fails if no gradient reached the bridge of transformers' LLaVA though only the answer has labels."""
    labels = torch.full_like(ids, -100)
    labels[0, -3:] = ids[0, -3:]
    logits = theirs(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32)).logits
    logits.retain_grad()
    ForCausalLMLoss(logits, labels, 200).backward()
    at_image = ids[0] == IMAGE
    assert logits.grad[0, at_image].abs().max() == 0
    assert theirs.model.multi_modal_projector.linear_1.weight.grad.norm() > 1e-4
    theirs.zero_grad()


@pytest.mark.claim("4-07", kind="model")
def test_the_loss_is_a_mean_over_tokens_of_the_batch(theirs):
    """Fails if transformers' loss averaged conversations and not tokens, or divided by the whole length."""
    words = torch.randint(3, 190, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(words, -100)
    labels[0, 4:], labels[1, 10:] = words[0, 4:], words[1, 10:]
    with torch.no_grad():
        out = theirs(input_ids=words, labels=labels)
        log_probs = out.logits[:, :-1].log_softmax(-1).gather(-1, words[:, 1:, None])[..., 0]  # [B, T - 1]
    mask = (labels[:, 1:] != -100).float()
    by_formula = -(log_probs * mask).sum() / mask.sum()
    torch.testing.assert_close(out.loss, by_formula, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(response_loss(out.logits, labels), out.loss, atol=1e-5, rtol=1e-5)
    of_rows = (-(log_probs * mask).sum(1) / mask.sum(1)).mean()
    assert abs(of_rows - by_formula) > 1e-3


@pytest.mark.claim("4-08", kind="experiment")
def test_the_divisor_scales_plain_steps_and_hardly_those_of_adam(small, says):
    """Fails if a step of Adam shrank with the divisor as a plain step does, or if the factor were another."""
    assert f"{division_factor(626, 50):.3f}" == "0.074"
    says("0.074")
    tok = small.tokenizer
    ids, labels = (torch.tensor([row]) for row in chat.encode_chat(tok, [("what color is the star ?", "red")] * 3, 0))
    counted = int((labels[:, 1:] != -100).sum())
    moved = {}
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        for divisor in (counted, 20 * counted):
            model = tiny_llava(small, seed=0).decoder
            weight = model.blocks[1].mlp.up.weight
            before, run = weight.detach().clone(), optimizer(model.parameters(), lr=1e-3)
            response_loss(model(model.embed(ids)), labels, count=divisor).backward()
            run.step()
            moved[optimizer, divisor] = (weight.detach() - before).norm().item()
    assert moved[torch.optim.SGD, 20 * counted] == pytest.approx(moved[torch.optim.SGD, counted] / 20, rel=1e-3)
    assert moved[torch.optim.AdamW, 20 * counted] > 0.8 * moved[torch.optim.AdamW, counted]


@pytest.mark.claim("4-09", kind="model")
def test_a_continuous_token_has_no_id_and_a_discrete_one_has(theirs, ids):
    """Fails if LLaVA's visual positions held anything but one placeholder id, or if Chameleon's image tokens were not
    words of its vocabulary."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    assert set(ids[0, 4 : 4 + M].tolist()) == {IMAGE}  # what a loss there would have to predict
    features = theirs.model.get_image_features(torch.randn(1, 3, 32, 32))
    features = getattr(features, "pooler_output", features)
    table = theirs.get_input_embeddings().weight
    assert torch.cdist(features[0], table).min() > 0.1  # no visual token is a word's embedding
    vocabulary = {"<image>": 4} | {f"IMGIMG{chr(65 + i)}Z": 8 + i for i in range(4)}
    vocabulary |= {"<racm3:break>": 5, "<eoss>": 6}
    config = ChameleonConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocabulary_map=vocabulary,
        vq_config={"num_embeddings": 4, "embed_dim": 8, "latent_channels": 8, "base_channels": 32,
                   "channel_multiplier": [1], "resolution": 32, "num_res_blocks": 1},
    )  # fmt: skip
    chameleon = ChameleonForConditionalGeneration(config).eval()
    with torch.no_grad():
        tokens = chameleon.model.get_image_tokens(torch.randn(1, 3, 32, 32))
    assert set(tokens.flatten().tolist()) <= set(range(8, 12))


@pytest.mark.claim("4-10", kind="function")
def test_one_function_labels_both_stages():
    """Fails if the labels of a caption needed another rule than those of a conversation, or if the image had one."""
    for text, spans in (chat.caption_prompt("A cat."), chat.vicuna_prompt([("What is it?", "A cat.")])):
        offsets = [(place, place + 1) for place in range(len(text))]
        labels = chat.response_labels(list(range(len(text))), offsets, spans)
        kept = "".join(text[label] for label in labels if label != chat.IGNORE)
        assert kept in ("A cat.\n", "A cat.</s>") and "<image>" in text


@pytest.mark.claim("4-11", kind="model")
def test_visual_tokens_see_what_stands_before_them_and_nothing_behind(theirs, ids):
    """Fails if another question moved the visual states of transformers' LLaVA, or another system text did not."""
    pixels, at_image = torch.randn(1, 3, 32, 32), ids[0] == IMAGE
    states = {}
    for name, place in (("same", None), ("question", -5), ("system", 2)):
        changed = ids.clone()
        if place is not None:
            changed[0, place] = 77
        with torch.no_grad():
            states[name] = theirs(input_ids=changed, pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    moved = {name: (state - states["same"])[0, at_image].abs().max().item() for name, state in states.items()}
    assert moved["question"] == 0 and moved["system"] > 1e-3
    first = states["question"] - states["same"]
    assert first[0, -1].abs().max() > 1e-3  # the question does matter to what follows it


@pytest.mark.claim("4-13", kind="function")
def test_the_image_opens_the_first_question(says):
    """Fails if LLaVA-1.5's prompt had the image anywhere but behind the system text, or a second one."""
    text, _ = chat.vicuna_prompt([("What is it?", "A cat."), ("Sure?", None)])
    assert text.startswith(
        chat.VICUNA_SYSTEM + " USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    )
    assert text.count("<image>") == 1
    says("USER:")
