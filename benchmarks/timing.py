"""Interleaved timing, in another order each round, so that a noisy machine is noisy for all peers."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Peer:
    """One of the things compared: ``run(prepare())``, of which only ``run`` is timed."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass
class Timing:
    """Seconds per call, one entry per round and peer."""

    rounds: dict[str, list[float]] = field(default_factory=dict)

    def seconds(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, other: str) -> float:
        """Time of ``name`` over time of ``other``: the median of the ratios within each round."""
        pairs = zip(self.rounds[name], self.rounds[other], strict=True)
        return statistics.median(a / b for a, b in pairs)


# A batch is long enough that reading the clock does not count.
_BATCH_SECONDS = 500e-6
_LONGEST_BATCH = 200
_FEWEST_ROUNDS = 3
_MOST_ROUNDS = 200


def _nothing() -> None:
    pass


def batch(peer: Peer, size: int, wait: Callable[[], Any] = _nothing) -> float:
    """Seconds per call; inputs are made before, and results dropped after, the clock runs.

    ``wait`` returns when nothing is under way any more, on devices that work on their own.
    """
    inputs = [peer.prepare() for _ in range(size)]
    results = []
    wait()
    start = time.perf_counter_ns()
    for value in inputs:
        results.append(peer.run(value))
    wait()
    return (time.perf_counter_ns() - start) * 1e-9 / size


def batch_size(peer: Peer, wait: Callable[[], Any] = _nothing) -> int:
    """How many calls make a batch that is long enough; they are warm afterwards."""
    seconds = batch(peer, 1, wait)
    if seconds < 0.01:  # the first call of a small case is mostly first-time costs
        seconds = min(batch(peer, 1, wait) for _ in range(3))
    return max(1, min(_LONGEST_BATCH, round(_BATCH_SECONDS / seconds)))


def turns(names: Iterable[str], budget: float) -> Iterator[str]:
    """The names in rounds, each in another order, until ``budget`` seconds are spent; three at least."""
    names = list(names)
    order = random.Random(0)
    end = time.perf_counter() + budget
    for index in range(_MOST_ROUNDS):
        if index >= _FEWEST_ROUNDS and time.perf_counter() > end:
            break
        order.shuffle(names)
        yield from names


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Inside, no collection of garbage comes between two calls."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleaved(peers: dict[str, Peer], budget: float, warm: Callable[[], Any]) -> Timing:
    """Times the peers in turn until ``budget`` seconds are spent, for at least three rounds.

    ``warm`` runs before each, untimed: it reads what they all read, so that what the peer before left in
    the caches matters to none.
    """
    with without_garbage_collection():
        sizes = {name: batch_size(peer) for name, peer in peers.items()}
        timing = Timing({name: [] for name in peers})
        for name in turns(peers, budget):
            warm()
            timing.rounds[name].append(batch(peers[name], sizes[name]))
        return timing


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
