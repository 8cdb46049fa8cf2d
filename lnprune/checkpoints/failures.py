"""What can be wrong with files: errors that name the file, and say what to do."""

from __future__ import annotations


class UnusableCheckpoint(ValueError):
    """A checkpoint that cannot be read, or that is not what its headers say."""


class RefusedTarget(ValueError):
    """A place that is not written to. Nothing is changed."""
