"""Weight maps between this package and others, written as tables of names that can be read.

A table's key is our name and its value theirs. `{i}` runs over the layers, `*` stands for weight and bias, and a
tuple on their side says that we keep those tensors fused in one, stacked along the first axis.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

State = dict[str, torch.Tensor]


def take_prefix(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    """The entries whose name starts with `prefix`, without it. Raises ValueError when there are none."""
    taken = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not taken:
        raise ValueError(f"none of the {len(state)} names starts with {prefix!r}: is this another model's checkpoint?")
    return taken


def add_prefix(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    """The same entries, with `prefix` before every name."""
    return {prefix + name: tensor for name, tensor in state.items()}


@dataclass(frozen=True)
class WeightMap:
    """A table of names (see the module's docstring) that converts whole state dicts in both directions.

    Both methods raise ValueError that lists the names which are missing or not understood: nothing is dropped.
    """

    names: Mapping[str, str | tuple[str, ...]]

    def from_theirs(self, state: Mapping[str, torch.Tensor]) -> State:
        """Their state dict -> ours."""
        pairs = list(self._pairs(state, theirs=True))
        _compare(state, {name for _, theirs in pairs for name in theirs})
        return {ours: _fuse([state[name] for name in theirs]) for ours, theirs in pairs}

    def to_theirs(self, state: Mapping[str, torch.Tensor]) -> State:
        """Our state dict -> theirs."""
        pairs = list(self._pairs(state, theirs=False))
        _compare(state, {ours for ours, _ in pairs})
        return {name: part for ours, theirs in pairs
                for name, part in zip(theirs, _split(state[ours], len(theirs)), strict=True)}  # fmt: skip

    def _pairs(self, state: Mapping[str, torch.Tensor], *, theirs: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
        layers = self._layers(state, theirs=theirs)
        for ours, names in self.names.items():
            names = (names,) if isinstance(names, str) else names
            for i in range(layers) if "{i}" in ours else (0,):
                for kind in ("weight", "bias") if "*" in ours else ("",):
                    fill = [name.replace("{i}", str(i)).replace("*", kind) for name in (ours, *names)]
                    yield fill[0], tuple(fill[1:])

    def _layers(self, state: Mapping[str, torch.Tensor], *, theirs: bool) -> int:
        layered = next((item for item in self.names.items() if "{i}" in item[0]), None)
        if layered is None:
            return 0
        name = layered[0] if not theirs else layered[1] if isinstance(layered[1], str) else layered[1][0]
        before = re.escape(name.split("{i}")[0])
        return 1 + max((int(found[1]) for key in state if (found := re.match(before + r"(\d+)\.", key))), default=-1)


def _fuse(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _split(tensor: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    return tensor.chunk(parts) if parts > 1 else (tensor,)


def _compare(state: Mapping[str, torch.Tensor], expected: set[str]) -> None:
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unknown:
        raise ValueError(
            f"{len(missing)} weights are missing (first: {missing[:3]}) and {len(unknown)} are unknown "
            f"(first: {unknown[:3]}): is this another architecture, or is there a prefix to take off?"
        )
