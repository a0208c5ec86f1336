"""Exercise (derivation): the visual instruction tuning loss, from log-probabilities and a mask."""

import math

import torch

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    total, count = 0.0, 0
    for value, learned in zip(log_probs.tolist(), mask.tolist(), strict=True):
        if learned:
            total += value
            count += 1
    return torch.tensor(-total / count, dtype=torch.float64)


def cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for context, response, tail in ((6, 3, 0), (9, 1, 2), (5, 4, 3)):
        length = context + response + tail
        probabilities = 0.05 + 0.9 * torch.rand(length, generator=generator)
        mask = torch.zeros(length)
        mask[context : context + response] = 1.0
        out.append(Case({"log_probs": probabilities.log(), "mask": mask}))
    return out


def right(log_probs, mask):
    return -(log_probs * mask).sum() / mask.sum()


INSTRUCTION_LOSS = Exercise(
    name="instruction_loss",
    chapter="04",
    title="Derivation: the instruction tuning loss",
    difficulty="easy",
    minutes=10,
    points=3,
    attribute="instruction_loss",
    twin="vlm_course.loss:instruction_loss",
    interface=FunctionInterface(
        {"log_probs": "tensor [N]", "mask": "tensor [N] of 0.0 and 1.0"}, "scalar tensor, in nats"
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "over the whole length": Mistake(
            "You divide by all N tokens: the mean runs over the response alone, so divide by mask.sum().",
            lambda p, m: -(p * m).mean(),
        ),
        "no minus": Mistake(
            "The sign is missing: log-probabilities are negative, and the loss is minus their mean.",
            lambda p, m: (p * m).sum() / m.sum(),
        ),
        "sum": Mistake("This is the sum: divide by the number of response tokens.", lambda p, m: -(p * m).sum()),
        "no mask": Mistake(
            "This is the plain language modelling loss, the mean over every token: the mask is missing.",
            lambda p, m: -p.mean(),
        ),
        "mask inverted": Mistake(
            "Your mask is the wrong way round: 1 marks the response, and only it counts.",
            lambda p, m: right(p, 1 - m),
        ),
        "whole sum over the response's length": Mistake(
            "You divide by the response's length but sum over all tokens: mask the sum too.",
            lambda p, m: -p.sum() / m.sum(),
        ),
        "perplexity": Mistake(
            "This is the perplexity, the exponential of the loss: return the loss.", lambda p, m: right(p, m).exp()
        ),
        "in bits": Mistake(
            "You count in bits: keep the natural logarithm, in nats.", lambda p, m: right(p, m) / math.log(2)
        ),
        "mean probability": Mistake(
            "This is minus the logarithm of the mean probability: average the logarithms, not the probabilities.",
            lambda p, m: -((p.exp() * m).sum() / m.sum()).log(),
        ),
        "shifted": Mistake(
            "You shifted once more: log_probs[i] is already the log-probability of token i.",
            lambda p, m: right(p[:-1], m[1:]),
        ),
        "indexed with the mask": Mistake(
            "mask holds the numbers 0 and 1, so log_probs[mask.long()] takes the first two entries again and again.",
            lambda p, m: -p[m.long()].mean(),
        ),
    },
    also_correct={
        "selected": lambda p, m: -p[m.bool()].mean(),
        "dot product": lambda p, m: -(p @ m) / m.count_nonzero(),
        "a float": lambda p, m: torch.tensor(
            -sum(x for x, k in zip(p.tolist(), m.tolist(), strict=True) if k) / sum(m.tolist())
        ),
    },
)
