"""Which groups of channels a caller means: include and exclude, by what makes the channels."""

from __future__ import annotations

from torch import nn

from lnprune.modules.finding import Choice, Found, Patterns
from lnprune.removal.groups import Group, Refused, refusals


def chosen(
    model: nn.Module, groups: list[Group], refused: list[Refused], include: Patterns, exclude: Patterns
) -> tuple[list[Group], list[Refused]]:
    """The groups that are meant, and the others as refused."""
    included, excluded = Choice(include, "include"), Choice(exclude, "exclude")
    modules = dict(model.named_modules())

    def found(name: str) -> Found:
        path, _, attribute = name.rpartition(".")
        return Found(name, modules[path], attribute)

    taken, left_out = [], []
    for group in groups:
        makers = [found(name) for name in group.makers]
        out = [each for each in makers if excluded.match(each) is not None]
        inside = [each for each in makers if included.match(each) is not None]
        if out:
            left_out += refusals(group, f"is excluded with `{out[0].name}`")
        elif included.patterns and not inside:
            left_out += refusals(group, "is not included")
        else:
            taken.append(group)
    hit = set(included.matched)
    others = [(found(each.parameter), each.reason) for each in refused]
    for entry, reason in others:
        before = set(included.matched)
        included.match(entry)
        excluded.match(entry)
        new = included.matched - before - hit
        if new:
            raise ValueError(f"include: the channels of {entry.name} cannot go: {reason}")
    known = [found(name) for group in groups for name in group.makers] + [entry for entry, _ in others]
    included.check_all_matched(model, known)
    excluded.check_all_matched(model, known)
    return taken, left_out
