"""Questions about scenes with exact answers, and whole conversations, as integer tensors made on the device.

Ten kinds of question: colour, shape, size, count, existence (half the answers are "yes"), relation (left, right,
above, below), check (a relation to confirm, half "yes"), point, box and caption. A question names its object without
ambiguity: "the star" only where there is one star, else "the small star", and the kind does not apply to a scene where
no object can be named (`Turns.valid`).

Coordinates in text are whole numbers on a 0..255 grid over the image; `from_grid` returns to pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .questions import ANSWER_LENGTH, LOCATIONS, QUESTION_LENGTH, Questions, from_grid, to_grid
from .scenes import Scenes
from .templates import compact

__all__ = ["ANSWER_LENGTH", "KINDS", "LOCATIONS", "QUESTION_LENGTH", "Dialogs", "Turns", "from_grid", "to_grid"]

KINDS = ("colour", "shape", "size", "count", "existence", "relation", "check", "point", "box", "caption")


@dataclass(frozen=True)
class Turns:
    """One question and answer about each of B scenes."""

    kind: Tensor  # [B] long, index into KINDS
    question: Tensor  # [B, 24] ids, padded with 0 at the end
    answer: Tensor  # [B, 30] ids, padded with 0 at the end, without <eos>
    target: Tensor  # [B] long, the object slot that the question is about (0 where it is about no single one)
    valid: Tensor  # [B] bool, whether the kind applies to the scene


class Dialogs(Questions):
    """Makes questions and conversations on one device.

    Args:
        tokenizer: must know every word of `templates.vocabulary()`.
        canonical: always use the first wording of a kind.
    """

    def ask(self, scenes: Scenes, kind: str, *, generator: torch.Generator | None = None) -> Turns:
        """One question of a kind about every scene.

        Raises:
            ValueError: the kind is unknown, or the scenes are on another device.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        if scenes.device.type != self.device.type:
            raise ValueError(f"the scenes are on {scenes.device}, the dialogs on {self.device}")
        self._generator = generator
        question, answer, target, valid = getattr(self, "_" + kind)(scenes)
        number = torch.full((len(scenes),), KINDS.index(kind), device=self.device)
        return Turns(number, compact(question)[0], compact(answer)[0], target, valid)

    def mixed(self, scenes: Scenes, weights: Tensor, *, generator: torch.Generator | None = None) -> Turns:
        """One question about every scene, its kind drawn by `weights` [10]; existence where the kind does not apply."""
        wanted = torch.multinomial(weights.to(self.device), len(scenes), replacement=True, generator=generator)
        turns = [self.ask(scenes, kind, generator=generator) for kind in KINDS]
        valid = torch.stack([t.valid for t in turns])  # [kinds, B]
        kind = torch.where(self._at(valid.T, wanted), wanted, KINDS.index("existence"))
        choose = lambda name: self._at(torch.stack([getattr(t, name) for t in turns], 1), kind)  # noqa: E731
        return Turns(kind, choose("question"), choose("answer"), choose("target"), choose("valid"))

    def several(self, scenes: Scenes, turns: int, weights: Tensor, *, generator=None) -> list[Turns]:
        """`turns` questions of mixed kinds about every scene, made in one pass."""
        rows = torch.arange(len(scenes), device=self.device).repeat(turns)
        together = self.mixed(scenes[rows], weights, generator=generator)
        parts = [getattr(together, name).chunk(turns) for name in Turns.__dataclass_fields__]
        return [Turns(*part) for part in zip(*parts, strict=True)]

    def conversation(
        self, turns: list[Turns], *, visual_tokens: int, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Several turns about the same scenes as training sequences.

        <bos> <image> x visual_tokens, then for each turn <user> question <assistant> answer <eos>.

        Args:
            visual_tokens: number of <image> placeholders.
            length: cut or pad to this many tokens; None keeps all.

        Returns:
            ids [B, length], padded with <pad> at the end; labels [B, length], unshifted: the answers and their <eos>,
            -100 elsewhere.
        """
        tok, n = self.tokenizer, len(turns[0].kind)
        mark = lambda token: torch.full((n, 1), token, device=self.device)  # noqa: E731
        ids = [mark(tok.bos_id), mark(tok.image_id).expand(n, visual_tokens)]
        learn = [torch.zeros(n, 1 + visual_tokens, dtype=torch.bool, device=self.device)]
        for turn in turns:
            parts = [mark(tok.user_id), turn.question, mark(tok.assistant_id), turn.answer, mark(tok.eos_id)]
            ids += parts
            learn += [torch.full_like(p, i >= 3, dtype=torch.bool) for i, p in enumerate(parts)]
        ids, learn = compact(torch.cat(ids, 1), torch.cat(learn, 1), pad_id=tok.pad_id)
        length = length or ids.shape[1]
        if ids.shape[1] < length:
            ids, learn = (torch.nn.functional.pad(t, (0, length - t.shape[1])) for t in (ids, learn))
        ids, learn = ids[:, :length], learn[:, :length]
        return ids, torch.where(learn & (ids != tok.pad_id), ids, -100)
