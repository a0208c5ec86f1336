"""One interface to three tokenizers: the course's words, those of a checkpoint folder, SmolLM2's out of its GGUF.

An adapter turns text into ids and back, and a conversation into ids with labels in the template that its model was
tuned with: the course's own, Vicuna's (LLaVA-1.5) or ChatML (SmolLM2-Instruct).

ChatML costs nine tokens a turn where the course's template costs three. It is used all the same: SmolLM2 knows from its
tuning that an answer follows "assistant" and ends at <|im_end|>, and would have to unlearn it. Its default system text
is left out, in training as in asking; it says nothing about images and costs 21 tokens a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlm_course.chat import IGNORE, Turns, encode_chat, encode_vicuna
from vlm_course.tokenizer import SPECIAL, WordTokenizer
from vlm_course.validation import require_count

IMAGE = "<image>"


@dataclass(frozen=True)
class Frame:
    """The ids that a template puts around images, questions and answers, for those who build rows as tensors.

    A row is: opening, image, asking, question, answering, answer, ending; then again, question, answering and so on.
    """

    opening: list[int]
    asking: list[int]
    answering: list[int]
    ending: list[int]
    again: list[int]


class TokenizerAdapter(Protocol):
    """What the engine asks of a tokenizer. `vocab_size` is one more than the greatest id."""

    image_id: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    vocab_size: int

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Text to ids, nothing put before or behind. Control tokens written in it are text unless `special`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, without control tokens."""

    def encode_chat(self, turns: Turns, visual_tokens: int) -> tuple[list[int], list[int]]:
        """A conversation -> (ids, labels): answers and what ends them are learned, -100 everywhere else."""


class WordAdapter:
    """The course's own tokenizer, for the small model."""

    def __init__(self, words: WordTokenizer):
        self.words = words
        for name in ("pad", "bos", "eos", "image", "user", "assistant"):
            setattr(self, f"{name}_id", getattr(words, f"{name}_id"))
        self.vocab_size = words.vocab_size
        user, assistant = [words.user_id], [words.assistant_id]
        self.frame = Frame([words.bos_id], user, assistant, [words.eos_id], user)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self.words.encode(text, special=special)

    def decode(self, ids: Sequence[int]) -> str:
        return self.words.decode([i for i in map(int, ids) if i >= len(SPECIAL) or i == self.words.unk_id])

    def encode_chat(self, turns: Turns, visual_tokens: int) -> tuple[list[int], list[int]]:
        return encode_chat(self.words, turns, visual_tokens)


class FastAdapter:
    """A fast tokenizer of transformers that has <image> as one token; the template is Vicuna's, as LLaVA-1.5 has it.

    Attributes:
        fast: the tokenizer itself.

    Raises:
        ValueError: it has no <image>, or no token that ends an answer.
    """

    def __init__(self, fast: Any, *, eos_id: int | None = None, pad_id: int | None = None):
        self.fast = fast
        image = fast.get_added_vocab().get(IMAGE, fast.get_vocab().get(IMAGE))
        if image is None:
            raise ValueError(
                f"none of the tokenizer's {len(fast)} tokens is {IMAGE}: is this a language model's alone? "
                "Add it as a special token, and a row to the embedding"
            )
        eos = fast.eos_token_id if eos_id is None else eos_id
        if eos is None:
            raise ValueError(f"none of the tokenizer's {len(fast)} tokens is its end token: give eos_id")
        pads = (pad_id, fast.pad_token_id, fast.unk_token_id, eos)
        self.image_id, self.bos_id, self.eos_id = image, fast.bos_token_id, eos
        self.pad_id = next(pad for pad in pads if pad is not None)
        self.vocab_size = 1 + max(fast.get_vocab().values())

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self.fast(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.fast.decode(list(map(int, ids)), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def encode_chat(self, turns: Turns, visual_tokens: int) -> tuple[list[int], list[int]]:
        return encode_vicuna(self.fast, turns, visual_tokens, image_id=self.image_id)


class ChatMLAdapter(FastAdapter):
    """SmolLM2-Instruct's: a byte-level BPE, ChatML for its template (without a system text).

    Text never becomes a control token here, so a turn may spell out <|im_end|> or <image> and end nothing.
    """

    def __init__(self, fast: Any):
        ids = fast.get_vocab()
        missing = [name for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>") if name not in ids]
        if missing:
            raise ValueError(
                f"{len(missing)} of ChatML's 3 tokens are missing ({missing[0]}): is this another model's?"
            )
        # <|endoftext|> pads: the GGUF names <|im_end|> for it, and padding must differ from what ends an answer.
        super().__init__(fast, eos_id=ids["<|im_end|>"], pad_id=ids["<|endoftext|>"])
        self.bos_id = None  # conversations begin with <|im_start|>, and nothing stands before it
        start, end, line = [ids["<|im_start|>"]], [self.eos_id], self.encode("\n")
        user, assistant = start + self.encode("user\n"), end + line + start + self.encode("assistant\n")
        self.frame = Frame(user, line, assistant, end, line + user)

    def encode_chat(self, turns: Turns, visual_tokens: int) -> tuple[list[int], list[int]]:
        """<|im_start|>user\\n <image>*M \\n question<|im_end|>\\n<|im_start|>assistant\\n answer<|im_end|>, and so on.

        Raises ValueError when there is no turn, or one but the last has no answer.
        """
        require_count(visual_tokens, "visual_tokens", 0)
        if not turns:
            raise ValueError("the conversation has 0 turns: give at least one (question, answer)")
        ids: list[int] = []
        labels: list[int] = []
        for number, (question, answer) in enumerate(turns):
            if answer is None and number < len(turns) - 1:
                raise ValueError(f"turn {number} of {len(turns)} has no answer: only the last may be left open")
            image = [self.image_id] * visual_tokens + self.frame.asking if visual_tokens and not number else []
            before = self.frame.again if number else self.frame.opening + image
            prompt = before + self.encode(question) + self.frame.answering
            response = [] if answer is None else [*self.encode(answer), *self.frame.ending]
            ids += prompt + response
            labels += [IGNORE] * len(prompt) + response
        return ids, labels


def for_small() -> WordAdapter:
    """The adapter of the shipped small model."""
    return WordAdapter(WordTokenizer.small())


def for_folder(folder: str | Path) -> FastAdapter:
    """The adapter of a checkpoint in the published layout, from its folder alone; nothing is fetched.

    A tokenizer with ChatML's tokens (as `published.save` writes it for SmolLM2) speaks ChatML, any other Vicuna's.
    Raises FileNotFoundError when the folder has no tokenizer, ValueError when that has no <image>.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    names = ("tokenizer.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        raise FileNotFoundError(f"{folder} holds neither {names[0]} nor {names[1]}: was the download complete?")
    fast = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    chatml = {"<|im_start|>", "<|im_end|>"} <= fast.get_vocab().keys()
    return ChatMLAdapter(fast) if chatml else FastAdapter(fast)


def for_smollm(folder: str | Path | None = None) -> ChatMLAdapter:
    """SmolLM2's adapter, with <image> added behind its 49,152 tokens.

    `folder` is a cache that `smollm.cached` made; by default the user's, made now if need be. Errors as there.
    """
    from transformers import AutoTokenizer

    from vlm_course.finetune.smollm import cached

    folder = cached() if folder is None else Path(folder)
    fast = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if IMAGE not in fast.get_vocab():
        fast.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return ChatMLAdapter(fast)
