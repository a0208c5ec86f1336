"""The instruction-tuning loss: cross-entropy on the response alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_course.validation import checks


def _loss_rule(logits, labels, ignore=-100, count=None):
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}, expected [B, T, V] and [B, T]: "
            "pass both unshifted, the loss shifts them itself"
        )
    # Who passes a count has counted. Otherwise look, unless the values are out of reach.
    look = count is None and not (labels.is_meta or torch.compiler.is_compiling())
    if look and bool((labels[:, 1:] == ignore).all()):
        raise ValueError(
            f"all {labels.shape[0]} x {labels.shape[1]} labels are {ignore}: there is no response to learn from; "
            "was the answer cut off by truncation?"
        )


@checks(_loss_rule)
def response_loss(logits: Tensor, labels: Tensor, ignore: int = -100, count: int | Tensor | None = None) -> Tensor:
    """Mean cross-entropy over response tokens, in nats, computed in float32.

    logits [B, T, V]; labels [B, T], the ids themselves (unshifted), `ignore` outside the response -> a scalar.
    The logits at position t are scored against the label at t + 1. `count` replaces the number of response tokens
    as divisor, so that the parts of an accumulated batch add up to the mean over the whole.
    Raises ValueError when no label is left. Source: LLaVA (Liu et al. 2023), section 4.2.
    """
    predictions = logits[:, :-1].flatten(0, 1).float()  # [B, T, V] -> [B * (T - 1), V]
    targets = labels[:, 1:].flatten()  # [B, T] -> [B * (T - 1)]
    total = F.cross_entropy(predictions, targets, ignore_index=ignore, reduction="sum")
    return total / ((targets != ignore).sum() if count is None else count)
