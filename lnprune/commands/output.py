"""What commands print: tables and JSON on stdout, progress on stderr where that is a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Progress = Callable[[int], None]  # told of bytes that are done
NEEDS_RICH = 'tables need rich, which the extra "cli" brings: pip install "lnprune[cli]", or use --json'


def printable(text: str) -> str:
    """The text with what is no character of a line spelled out: names in files may hold anything."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode()
        for each in text
    )


def say(text: str) -> None:
    """A line, or several, on stdout."""
    sys.stdout.write(printable(text) + "\n")


def say_json(value: Any) -> None:
    """A document on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def warn(text: str) -> None:
    """A line on stderr."""
    print(printable(text).replace("\n", " "), file=sys.stderr)


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def table(columns: Mapping[str, str], rows: Sequence[Sequence[str]], title: str) -> str:
    """Lines of a table, as wide as its content.

    Args:
        columns: the heads, each with how it is aligned: ``"left"`` or ``"right"``.
        rows: the cells.
        title: a line above.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError(NEEDS_RICH) from error
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for head, side in columns.items():
        drawn.add_column(head, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        drawn.add_row(*map(printable, row))
    console = Console(file=io.StringIO(), width=10_000, color_system=None, markup=False, emoji=False)
    console.print(drawn)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


@contextlib.contextmanager
def progress(what: str, total: int, wanted: bool) -> Iterator[Progress]:
    """A bar of so many bytes for the time of the block, where somebody looks at it."""
    if not wanted or not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bars
    except ImportError:
        yield lambda _: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda count: bars.advance(task, count)
