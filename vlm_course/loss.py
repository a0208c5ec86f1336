"""The instruction-tuning loss: cross-entropy on the response alone, and what its divisor weighs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_course.validation import checks, counts, readable, require_count, require_same_device


def _loss_rule(logits, labels, ignore=-100, count=None):
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}, expected [B, T, V] and [B, T]: "
            "pass both unshifted, the loss shifts them itself"
        )
    if 0 in logits.shape:
        raise ValueError(f"logits are {tuple(logits.shape)}, expected no axis of size 0")
    require_same_device(logits=logits, labels=labels)
    if count is not None and not isinstance(count, Tensor):
        require_count(count, "count")
    if readable(labels) and labels.device.type == "cpu":  # elsewhere a look would wait for the device
        beyond = labels[(labels != ignore) & ((labels < 0) | (labels >= logits.shape[-1]))]
        if len(beyond):
            raise ValueError(
                f"a label is {int(beyond[0])}, expected 0 to {logits.shape[-1] - 1}, or {ignore} to ignore it"
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


def _instruction_rule(log_probs, mask):
    if log_probs.dim() != 1 or log_probs.shape != mask.shape:
        raise ValueError(
            f"log_probs are {tuple(log_probs.shape)} and the mask is {tuple(mask.shape)}, expected [N] and [N]: "
            "one number a token of one sequence"
        )
    if len(mask) == 0:
        raise ValueError("log_probs are (0,): 0 tokens, expected at least 1")
    require_same_device(log_probs=log_probs, mask=mask)
    if readable(mask) and not mask.any():
        raise ValueError(f"0 of {len(mask)} tokens are in the response: there is nothing to learn from")


@checks(_instruction_rule)
def instruction_loss(log_probs: Tensor, mask: Tensor) -> Tensor:
    """The formula itself: L = -(1/T) sum_i m_i log P(x_i | x_<i), with T = sum_i m_i, for one sequence.

    log_probs [N], the log-probability of every token given those before it; mask [N], 1 or True in the response
    -> a scalar, in nats. `response_loss` computes the same from logits and labels.
    Source: LLaVA (Liu et al. 2023), equation 3, divided by the number of response tokens.
    """
    return -(log_probs * mask).sum() / mask.sum()


def _answer_rule(lengths):
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths are {list(lengths)}: give the response tokens of each conversation, at least 1")


@checks(_answer_rule)
def answer_weights(lengths: Sequence[int]) -> list[float]:
    """The weight that each conversation's own mean loss has in the mean over all response tokens of a batch."""
    total = sum(lengths)
    return [length / total for length in lengths]


@counts(context_tokens=0, response_tokens=1)
def division_factor(context_tokens: int, response_tokens: int) -> float:
    """The loss divided by the length of the whole sequence, over the loss divided by that of the response."""
    return response_tokens / (context_tokens + response_tokens)
