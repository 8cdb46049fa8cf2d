"""Channels that go together, on the CPU: finding them against a forward, ranking them against a peer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lnprune
from benchmarks import calls, program, report
from benchmarks.lists import LIST_BUDGETS
from benchmarks.peers import LARGEST_ERROR, torch_pruning
from benchmarks.program import FRESH, RECYCLED, Program, Sections
from benchmarks.report import Row, Verdict
from benchmarks.resnet50 import resnet50
from benchmarks.timing import Peer, interleaved
from benchmarks.vit import vit_b_16

MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-50": resnet50, "ViT-B/16": vit_b_16}
IMAGES = (2, 3, 224, 224)
# What finding the channels may take: so many forwards, and so many seconds besides.
FORWARDS, SECONDS = 4, 0.2
FIRST, AGAIN = "first", "again"
SPEEDUPS = {FIRST: 4, AGAIN: 8}
MEMORY = {RECYCLED: "memory used before", FRESH: "memory as a process starts"}


def time_labels(budget: float) -> list[Row]:
    """Finding the channels without the trial, against a forward; and once with the trial."""
    rows = []
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, images = make(), torch.randn(IMAGES)
        with torch.no_grad():
            peers = {
                "labels": Peer(lambda _, m=model, i=images: lnprune.couple(m, i, check=False)),
                "forward": Peer(lambda _, m=model, i=images: m(i)),
            }
            timing = interleaved(peers, LIST_BUDGETS * budget, partial(calls.read_all, model.parameters()))
        start = time.perf_counter()
        coupling = lnprune.couple(model, images)
        row = {"model": name, "groups": len(coupling.groups)}
        row |= report.timed_columns(timing, over_forward=("labels", "forward"))
        rows.append(row | {"with_trial": time.perf_counter() - start})
        report.show(rows[-1])
    return rows


def fault_of(coupling: lnprune.Coupling, model: nn.Module) -> str | None:
    """What is wrong with a ranking: it is compared with sums in float64, member by member."""
    tensors = dict(model.named_parameters())
    found = coupling.rank(2).norms
    expected = []
    for group in coupling.groups:
        sums = torch.zeros(group.channels, dtype=torch.float64)
        for member in group.members:
            if len(member.shape) > 1:
                flat = tensors[member.name].detach().double().transpose(0, member.dim).flatten(1)
                sums.index_add_(0, member.channels, flat.square().sum(dim=1)[member.slices])
        expected.append(sums.sqrt())
    error = calls.norm_error(
        torch.cat([found[group.name] for group in coupling.groups]), torch.cat(expected)
    )
    return None if error <= LARGEST_ERROR else f"relative error {error:.1e}"


def time_ranking(budget: float) -> list[Row]:
    """The norms of the groups of ResNet-50, against Torch-Pruning's importance of the same groups."""
    if torch_pruning is None:
        print("Torch-Pruning is not installed: left out", flush=True)
        return []
    torch.manual_seed(0)
    model, images = resnet50(), torch.randn(IMAGES)
    head = next(module for module in model.modules() if isinstance(module, nn.Linear))
    graph = torch_pruning.DependencyGraph().build_dependency(model, images)
    theirs = list(graph.get_all_groups(ignored_layers=[head], root_module_types=[nn.Conv2d, nn.Linear]))
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    coupling = lnprune.couple(model, images, check=False)
    fault = fault_of(coupling, model)
    if len(theirs) != len(coupling.groups):
        fault = f"{len(coupling.groups)} groups, the peer has {len(theirs)}"

    def new() -> lnprune.Coupling:
        return lnprune.Coupling(model, coupling.groups, coupling.refused)

    def importances(_: Any) -> list[Tensor]:
        return [importance(group) for group in theirs]

    rows = []
    for call, prepare in ((FIRST, new), (AGAIN, lambda: coupling)):
        peers = {"lnprune": Peer(lambda c: c.rank(2), prepare), "peer": Peer(importances)}
        timing = interleaved(peers, LIST_BUDGETS * budget, partial(calls.read_all, model.parameters()))
        row: Row = {"call": call, "correct": fault is None} | ({} if fault is None else {"fault": fault})
        rows.append(row | report.timed_columns(timing, over_peer=("peer", "lnprune")))
        report.show(rows[-1])
    return rows


def verdicts(sections: Sections) -> list[Verdict]:
    """What was asked for, and what was found."""
    found = []
    for row in sections["labels"]:
        most = FORWARDS * row["forward"] + SECONDS
        wanted = f"{FORWARDS} forwards + {SECONDS} s: {most:.2f} s"
        shown = f"{row['labels']:.2f} s"
        found.append(
            Verdict(f"couple({row['model']}) without the trial", wanted, shown, row["labels"] <= most)
        )
    for row in sections["ranking"]:
        least = SPEEDUPS[row["call"]]
        shown = report.cell("over_peer", row)
        found.append(
            Verdict(
                f"ranking, {row['call']}, {MEMORY[row['state']]}",
                f"{least} x",
                shown,
                row["over_peer"] >= least,
            )
        )
    return found


def speed_lines(machine: dict[str, Any], sections: Sections) -> list[str]:
    """What the README says of the speed."""
    lines = report.table(sections["labels"])
    by_memory: dict[str, list[str]] = {}
    for row in sections["ranking"]:
        by_memory.setdefault(MEMORY[row["state"]], []).append(f"{row['call']} {row['over_peer']:.1f} x")
    said = "; ".join(f"{memory}, {', '.join(found)}" for memory, found in by_memory.items())
    if said:
        lines += ["", f"Ranking ResNet-50's groups, Torch-Pruning's time over ours: {said}."]
    return lines


def markdown(machine: dict[str, Any], sections: Sections, seconds: float) -> str:
    """The page."""
    ranking = [{"call": r["call"], "memory": MEMORY[r["state"]]} | r for r in sections["ranking"]]
    lines = [
        "# Channels that go together, on the CPU",
        "",
        report.provenance(machine, seconds),
        report.cpu_of(machine),
        program.conditions(machine, sections),
        *report.fault_lines(sections),
        "",
        f"`couple` of models, with example inputs of {' x '.join(map(str, IMAGES))}, without the trial of "
        "removal (`check=False`) and with it, and a forward of the same inputs:",
        "",
        *speed_lines(machine, sections),
        "",
        "`rank(2)` of ResNet-50's groups, first with a new coupling's index tensors and again, against "
        "Torch-Pruning's `GroupMagnitudeImportance` of the same "
        "groups. Norms were checked against sums in float64.",
        "",
        *(report.table(ranking) if ranking else ["Not measured in this run."]),
    ]
    return "\n".join([*lines, *program.warning(machine)]) + "\n"


PROGRAM = Program(
    module="benchmarks.coupling",
    description=__doc__,
    budget=0.4,
    sections={
        "labels": lambda o: time_labels(o.budget),
        "ranking": lambda o: time_ranking(o.budget),
    },
    states={RECYCLED: ["labels", "ranking"], FRESH: ["ranking"]},
    verdicts=verdicts,
    markdown=markdown,
    speed_lines=speed_lines,
    pictures=lambda _: {},
)


if __name__ == "__main__":
    sys.exit(program.main(PROGRAM))
