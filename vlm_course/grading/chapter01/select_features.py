"""Exercise: which of a tower's hidden states a language model gets."""

import torch
import torch.nn.functional as F

from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def oracle(states: list[torch.Tensor], layer: int | list[int], strategy: str) -> torch.Tensor:
    """Token by token."""
    wanted = list(layer) if isinstance(layer, list | tuple) else [layer]
    batch, tokens, _ = states[0].shape
    first = 1 if strategy == "default" else 0
    images = []
    for b in range(batch):
        rows = []
        for n in range(first, tokens):
            row = []
            for index in wanted:
                row += states[index + len(states) if index < 0 else index][b, n].tolist()
            rows.append(row)
        images.append(rows)
    return torch.tensor(images, dtype=torch.float64)


def cases(seed: int) -> list[Case]:
    draw = torch.Generator().manual_seed(seed)

    def case(layer: int | list[int], strategy: str, batch: int, tokens: int, width: int, blocks: int) -> Case:
        states = [torch.randn(batch, tokens, width, generator=draw) for _ in range(blocks + 1)]
        return Case({"states": states, "layer": layer, "strategy": strategy})

    return [
        case(-2, "default", 2, 5, 4, 3),  # LLaVA-1.5
        case(1, "full", 2, 4, 3, 4),
        case(-1, "default", 1, 7, 4, 2),
        case([-2, -4, 1], "default", 2, 5, 3, 4),  # several layers side by side, as VipLlava takes them
    ]


def as_list(layer):
    return list(layer) if isinstance(layer, list | tuple) else [layer]


def select(states, layer, strategy, drop=lambda x: x[:, 1:], join=lambda parts: torch.cat(parts, dim=-1)):
    joined = join([states[index] for index in as_list(layer)])
    return drop(joined) if strategy == "default" else joined


def one_by_one(states, layer, strategy):
    start = int(strategy == "default")
    parts = [states[index][:, start:] for index in as_list(layer)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def only_lists(states, layer, strategy):
    layers = layer if isinstance(layer, list) else [layer]
    joined = torch.cat([states[index] for index in layers], -1)
    return joined if strategy == "full" else joined[:, 1:, :]


def by_stack(states, layer, strategy):
    stacked = torch.stack([states[index] for index in as_list(layer)], dim=2)  # [B, 1+N, k, D]
    flat = stacked.flatten(2)
    return flat.narrow(1, 1, flat.shape[1] - 1) if strategy == "default" else flat


SELECT_FEATURES = Exercise(
    name="select_features",
    chapter="01",
    title="Build It: penultimate features",
    difficulty="medium",
    minutes=15,
    points=4,
    attribute="select_features",
    twin="vlm_course.vit:select_features",
    interface=FunctionInterface(
        {
            "states": "list of layers+1 tensors [B, 1+N, D]",
            "layer": "integer, or a list of integers",
            "strategy": "text, default or full",
        },
        "tensor [B, N, k*D], or [B, 1+N, k*D] for full",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "last token dropped": Mistake(
            "You drop the last token: the class token is the first one, so [:, 1:].",
            lambda s, i, how: select(s, i, how, drop=lambda x: x[:, :-1]),
        ),
        "class token kept": Mistake(
            'You keep the class token: "default" drops it, and only "full" keeps it.',
            lambda s, i, how: select(s, i, "full"),
        ),
        "class token always dropped": Mistake(
            'You always drop the class token: "full" keeps it.', lambda s, i, how: select(s, i, "default")
        ),
        "strategies exchanged": Mistake(
            'You exchanged the two: "default" drops the class token, "full" keeps it.',
            lambda s, i, how: select(s, i, "full" if how == "default" else "default"),
        ),
        "class token alone": Mistake(
            "You return the class token alone: that is what CLIP compares with a text; a VLM gets the patches.",
            lambda s, i, how: select(s, i, "default", drop=lambda x: x[:, :1]),
        ),
        "batch for tokens": Mistake(
            "You drop the first image of the batch: tokens are dimension 1, so [:, 1:].",
            lambda s, i, how: select(s, i, how, drop=lambda x: x[1:]),
        ),
        "always the last layer": Mistake(
            "You always take the last layer: LLaVA asks for layer -2, and others for others.",
            lambda s, i, how: select(s, [-1 for _ in as_list(i)], how),
        ),
        "last layer, patches": Mistake(
            "You always take the last layer's patches: layer and strategy say what is asked for.",
            lambda s, i, how: s[-1][:, 1:],
        ),
        "one layer alone": Mistake(
            "Your answer knows one layer alone: a list of layers is joined along the width.",
            lambda s, i, how: s[i][:, 1:] if how == "default" else s[i],
        ),
        "always the penultimate": Mistake(
            "You always take layer -2: use the layer that is asked for.",
            lambda s, i, how: select(s, [-2 for _ in as_list(i)], how),
        ),
        "embeddings not counted": Mistake(
            "You leave out states[0], the input of the first block: it counts, so layer 1 is the first block's output.",
            lambda s, i, how: select(s[1:], i, how),
        ),
        "first layer only": Mistake(
            "You take only the first layer of the list: all of them are joined along the width.",
            lambda s, i, how: select(s, as_list(i)[0], how),
        ),
        "averaged": Mistake(
            "You average the layers: they are joined along the width, so that each keeps its numbers.",
            lambda s, i, how: select(s, i, how, join=lambda parts: torch.stack(parts).mean(0)),
        ),
        "joined as tokens": Mistake(
            "You joined the layers as more tokens: join them along the width, dim=-1, so that N stays N.",
            lambda s, i, how: select(s, i, how, join=lambda parts: torch.cat(parts, dim=1)),
        ),
        "sorted": Mistake(
            "You sorted the layers: they are joined in the order that was asked for.",
            lambda s, i, how: select(s, sorted(index % len(s) for index in as_list(i)), how),
        ),
        "normalised": Mistake(
            "You normalised the features: what a VLM gets comes before the tower's final LayerNorm.",
            lambda s, i, how: F.layer_norm(select(s, i, how), select(s, i, how).shape[-1:]),
        ),
    },
    also_correct={
        "each layer cut by itself": one_by_one,
        "asks for a list": only_lists,
        "stacked and flattened": by_stack,
    },
)
