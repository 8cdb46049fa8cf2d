"""The words and options of the command line."""

from __future__ import annotations

import argparse
from typing import Any

from lnprune import __version__
from lnprune.plans.selection import LEAST, WORDS

DESCRIPTION = """Prunes the channels of checkpoints on disk, without the code of their models and without
holding them in memory. A checkpoint (CKPT) is a file (.safetensors, or a state dict: .pt, .pth, .bin),
an index of several files (*.index.json), or a folder with one or the other. Only compact runs a model:
that of a folder of transformers."""
EXIT_CODES = """exit codes: 0 done; 1 failed; 2 usage; 3 a checkpoint or plan that cannot be used; 4 a
target that is not written to; 130 and 143 interrupted. With LNPRUNE_DEBUG=1 errors show their origin."""


def amount(text: str) -> int | float:
    """A count, "3", or a share, "0.3"."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def order(text: str) -> int | float | str:
    """The order of a norm: a number, "inf", "-inf", "fro" or "nuc"."""
    return text if text in ("fro", "nuc") else amount(text)


def dim(text: str) -> tuple[str | None, int | str]:
    """A dim, "out", "in" or "0", for all tensors, or behind "PATTERN=" for some."""
    pattern, equals, value = text.rpartition("=")
    if value not in ("out", "in"):
        try:
            return pattern if equals else None, int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected out, in, a number, or PATTERN=..., got {text!r}"
            ) from None
    return pattern if equals else None, value


def batch_dim(text: str) -> tuple[str, int]:
    """A dim for the tensors of a pattern: "PATTERN=0"."""
    pattern, value = dim(text)
    if pattern is None or isinstance(value, str):
        raise argparse.ArgumentTypeError(f"expected PATTERN=NUMBER, got {text!r}")
    return pattern, value


def parser() -> argparse.ArgumentParser:
    """All commands, each with its options."""
    top = argparse.ArgumentParser("lnprune", description=DESCRIPTION, epilog=EXIT_CODES, allow_abbrev=False)
    version = f"lnprune {__version__}"
    top.add_argument("--version", action="version", version=version)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    found = _command(
        commands, "info", "what is installed, what runs, and whether it computes the right thing"
    )
    found.add_argument("--no-test", action="store_true", help="leave out the test on each device")

    found = _command(commands, "inspect", "the tensors of a checkpoint, and where their channels are")
    found.add_argument("checkpoint", metavar="CKPT")
    _add_choice(found)
    found.add_argument("--all", action="store_true", help="also the tensors that are left alone, and why")

    found = _command(commands, "rank", "measure the norm of every channel")
    found.add_argument("checkpoint", metavar="CKPT")
    _add_choice(found)
    _add_order(found)
    found.add_argument("--save", metavar="FILE", help="keep the norms, for plan: ranking.safetensors, say")
    found.add_argument("--plot", metavar="FILE", help="a picture of the norms (png, pdf, svg)")

    found = _command(commands, "plan", "choose the channels to prune; changes no weights")
    found.add_argument("checkpoint", metavar="CKPT|RANKING", help="a checkpoint, or what rank saved")
    _add_choice(found)
    _add_order(found)
    _add_selection(found, is_required=True)
    found.add_argument("-o", "--output", metavar="FILE", help="the plan, as JSON")
    found.add_argument("--plot", metavar="FILE", help="a picture of the plan (png, pdf, svg)")
    found.add_argument(
        "--fused-experts",
        action="store_true",
        help="name experts as transformers holds them: all of a layer in one parameter",
    )

    found = _command(commands, "prune", "write a checkpoint with zeros in the channels that go")
    found.add_argument("checkpoint", metavar="CKPT")
    found.add_argument("--plan", metavar="FILE", help="a plan, of this checkpoint or of its model")
    _add_choice(found)
    _add_order(found)
    _add_selection(found, is_required=False)
    group = found.add_argument_group("where to")
    group.add_argument("-o", "--output", metavar="OUT", help="a file for a file, a folder for a folder")
    group.add_argument("--in-place", action="store_true", help="replace the checkpoint itself")
    group.add_argument("--force", action="store_true", help="replace OUT where it is there")
    group.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    found.add_argument("--bias", action="store_true", help="also the biases of output channels that go")

    found = _command(commands, "verify", "look whether all that a plan prunes is zero")
    found.add_argument("checkpoint", metavar="CKPT")
    found.add_argument("--plan", metavar="FILE", required=True, help="the plan")
    found.add_argument("--bias", action="store_true", help="also the biases of output channels that go")

    found = _command(
        commands,
        "compact",
        "write a smaller folder of transformers, without the channels, heads and experts that go",
    )
    found.add_argument("folder", metavar="FOLDER", help="what from_pretrained loads")
    found.add_argument("-o", "--output", required=True, metavar="OUT", help="a new folder, for the same")
    group = found.add_argument_group("how much of every layer, as a share (0.3) or a count (3)")
    for name, what in (
        ("amount", "intermediate channels of MLPs and experts"),
        ("heads", "attention heads, with the keys and values that they share"),
        ("experts", "whole experts"),
    ):
        default = 0 if name == "amount" else None
        group.add_argument(f"--{name}", type=amount, metavar="A", default=default, help=what)
    group.add_argument(
        "--multiple-of", type=int, default=1, metavar="N", help="keep a multiple of N channels"
    )
    _add_order(found)
    found.add_argument(
        "--importance-scores",
        metavar="FILE",
        help="a safetensors file with tensors to measure in place of weights, by their names",
    )
    found.add_argument(
        "--custom-code",
        action="store_true",
        help="where no config says that heads are gone, write code that from_pretrained trusts if told to",
    )
    found.add_argument("--force", action="store_true", help="replace OUT where it is there")
    found.add_argument(
        "--no-verify",
        action="store_true",
        help="leave out the comparison with two copies in float64",
    )
    return top


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    found: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EXIT_CODES, allow_abbrev=False
    )
    found.add_argument("--json", action="store_true", help="print JSON")
    found.add_argument(
        "-q", "--quiet", action="store_true", help="print results alone: no notes, no tables"
    )
    found.add_argument("--no-progress", action="store_true", help="no bar, also on a terminal")
    found.add_argument("--threads", type=_positive, metavar="N", help="use so many threads")
    return found


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def _add_choice(found: argparse.ArgumentParser) -> None:
    group = found.add_argument_group("which tensors")
    group.add_argument(
        "--include", action="append", metavar="P", help="only tensors of this pattern (again for more)"
    )
    group.add_argument("--exclude", action="append", metavar="P", help="no tensors of this pattern")
    group.add_argument(
        "--dim",
        action="append",
        type=dim,
        default=[],
        metavar="out|in|N|P=N",
        help="the dim of the channels, for all or for the tensors of a pattern (default: out)",
    )
    group.add_argument(
        "--batch-dim",
        action="append",
        type=batch_dim,
        default=[],
        metavar="P=N",
        help="the dim along which tensors hold many matrices, as those of experts",
    )


def _add_order(found: argparse.ArgumentParser) -> None:
    found.add_argument("-n", "--order", type=order, metavar="N", help="the order of the norm (default: 2)")
    for name, what in (("--scale", "norms of channels"), ("--element-scale", "elements")):
        text = f"a safetensors file with vectors, by names of tensors, that {what} are multiplied by"
        found.add_argument(name, metavar="FILE", help=text)


def _add_selection(found: argparse.ArgumentParser, is_required: bool) -> None:
    group = found.add_argument_group("how many channels")
    group.add_argument(
        "--amount",
        type=amount,
        required=is_required,
        metavar="A",
        help="a share (0.3) or a count (3), of each tensor or, with --scope global, of all",
    )
    for name, words in WORDS.items():
        group.add_argument(f"--{name}", choices=words, help=f"as in Ranking.select (default: {words[0]})")
    for name in LEAST:
        group.add_argument(
            f"--{name.replace('_', '-')}", type=int, metavar="N", help="as in Ranking.select"
        )
    group.add_argument("--uniform", choices=["kind"], help="as in Ranking.select")


def selection(given: argparse.Namespace) -> dict[str, Any]:
    """The arguments of Ranking.select."""
    names = ("amount", *WORDS, *LEAST, "uniform")
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


def is_choice(given: argparse.Namespace) -> bool:
    """Whether any option says which tensors, dims or norms."""
    return bool(given.dim or given.batch_dim or given.include or given.exclude or given.order is not None)


def choice(given: argparse.Namespace) -> dict[str, Any]:
    """The arguments of choose, the checkpoint aside."""
    whole = [value for pattern, value in given.dim if pattern is None]
    some = {pattern: value for pattern, value in given.dim if pattern is not None}
    if len(whole) > 1:
        raise ValueError(f"--dim: expected one for all tensors, got {', '.join(map(str, whole))}")
    return {
        "dim": {**({"*": whole[0]} if whole else {}), **some} if some else (whole[0] if whole else "out"),
        "batch_dim": dict(given.batch_dim),
        "include": given.include,
        "exclude": given.exclude,
    }
