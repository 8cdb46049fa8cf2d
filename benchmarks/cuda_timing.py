"""What is measured on a GPU: device and wall time, a copy to compare with, launches, the peak of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.timing import Peer, Timing, batch, batch_size, turns, without_garbage_collection

# What is read between two runs, in units of the cache: nothing of either is left there, and nothing that
# has yet to be written back.
_EVICTED_CACHES = 4
# How long the GPU is kept busy while a call is launched: the time that launching took before, with room
# to spare, and at most this.
_LONGEST_HEAD_START = 0.1


def _elapsed(run: Callable[[], Any]) -> float:
    """Seconds between two events around what ``run`` launches."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    result = run()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) * 1e-3


class Gpu:
    """The current CUDA device and what it takes to time it."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self._other_data = torch.randn(_EVICTED_CACHES * cache // 4, device="cuda")
        cycles = 10_000_000
        spin = partial(torch.cuda._sleep, cycles)
        self._cycles_per_second = cycles / min(_elapsed(spin) for _ in range(3))

    def head_start(self, peer: Peer) -> float:
        """Seconds that the GPU has to be busy for all of a call to be launched before it begins."""
        seconds = []
        for _ in range(3):
            torch.cuda.synchronize()
            seconds.append(batch(peer, 1))
        return min(2 * min(seconds) + 50e-6, _LONGEST_HEAD_START)

    def device_seconds(self, run: Callable[[], Any], head_start: float) -> float:
        """Seconds on the device, by events, from cold caches and without waiting for launches."""
        self._other_data.sum()
        torch.cuda._sleep(round(head_start * self._cycles_per_second))
        return _elapsed(run)

    def interleaved(self, peers: dict[str, Peer], budget: float) -> tuple[Timing, Timing]:
        """Device time and wall time of the peers in turn, for ``budget`` seconds or at least three rounds.

        Wall time is that of calls one after the other until the device is done with the last.
        """
        wait = torch.cuda.synchronize
        with without_garbage_collection():
            sizes = {name: batch_size(peer, wait) for name, peer in peers.items()}
            head_starts = {name: self.head_start(peer) for name, peer in peers.items()}
            device = Timing({name: [] for name in peers})
            wall = Timing({name: [] for name in peers})
            for name in turns(peers, budget):
                peer = peers[name]
                run = partial(peer.run, peer.prepare())
                device.rounds[name].append(self.device_seconds(run, head_starts[name]))
                wall.rounds[name].append(batch(peer, sizes[name], wait))
            return device, wall

    def copy_seconds(self, size: int, budget: float) -> float:
        """Seconds that a copy of so many bytes takes from one block of the device's memory to another."""
        source = torch.randn(size // 4, device="cuda")
        target = torch.empty_like(source)
        device, _ = self.interleaved({"copy": Peer(lambda _: target.copy_(source))}, budget)
        return device.seconds("copy")


def count_launches(run: Callable[[], Any]) -> dict[str, int]:
    """How many kernels, copies and fills of memory a call puts on the device, by the profiler."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        result = run()
        torch.cuda.synchronize()
    del result
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    copies = sum(name.startswith("Memcpy") for name in names)
    fills = sum(name.startswith("Memset") for name in names)
    return {"kernels": len(names) - copies - fills, "copies": copies, "fills": fills}


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the device's memory at the peak of a call, beyond those held before it."""
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
