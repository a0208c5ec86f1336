"""Exercise: the two-layer bridge of LLaVA-1.5."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vlm_course.grading.exercise import (
    Case,
    Exercise,
    Mistake,
    ModuleInterface,
    Shape,
    Tensors,
    as_declared,
    transposed,
)


def parameters(construct: dict) -> dict[str, Shape]:
    vision, llm = construct["vision_dim"], construct["llm_dim"]
    return {
        "mlp.0.weight": (llm, vision),
        "mlp.0.bias": (llm,),
        "mlp.2.weight": (llm, llm),
        "mlp.2.bias": (llm,),
    }


def oracle(values: Tensors, construct: dict, features: torch.Tensor) -> torch.Tensor:
    """One token, one output number at a time; at a real model's size a NaN of the right shape."""
    batch, tokens, _ = features.shape
    out = torch.full((batch, tokens, construct["llm_dim"]), math.nan, dtype=torch.float64)
    if out.numel() > 10_000:
        return out
    for b in range(batch):
        for n in range(tokens):
            x = features[b, n].double()
            hidden = [
                float(row @ x + bias) for row, bias in zip(values["mlp.0.weight"], values["mlp.0.bias"], strict=True)
            ]
            active = torch.tensor([h * 0.5 * (1 + math.erf(h / math.sqrt(2))) for h in hidden], dtype=torch.float64)
            for i, (row, bias) in enumerate(zip(values["mlp.2.weight"], values["mlp.2.bias"], strict=True)):
                out[b, n, i] = float(row @ active + bias)
    return out


def cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    narrow, wide, other = (int(torch.randint(low, low + 4, (), generator=generator)) for low in (5, 10, 15))

    def case(vision: int, llm: int, batch: int, tokens: int, *, values: bool = True) -> Case:
        features = 2 * torch.randn(batch, tokens, vision, generator=generator)
        return Case({"features": features}, {"vision_dim": vision, "llm_dim": llm}, values)

    lesson = [case(1024, 4096, 2, 576, values=False)] if seed == 0 else []
    return [*lesson, case(narrow, wide, 2, 4, values=True), case(other, narrow, 3, 5), case(wide, other, 1, 1)]


def bridge(*modules) -> nn.Module:
    """A bridge that only its layers tell from the right one."""
    return nn.Sequential(*modules)


class Act(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Functional(nn.Module):
    """Two layers with names of their own, and the activation as a function."""

    def __init__(self, vision_dim, llm_dim, before=None, between=F.gelu, after=None):
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, llm_dim)
        self.fc2 = nn.Linear(llm_dim, llm_dim)
        self.steps = [step or (lambda x: x) for step in (before, between, after)]

    def forward(self, x):
        before, between, after = self.steps
        return after(self.fc2(between(self.fc1(before(x)))))


class ByHand(nn.Module):
    """Weights as [in, out], and GELU from its definition."""

    def __init__(self, vision_dim, llm_dim):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(vision_dim, llm_dim) * 0.02)
        self.b1 = nn.Parameter(torch.zeros(llm_dim))
        self.w2 = nn.Parameter(torch.randn(llm_dim, llm_dim) * 0.02)
        self.b2 = nn.Parameter(torch.zeros(llm_dim))

    def forward(self, x):
        hidden = torch.einsum("bnd,de->bne", x, self.w1) + self.b1  # [B, N, D_vision] -> [B, N, D_llm]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return hidden @ self.w2 + self.b2  # [B, N, D_llm] -> [B, N, D_llm]


class Convolutions(nn.Module):
    """A convolution of width 1 is a linear map of each token."""

    def __init__(self, vision_dim, llm_dim):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(vision_dim, llm_dim, 1), nn.GELU(), nn.Conv1d(llm_dim, llm_dim, 1))

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)  # [B, N, D_vision] -> [B, N, D_llm]


class Residual(Functional):
    """Adds the hidden layer to the output."""

    def forward(self, x):
        hidden = F.gelu(self.fc1(x))
        return hidden + self.fc2(hidden)


class Flattened(Functional):
    """Right but for the shape: batch and tokens are one dimension."""

    def forward(self, x):
        return super().forward(x).flatten(0, 1)


def as_convolution(values: Tensors) -> Tensors:
    return {name: value.unsqueeze(-1) if value.ndim == 2 else value for name, value in values.items()}


INTERFACE = ModuleInterface(
    constructor={"vision_dim": "integer", "llm_dim": "integer"},
    parameters=parameters,
    call={"features": "tensor [B, N, vision_dim]"},
    returns="tensor [B, N, llm_dim]",
    positional=True,
    layouts=(as_declared, transposed, as_convolution),
)

