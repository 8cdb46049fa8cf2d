"""Interleaved timing, in another order each round, so that a noisy machine is noisy for all peers."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any


@dataclass
class Peer:
    """One of the things compared: ``run(prepare())``, of which only ``run`` is timed."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass
class Timing:
    """Seconds per call, one entry per round and peer; page faults likewise, where they were counted."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, list[float]] = field(default_factory=dict)
    settled: bool = True

    def seconds(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratios(self, name: str, other: str) -> list[float]:
        """Time of ``name`` over time of ``other`` within each round."""
        return [a / b for a, b in zip(self.rounds[name], self.rounds[other], strict=True)]

    def ratio(self, name: str, other: str) -> float:
        return statistics.median(self.ratios(name, other))

    def quartiles(self, name: str, other: str) -> tuple[float, float]:
        """The lower and the upper quartile of the ratios."""
        lower, _, upper = statistics.quantiles(self.ratios(name, other), n=4, method="inclusive")
        return lower, upper


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


# The rule by which times have settled: in so many rounds in a row none falls below its lowest so far by
# more than this share.
STEADY_ROUNDS = 2
STEADY_SHARE = 0.05
# Rounds that settle take at most so many times as long as those that count.
_SETTLING_BUDGETS = 10


def settle(measured: Mapping[str, Callable[[], float]], longest: float) -> bool:
    """Measures all in turn until their times settle, for at most about ``longest`` seconds.

    Returns whether they did.
    """
    lowest = dict.fromkeys(measured, math.inf)
    steady = 0
    end = time.perf_counter() + longest
    while steady < STEADY_ROUNDS:
        if time.perf_counter() > end:
            return False
        fell = False
        for name, measure in measured.items():
            seconds = measure()
            fell |= seconds < (1 - STEADY_SHARE) * lowest[name]
            lowest[name] = min(lowest[name], seconds)
        steady = 0 if fell else steady + 1
    return True


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


def page_faults() -> int:
    """Faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def interleaved(
    peers: dict[str, Peer], budget: float, warm: Callable[[], Any], one_by_one: bool = False
) -> Timing:
    """Times the peers in turn, once settled, until ``budget`` seconds are spent, for three rounds at least.

    ``warm`` runs before each, untimed: it reads what they all read, so that what the peer before left in
    the caches matters to none. ``one_by_one``: also before each call of a short one, instead of before
    a batch of calls.
    """
    with without_garbage_collection():
        sizes = {name: 1 if one_by_one else batch_size(peer) for name, peer in peers.items()}

        def run(name: str) -> float:
            warm()
            return batch(peers[name], sizes[name])

        settled = settle({name: partial(run, name) for name in peers}, _SETTLING_BUDGETS * budget)
        timing = Timing({name: [] for name in peers}, {name: [] for name in peers}, settled)
        for name in turns(peers, budget):
            warm()
            faults = page_faults()
            timing.rounds[name].append(batch(peers[name], sizes[name]))
            timing.faults[name].append((page_faults() - faults) / sizes[name])
        return timing


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
