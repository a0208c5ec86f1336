"""The shipped model in front of one image: questions in, words and their probability out, places in image pixels."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..chat import encode_chat, pad_rows
from ..generation import generate
from ..images import small_preprocess
from ..pretrained import Small
from ..worlds.dialogs import ANSWER_LENGTH, from_grid
from ..worlds.scenes import COLOURS, IMAGE_SIZE, SHAPES, SIZES
from .scope import Description


@dataclass(frozen=True)
class Reply:
    """What the model wrote to one question, and the product of the probabilities of the tokens, the end included."""

    question: str
    text: str
    probability: float


class Reader:
    """Encodes an RGB image once and answers questions about it, greedily and several at a time.

    Questions should be in the wording of `worlds.templates`. `patches` holds the features of the vision tower that
    the bridge reads: [1, N, D].
    """

    @torch.no_grad()
    def __init__(self, small: Small, image: Image.Image):
        self.model, self.tokenizer = small.model, small.tokenizer
        self.image_size = image.size
        self.pixels = small_preprocess(image, size=IMAGE_SIZE)[None]  # [1, 3, H, W]
        config = self.model.config
        self.patches = self.model.vision.patch_features(self.pixels, layer=config.feature_layer)  # [1, N, D_vision]
        self._features = self.model.bridge(self.patches)  # [1, N, D_vision] -> [1, M, D_llm]
        self.replies: list[Reply] = []

    def prompt(self, question: str) -> list[int]:
        """The ids of one question with the image's placeholders in front, ready to be continued."""
        return encode_chat(self.tokenizer, [(question, None)], self.model.config.visual_tokens)[0]

    @torch.no_grad()
    def ask(self, *questions: str, max_new_tokens: int = 8) -> list[Reply]:
        """One reply a question; all are kept in `replies`, in order."""
        ids, mask = pad_rows([self.prompt(q) for q in questions], self.tokenizer.pad_id, side="left")  # [Q, T]
        features = self._features.expand(len(questions), -1, -1)  # [1, M, D] -> [Q, M, D]
        new = generate(
            self.model,
            ids,
            image_features=features,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_id=self.tokenizer.eos_id,
        )  # [Q, L]
        probabilities = self._probabilities(ids, mask, new, features)
        texts = [self.tokenizer.decode(row) for row in new]
        replies = [Reply(*reply) for reply in zip(questions, texts, probabilities, strict=True)]
        self.replies += replies
        return replies

    def _probabilities(self, ids: Tensor, mask: Tensor, new: Tensor, features: Tensor) -> list[float]:
        """Of every row's new tokens up to the first <eos>: [Q, T], [Q, L] -> Q numbers."""
        length = new.shape[1]
        logits = self.model(
            torch.cat([ids, new[:, :-1]], 1),
            image_features=features,
            attention_mask=torch.cat([mask, mask.new_ones(len(new), length - 1)], 1),
            logits_to_keep=length,
        )  # [Q, L, V]
        scores = logits.log_softmax(-1).gather(-1, new[:, :, None])[:, :, 0]  # [Q, L, V] -> [Q, L]
        ended = (new == self.tokenizer.eos_id).cumsum(1) - (new == self.tokenizer.eos_id).long() > 0
        return scores.masked_fill(ended, 0).sum(1).exp().tolist()

    def describe(self) -> tuple[list[Description], Reply]:
        """Every object in the model's own description of the image, in reading order."""
        (reply,) = self.ask("describe the image .", max_new_tokens=ANSWER_LENGTH + 1)
        return parse_caption(reply.text), reply

    def place(self, text: str) -> tuple[float, float, float, float] | None:
        """Pixels of the image, xyxy, from "[10 20 30 40]" or "(10 20)"; None where the text has another form."""
        match = re.fullmatch(r"\[\s*(\d+) (\d+) (\d+) (\d+)\s*\]|\(\s*(\d+) (\d+)\s*\)", text)
        if not match:
            return None
        numbers = [int(n) for n in match.groups() if n is not None]
        grid = torch.tensor(numbers * (4 // len(numbers)))
        width, height = self.image_size
        side = max(width, height)
        offset = torch.tensor([(side - width) // 2, (side - height) // 2] * 2)
        limit = torch.tensor([width, height] * 2)
        return tuple((from_grid(grid) * side / IMAGE_SIZE - offset).clamp(min=0).minimum(limit).tolist())


def parse_caption(text: str) -> list[Description]:
    """ "a large red circle, a small blue star." -> its objects. What is not of this form is left out."""
    names = ("|".join(words) for words in (SIZES, COLOURS, SHAPES))
    return [Description(*match) for match in re.findall(r"\ba ({}) ({}) ({})\b".format(*names), text)]