VISION_PROJECTION = Exercise(
    name="vision_projection",
    chapter="02",
    title="Build It: the projection bridge",
    difficulty="easy",
    minutes=15,
    points=4,
    attribute="VisionProjection",
    twin="vlm_course.bridges:VisionProjection",
    interface=INTERFACE,
    oracle=oracle,
    cases=cases,
    mistakes={
        "no activation": Mistake(
            "This is what you get without the GELU: two linear maps in a row are only one linear map.",
            lambda v, d: bridge(nn.Linear(v, d), nn.Linear(d, d)),
        ),
        "ReLU": Mistake(
            "This is what you get with ReLU: LLaVA-1.5 puts GELU between the layers.",
            lambda v, d: bridge(nn.Linear(v, d), nn.ReLU(), nn.Linear(d, d)),
        ),
        "tanh GELU": Mistake(
            'This is GELU\'s tanh approximation: LLaVA uses the exact one, nn.GELU() without approximate="tanh".',
            lambda v, d: bridge(nn.Linear(v, d), nn.GELU("tanh"), nn.Linear(d, d)),
        ),
        "quick GELU": Mistake(
            "This is CLIP's quick GELU, x * sigmoid(1.702 x): the bridge uses the exact one, nn.GELU().",
            lambda v, d: bridge(nn.Linear(v, d), Act(lambda x: x * torch.sigmoid(1.702 * x)), nn.Linear(d, d)),
        ),
        "SiLU": Mistake(
            "This is what you get with SiLU: LLaVA-1.5 puts GELU between the layers.",
            lambda v, d: bridge(nn.Linear(v, d), nn.SiLU(), nn.Linear(d, d)),
        ),
        "GELU at the end too": Mistake(
            "You apply GELU after the last layer too: word embeddings take any sign, so the output stays linear.",
            lambda v, d: bridge(nn.Linear(v, d), nn.GELU(), nn.Linear(d, d), nn.GELU()),
        ),
        "GELU only at the end": Mistake(
            "Your GELU comes after both layers: it belongs between them.",
            lambda v, d: bridge(nn.Linear(v, d), nn.Linear(d, d), nn.GELU()),
        ),
        "GELU first": Mistake(
            "Your GELU comes before the first layer: it belongs between the two.",
            lambda v, d: bridge(nn.GELU(), nn.Linear(v, d), nn.Linear(d, d)),
        ),
        "no biases": Mistake(
            "Your layers have no biases: both linear maps of LLaVA-1.5 have one.",
            lambda v, d: bridge(nn.Linear(v, d, bias=False), nn.GELU(), nn.Linear(d, d, bias=False)),
        ),
        "one layer": Mistake(
            "This is the single linear map of the first LLaVA: 1.5 has two, with a GELU between.",
            lambda v, d: bridge(nn.Linear(v, d)),
        ),
        "narrow middle": Mistake(
            "Your middle width is vision_dim: the first layer already goes to llm_dim.",
            lambda v, d: bridge(nn.Linear(v, v), nn.GELU(), nn.Linear(v, d)),
        ),
        "four times wider middle": Mistake(
            "Your middle is four times as wide as in a transformer's feed-forward net: here both layers give llm_dim.",
            lambda v, d: bridge(nn.Linear(v, 4 * d), nn.GELU(), nn.Linear(4 * d, d)),
        ),
        "always 1024 and 4096": Mistake(
            "Your widths are the numbers 1024 and 4096: use vision_dim and llm_dim, other models have other widths.",
            lambda v, d: bridge(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 4096)),
        ),
        "always 4096": Mistake(
            "Your output width is the number 4096: use llm_dim, other language models have other widths.",
            lambda v, d: bridge(nn.Linear(v, 4096), nn.GELU(), nn.Linear(4096, 4096)),
        ),
        "widths exchanged": Mistake(
            "Your widths are exchanged: nn.Linear takes the input's width first.",
            lambda v, d: bridge(nn.Linear(d, v), nn.GELU(), nn.Linear(v, v)),
        ),
        "LayerNorm added": Mistake(
            "You added a LayerNorm: the bridge of LLaVA-1.5 has two linear maps and a GELU, nothing else.",
            lambda v, d: bridge(nn.Linear(v, d), nn.GELU(), nn.LayerNorm(d), nn.Linear(d, d)),
        ),
        "residual": Mistake(
            "You add the hidden layer to the output: this bridge has no residual connection.", Residual
        ),
        "first token dropped": Mistake(
            "You drop the first token: the class token is already gone here, and every patch has its output.",
            lambda v, d: Functional(v, d, before=lambda x: x[:, 1:]),
        ),
        "batch flattened": Mistake(
            "You merged batch and tokens: nn.Linear works on the last dimension and leaves the others alone.", Flattened
        ),
        "dropout": Mistake(
            "A second call gives another result: dropout or other noise does not belong into this bridge.",
            lambda v, d: bridge(nn.Linear(v, d), nn.GELU(), nn.Dropout(0.5), nn.Linear(d, d)),
        ),
    },
    also_correct={
        "layers and F.gelu": Functional,
        "matrices and erf": ByHand,
        "convolutions": Convolutions,
    },
)
