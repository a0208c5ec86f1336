"""Exercise: CLIP's loss, symmetric over images and captions."""

import math

import torch
import torch.nn.functional as F

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(logits: torch.Tensor) -> torch.Tensor:
    """One softmax at a time."""
    values = logits.double().tolist()
    size, total = len(values), 0.0
    for i in range(size):
        row, column = values[i], [values[j][i] for j in range(size)]
        for choices in (row, column):
            top = max(choices)
            total += top + math.log(sum(math.exp(choice - top) for choice in choices)) - values[i][i]
    return torch.tensor(total / (2 * size), dtype=torch.float64)


def cases(seed: int) -> list[Case]:
    draw = torch.Generator().manual_seed(seed)
    # Far from symmetric, so that the two directions differ; large numbers overflow a softmax written by hand.
    tables = [3 * torch.randn(size, size, generator=draw) for size in (4, 7)]
    return [Case({"logits": table}) for table in (*tables, 40 * torch.randn(5, 5, generator=draw))]


def pairs(x):
    return torch.arange(len(x))


def one_way(x):
    return F.cross_entropy(x, pairs(x))


def by_logsumexp(x):
    own = x.diagonal()
    return (x.logsumexp(0) - own + x.logsumexp(1) - own).mean() / 2


def by_log_softmax(x):
    both = x.log_softmax(1).diagonal() + x.log_softmax(0).diagonal()
    return -0.5 * both.mean()


CONTRASTIVE_LOSS = Exercise(
    name="contrastive_loss",
    chapter="01",
    title="Build It: the contrastive loss",
    difficulty="medium",
    minutes=10,
    points=3,
    attribute="contrastive_loss",
    twin="vlm_course.contrastive:contrastive_loss",
    interface=FunctionInterface(
        {"logits": "tensor [B, B], rows images, columns captions"},
        "tensor []",
        driver="vlm_course.grading.gradients:kept",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "images choose": Mistake(
            "Only the images choose in yours: captions choose among the images too, and the two are averaged.", one_way
        ),
        "captions choose": Mistake(
            "Only the captions choose in yours: images choose among the captions too, and the two are averaged.",
            lambda x: one_way(x.T),
        ),
        "sum of both": Mistake(
            "You add the two directions: take their mean, so that knowing nothing costs ln B.",
            lambda x: one_way(x) + one_way(x.T),
        ),
        "sum over the batch": Mistake(
            "You sum over the pairs: take the mean, or the loss grows with the batch.",
            lambda x: len(x) * (one_way(x) + one_way(x.T)) / 2,
        ),
        "softmax twice": Mistake(
            "You applied a softmax before cross_entropy, which has its own: give it the logits.",
            lambda x: (F.cross_entropy(x.softmax(1), pairs(x)) + F.cross_entropy(x.T.softmax(1), pairs(x))) / 2,
        ),
        "first caption": Mistake(
            "Your right answers are all number 0: image i belongs to caption i, torch.arange(B).",
            lambda x: (
                (
                    F.cross_entropy(x, torch.zeros(len(x), dtype=torch.long))
                    + F.cross_entropy(x.T, torch.zeros(len(x), dtype=torch.long))
                )
                / 2
            ),
        ),
        "one softmax over all": Mistake(
            "Yours is one softmax over the whole table: each row chooses by itself, and each column.",
            lambda x: x.flatten().logsumexp(0) - x.diagonal().mean(),
        ),
        "sigmoid": Mistake(
            "This is SigLIP's loss, a yes or no for every pair: CLIP's has a softmax over rows and columns.",
            lambda x: -F.logsigmoid((2 * torch.eye(len(x)) - 1) * x).sum() / len(x),
        ),
        "diagonal alone": Mistake(
            "You reward the diagonal alone: it has to win against the other captions, so the softmax is needed.",
            lambda x: -x.diagonal().mean(),
        ),
        "sign": Mistake(
            "Your sign is wrong: the loss is minus the logarithm of the right pair's share.",
            lambda x: -(one_way(x) + one_way(x.T)) / 2,
        ),
        "a plain number": Mistake(
            "You return a Python number: a loss stays a tensor, or nothing can be learned from it.",
            lambda x: ((one_way(x) + one_way(x.T)) / 2).item(),
        ),
        "cut off": Mistake(
            "Your loss is cut off from the logits by no_grad, detach or .item(): nothing can be learned from it.",
            lambda x: ((one_way(x) + one_way(x.T)) / 2).detach(),
        ),
    },
    also_correct={"by logsumexp": by_logsumexp, "by log_softmax": by_log_softmax},
)
