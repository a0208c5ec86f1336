"""Exercise: merge A and B into the weight."""

import copy

import torch
from torch import nn

from vlm_course.grading.chapter10.lora_linear import linear
from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def adapted(weight, bias, a, b, alpha):
    """The package's LoRALinear with these numbers."""
    from vlm_course.finetune.lora import LoRALinear

    layer = LoRALinear(linear(weight, bias), rank=len(a), alpha=alpha).eval()
    with torch.no_grad():
        layer.lora_a.copy_(a)
        layer.lora_b.copy_(b)
    return layer


def drive(answer, weight, bias, a, b, alpha, x):
    """What the merged layer gives, what the given layer gives afterwards, and the merged layer of a second call."""
    layer = adapted(weight, bias, a, b, alpha)
    merged = answer(layer)
    if type(merged) is not nn.Linear:
        return {"kind": type(merged).__name__}
    first, afterwards = merged(x), layer(x)
    return {
        "kind": "Linear",
        "merged": first,
        "the layer afterwards": afterwards,
        "merged again": answer(layer)(x),
        "numbers": sum(parameter.numel() for parameter in merged.parameters()),
    }


def oracle(weight, bias, a, b, alpha, x):
    """Number by number, in float64."""
    outputs, inputs = weight.shape
    out = torch.zeros(len(x), outputs, dtype=torch.float64)
    for row in range(len(x)):
        for i in range(outputs):
            out[row, i] = float(bias[i]) if len(bias) else 0.0
            for j in range(inputs):
                update = sum(float(b[i, k]) * float(a[k, j]) for k in range(len(a)))
                out[row, i] += (float(weight[i, j]) + alpha / len(a) * update) * float(x[row, j])
    numbers = weight.numel() + len(bias)
    return {"kind": "Linear", "merged": out, "the layer afterwards": out, "merged again": out, "numbers": numbers}


def cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(inputs: int, outputs: int, rank: int, alpha: float, bias: bool) -> Case:
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        call = {"weight": draw(outputs, inputs), "bias": draw(outputs if bias else 0), "a": draw(rank, inputs)}
        return Case(call | {"b": draw(outputs, rank), "alpha": alpha, "x": draw(3, inputs)})

    # Square layers let a transposed update pass without a crash; others show that it does not fit.
    side = int(torch.randint(5, 9, (), generator=generator))
    return [case(side, side, 3, 7.0, True), case(4, 10, 2, 5.0, True), case(9, 6, 4, 3.0, False)]


def new_linear(layer, weight, *, bias=True):
    """An nn.Linear with this weight and, if wanted, the base's bias."""
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=bias and layer.base.bias is not None)
    merged.weight = nn.Parameter(weight)
    if merged.bias is not None:
        merged.bias = nn.Parameter(layer.base.bias.detach().clone())
    return merged


def product(layer):
    return layer.lora_b.detach() @ layer.lora_a.detach()


def weighted(weight, **options):
    """An answer whose weight is computed otherwise."""
    return lambda layer: new_linear(layer, weight(layer), **options)


def in_place(layer):
    with torch.no_grad():
        layer.base.weight += layer.scale * product(layer)
    return layer.base


def not_merged(layer):
    with torch.no_grad():
        layer.base.weight += layer.scale * product(layer)
    return layer


def bias_scaled(layer):
    merged = weighted(lambda one: one.base.weight + one.scale * product(one))(layer)
    if merged.bias is not None:
        merged.bias.data *= 1 + layer.scale
    return merged


def entry_by_entry(layer):
    """Adds the outer product of each column of B with its row of A."""
    merged = copy.deepcopy(layer.base)
    for column, row in zip(layer.lora_b.detach().T, layer.lora_a.detach(), strict=True):
        merged.weight.data += layer.scale * torch.outer(column, row)
    return merged


def from_the_unit_vectors(layer):
    """What the layer makes of every unit vector is a column of the merged weight."""
    with torch.no_grad():
        columns = layer(torch.eye(layer.in_features))  # [in, out]
        bias = 0 if layer.bias is None else layer.bias
        return new_linear(layer, (columns - bias).T.contiguous())


MERGED_LINEAR = Exercise(
    name="merged_linear",
    chapter="10",
    title="Build It: merge the weights",
    difficulty="easy",
    minutes=10,
    points=3,
    attribute="merged_linear",
    twin="vlm_course.finetune.lora:merged_linear",
    forbidden=("vlm_course.finetune.lora:merge_lora",),
    interface=FunctionInterface(
        {
            "weight": "tensor [out, in], the base layer's",
            "bias": "tensor [out], or empty for none",
            "a": "tensor [rank, in]",
            "b": "tensor [out, rank]",
            "alpha": "number",
            "x": "tensor [rows, in]",
        },
        "dict of what the merged layer and the given one compute",
        driver="vlm_course.grading.chapter10.merged_linear:drive",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "no scale": Mistake(
            "You add B A as it is: it is multiplied by layer.scale, which is alpha / rank.",
            weighted(lambda layer: layer.base.weight + product(layer)),
        ),
        "scale for both": Mistake(
            "You multiply the whole sum by the scale: only the update is scaled, not the base's weight.",
            weighted(lambda layer: layer.scale * (layer.base.weight + product(layer))),
        ),
        "transposed": Mistake(
            "Your update is transposed: B A is [out, in], as the weight is.",
            weighted(lambda layer: layer.base.weight + layer.scale * product(layer).T),
        ),
        "A before B": Mistake(
            "You multiply A by B: B A is [out, rank] times [rank, in], in that order.",
            weighted(lambda layer: layer.base.weight + layer.scale * layer.lora_a @ layer.lora_b),
        ),
        "base lost": Mistake(
            "Your weight is the update alone: it is added to the base's weight.",
            weighted(lambda layer: layer.scale * product(layer)),
        ),
        "update lost": Mistake(
            "Your weight is the base's alone: scale * B A is added to it.",
            weighted(lambda layer: layer.base.weight.clone()),
        ),
        "subtracted": Mistake(
            "You subtract the update: merging adds it; subtracting is how it is taken out again.",
            weighted(lambda layer: layer.base.weight - layer.scale * product(layer)),
        ),
        "bias lost": Mistake(
            "Your merged layer has no bias: the base's bias belongs to it, unchanged.",
            weighted(lambda layer: layer.base.weight + layer.scale * product(layer), bias=False),
        ),
        "bias scaled": Mistake(
            "You changed the bias: A and B act on x alone, so the base's bias stays as it is.", bias_scaled
        ),
        "merged twice": Mistake(
            "You add to the layer's own weight, so a second call adds the update again: change a copy.", in_place
        ),
        "still with A and B": Mistake(
            "You return a layer that still adds B A x, now twice: return one nn.Linear without A and B.", not_merged
        ),
        "a matrix": Mistake(
            "You return the weight: return an nn.Linear that holds it, and the bias.",
            lambda layer: layer.base.weight + layer.scale * product(layer),
        ),
    },
    also_correct={"outer products": entry_by_entry, "unit vectors": from_the_unit_vectors},
)
