"""The running state of a fine-tuning: what learns, the optimizer, the step, the random state; and its log.

Both are files that a `kill -9` cannot spoil: the state is renamed into its place when it is complete, and the log is
cut back to the state's step when a run goes on.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..training import save_atomically
from .distributed import copy_into, whole

STATE, LOG = "state.pt", "log.jsonl"


def load_state(folder: Path, identity: dict) -> dict[str, Any] | None:
    """The running state in `folder`, its tensors on the CPU; None where there is none.

    Raises:
        ValueError: it cannot be read, or it is of another run: other plan, data or model.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        there = state["identity"]
    except Exception as error:  # torch.load meets a foreign file with exceptions of every kind
        raise ValueError(
            f"{path} is no running state of a fine-tuning ({error}): delete it, or name another"
        ) from error
    different = [
        f"{key} {there.get(key)} there, {value} here" for key, value in identity.items() if there.get(key) != value
    ]
    if different:
        raise ValueError(f"{path} is of another run: {'; '.join(different)}. Give another folder, or delete it")
    return state


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Put the running state into the place of the one before, atomically."""
    save_atomically(state, folder / STATE)


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's moments now, by a step of rate 0 on gradients of 0: a batch that fits then fits later."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        state["step"] = state["step"].zero_() if isinstance(state["step"], Tensor) else 0


def capture(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None, *, keep: bool
) -> dict[str, Any]:
    """Weights, and moments if an optimizer is given, by the parameters' names, whole and on the CPU.

    `keep` says whether this process needs them. All must call it, since what is divided among them is collected.
    """
    state: dict[str, Any] = {"weights": {n: whole(p.data, keep=keep) for n, p in parameters.items()}, "optimizer": {}}
    for name, parameter in parameters.items() if optimizer is not None else ():
        state["optimizer"][name] = {
            key: whole(value, keep=keep) if isinstance(value, Tensor) else value
            for key, value in optimizer.state[parameter].items()
        }
    return state


def restore(state: dict[str, Any], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Undoes `capture`, also for another number of processes."""
    for name, parameter in parameters.items():
        copy_into(parameter.data, state["weights"][name])
        own = optimizer.state[parameter]
        for key, value in state["optimizer"].get(name, {}).items():
            if isinstance(own[key], Tensor):
                copy_into(own[key], torch.as_tensor(value))
            else:
                own[key] = int(value)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch's generators: the CPU's and, on a GPU, that one's."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Undoes `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def frozen_fingerprint(model: nn.Module) -> int:
    """Of 16 values of every frozen parameter: another base model, or another order of training, gives another one."""
    samples = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            samples.append(flat[:: max(1, len(flat) // 16)][:16].float())
    return zlib.crc32(torch.cat(samples).cpu().numpy().tobytes()) if samples else 0


class Log:
    """A file of JSON objects, one a line: `{"step": 1, "loss": 5.99, ...}` for every step."""

    def __init__(self, folder: Path, *, after: int):
        """Opens `folder`'s log for the steps behind `after`; lines of later steps are taken out first."""
        self.path = folder / LOG
        kept = [line for line in read_log(folder) if line["step"] <= after]
        beside = self.path.with_suffix(".part")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        beside.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, lines: Iterable[dict]) -> None:
        """Append, so that it outlives this process."""
        self._file.writelines(json.dumps(line) + "\n" for line in lines)
        self._file.flush()

    def sync(self) -> None:
        """Hand to the disk, so that it outlives a loss of power: the log must not end before the state."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more lines will follow."""
        self._file.close()


def read_log(folder: Path | str) -> list[dict]:
    """The steps that the log in `folder` holds, in order; a last line that was cut off is left out."""
    path, lines = Path(folder) / LOG, []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines
