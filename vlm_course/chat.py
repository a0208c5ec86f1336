"""Conversations as token ids: the small model's template, LLaVA-1.5's, and which tokens are to be learned.

A turn is (question, answer); the last answer may be None, which leaves the prompt open for the model to continue.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_course.validation import checks, counts, require_one_of

IGNORE = -100

Turns = Sequence[tuple[str, str | None]]

# The words that Vicuna v1.1 and after it LLaVA-1.5 were tuned with; a checkpoint expects them to the letter.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _check_turns(turns: Turns) -> None:
    if not turns:
        raise ValueError("the conversation has no turns: give at least one (question, answer)")
    for number, (_, answer) in enumerate(turns[:-1]):
        if answer is None:
            raise ValueError(f"turn {number} of {len(turns)} has no answer: only the last may be left open")


@counts(visual_tokens=0)
def encode_chat(tokenizer, turns: Turns, visual_tokens: int) -> tuple[list[int], list[int]]:
    """<bos> <image>*M, then <user> question <assistant> answer <eos> for every turn -> (ids, labels).

    `visual_tokens` is M, 0 for a conversation without an image. Labels are unshifted: the answer's own ids and the
    <eos> that ends it, -100 everywhere else. Raises ValueError when a text spells out a control token of the template.
    """
    _check_turns(turns)
    ids = [tokenizer.bos_id] + [tokenizer.image_id] * visual_tokens
    labels = [IGNORE] * len(ids)
    for question, answer in turns:
        prompt = [tokenizer.user_id, *_encode_text(tokenizer, question), tokenizer.assistant_id]
        response = [] if answer is None else [*_encode_text(tokenizer, answer), tokenizer.eos_id]
        ids += prompt + response
        labels += [IGNORE] * len(prompt) + response
    return ids, labels


def _encode_text(tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text)
    names = ("pad", "bos", "eos", "image", "user", "assistant")
    control = {getattr(tokenizer, f"{name}_id"): name for name in names}
    for token in ids:
        if token in control:
            raise ValueError(f"the text {text!r} spells out the control token <{control[token]}>: write it differently")
    return ids


def _vicuna_rule(turns, image=True, system=VICUNA_SYSTEM):
    _check_turns(turns)
    for number, (question, answer) in enumerate(turns):
        if "<image>" in question or "<image>" in (answer or ""):
            raise ValueError(f"turn {number} spells out <image>: the template puts it in, once, in the first question")


@checks(_vicuna_rule)
def vicuna_prompt(turns: Turns, image: bool = True, system: str = VICUNA_SYSTEM) -> tuple[str, list[tuple[int, int]]]:
    """LLaVA-1.5's template -> (text, character spans of the responses, each with its </s>).

    The image stands inside the first question, "USER: <image>\\n...", behind the system text; so the first visual
    token is not the first token. Turns follow each other without a space after </s>.
    Source: haotian-liu/LLaVA, llava/conversation.py (conv_vicuna_v1) and llava/train/train.py (preprocess_v1).
    """
    text, spans = system + " ", []
    for number, (asked, answer) in enumerate(turns):
        placeholder = "<image>\n" if image and number == 0 else ""
        text += f"USER: {placeholder}{asked} ASSISTANT:"
        if answer is not None:
            start = len(text) + 1  # behind the space
            text += f" {answer}</s>"
            spans.append((start, len(text)))
    return text, spans


def caption_prompt(caption: str) -> tuple[str, list[tuple[int, int]]]:
    """What LLaVA's first stage trains on -> (text, spans): the image, the caption, a line end; nobody asks anything.

    Source: haotian-liu/LLaVA, llava/train/train.py (preprocess_plain).
    """
    _vicuna_rule([("", caption)])
    return f"<image>{caption}\n", [(len("<image>"), len(f"<image>{caption}\n"))]


def _labels_rule(ids, offsets, spans):
    if len(ids) != len(offsets):
        raise ValueError(f"there are {len(ids)} ids but {len(offsets)} offsets: are both of the same text?")
    for start, end in spans:
        if not 0 <= start <= end:
            raise ValueError(f"a span goes from {start} to {end}: it must go from its first character past its last")


@checks(_labels_rule)
def response_labels(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> list[int]:
    """Labels of a tokenised text: a token that covers any character of a response keeps its id, others get -100.

    `offsets` are the tokens' characters (start, end), `spans` those of the responses, both with the end excluded. A
    token that begins with the space before a response belongs to it: many tokenizers glue the two together.
    """
    labels = []
    for token, (start, end) in zip(ids, offsets, strict=True):
        learned = any(start < last and end > first for first, last in spans)
        labels.append(token if learned else IGNORE)
    return labels


@counts(visual_tokens=0, image_id=0)
def encode_vicuna(tokenizer, turns: Turns, visual_tokens: int, *, image_id: int) -> tuple[list[int], list[int]]:
    """`vicuna_prompt` through a fast Hugging Face tokenizer -> (ids, labels), <image> expanded to `visual_tokens`.

    Labels follow the characters: a token belongs to the response when it covers any of the response's characters,
    so they do not depend on how many tokens the pieces would have if they were tokenised apart.
    """
    text, spans = vicuna_prompt(turns, visual_tokens > 0)
    encoded = tokenizer(text, return_offsets_mapping=True)
    learned = response_labels(encoded["input_ids"], encoded["offset_mapping"], spans)
    ids, labels = [], []
    for token, label in zip(encoded["input_ids"], learned, strict=True):
        repeat = visual_tokens if token == image_id else 1
        ids += [token] * repeat
        labels += [label] * repeat
    if ids.count(image_id) != visual_tokens:
        raise ValueError(
            f"the prompt has {ids.count(image_id)} placeholders instead of {visual_tokens}: is <image> one token, "
            f"with id {image_id}, in this tokenizer?"
        )
    return ids, labels


def _rows_rule(rows, value, *, side="right"):
    if len(rows) < 1:
        raise ValueError("there are 0 rows to pad, expected at least 1")
    require_one_of(side, "side", ("left", "right"))


@checks(_rows_rule)
def pad_rows(rows: Sequence[Sequence[int]], value: int, *, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of ids or labels -> (tensor [B, T], boolean mask [B, T], True for real tokens).

    Pad on the right to train (`value` is -100 for labels), on the left to generate.
    """
    length = max(len(row) for row in rows)
    padded = torch.full((len(rows), length), value)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        padded[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = True
    return padded, mask
