"""Emu: one objective for words and images, predict the next element, be it a word or a visual embedding.

The language model reads [IMG], an image's causal embeddings, [/IMG] among the words. Its head scores the next word; a
second, linear head gives the next visual embedding, which is how it also writes images: a diffusion model, not here,
turns the embeddings into pixels.
Sources: Sun et al. 2024 (Emu, ICLR, arXiv 2307.05222), sections 2.1 and 2.2; baaivision/Emu at a8bd539, Emu1/models,
modeling_llama.py (which tokens are predicted, and how) and modeling_emu.py (generate_image). The code of the
pretraining itself is not public.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.causal_former import CausalFormer
from vlm_course.decoder import Decoder, DecoderConfig, rotary_phases
from vlm_course.fusion import splice_image_features
from vlm_course.validation import (
    checks,
    counts,
    method_checks,
    readable,
    require_number,
    require_same_device,
    require_shape,
)


class ElementLoss(NamedTuple):
    """What `next_element_loss` gives: three scalars, total = words + weight * embeddings."""

    total: Tensor
    words: Tensor  # mean cross-entropy of the words, in nats
    embeddings: Tensor  # mean squared error of a value of a visual embedding


def _check_loss(
    logits: Tensor,
    regressed: Tensor,
    ids: Tensor,
    embeds: Tensor,
    *,
    image_id: int,
    silent: tuple[int, ...] = (),
    end_id: int | None = None,
    weight: float = 1.0,
) -> None:
    require_shape(logits, "logits", "B T V")
    B, T = logits.shape[:2]
    require_shape(ids, "ids", "B T", floating=False, B=B, T=T, hint="pass both unshifted, the loss shifts them itself")
    require_shape(regressed, "regressed", "B T D", B=B, T=T)
    require_shape(embeds, "embeds", "B T D", B=B, T=T, D=regressed.shape[2])
    require_same_device(logits=logits, regressed=regressed, ids=ids, embeds=embeds)
    require_number(weight, "weight", low=0)
    if readable(ids):
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= logits.shape[2]:
            raise ValueError(f"ids run from {low} to {high}, expected 0 to {logits.shape[2] - 1}: logits have as many")
        if not bool(_word_targets(ids, image_id, silent).any()):
            raise ValueError(f"0 of {ids[:, 1:].numel()} next tokens are words: there is no word to learn from")
        if not bool(_image_targets(ids, image_id, end_id).any()):
            raise ValueError(f"0 of {ids[:, 1:].numel()} next tokens are image tokens with image_id {image_id}")


def _word_targets(ids: Tensor, image_id: int, silent: tuple[int, ...]) -> Tensor:
    """Where the next token is a word: [B, T] -> [B, T - 1]."""
    return ~torch.isin(ids[:, 1:], torch.tensor([image_id, *silent], device=ids.device))


def _image_targets(ids: Tensor, image_id: int, end_id: int | None) -> Tensor:
    """Where the next token is a visual embedding, or closes an image: [B, T] -> [B, T - 1]."""
    following = ids[:, 1:] == image_id
    return following if end_id is None else following | ((ids[:, 1:] == end_id) & (ids[:, :-1] == image_id))


@counts(image_id=0, end_id=0)
@checks(_check_loss)
def next_element_loss(
    logits: Tensor,
    regressed: Tensor,
    ids: Tensor,
    embeds: Tensor,
    *,
    image_id: int,
    silent: tuple[int, ...] = (),
    end_id: int | None = None,
    weight: float = 1.0,
) -> ElementLoss:
    """Cross-entropy where a word comes next, squared distance where a visual embedding comes next.

    logits [B, T, V] and regressed [B, T, D], the two heads' predictions at each position; ids [B, T], unshifted, with
    `image_id` for a visual embedding; embeds [B, T, D], what the language model read -> `ElementLoss`.
    Embeddings are targets only: no gradient flows into them, or all of them could shrink to one point. `silent` ids
    ([IMG], [/IMG], padding) are not asked for as words: the user says when an image begins. With `end_id` the place
    after an image's last embedding must give the embedding of [/IMG], as the released code has it. The code of the
    squared distance is not public: here it is the mean over all values of the embeddings asked for.
    """
    words = _word_targets(ids, image_id, silent)  # [B, T - 1]
    scores = F.cross_entropy(logits[:, :-1][words].float(), ids[:, 1:][words])
    images = _image_targets(ids, image_id, end_id)  # [B, T - 1]
    distance = F.mse_loss(regressed[:, :-1][images].float(), embeds[:, 1:][images].detach().float())
    return ElementLoss(scores + weight * distance, scores, distance)


class EmuOutput(NamedTuple):
    """What `Emu` gives: logits [B, T, V], regressed [B, T, D], embeds [B, T, D], as `next_element_loss` takes them."""

    logits: Tensor
    regressed: Tensor
    embeds: Tensor


def _check_ids(self: "Emu", ids: Tensor) -> None:
    require_shape(ids, "ids", "B T", floating=False)
    require_same_device(ids=ids, **{"the model": self.regress.weight})


def _check_forward(self: "Emu", ids: Tensor, features: Tensor | None = None) -> None:
    _check_ids(self, ids)
    if features is None and readable(ids) and bool((ids == self.image_id).any()):
        raise ValueError(f"ids hold {int((ids == self.image_id).sum())} image tokens, but there are 0 images")


def _check_generate(self: "Emu", ids: Tensor, features: Tensor | None = None) -> None:
    _check_forward(self, ids, features)
    if readable(ids) and bool((ids[:, -1] != self.start_id).any()):
        last = int(ids[:, -1][ids[:, -1] != self.start_id][0])
        raise ValueError(f"a prompt ends with id {last}, expected {self.start_id}: [IMG] asks for an image")


def _check_model(self, *, bridge: CausalFormer, text: DecoderConfig, image_id: int, start_id: int) -> None:
    if not isinstance(text, DecoderConfig):
        raise ValueError(f"text is a {type(text).__name__}, expected a DecoderConfig")
    if bridge.project.out_features != text.width:
        raise ValueError(
            f"the bridge ends in width {bridge.project.out_features}, but the language model's is {text.width}"
        )
    for name, value in (("image_id", image_id), ("start_id", start_id)):
        if value >= text.vocab_size:
            raise ValueError(
                f"{name} is {value}, expected 0 to {text.vocab_size - 1}: the vocabulary has no more words"
            )


@method_checks(hidden=lambda self, embeds: require_shape(embeds, "embeds", "B T D", D=self.regress.in_features),
               embed=_check_forward, generate_embeddings=_check_generate)  # fmt: skip
@checks(_check_forward, init=_check_model)
@counts(image_id=0, start_id=0)
class Emu(nn.Module):
    """Bridge, language model and the head that regresses visual embeddings; the tower stays outside.

    forward: ids [B, T], each image as [IMG] and one `image_id` a visual embedding, features [images, N, D_vision] in
    order (None without images) -> `EmuOutput`. `start_id` is [IMG].
    """

    def __init__(self, *, bridge: CausalFormer, text: DecoderConfig, image_id: int, start_id: int):
        super().__init__()
        self.bridge = bridge
        self.language = Decoder(text)
        self.regress = nn.Linear(text.width, text.width, bias=False)
        self.image_id, self.start_id = image_id, start_id

    def embed(self, ids: Tensor, features: Tensor | None = None) -> Tensor:
        """Words and visual embeddings in one sequence: [B, T], [images, N, D_vision] -> [B, T, D]."""
        embeds = self.language.embed(ids)
        return embeds if features is None else splice_image_features(embeds, ids, self.bridge(features), self.image_id)

    def hidden(self, embeds: Tensor) -> Tensor:
        """What both heads read: [B, T, D] -> [B, T, D], causal, normalised."""
        config = self.language.config
        phases = rotary_phases(torch.arange(embeds.shape[1], device=embeds.device), config.head_dim, config.rope_theta)
        for layer, block in enumerate(self.language.blocks):
            embeds = block(embeds, phases, None, None, layer)  # [B, T, D]
        return self.language.norm(embeds)

    def forward(self, ids: Tensor, features: Tensor | None = None) -> EmuOutput:
        embeds = self.embed(ids, features)  # [B, T, D]
        hidden = self.hidden(embeds)  # [B, T, D]
        return EmuOutput(self.language.head(hidden), self.regress(hidden), embeds)

    @torch.no_grad()
    def generate_embeddings(self, ids: Tensor, features: Tensor | None = None) -> Tensor:
        """An image, written embedding by embedding: prompts [B, T] that end with [IMG] -> [B, queries, D].

        What the second head gives at the last place becomes the next input, as often as an image has embeddings.
        """
        sequence = self.embed(ids, features)  # [B, T, D]
        for _ in range(len(self.bridge.queries)):
            following = self.regress(self.hidden(sequence)[:, -1:])  # [B, 1, D]
            sequence = torch.cat([sequence, following], dim=1)  # [B, T, D] -> [B, T + 1, D]
        return sequence[:, ids.shape[1] :]
