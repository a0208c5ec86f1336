"""LoRA: a frozen linear layer learns through two thin matrices beside it, and afterwards swallows them.

Source: Hu et al. 2021 ("LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685), section 4.1:
h = W x + (alpha / r) B A x, with B zero at the start, so that training begins at the model as it was.
"""

import copy
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_course.validation import checks, counts, require_number, require_same_device, require_shape

# Every linear map of a decoder's blocks (the set that LLaVA-1.5's LoRA script adapts); the head stays as it is.
TARGETS = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.out",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)


class StandsForLinear(nn.Module):
    """Stands where the linear layer `self.base` stood: has its in_features, out_features, weight and bias."""

    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)


def _check_layer(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float = 0.0) -> None:
    if not isinstance(base, nn.Linear):
        raise ValueError(f"base is a {type(base).__name__}, expected an nn.Linear: does it have LoRA already?")
    most = min(base.in_features, base.out_features)
    if rank > most:
        raise ValueError(
            f"rank is {rank}, but a map from {base.in_features} to {base.out_features} has at most rank {most}"
        )
    require_number(alpha, "alpha", above=0)
    require_number(dropout, "dropout", 0, 1)


def _check_input(self, x: Tensor) -> None:
    axes = " ".join(f"axis{i}" for i in range(x.dim() - 1)) + " features"
    require_shape(x, "x", axes, features=self.in_features)
    require_same_device(x=x, **{"the layer": self.weight})


@counts(rank=1)
@checks(_check_input, init=_check_layer)
class LoRALinear(StandsForLinear):
    """base(x) + (alpha / rank) * B A dropout(x), where only A and B learn. forward: [..., in] -> [..., out].

    `lora_a` is A [rank, in], `lora_b` is B [out, rank], which starts at zero. They may be kept in another dtype than
    the base (float32 beside bfloat16, where small steps would be rounded away): they are cast to that of x.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(self.dropout(x), self.lora_a.to(x.dtype))  # [..., in] -> [..., rank]
        update = F.linear(inner, self.lora_b.to(x.dtype))  # [..., rank] -> [..., out]
        return self.base(x) + self.scale * update  # [..., out]


def _check_lora(layer: nn.Module) -> None:
    if not isinstance(layer, StandsForLinear):
        raise ValueError(f"layer is a {type(layer).__name__}, expected a LoRALinear: is it merged already?")


@checks(_check_lora)
@torch.no_grad()
def merged_linear(layer: LoRALinear) -> nn.Linear:
    """The layer as one nn.Linear of weight W + scale * B A, with the base's bias; `layer` itself stays as it is."""
    merged = copy.deepcopy(layer.base)
    merged.weight += layer.scale * (layer.lora_b @ layer.lora_a)  # [out, rank] x [rank, in] -> [out, in]
    return merged


def _targets(model: nn.Module, targets: Sequence[str], inside: str | None) -> list[str]:
    """Names of the modules that lie in the part `inside` and end in one of `targets`."""
    if inside is None:
        inside = "decoder" if hasattr(model, "decoder") else ""
    ends = tuple("." + target for target in targets)
    return [
        name
        for name, _ in model.named_modules()
        if f".{name}".endswith(ends) and (not inside or name.startswith(inside + "."))
    ]


def _check_add(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = TARGETS,
    dropout: float = 0.0,
    inside: str | None = None,
    dtype: torch.dtype | None = None,
    layer: type | None = None,
) -> None:
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets is {targets!r}, expected at least 1 name such as 'attention.query', in a tuple")
    if has_lora(model):
        layers = sum(1 for _ in lora_layers(model))
        raise ValueError(f"the model has {layers} LoRA layers already, expected 0: merge or load them first")
    names = _targets(model, targets, inside)
    for target in targets:
        if not any(f".{name}".endswith("." + target) for name in names):
            linears = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ValueError(f"0 modules end in {target!r}; the model's linear layers are called {linears}")
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} is a {type(module).__name__}, expected an nn.Linear: name those inside it")
        _check_layer(None, module, rank=rank, alpha=alpha, dropout=dropout)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@counts(rank=1)
