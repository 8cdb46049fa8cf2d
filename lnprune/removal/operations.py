"""All operations that are known: the table with every rule in it, and its list for the documentation."""

from __future__ import annotations

from lnprune.removal import indexing, movement, pointwise, products, reductions
from lnprune.removal.rules import RULES, Rule

__all__ = ["RULES", "Rule", "indexing", "listed", "movement", "pointwise", "products", "reductions"]


def listed() -> str:
    """The table as Markdown, one line for each thing that rules say."""
    names: dict[str, list[str]] = {}
    for name, rule in RULES.items():
        names.setdefault(rule.says, []).append(f"`{name}`")
    lines = ["| operations | what happens to the labels |", "|---|---|"]
    lines += [f"| {', '.join(sorted(each))} | {says} |" for says, each in names.items()]
    return "\n".join(lines)
