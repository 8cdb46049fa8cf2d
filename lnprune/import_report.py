"""What the command line says where the package cannot be imported; needs nothing but Python."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from typing import Any

# What a report names, whether it is installed or not.
PACKAGES = ("lnprune", "torch", "safetensors", "rich", "matplotlib", "transformers")


class reporting:
    """Inside, what cannot be imported ends the command line with a report; elsewhere it is raised."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and is_command_line(sys.orig_argv):
            report(error, sys.argv[1:])
            sys.stdout.flush()
            raise SystemExit(1) from None


def is_command_line(argv: list[str]) -> bool:
    """Whether a process that was started so is this package's command line."""
    for i, word in enumerate(argv[1:], 1):
        if word == "-m":
            return argv[i + 1 : i + 2] == ["lnprune"]
        if not word.startswith("-"):
            return os.path.basename(word) == "lnprune"
    return False


def installed() -> dict[str, str | None]:
    """The version of Python and of each package; None where it is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def report(error: Exception, words: list[str]) -> None:
    """Says what is installed, where `info` was asked for; and always why nothing runs."""
    why = f"import lnprune fails: {type(error).__name__}: {' '.join(str(error).split())}"
    if "info" not in words:
        print(f"lnprune: {why}", file=sys.stderr)
    elif "--json" in words:
        print(json.dumps({"installed": installed(), "works": False, "error": why}, indent=1))
    else:
        for name, version in installed().items():
            print(f"{name:<16}{version or 'not installed'}")
        print(f"{'works':<16}no: {why}")
