"""Times of several ways to the same answer, taken in turn so that all of them see the same machine."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import psutil
import torch


@dataclass(frozen=True)
class Row:
    """One line of the table: milliseconds of the course's code and of the peer's, and what was asked of their ratio.

    `low` and `high` bound the middle half of the ratios of the single rounds: a wide range is a restless machine.
    """

    name: str
    peer: str
    ours_ms: float
    peer_ms: float
    asked: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def ratio(self) -> float:
        """Ours over the peer's: below 1 ours is the faster."""
        return self.ours_ms / self.peer_ms

    @property
    def verdict(self) -> str:
        """What the ratio means for what was asked; empty when nothing was."""
        return "" if self.asked is None else "pass" if self.ratio <= self.asked else "FAIL"

    def as_json(self) -> dict:
        """Every field, the ratio and the verdict."""
        return {**asdict(self), "ratio": self.ratio, "verdict": self.verdict}

    def __str__(self) -> str:
        asked = "" if self.asked is None else f"{self.asked:.2f}"
        spread = "" if self.low is None else f"{self.low:.2f}-{self.high:.2f}"
        numbers = f"{self.ours_ms:>10.2f} {self.peer_ms:>10.2f} {self.ratio:>6.2f} {spread:>10}"
        return f"{self.name:<16}{numbers} {asked:>6} {self.verdict:<5} {self.peer}"


HEADER = f"{'':<16}{'course ms':>10} {'peer ms':>10} {'ratio':>6} {'by pair':>10} {'asked':>6} {'':<5} peer"


def in_turn(runs: dict[str, Callable[[], object]], pairs: int, *, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every run in each of `pairs` rounds. All run in every round, the order turned round each time."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(warm_up + pairs):
        for name in sorted(runs, reverse=bool(round_ % 2)):
            _wait()
            start = time.perf_counter()
            runs[name]()
            _wait()
            if round_ >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def beside(name: str, ours: list[float], peers: dict[str, list[float]], *, asked: float | None = None) -> Row:
    """The row of `ours` beside the fastest peer: ratio of the medians, and quartiles of the ratio round by round."""
    peer = min(peers, key=lambda name: statistics.median(peers[name]))
    ratios = [mine / theirs for mine, theirs in zip(ours, peers[peer], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    mine, theirs = (1e3 * statistics.median(seconds) for seconds in (ours, peers[peer]))
    return Row(name, peer, mine, theirs, asked, low, high)


def load() -> float:
    """Processes that wait for a core or have one, on average over the last minute."""
    return psutil.getloadavg()[0]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
