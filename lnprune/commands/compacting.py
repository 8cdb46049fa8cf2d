"""The command about models that get smaller: compact writes a folder of transformers from another."""

from __future__ import annotations

import argparse

from lnprune.commands import output
from lnprune.commands.reading import vectors


def compact(given: argparse.Namespace) -> int:
    """Writes a smaller folder, and says what changed."""
    from lnprune.integrations.transformers import prune_pretrained

    scores, scale, elements = (
        None if path is None else vectors(path)
        for path in (given.importance_scores, given.scale, given.element_scale)
    )
    made = prune_pretrained(
        given.folder,
        given.output,
        given.amount,
        n=2 if given.order is None else given.order,
        heads=given.heads,
        experts=given.experts,
        multiple_of=given.multiple_of,
        importance_scores=scores,
        scale=scale,
        element_scale=elements,
        custom_code=given.custom_code,
        force=given.force,
        verify=not given.no_verify,
    )
    if given.json:
        output.say_json(
            {
                "folder": given.folder,
                "output": made.path,
                "config": {key: {"before": old, "after": new} for key, (old, new) in made.numbers.items()},
                "parameters": dict(zip(("before", "after"), made.parameters, strict=True)),
                "bytes": dict(zip(("before", "after"), made.size, strict=True)),
                "difference": made.difference,
            }
        )
        return 0
    if not given.quiet:
        for key, (old, new) in made.numbers.items():
            output.say(f"{key}: {'default' if old is None else old} -> {new}")
        output.say("parameters: {:,} -> {:,}".format(*made.parameters))
        output.say(f"weights: {' -> '.join(map(output.size, made.size))}")
        if made.difference is not None:
            output.say(
                "compared in float64 with zeros in place of what went: the largest difference is "
                f"{made.difference:.1g} of the largest output"
            )
    output.say(made.path)
    return 0
