"""Shared by all tests: no network, one thread (the suite runs its files side by side), the same examples every run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import Phase, settings

settings.register_profile("course", deadline=None, max_examples=30, derandomize=True, database=None)
settings.register_profile("mutants", parent=settings.get_profile("course"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "course"))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def redraw():
    """Draw every parameter anew from N(0, std), LayerNorms too: defaults hide wrong norms and activations."""

    def redraw(module: torch.nn.Module, std: float = 0.2, seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        return module.eval()

    return redraw


@pytest.fixture
def in_one_graph():
    """torch.compile that raises where Python would look at a value, and that remembers no other test: the compiler
    counts recompilations by function, and all checked functions are one to it."""
    torch._dynamo.reset()

    def compiled(function, **options):
        return torch.compile(function, fullgraph=True, backend="eager", **options)

    yield compiled
    torch._dynamo.reset()
