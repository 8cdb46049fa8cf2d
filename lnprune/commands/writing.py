"""The commands about pruned checkpoints: prune writes one, verify looks at one."""

from __future__ import annotations

import argparse
import math

from lnprune.checkpoints.checkpoint import open_checkpoint
from lnprune.checkpoints.failures import UnusableCheckpoint
from lnprune.checkpoints.pruning import Target
from lnprune.checkpoints.verification import differences
from lnprune.checkpoints.zeros import Job, jobs_of
from lnprune.commands import options, output
from lnprune.commands.reading import measure, show_plan
from lnprune.plans import plan_file
from lnprune.plans.plan_file import SavedPlan


def prune(given: argparse.Namespace) -> int:
    """Writes a checkpoint with zeros, by a plan that was saved or one that is made here."""
    if (given.output is None) is not given.in_place:
        raise ValueError("expected -o OUT, or --in-place, one of them")
    if (given.plan is None) is (given.amount is None):
        raise ValueError("expected --plan FILE, or --amount A, one of them")
    if given.plan is not None and (options.selection(given) or options.is_choice(given)):
        raise ValueError("--plan: says which channels: expected no options of choosing some beside it")
    checkpoint = open_checkpoint(given.checkpoint)
    wanted = not (given.quiet or given.no_progress)
    made = None
    if given.plan is not None:
        saved = _read_plan(given.plan)
    else:
        if given.output is not None:
            Target(checkpoint, [], given.output, given.force)  # before the norms: what can be refused is
        made = measure(given, checkpoint).ranking().select(**options.selection(given))
        saved = plan_file.parsed(made.to_dict(), given.checkpoint)
    target = Target(checkpoint, jobs_of(checkpoint, saved, given.bias), given.output, given.force)
    left = target.left_behind
    if left and not given.quiet:
        output.warn(f"not copied, since it may hold weights that are not pruned: {', '.join(left)}")
    if not given.dry_run:
        with output.progress("prune", target.size, wanted) as done:
            target.write(done)
    if made is not None and not given.json:
        show_plan(given, made)
    channels = sum(len(pruned) for pruned in saved.pruned)
    if given.json:
        output.say_json(
            {
                "checkpoint": checkpoint.path,
                "output": target.path,
                "is_written": not given.dry_run,
                "bytes": target.size,
                "channels_pruned": channels,
            }
        )
    elif not given.dry_run:
        output.say(target.path)
    elif not given.quiet:
        output.say(f"would write {target.path}: {output.size(target.size)}, {channels} channels pruned")
    return 0


def verify(given: argparse.Namespace) -> int:
    """Says whether all that a plan prunes of a checkpoint is +0.0."""
    checkpoint = open_checkpoint(given.checkpoint)
    saved = _read_plan(given.plan)
    jobs: list[Job] = jobs_of(checkpoint, saved, given.bias)
    total = sum(job.tensor.length for job in jobs)
    with output.progress("verify", total, not (given.quiet or given.no_progress)) as done:
        found = differences(checkpoint, jobs, done)
    if given.json:
        output.say_json({"checkpoint": checkpoint.path, "is_pruned": not found, "differences": found})
    else:
        for line in found:
            output.say(line)
        if not found and not given.quiet:
            elements = sum(math.prod(job.tensor.shape) for job in jobs)
            output.say(f"{checkpoint.path}: as the plan says: {len(jobs)} tensors, {elements:,} elements")
    return 1 if found else 0


def _read_plan(path: str) -> SavedPlan:
    try:
        return plan_file.read(path)
    except OSError as error:
        raise UnusableCheckpoint(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UnusableCheckpoint(str(error)) from None
