"""Exercise: the loss of the response, from logits and unshifted labels."""

import math

import torch
import torch.nn.functional as F

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(logits: torch.Tensor, labels: torch.Tensor, ignore: int = -100, count: int | None = None) -> torch.Tensor:
    total, tokens = 0.0, 0
    for row, targets in zip(logits.double(), labels.tolist(), strict=True):
        for place in range(len(targets) - 1):
            target = targets[place + 1]
            if target == ignore:
                continue
            scores = row[place].tolist()
            largest = max(scores)
            log_sum = largest + math.log(sum(math.exp(score - largest) for score in scores))
            total += log_sum - scores[target]
            tokens += 1
    return torch.tensor(total / (tokens if count is None else count), dtype=torch.float64)


def cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(spans: list[tuple[int, int]], length: int, words: int, **more) -> Case:
        logits = 3 * torch.randn(len(spans), length, words, generator=generator)
        ids = torch.randint(words, (len(spans), length), generator=generator)
        labels = torch.full_like(ids, more.get("ignore", -100))
        for row, (start, end) in enumerate(spans):
            labels[row, start:end] = ids[row, start:end]
        return Case({"logits": logits, "labels": labels, **more})

    return [
        case([(4, 9), (6, 8)], 9, 11),
        case([(3, 4), (2, 8), (0, 0)], 8, 7),  # the last conversation has nothing to learn
        case([(2, 6), (5, 6)], 7, 9, ignore=-1),
        case([(2, 5), (3, 7)], 7, 9, ignore=-100, count=23),
        case([(0, 5), (0, 7)], 7, 9),  # the first token has a label, and nothing predicts it
    ]


def answer(
    logits, labels, ignore=-100, count=None, *, shift=True, twice=False, back=False, divisor="tokens", no_count=False
):
    """The right loss with one thing changed."""
    if shift:
        logits, labels = (logits[:, 1:], labels[:, :-1]) if back else (logits[:, :-1], labels[:, 1:])
    if twice:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=ignore, reduction="none")  # [B, T]
    learned = labels != ignore
    if divisor == "rows":
        return ((loss * learned).sum(1) / learned.sum(1).clamp(min=1)).mean()
    if divisor == "nothing":
        return loss.sum()
    if divisor == "batch":
        return loss.sum() / len(labels)
    if divisor == "all":
        return loss.mean()
    return loss.sum() / (learned.sum() if count is None or no_count else count)


def changed(**options):
    return lambda logits, labels, ignore=-100, count=None: answer(logits, labels, ignore, count, **options)


def on_probabilities(logits, labels, ignore=-100, count=None):
    return answer(logits.softmax(-1), labels, ignore, count)


def gathered(logits, labels, ignore=-100, count=None):
    """Log-probabilities, picked out."""
    log_probs, targets = logits[:, :-1].log_softmax(-1), labels[:, 1:]
    learned = targets != ignore
    chosen = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]  # [B, T - 1, V] -> [B, T - 1]
    return -(chosen * learned).sum() / (count or learned.sum())


def selected(logits, labels, ignore=-100, count=None):
    """Only the learned positions, then a plain cross-entropy."""
    learned = labels[:, 1:] != ignore
    kept, targets = logits[:, :-1][learned], labels[:, 1:][learned]  # [n, V], [n]
    mean = F.cross_entropy(kept, targets)
    return mean if count is None else mean * len(targets) / count


def always_hundred(logits, labels, ignore=-100, count=None):
    labels = torch.where(labels == ignore, ignore if ignore == -100 else 0, labels)
    return answer(logits, labels, -100, count)


RESPONSE_LOSS = Exercise(
    name="response_loss",
    chapter="04",
    title="Build It: the response loss",
    difficulty="medium",
    minutes=15,
    points=4,
    attribute="response_loss",
    twin="vlm_course.loss:response_loss",
    interface=FunctionInterface(
        {"logits": "tensor [B, T, V]", "labels": "tensor [B, T]", "ignore": "integer", "count": "integer or None"},
        "scalar tensor, in nats",
        driver="vlm_course.grading.gradients:kept",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "no shift": Mistake(
            "You did not shift: each position is scored on its own token, which it has read. Such a loss falls to 0.",
            changed(shift=False),
        ),
        "shifted twice": Mistake(
            "You shifted twice: the model would have to guess the token after the next.", changed(twice=True)
        ),
        "shifted the wrong way": Mistake(
            "You shifted the wrong way: position t is scored on the token before it, which it has read.",
            changed(back=True),
        ),
        "over all positions": Mistake(
            "You divide by all positions: the mean runs over the tokens that have a label.", changed(divisor="all")
        ),
        "mean of the rows' means": Mistake(
            "You average each conversation first and then the conversations: the mean runs over all response tokens.",
            changed(divisor="rows"),
        ),
        "sum": Mistake("This is the sum: divide by the number of response tokens.", changed(divisor="nothing")),
        "by the batch": Mistake(
            "You divide by the number of conversations: divide by the number of response tokens.",
            changed(divisor="batch"),
        ),
        "count ignored": Mistake("You do not use count: where it is given, it is the divisor.", changed(no_count=True)),
        "probabilities": Mistake(
            "You apply a softmax first: cross_entropy takes logits and does that itself.", on_probabilities
        ),
        "always -100": Mistake(
            "You ignore -100 whatever `ignore` says, so other marks count as tokens.", always_hundred
        ),
        "in bits": Mistake(
            "You count in bits: keep the natural logarithm, in nats.",
            lambda g, t, i=-100, c=None: answer(g, t, i, c) / math.log(2),
        ),
        "count of the unshifted labels": Mistake(
            "You count the labels before the shift: a label on the first token is never predicted, so it does not "
            "count.",
            lambda g, t, i=-100, c=None: answer(g, t, i, int((t != i).sum()) if c is None else c),
        ),
        "sign": Mistake(
            "The sign is wrong: a cross-entropy is never negative.",
            lambda g, t, i=-100, c=None: -answer(g, t, i, c),
        ),
        "cut off": Mistake(
            "Your loss is cut off from the logits by no_grad, detach or .item(): nothing can be learned from it.",
            lambda g, t, i=-100, c=None: answer(g, t, i, c).detach(),
        ),
        "a plain number": Mistake(
            "You return a Python number: a loss stays a tensor, or nothing can be learned from it.",
            lambda g, t, i=-100, c=None: answer(g, t, i, c).item(),
        ),
    },
    also_correct={"picked out": gathered, "selected": selected},
)
