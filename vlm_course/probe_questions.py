"""A fixed set of questions about fresh scenes, and how a model answers them when somebody changes its visual tokens.

All questions about a scene stand in one sequence, as they do in training, and one forward pass scores them. An answer
counts as exact when the best next token is right at each of its positions: when greedy decoding would write just that.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_course.llava import Llava
from vlm_course.loss import response_loss
from vlm_course.tokenizer import NUMBERS, WordTokenizer
from vlm_course.worlds.dialogs import LOCATIONS, Dialogs
from vlm_course.worlds.scenes import IMAGE_SIZE, Scenes, render, sample

PROBE_KINDS = ("colour", "shape", "count", "existence", "relation", "box")


@dataclass(frozen=True)
class QuestionSet:
    """B scenes, one question of each of K kinds about each of them."""

    kinds: tuple[str, ...]
    tokenizer: WordTokenizer
    scenes: Scenes
    pixels: Tensor  # [B, 3, 96, 96]
    ids: Tensor  # [B, T]: image placeholders and K turns
    labels: Tensor  # [B, T]: the answers, -100 elsewhere
    turn: Tensor  # [B, T]: which turn a label belongs to, -1 outside the answers
    asked: Tensor  # [B, K] bool: False where a kind does not apply to a scene
    texts: tuple[tuple[str, ...], ...]  # [B][K] the questions in words

    def columns(self, kind: str | None = None) -> list[int]:
        """The place of one kind among the kinds, or of all but the boxes."""
        return [self.kinds.index(kind)] if kind else [k for k, name in enumerate(self.kinds) if name != "box"]

    def majority(self, kind: str | None = None) -> float:
        """Share of exact answers for whoever gives each kind's most frequent answer and looks at nothing."""
        columns = self.columns(kind)
        answers = [
            Counter(tuple(self.labels[row][self.turn[row] == k].tolist()) for row in self.asked[:, k].nonzero()[:, 0])
            for k in columns
        ]
        return sum(max(a.values(), default=0) for a in answers) / self.asked[:, columns].sum().item()


@dataclass(frozen=True)
class Score:
    """What a model made of a question set: mean loss of the answers (nats a token) and the answers themselves."""

    questions: QuestionSet
    loss: float
    predicted: Tensor  # [B, T]: the best token for every position of an answer, -1 elsewhere

    @property
    def exact(self) -> Tensor:
        """Whether each answer is right to the last token: [B, K] bool. Look only where `questions.asked`."""
        wrong = (self.predicted != self.questions.labels) & (self.questions.turn >= 0)  # [B, T]
        return torch.stack([~(wrong & (self.questions.turn == k)).any(1) for k in range(len(self.questions.kinds))], 1)

    def accuracy(self, kind: str | None = None) -> float:
        """Share of exact answers, over one kind or over all but the boxes."""
        columns = self.questions.columns(kind)
        asked = self.questions.asked[:, columns]
        return (self.exact[:, columns] & asked).sum().item() / asked.sum().item()

    def box_error(self) -> float:
        """Mean distance of the numbers of a box from the true ones, in pixels; another word counts as a whole image."""
        first = self.questions.tokenizer.id_of(NUMBERS[0])
        box = self.questions.turn == self.questions.kinds.index("box")
        number = box & (self.questions.labels >= first) & (self.questions.labels < first + LOCATIONS)
        number &= self.questions.asked[:, self.questions.kinds.index("box"), None]
        predicted, true = self.predicted[number] - first, self.questions.labels[number] - first
        is_number = (predicted >= 0) & (predicted < LOCATIONS)
        off = torch.where(is_number, (predicted - true).abs(), LOCATIONS).float()
        return off.mean().item() * IMAGE_SIZE / LOCATIONS

    def answer(self, row: int, kind: str) -> str:
        """The predicted answer in words, without the end mark."""
        here = self.questions.turn[row] == self.questions.kinds.index(kind)
        return self.questions.tokenizer.decode(self.predicted[row][here])


def question_set(
    tokenizer: WordTokenizer,
    *,
    scenes: int = 24,
    kinds: tuple[str, ...] = PROBE_KINDS,
    visual_tokens: int = 144,
    seed: int = 0,
    objects: tuple[int, int] = (2, 4),
) -> QuestionSet:
    """Draw scenes that no training saw, in canonical wording. The same seed gives the same questions."""
    generator = torch.Generator().manual_seed(seed)
    drawn = sample(scenes, generator=generator, objects=objects)
    pixels = render(drawn, generator=generator)
    dialogs = Dialogs(tokenizer, canonical=True)
    turns = [dialogs.ask(drawn, kind, generator=generator) for kind in kinds]
    ids, labels = dialogs.conversation(turns, visual_tokens=visual_tokens)
    length = int((ids != tokenizer.pad_id).sum(1).max())
    ids, labels = ids[:, :length], labels[:, :length]
    answers = labels >= 0
    starts = answers & ~answers.roll(1, dims=1)  # [B, T]: the first token of every answer
    turn = torch.where(answers, starts.cumsum(1) - 1, -1)
    texts = tuple(tuple(tokenizer.decode(t.question[row]) for t in turns) for row in range(scenes))
    asked = torch.stack([t.valid for t in turns], 1)
    return QuestionSet(tuple(kinds), tokenizer, drawn, pixels, ids, labels, turn, asked, texts)


@torch.no_grad()
def score(model: Llava, questions: QuestionSet, image_features: Tensor) -> Score:
    """Answer a question set from projected visual tokens [B, M, D_llm]."""
    logits = model(questions.ids, image_features=image_features)  # [B, T] -> [B, T, V]
    best = logits.argmax(-1).roll(1, dims=1)  # what stands at t was predicted at t - 1
    loss = response_loss(logits, questions.labels).item()
    return Score(questions, loss, torch.where(questions.turn >= 0, best, -1))
