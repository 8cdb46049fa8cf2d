"""The command line from its words to its exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lnprune.checkpoints.failures import RefusedTarget, UnusableCheckpoint
from lnprune.commands import compacting, info, options, reading, writing
from lnprune.commands.output import warn

DONE, FAILED, USAGE, UNUSABLE, REFUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 4, 130, 143

COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "info": info.info,
    "inspect": reading.inspect,
    "rank": reading.rank,
    "plan": reading.plan,
    "prune": writing.prune,
    "verify": writing.verify,
    "compact": compacting.compact,
}


class Terminated(BaseException):
    """The process was asked to end."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command; its exit code. Without words, those of the process."""
    warnings.simplefilter("ignore")  # stderr is for what the command says
    given = options.parser().parse_args(words)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        if given.threads is not None:
            import torch

            torch.set_num_threads(given.threads)
        code = COMMANDS[given.command](given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read stdout has enough
        os._exit(FAILED)
    except (Exception, KeyboardInterrupt, Terminated) as error:
        if os.environ.get("LNPRUNE_DEBUG") == "1":
            raise
        return _code_of(error)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: Any) -> NoReturn:
    raise Terminated


def _code_of(error: BaseException) -> int:
    """Says what went wrong, and how the process ends."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, Terminated):
        return TERMINATED
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    warn(f"lnprune: {text}")
    if isinstance(error, UnusableCheckpoint):
        return UNUSABLE
    if isinstance(error, RefusedTarget):
        return REFUSED
    # What the options say does not fit the checkpoint.
    return USAGE if isinstance(error, ValueError | TypeError | IndexError) else FAILED