@checks(_check_add)
def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = TARGETS,
    dropout: float = 0.0,
    inside: str | None = None,
    dtype: torch.dtype | None = None,
    layer: type | None = None,
) -> list[str]:
    """Put a `LoRALinear` in the place of every target, in place, and freeze everything else.

    Args:
        targets: ends of module names, by default every linear map of a decoder's blocks.
        inside: only modules under this name; by default "decoder" where the model has one (a `Llava`), else anywhere.
        dtype: of A and B, by default that of the layer (give torch.float32 to a model in bfloat16).
        layer: the class to use, by default `LoRALinear`.

    Returns:
        the names of the parameters that learn (every A and B), which `training.freeze_all_but` takes as prefixes.

    Raises:
        ValueError: a target fits no linear layer, the rank is larger than a layer's sides, or there is LoRA already.
    """
    model.requires_grad_(False)
    for name in _targets(model, targets, inside):
        base = model.get_submodule(name)
        added = (layer or LoRALinear)(base, rank=rank, alpha=alpha, dropout=dropout)
        if dtype is not None:
            for parameter in added.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
        _replace(model, name, added.train(base.training))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Name and module of every LoRA layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, StandsForLinear))


def has_lora(model: nn.Module) -> bool:
    """Whether the model has at least one LoRA layer."""
    return any(True for _ in lora_layers(model))


def _check_present(model: nn.Module, *rest) -> None:
    if not has_lora(model):
        raise ValueError("the model has 0 LoRA layers, expected at least 1: call add_lora first, or was it merged?")


@checks(_check_present)
def merge_lora(model: nn.Module) -> list[str]:
    """Replace every LoRA layer by its `merged_linear`, in place; returns their names. The model is plain again.

    Raises:
        ValueError: the model has no LoRA layer, because it was merged already or never had one.
    """
    names = [name for name, _ in lora_layers(model)]
    for name in names:
        module = model.get_submodule(name)
        _replace(model, name, merged_linear(module).train(module.training))
    return names


@checks(_check_present)
def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """What LoRA learned and nothing else: for every layer `NAME.lora_a`, `NAME.lora_b` and `NAME.scale` (one number).

    The tensors are the model's own (detached, not copied), ready for `safetensors` or `training.save_atomically`.
    """
    state = {}
    for name, layer in lora_layers(model):
        state[f"{name}.lora_a"], state[f"{name}.lora_b"] = layer.lora_a.detach(), layer.lora_b.detach()
        state[f"{name}.scale"] = torch.tensor(layer.scale, dtype=torch.float64)
    return state


def _check_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    _check_present(model)
    own = lora_state(model)
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unknown:
        first = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown"
        raise ValueError(
            f"the state has {len(state)} tensors for {len(own)} of the model; {first}: were the targets others?"
        )
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}: was the rank another?"
            )
        if name.endswith(".scale") and not math.isclose(state[name], tensor, rel_tol=1e-6):
            raise ValueError(f"{name} is {state[name].item():g}, expected {tensor.item():g}: was alpha another?")


@checks(_check_state)
@torch.no_grad()
def load_lora(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy what `lora_state` gave into a model that has the same LoRA layers (same targets, rank and alpha).

    Raises:
        ValueError: names, shapes or scales differ, so the state belongs to other layers.
    """
    for name, layer in lora_layers(model):
        layer.lora_a.copy_(state[f"{name}.lora_a"])
        layer.lora_b.copy_(state[f"{name}.lora_b"])


@counts(width=1, kv_width=1, mlp_width=1, layers=1, rank=1)
def lora_budget(width: int, kv_width: int, mlp_width: int, layers: int, rank: int) -> tuple[int, int, int, int]:
    """What learns in a decoder's linear layers, and what AdamW keeps for it: LoRA of one rank against full tuning.

    A block has query and out (width to width), key and value (width to kv_width), gate and up (width to mlp_width) and
    down (mlp_width to width), none with a bias. AdamW keeps two float32 moments of every parameter that learns.

    Returns:
        parameters of LoRA, parameters of full tuning, bytes of the moments with LoRA, with full tuning.
    """
    both_ways = [(width, width), (width, kv_width)] * 2  # query and out, key and value
    maps = both_ways + [(width, mlp_width)] * 3  # gate, up, down: the sum of the sides is the same either way
    lora = layers * sum(rank * (one + other) for one, other in maps)
    full = layers * sum(one * other for one, other in maps)
    return lora, full, 8 * lora, 8 * full
