"""Exercise: full attention over image and question, causal after them."""

import torch

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(lengths: torch.Tensor, length: int) -> torch.Tensor:
    """One query and one key at a time: earlier keys always, later ones inside the prefix."""
    mask = torch.zeros(len(lengths), 1, length, length, dtype=torch.bool)
    for row, prefix in enumerate(lengths.tolist()):
        for query in range(length):
            for key in range(length):
                mask[row, 0, query, key] = key <= query or key < prefix
    return mask


def cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    length = draw(7, 10)
    return [
        Case({"lengths": torch.tensor([draw(2, 4), draw(4, 6)]), "length": length}),
        Case({"lengths": torch.tensor([0, length, draw(2, 5)]), "length": length}),
        Case({"lengths": torch.tensor([3]), "length": 6}),
    ]


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def inside(lengths, length, off=0):
    return torch.arange(length) < (lengths[:, None] + off)  # [B, T]


def right(lengths, length):
    return causal(length) | inside(lengths, length)[:, None, None]


def queries_for_keys(lengths, length):
    """The prefix sees everything, answers included, instead of being seen by all."""
    return causal(length) | inside(lengths, length)[:, None, :, None]


def causal_alone(lengths, length):
    return causal(length).expand(len(lengths), 1, -1, -1)


def no_mask(lengths, length):
    return torch.ones(len(lengths), 1, length, length, dtype=torch.bool)


def blocks(lengths, length):
    prefix = inside(lengths, length)
    both = prefix[:, None, :, None] & prefix[:, None, None, :]
    neither = ~prefix[:, None, :, None] & ~prefix[:, None, None, :]
    return both | (neither & causal(length))


def one_short(lengths, length):
    return causal(length) | inside(lengths, length, -1)[:, None, None]


def one_long(lengths, length):
    return causal(length) | inside(lengths, length, 1)[:, None, None]


def first_rows_length(lengths, length):
    return right(lengths[:1].expand(len(lengths)), length)


def longest(lengths, length):
    return right(lengths.max().expand(len(lengths)), length)


def suffix_sees_prefix_only(lengths, length):
    return inside(lengths, length)[:, None, None].expand(-1, 1, length, -1) | torch.eye(length, dtype=torch.bool)


def anti_causal(lengths, length):
    return causal(length).T | inside(lengths, length)[:, None, None]


def inverted(lengths, length):
    return ~right(lengths, length)


def and_for_or(lengths, length):
    return causal(length) & inside(lengths, length)[:, None, None]


def no_head_axis(lengths, length):
    return right(lengths, length)[:, 0]


def by_maximum(lengths, length):
    last = torch.maximum(torch.arange(length)[None], lengths[:, None] - 1)  # [B, T], the last key of every query
    return (torch.arange(length) <= last[..., None])[:, None]


def by_assignment(lengths, length):
    mask = causal(length).repeat(len(lengths), 1, 1, 1)
    for row, prefix in enumerate(lengths.tolist()):
        mask[row, :, :, :prefix] = True
    return mask


PREFIX_MASK = Exercise(
    name="prefix_mask",
    chapter="03",
    title="Build It: the prefix mask",
    difficulty="medium",
    minutes=15,
    points=3,
    attribute="prefix_mask",
    twin="vlm_course.attention:prefix_mask",
    interface=FunctionInterface(
        {"lengths": "tensor [B] of integers", "length": "integer"}, "tensor [B, 1, length, length] of booleans"
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "queries for keys": Mistake(
            "Your prefix sees everything, the answer to come included: the prefix may be seen, so mark its keys.",
            queries_for_keys,
        ),
        "causal alone": Mistake(
            "This is the causal mask: inside the prefix every token sees all others.", causal_alone
        ),
        "no mask": Mistake("Nothing is hidden: behind the prefix the mask is causal.", no_mask),
        "blocks": Mistake("Your answer tokens do not see the prefix: they see all of it, image and question.", blocks),
        "one short": Mistake("Your prefix is one token short: the keys are 0 to lengths - 1.", one_short),
        "one long": Mistake("Your prefix is one token too long: key < lengths, not <=.", one_long),
        "first row's length for all": Mistake(
            "All rows use the first row's prefix: each row has its own length.", first_rows_length
        ),
        "the longest for all": Mistake("All rows use the longest prefix: each row has its own length.", longest),
        "answers do not see each other": Mistake(
            "Your answer tokens see the prefix and themselves alone: earlier answer tokens too.",
            suffix_sees_prefix_only,
        ),
        "anti-causal": Mistake("Behind the prefix your tokens see the future: key <= query, not >=.", anti_causal),
        "inverted": Mistake("Your mask is inverted: True means may attend.", inverted),
        "and for or": Mistake(
            "You combined causal and prefix with &: a key may be seen if it is earlier or in the prefix.", and_for_or
        ),
        "numbers": Mistake(
            "Your mask holds numbers: make it boolean, or attention adds it to the scores and hides nothing.",
            lambda lengths, length: right(lengths, length).float(),
        ),
        "no head axis": Mistake("The result needs an axis for the heads: [B, 1, length, length].", no_head_axis),
    },
    also_correct={"by the last key": by_maximum, "by assignment": by_assignment, "by or": right},
)
