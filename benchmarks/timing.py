"""Interleaved timing, in another order each round, so that a noisy machine is noisy for all peers."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
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


def _batch(peer: Peer, size: int) -> float:
    """Seconds per call; inputs are made before, and results dropped after, the clock runs."""
    inputs = [peer.prepare() for _ in range(size)]
    results = []
    start = time.perf_counter_ns()
    for value in inputs:
        results.append(peer.run(value))
    return (time.perf_counter_ns() - start) * 1e-9 / size


def interleaved(peers: dict[str, Peer], budget: float, warm: Callable[[], Any]) -> Timing:
    """Times the peers in turn until ``budget`` seconds are spent, for at least three rounds.

    ``warm`` runs before each, untimed: it reads what they all read, so that what the peer before left in
    the caches matters to none.
    """
    gc.collect()
    gc.disable()
    try:
        sizes = {}
        for name, peer in peers.items():
            seconds = _batch(peer, 1)
            if seconds < 0.01:  # the first call of a small case is mostly first-time costs
                seconds = min(_batch(peer, 1) for _ in range(3))
            sizes[name] = max(1, min(_LONGEST_BATCH, round(_BATCH_SECONDS / seconds)))
        timing = Timing({name: [] for name in peers})
        names = list(peers)
        order = random.Random(0)
        end = time.perf_counter() + budget
        for index in range(_MOST_ROUNDS):
            if index >= _FEWEST_ROUNDS and time.perf_counter() > end:
                break
            order.shuffle(names)
            for name in names:
                warm()
                timing.rounds[name].append(_batch(peers[name], sizes[name]))
        return timing
    finally:
        gc.enable()


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
