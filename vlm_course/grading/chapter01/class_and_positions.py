"""Exercise: the class token in front, a position for every token."""

import torch
import torch.nn.functional as F

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(patches: torch.Tensor, class_token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Number by number."""
    batch, count, width = patches.shape
    out = torch.zeros(batch, 1 + count, width, dtype=torch.float64)
    for b in range(batch):
        for n in range(1 + count):
            for d in range(width):
                token = class_token[d] if n == 0 else patches[b, n - 1, d]
                out[b, n, d] = float(token) + float(positions[n, d])
    return out


def cases(seed: int) -> list[Case]:
    draw = torch.Generator().manual_seed(seed)

    def case(batch: int, count: int, width: int) -> Case:
        return Case(
            {
                "patches": torch.randn(batch, count, width, generator=draw),
                "class_token": 2 + torch.randn(width, generator=draw),
                "positions": torch.randn(1 + count, width, generator=draw),
            }
        )

    return [case(2, 6, 4), case(3, 4, 5), case(1, 1, 3)]


def front(x, c):
    return torch.cat([c.expand(len(x), 1, -1), x], dim=1)  # [B, N, D] -> [B, 1+N, D]


def by_assignment(x, c, p):
    out = x.new_empty(x.shape[0], x.shape[1] + 1, x.shape[2])
    out[:, 0] = c + p[0]
    out[:, 1:] = x + p[1:]
    return out


CLASS_AND_POSITIONS = Exercise(
    name="class_and_positions",
    chapter="01",
    title="Build It: class token and positions",
    difficulty="easy",
    minutes=10,
    points=3,
    attribute="add_class_and_positions",
    twin="vlm_course.vit:add_class_and_positions",
    interface=FunctionInterface(
        {"patches": "tensor [B, N, D]", "class_token": "tensor [D]", "positions": "tensor [1+N, D]"},
        "tensor [B, 1+N, D]",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "class token last": Mistake(
            "Your class token comes last: it goes before the patches, and position 0 is its own.",
            lambda x, c, p: torch.cat([x, c.expand(len(x), 1, -1)], dim=1) + p,
        ),
        "class token without position": Mistake(
            "Your class token got no position: there are 1 + N of them, and row 0 is for the class token.",
            lambda x, c, p: front(x + p[1:], c),
        ),
        "positions before the class token": Mistake(
            "You gave the first N positions to the patches before the class token joined: every patch is off by one.",
            lambda x, c, p: front(x + p[:-1], c),
        ),
        "last row for the class token": Mistake(
            "You gave the class token the last position: its own is row 0.",
            lambda x, c, p: front(x, c) + p.roll(1, dims=0),
        ),
        "one class token for the batch": Mistake(
            "You made one class token for the whole batch: expand it, so that every image has its copy.",
            lambda x, c, p: torch.cat([c[None, None], x], dim=1) + p,
        ),
        "no positions": Mistake(
            "You did not add the positions: without them the tower cannot tell where a patch was.",
            lambda x, c, p: front(x, c),
        ),
        "multiplied": Mistake("You multiplied by the positions: they are added.", lambda x, c, p: front(x, c) * p),
        "no class token": Mistake(
            "The class token is missing: N patches go in, 1 + N tokens come out.", lambda x, c, p: x + p[1:]
        ),
        "first patch replaced": Mistake(
            "You put the class token in the place of the first patch: it is one token more.",
            lambda x, c, p: torch.cat([c.expand(len(x), 1, -1), x[:, 1:]], dim=1) + p[: x.shape[1]],
        ),
        "side by side": Mistake(
            "You joined positions and tokens side by side, which makes them wider: they are added.",
            lambda x, c, p: torch.cat([front(x, c), p.expand(len(x), -1, -1)], dim=-1),
        ),
        "mean for class token": Mistake(
            "You put the mean of the patches in front: the class token is a vector of its own, learned.",
            lambda x, c, p: torch.cat([x.mean(1, keepdim=True), x], dim=1) + p,
        ),
        "class token added to all": Mistake(
            "You added the class token to every patch too: it is a token of its own.",
            lambda x, c, p: front(x + c, c) + p,
        ),
        "normalised": Mistake(
            "You added a LayerNorm: CLIP has one after this step, but it is a layer of its own, with weights.",
            lambda x, c, p: F.layer_norm(front(x, c) + p, x.shape[-1:]),
        ),
    },
    also_correct={
        "by assignment": by_assignment,
        "two sums joined": lambda x, c, p: torch.cat([(c + p[0]).expand(len(x), 1, -1), x + p[1:]], dim=1),
        "padded, then filled": lambda x, c, p: F.pad(x, (0, 0, 1, 0)) + F.pad(c[None], (0, 0, 0, len(p) - 1)) + p,
    },
)
