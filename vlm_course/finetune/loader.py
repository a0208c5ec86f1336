"""Which records a step reads, and reading them while the step before is computed.

A batch follows from the step's number alone, so a run that was interrupted sees what it would have seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..validation import require_count
from .collate import Batch, Collator
from .data import Record, Records


@lru_cache(maxsize=4)
def _order(records: int, epoch: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(records, generator=generator).tolist()


@dataclass(frozen=True)
class Loader:
    """The batch of every step: `loader(step)`. Each record is seen once an epoch, in another order each time.

    Attributes:
        batch: records a step, those of all processes together.
        rank, world: this process reads the rank-th of `world` parts of every batch.
    """

    records: Records | Sequence[Record]
    collator: Collator
    batch: int
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        require_count(self.batch, "batch")
        require_count(self.world, "world")
        if not len(self.records):
            raise ValueError("there are 0 records, expected at least 1")
        if self.batch < self.world:
            raise ValueError(f"a batch of {self.batch} cannot be shared by {self.world} processes: each needs a row")

    def at(self, step: int) -> list[Record]:
        """The records of a step, of this process."""
        start, total = step * self.batch, len(self.records)
        first, last = (start + self.batch * part // self.world for part in (self.rank, self.rank + 1))
        return [self.records[_order(total, place // total, self.seed)[place % total]] for place in range(first, last)]

    def __call__(self, step: int) -> Batch:
        return self.collator(self.at(step))

    def share(self, rank: int, world: int) -> Loader:
        """The loader of one process of several; together they read what this one reads."""
        return replace(self, rank=rank, world=world)

    @property
    def fingerprint(self) -> str:
        """Of what is read in which order: a run goes on only with the same."""
        data = self.records.fingerprint if isinstance(self.records, Records) else len(self.records)
        packed = "packed" if self.collator.pack else "padded"
        return f"{len(self.records)} records ({data}) of at most {self.collator.max_tokens} tokens, {packed}"


def shared(batches: Callable[[int], Batch], rank: int, world: int) -> Callable[[int], Batch]:
    """One process's part of every batch; read by itself where `batches` can share, else cut out of the whole."""
    if world == 1:
        return batches
    if hasattr(batches, "share"):
        return batches.share(rank, world)

    def part(step: int) -> Batch:
        batch = batches(step)
        first, last = (len(batch) * number // world for number in (rank, rank + 1))
        return batch.part(first, last)

    return part


def ahead(batches: Callable[[int], Batch], start: int, stop: int, *, workers: int = 0) -> Iterator[Batch]:
    """`batches(step)` for start <= step < stop, in order; `workers` threads are that many steps ahead.

    With 0 workers a batch is made when it is asked for, which is best where there are no idle cores.
    """
    require_count(workers, "workers", 0)
    if not workers:
        yield from map(batches, range(start, stop))
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for step in range(start, stop):
                waiting.append(pool.submit(batches, step))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
