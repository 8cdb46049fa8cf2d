"""Ranks: processes that run a test's function together, joined by gloo on the loopback address.

They are started once for each number of ranks, since importing torch takes longest. They are ended by
their ids: after the tests, and when a function raises on a rank or takes too long, so that the next test
does not feel it.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

START_LIMIT = 240  # seconds: torch is imported by all of them at once
CALL_LIMIT = 240
COLLECTIVE_LIMIT = 60  # a rank that waits for another so long raises


class Ranks:
    """So many processes, which wait for functions to run."""

    def __init__(self, count: int):
        self.count = count
        self._workers: list[tuple[Any, Any]] = []
        atexit.register(self.end)

    def run(self, function: Callable[..., Any], *args: Any, limit: float = CALL_LIMIT) -> list[Any]:
        """What the function of a test module returns on each rank, called with the same arguments.

        It is called with the same seed on all ranks. Raises AssertionError with what every rank raised.
        """
        if not self._workers:
            self._start()
        seed = int(torch.randint(2**31, ()))
        for _, connection in self._workers:
            connection.send((function, args, seed))
        return self._answers(limit)

    def _start(self) -> None:
        folder = tempfile.mkdtemp()
        context = multiprocessing.get_context("spawn")
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, self.count, f"{folder}/store", theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self._answers(START_LIMIT)

    def _answers(self, limit: float) -> list[Any]:
        deadline = time.monotonic() + limit
        answers, failures = [], []
        for rank, (_, connection) in enumerate(self._workers):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                failures.append(f"rank {rank}: no answer within {limit} seconds")
                continue
            try:
                is_good, answer = connection.recv()
            except EOFError:
                is_good, answer = False, "its process ended"
            answers.append(answer)
            if not is_good:
                failures.append(f"rank {rank}: {answer}")
        if failures:
            self.end()
            raise AssertionError("\n\n".join(failures))
        return answers

    def end(self) -> None:
        """Ends the processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []


@functools.cache
def ranks(count: int) -> Ranks:
    """The processes of this test run."""
    return Ranks(count)


def _work(rank: int, count: int, store: str, connection: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, count),
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=COLLECTIVE_LIMIT),
    )
    connection.send((True, None))
    while True:
        try:
            function, args, seed = connection.recv()
        except EOFError:
            return
        torch.manual_seed(seed)
        try:
            connection.send((True, function(*args)))
        except BaseException:
            connection.send((False, f"torch.manual_seed({seed})\n{traceback.format_exc()}"))


def raised_by(call: Callable[[], Any]) -> str:
    """The type and the message of what a call raises; an error if it raises nothing."""
    try:
        call()
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")
