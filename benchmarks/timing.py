"""Times of two ways to the same answer, taken in turn so that both see the same machine."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """Median milliseconds of the course's code and of a peer's."""

    name: str
    peer: str
    ours_ms: float
    peer_ms: float

    @property
    def ratio(self) -> float:
        """Ours over the peer's: below 1 ours is the faster."""
        return self.ours_ms / self.peer_ms

    def __str__(self) -> str:
        return f"{self.name:<10}{self.ours_ms:>10.1f} ms {self.peer_ms:>10.1f} ms {self.ratio:>7.2f}   {self.peer}"


def compare(name: str, peer: str, ours: Callable, theirs: Callable, *, rounds: int = 9, warm_up: int = 2) -> Ratio:
    """Run both in turn; warm-up rounds are not counted."""
    times: dict[Callable, list[float]] = {ours: [], theirs: []}
    for round_ in range(warm_up + rounds):
        for run in (ours, theirs) if round_ % 2 else (theirs, ours):
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if round_ >= warm_up:
                times[run].append(time.perf_counter() - start)
    return Ratio(name, peer, 1e3 * statistics.median(times[ours]), 1e3 * statistics.median(times[theirs]))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
