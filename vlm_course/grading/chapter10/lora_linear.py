"""Exercise: a linear layer with LoRA."""

import torch
from torch import nn

from vlm_course.grading.chapter10.lora_answers import FromLayers, OneMatrix, made
from vlm_course.grading.exercise import Case, Exercise, FunctionInterface, Mistake


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """A layer with these numbers; an empty bias means none. Everything in it learns, as in a fresh model."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=len(bias) > 0)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if len(bias):
            layer.bias.copy_(bias)
    return layer


def drive(answer, weight, bias, a, b, alpha, dropout, x):
    """The layer as it starts, what of it learns, the layer with A and B given, and the same while training."""
    base = linear(weight, bias)
    layer = answer(base, rank=len(a), alpha=alpha, dropout=dropout).eval()
    shapes = {name: tuple(getattr(layer, name).shape) for name in ("lora_a", "lora_b")}
    if shapes != {"lora_a": tuple(a.shape), "lora_b": tuple(b.shape)}:
        return {"shapes": shapes}
    at_zero = {name: int(not getattr(layer, name).any()) for name in shapes}
    start = layer(x) if any(at_zero.values()) else "not what the base gives"
    learns = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    result = {"starts at zero": at_zero, "at the start": start, "numbers that learn": learns}
    result["parameters"] = sum(isinstance(getattr(layer, name), nn.Parameter) for name in shapes)
    if learns:
        layer(x).square().sum().backward()
    result["first gradient"] = {name: _moves(getattr(layer, name)) for name in shapes}
    with torch.no_grad():
        layer.lora_a.copy_(a)
        layer.lora_b.copy_(b)
    if dropout and not torch.equal(layer(x), layer(x)):
        return result | {"with A and B": "two calls in eval mode differ"}
    result |= {"with A and B": layer(x), "weight afterwards": base.weight.detach().clone()}
    return result | {"while training": _while_training(answer, dropout)}


def _moves(parameter: torch.Tensor) -> int:
    return int(parameter.grad is not None and bool(parameter.grad.abs().sum() > 0))


def _while_training(answer, dropout: float) -> str:
    """Where dropout acts. A and B turn their input and lose nothing, so what went in can be read off what came out."""
    generator, size = torch.Generator().manual_seed(5), 24
    turns = [torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2)]
    base = linear(torch.randn(size, size, generator=generator), torch.zeros(0))
    layer = answer(base, rank=size, alpha=float(size), dropout=dropout).train()
    with torch.no_grad():
        layer.lora_a.copy_(turns[0])
        layer.lora_b.copy_(turns[1])
        x = torch.randn(30, size, generator=generator)
        entered = (layer(x) - x @ base.weight.T) @ (turns[1] @ turns[0])  # [30, size], the update turned back
    if torch.allclose(entered, x, atol=1e-3):
        return "nothing is zero"
    zero = entered.abs() < 1e-3
    if not torch.allclose(entered[~zero], (x / (1 - dropout))[~zero], atol=1e-3):
        return "not the update of an input of which some numbers are zero and the others enlarged"
    return "some of the update's input is zero"


def oracle(weight, bias, a, b, alpha, dropout, x):
    """Number by number, in float64."""
    outputs, inputs = weight.shape
    plain, adapted = (torch.zeros(len(x), outputs, dtype=torch.float64) for _ in range(2))
    for row in range(len(x)):
        inner = [sum(float(a[k, j]) * float(x[row, j]) for j in range(inputs)) for k in range(len(a))]
        for i in range(outputs):
            value = sum(float(weight[i, j]) * float(x[row, j]) for j in range(inputs))
            plain[row, i] = value + (float(bias[i]) if len(bias) else 0.0)
            update = sum(float(b[i, k]) * inner[k] for k in range(len(a)))
            adapted[row, i] = plain[row, i] + alpha / len(a) * update
    return {
        "starts at zero": {"lora_a": 0, "lora_b": 1},
        "at the start": plain,
        "numbers that learn": len(a) * (inputs + outputs),
        "parameters": 2,
        "first gradient": {"lora_a": 0, "lora_b": 1},  # B = 0 stops the gradient on its way to A
        "with A and B": adapted,
        "weight afterwards": weight.double(),
        "while training": "some of the update's input is zero" if dropout else "nothing is zero",
    }


def cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(inputs: int, outputs: int, rank: int, alpha: float, dropout: float, bias: bool) -> Case:
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        call = {"weight": draw(outputs, inputs), "bias": draw(outputs if bias else 0), "a": draw(rank, inputs)}
        call |= {"b": draw(outputs, rank), "alpha": alpha, "dropout": dropout, "x": draw(3, inputs)}
        return Case(call)

    # alpha / rank is never 1, and no side equals another but in the last case, where exchanged matrices do not crash.
    wide = int(torch.randint(8, 12, (), generator=generator))
    return [case(5, wide, 3, 7.0, 0.0, True), case(wide, 6, 2, 5.0, 0.5, False), case(4, 4, 4, 10.0, 0.25, True)]


LORA_LINEAR = Exercise(
    name="lora_linear",
    chapter="10",
    title="Build It: a linear layer with LoRA",
    difficulty="medium",
    minutes=25,
    points=5,
    attribute="LoRALinear",
    twin="vlm_course.finetune.lora:LoRALinear",
    interface=FunctionInterface(
        {
            "weight": "tensor [out, in], the base layer's",
            "bias": "tensor [out], or empty for none",
            "a": "tensor [rank, in], put into lora_a",
            "b": "tensor [out, rank], put into lora_b",
            "alpha": "number",
            "dropout": "number",
            "x": "tensor [rows, in]",
        },
        "dict of what the layer gives at the start, with A and B, and while training, and of what learns",
        driver="vlm_course.grading.chapter10.lora_linear:drive",
    ),
    oracle=oracle,
    cases=cases,
    mistakes={
        "no alpha / rank": Mistake("You add B A x as it is: it is multiplied by alpha / rank.", made(scale=1)),
        "alpha alone": Mistake(
            "You multiply by alpha: it is alpha / rank, so that a larger rank does not mean a larger step.",
            made(scale=lambda alpha, rank: alpha),
        ),
        "root of the rank": Mistake(
            "You divide alpha by the root of the rank, as a later paper does (rsLoRA): here it is alpha / rank.",
            made(scale=lambda alpha, rank: alpha / rank**0.5),
        ),
        "rank over alpha": Mistake(
            "Your factor is rank / alpha: it is alpha / rank.", made(scale=lambda alpha, rank: rank / alpha)
        ),
        "everything scaled": Mistake(
            "You multiply the base's output by alpha / rank too: only the update is scaled.", made(scale_all=True)
        ),
        "A and B both random": Mistake(
            "Your B starts at random values: it starts at zero, so that the first output is the base's own.",
            made(start=("random", "random")),
        ),
        "A and B both zero": Mistake(
            "Your A and B both start at zero: each then stops the other's gradient, and nothing is ever learned.",
            made(start=("zero", "zero")),
        ),
        "A zero, B random": Mistake(
            "Your A starts at zero and B at random values: it is the other way round, B is zero.",
            made(start=("zero", "random")),
        ),
        "base not frozen": Mistake(
            "Your base still learns: base.requires_grad_(False) freezes its weight and its bias.", made(freeze=False)
        ),
        "only the weight frozen": Mistake(
            "Your base's bias still learns: freeze the whole base, with base.requires_grad_(False).",
            made(freeze="weight"),
        ),
        "all frozen": Mistake(
            "Nothing of yours learns: freeze the base alone, before A and B are there.", made(freeze="all")
        ),
        "plain tensors": Mistake(
            "Your A and B are tensors, not parameters, so no optimizer finds them: wrap them in nn.Parameter.",
            made(parameters=False),
        ),
        "B before A": Mistake(
            "You multiply by B before A: x goes through A into rank numbers, and from there through B.",
            made(order=("lora_b", "lora_a")),
        ),
        "shapes exchanged": Mistake(
            "Your A and B are [in, rank] and [rank, out]: as in nn.Linear they are [rank, in] and [out, rank].",
            made(transposed=True),
        ),
        "names exchanged": Mistake(
            "Your A has the shape of B and the other way round: A is [rank, in], B is [out, rank].", made(renamed=True)
        ),
        "base forgotten": Mistake(
            "You return the update alone: it is added to what the frozen base gives.", made(plain="nothing")
        ),
        "bias lost": Mistake(
            "Your base lost its bias: call self.base(x) instead of using its weight.", made(plain="weight")
        ),
        "after the base": Mistake(
            "Your A reads the base's output: A and B lie beside the base and read x.", made(reads="base")
        ),
        "activation in between": Mistake(
            "You put an activation between A and B: without one, B A is a matrix that can be merged into the base.",
            made(between=torch.relu),
        ),
        "dropout at eval": Mistake(
            "Your dropout also acts in eval mode: nn.Dropout knows the mode, F.dropout needs training=self.training.",
            made(drops="always"),
        ),
        "no dropout": Mistake(
            "Your layer ignores dropout: while training, the update reads dropout(x).", made(drops="never")
        ),
        "dropout elsewhere": Mistake(
            "Your dropout acts elsewhere: it belongs on what A reads and nothing else; the base reads x itself.",
            made(drops="all"),
        ),
        "base changed": Mistake(
            "You changed the base's weight: while training it stays as it was, and B A x is added to its output.",
            made(plain="in place"),
        ),
    },
    also_correct={"one matrix": OneMatrix, "from layers": FromLayers},
)
