"""The commands that read checkpoints: inspect, rank, plan."""

from __future__ import annotations

import argparse
import math
from typing import Any

from torch import Tensor

from lnprune.checkpoints import measurements
from lnprune.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lnprune.checkpoints.choice import Choice, Chosen, choose
from lnprune.checkpoints.expert_names import fused_experts
from lnprune.checkpoints.measurements import Measurements
from lnprune.checkpoints.measuring import measured
from lnprune.checkpoints.safetensors_file import read_header
from lnprune.checkpoints.stored import StoredTensor
from lnprune.checkpoints.streaming import bytes_of
from lnprune.commands import options, output
from lnprune.plans import fields, plan_file
from lnprune.plans.plan import Plan
from lnprune.steps.batches import rankings_of


def inspect(given: argparse.Namespace) -> int:
    """Says which tensors a checkpoint has, and what is a channel of each."""
    checkpoint = open_checkpoint(given.checkpoint)
    choice = choose(checkpoint, **options.choice(given), may_be_empty=True)
    chosen = {each.tensor: each for each in choice.chosen}
    if given.json:
        tensors = [_document(each, chosen.get(each), choice) for each in checkpoint.tensors]
        output.say_json({"checkpoint": checkpoint.path, "files": checkpoint.files, "tensors": tensors})
        return 0
    shown = [each for each in checkpoint.tensors if given.all or each in chosen]
    columns = dict.fromkeys(("tensor", "dtype"), "left")
    columns |= dict.fromkeys(("shape", "dim", "channels"), "right") | {"why": "left"}
    output.say(
        output.table(
            columns, [_cells(each, chosen.get(each), choice) for each in shown], _title(checkpoint, choice)
        )
    )
    doubtful = sum(each.is_doubtful for each in choice.chosen)
    if doubtful and not given.quiet:
        output.warn(
            f"{doubtful} dims are assumed (?): nothing in the file proves them; --dim 'PATTERN=N' says it"
        )
    return 0


def _title(checkpoint: Checkpoint, choice: Choice) -> str:
    files = f"{len(checkpoint.files)} files" if len(checkpoint.files) > 1 else "1 file"
    return (
        f"{checkpoint.path}: {files}, {output.size(checkpoint.size)}, {len(checkpoint.tensors)} tensors, "
        f"{len(choice.chosen)} taken"
    )


def _cells(tensor: StoredTensor, chosen: Chosen | None, choice: Choice) -> list[str]:
    names = " = ".join(tensor.names)
    if chosen is None:
        return [names, tensor.dtype, output.shape(tensor.shape), "", "", choice.left[tensor]]
    count = str(chosen.row.channels)
    if chosen.batch is not None:
        count = f"{rankings_of(chosen.batch)} x {count}"
    dim = f"{chosen.dim}{'?' * chosen.is_doubtful}"
    return [names, tensor.dtype, output.shape(tensor.shape), dim, count, chosen.why]


def _document(tensor: StoredTensor, chosen: Chosen | None, choice: Choice) -> dict[str, Any]:
    found = {
        "names": list(tensor.names),
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "file": tensor.file,
        "is_taken": chosen is not None,
        "why": choice.left[tensor] if chosen is None else chosen.why,
    }
    if chosen is not None:
        found |= {"dim": chosen.dim, "channels": chosen.row.channels, "is_doubtful": chosen.is_doubtful}
        if chosen.batch is not None:
            found["batch"] = {"dim": chosen.batch.dim, "size": chosen.batch.size}
    return found


def measure(given: argparse.Namespace, checkpoint: Checkpoint) -> Measurements:
    """The norms of a checkpoint's channels, with a bar."""
    choice = choose(checkpoint, **options.choice(given))
    doubtful = [each for each in choice.chosen if each.is_doubtful]
    if doubtful and not given.quiet:
        output.warn(
            f"{len(doubtful)} of {len(choice.chosen)} dims are assumed, that of {doubtful[0].row.name} for "
            "one: lnprune inspect shows them, --dim 'PATTERN=N' says it"
        )
    scale, elements = (
        None if path is None else vectors(path) for path in (given.scale, given.element_scale)
    )
    total = bytes_of([each.tensor for each in choice.chosen])
    n = 2 if given.order is None else given.order
    with output.progress("rank", total, not (given.quiet or given.no_progress)) as done:
        return measured(checkpoint, choice, n, scale, elements, done)


def vectors(path: str) -> dict[str, Tensor]:
    """The tensors of a small file."""
    read_header(path)
    from safetensors.torch import load_file

    return load_file(path)


def rank(given: argparse.Namespace) -> int:
    """Measures the norms, prints what they are like, and keeps them."""
    checkpoint = open_checkpoint(given.checkpoint)
    found = measure(given, checkpoint)
    if given.save is not None:
        measurements.save(found, given.save)
    if given.plot is not None:
        found.ranking().select(0.0).plot(given.plot)
    rows = []
    for name, norms in found.ranking().norms.items():
        ordered = norms.sort().values
        ends = [ordered[i].item() if len(ordered) else math.nan for i in (0, len(ordered) // 2, -1)]
        rows.append((name, len(norms), *ends, int((norms == 0).sum())))
    heads = "tensor", "channels", "smallest", "median", "largest", "zero"
    if given.json:
        tensors = [dict(zip(heads, map(fields.plain, row), strict=True)) for row in rows]
        output.say_json({"checkpoint": checkpoint.path, "n": fields.plain(found.n), "tensors": tensors})
    elif not given.quiet:
        cells = [[f"{each:.4g}" if isinstance(each, float) else str(each) for each in row] for row in rows]
        columns = {head: "left" if head == "tensor" else "right" for head in heads}
        output.say(output.table(columns, cells, f"norms of order {found.n} of {checkpoint.path}"))
    _say_files(given, given.save, given.plot)
    return 0


def plan(given: argparse.Namespace) -> int:
    """Chooses channels, and keeps the choice."""
    made = make_plan(given)
    fused = None
    if given.fused_experts:
        fused = fused_experts(plan_file.parsed(made.to_dict(), given.checkpoint))
    if given.plot is not None:
        made.plot(given.plot)
    if given.output is not None:
        plan_file.write(given.output, made.to_dict() if fused is None else plan_file.document(*fused))
    show_plan(given, made)
    _say_files(given, given.output, given.plot)
    return 0


def make_plan(given: argparse.Namespace) -> Plan:
    """The plan of a checkpoint or of a ranking that is kept."""
    if not measurements.is_ranking(given.checkpoint):
        return (
            measure(given, open_checkpoint(given.checkpoint)).ranking().select(**options.selection(given))
        )
    found = measurements.load(given.checkpoint)
    is_same_order = given.order in (None, found.n)
    given.order = None
    if options.is_choice(given) or not is_same_order:
        raise ValueError(
            f"{given.checkpoint}: is a ranking, of norms of order {found.n}: which tensors, which dims and "
            "which order are said to rank"
        )
    return found.ranking().select(**options.selection(given))


def show_plan(given: argparse.Namespace, made: Plan) -> None:
    """Prints a plan."""
    if given.json:
        document = made.to_dict()
        for values in document["parameters"]:
            del values["pruned"]  # thousands of numbers, which the plan's file has
        output.say_json(document)
    elif not given.quiet:
        text = str(made)
        if "\n" not in text:
            raise ImportError(output.NEEDS_RICH)
        output.say(text)


def _say_files(given: argparse.Namespace, *paths: str | None) -> None:
    for path in paths:
        if path is not None and not given.json:
            output.say(path)
