"""AdamW that rounds at random: torch's own in float32, right on average in bfloat16, the same inside the backward."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from vlm_course.finetune.fast_optimizer import RoundingAdamW, noise, rounded


def train(optimizer_of, *, steps: int = 20, dtype=torch.float32, inside: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    optimizer = optimizer_of([{"params": model.parameters(), "weight_decay": 0.1}])
    if inside:
        optimizer.in_backward()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def test_float32_is_torch_s_adamw():
    for ours, theirs in zip(train(RoundingAdamW), train(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_the_backward_pass_it_is_the_same(dtype):
    for one, other in zip(
        train(RoundingAdamW, dtype=dtype), train(RoundingAdamW, dtype=dtype, inside=True), strict=True
    ):
        assert torch.equal(one, other)


def test_gradients_are_dropped_inside_the_backward_pass():
    layer = nn.Linear(2, 2)
    optimizer = RoundingAdamW(layer.parameters()).in_backward()
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None and len(optimizer.hooks) == 2


def test_rounding_is_right_on_average_and_exact_where_it_can_be():
    values = torch.full((200_000,), 1.0 + 0.3 * 2**-7)
    found = rounded(values, noise(len(values), 5)).float()
    assert set(found.tolist()) == {1.0, 1.0 + 2**-7}
    assert found.mean().item() == pytest.approx(1.0 + 0.3 * 2**-7, abs=3 * 2**-7 * (0.21 / 200_000) ** 0.5)
    exact = torch.tensor([0.0, 1.5, -2.0, 0.0078125])
    assert torch.equal(rounded(exact, torch.full((4,), 0xFFFF)).float(), exact)


def test_small_steps_are_not_lost():
    """2,000 steps of 1e-5 from 1.0, where rounding to the nearest would never leave 1.0."""
    weight = nn.Parameter(torch.ones(400, dtype=torch.bfloat16))
    optimizer = RoundingAdamW([weight], lr=1e-5)
    for _ in range(2000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(0.98, abs=0.002)


def test_noise_is_even_and_depends_on_the_seed():
    bits = noise(1 << 16, 3)
    assert 0 <= int(bits.min()) and int(bits.max()) < 1 << 32
    ones = torch.stack([(bits >> place) & 1 for place in range(32)]).float().mean(dim=1)
    assert (ones - 0.5).abs().max() < 0.02
    assert not torch.equal(bits, noise(1 << 16, 4))


def test_state_goes_on_where_it_stopped():
    weight = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    optimizer = RoundingAdamW([weight], lr=1e-3)

    def step(parameter, opt):
        parameter.grad = torch.linspace(-1, 1, 50).to(torch.bfloat16)
        opt.step()

    step(weight, optimizer)
    other = nn.Parameter(weight.detach().clone())
    resumed = RoundingAdamW([other], lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(weight, optimizer)
    step(other, resumed)
    assert torch.equal(weight, other)


INTERPRETED = """
import torch
from vlm_course.finetune.fast_optimizer import plain_update
from vlm_course.finetune.optimizer_kernel import update
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    start = [torch.randn(37, 100).to(dtype) for _ in range(3)] + [torch.rand(37, 100).to(dtype)]
    ends = []
    for run in (plain_update, update):
        w, g, m, v = (t.clone() for t in start)
        run(w, g, m, v, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, decay=0.1, step=3, seed=11)
        ends.append((w, m, v))
    for ours, theirs in zip(*ends):
        apart = (ours.float() - theirs.float()).abs()
        assert (apart > 1e-6).float().mean() < 0.002, apart  # a last bit of float32 may tip a rounding
        assert apart.max() < 0.05
print("equal")
"""


def test_kernel_equals_plain_torch_in_triton_s_interpreter():
    pytest.importorskip("triton", reason="the kernels are Triton's, which this system has not")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr
