"""Experts and scaled norms on the CPU: against loops of torch, products, Torch-Pruning's Taylor scores."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock

import lnprune
from benchmarks import calls, program, report
from benchmarks.lists import LIST_BUDGETS
from benchmarks.peers import LARGEST_ERROR, torch_pruning
from benchmarks.program import RECYCLED, Program, Sections
from benchmarks.report import Row, Verdict
from benchmarks.resnet50 import resnet50
from benchmarks.timing import Peer, interleaved

SHAPE = (64, 512, 256)
AMOUNT = 0.5
LAYERS, EXPERTS = 60, 256  # of the large model
# Shape, dtype, dim of the channels, dim of the factors.
SCALED: list[tuple[tuple[int, ...], torch.dtype, int, int]] = [
    ((4096, 4096), torch.float32, 0, 1),
    ((4096, 4096), torch.float32, 1, 0),
    ((4096, 4096), torch.bfloat16, 0, 1),
    ((4096, 4096), torch.bfloat16, 1, 0),
    ((512, 512, 3, 3), torch.float32, 0, 1),
    ((512, 512, 3, 3), torch.float32, 1, 0),
]
MASKS, IN_PLACE, BY_HAND, NORMS = (
    *("masks, prune.ln_structured", "in place, and prune.remove"),
    *("in place, by norm, topk and mul_", "norms alone, torch.sum"),
)
LEAST = {MASKS: 3.0, IN_PLACE: 10.0}


class Experts(nn.Module):
    """The weights of all experts of a layer in one parameter."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


def loop_of_torch(layer: Experts, dim: int, permanent: bool) -> Experts:
    """Each expert as a module of its own, with torch's pruning; the mask or the zeros in the parameter."""
    mask = torch.empty_like(layer.weight)
    with torch.no_grad():
        for expert, flags in zip(layer.weight, mask, strict=True):
            one = nn.Module()
            one.register_parameter("weight", nn.Parameter(expert))
            stock.ln_structured(one, "weight", AMOUNT, 2, dim - 1)
            flags.copy_(one.weight_mask)
            if permanent:
                stock.remove(one, "weight")
                expert.copy_(one.weight)
    return layer if permanent else stock.custom_from_mask(layer, "weight", mask)


def loop_by_hand(layer: Experts, dim: int) -> Experts:
    """The fewest operations of torch for each expert."""
    with torch.no_grad():
        for expert in layer.weight:
            norms = torch.norm(expert, 2, dim=2 - dim)
            flags = torch.zeros_like(norms)
            flags[torch.topk(norms, len(norms) - round(AMOUNT * len(norms))).indices] = 1
            expert.mul_(flags.unsqueeze(2 - dim))
    return layer


def ours(layer: Experts, dim: int, permanent: bool) -> Experts:
    lnprune.local_structured([(layer, "weight")], AMOUNT, 2, dim, batch_dim=0, permanent=permanent)
    return layer


def time_experts(budget: float) -> list[Row]:
    """A layer of experts, both dims: masks, zeros in place, norms."""
    rows = []
    for dim in (1, 2):
        torch.manual_seed(0)
        weight = Experts(*SHAPE).weight.detach()
        ways: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
            MASKS: (lambda m, d=dim: ours(m, d, False), lambda m, d=dim: loop_of_torch(m, d, False)),
            IN_PLACE: (lambda m, d=dim: ours(m, d, True), lambda m, d=dim: loop_of_torch(m, d, True)),
            BY_HAND: (lambda m, d=dim: ours(m, d, True), lambda m, d=dim: loop_by_hand(m, d)),
        }
        for call, (mine, theirs) in ways.items():
            made, wanted = (way(fresh(weight)).weight for way in (mine, theirs))
            fault = None if torch.equal(made, wanted) else "other values"
            peers = {
                name: Peer(way, partial(fresh, weight))
                for name, way in (("lnprune", mine), ("torch", theirs))
            }
            timing = interleaved(peers, LIST_BUDGETS * budget, lambda: None)
            row: Row = {"call": f"{call}, dim {dim}", "correct": fault is None}
            rows.append(row | report.timed_columns(timing, speedup=("torch", "lnprune")))
            report.show(rows[-1])
        norms = lambda _, d=dim, w=weight: lnprune.ops.channel_norms([w], [d], 2.0, [0, SHAPE[0]])  # noqa: E731
        error = calls.norm_error(norms(None)[0].view(SHAPE[0], -1), weight.double().norm(dim=3 - dim))
        peers = {"lnprune": Peer(norms), "sum": Peer(lambda _, w=weight: torch.sum(w))}
        timing = interleaved(peers, LIST_BUDGETS * budget, partial(calls.read_all, [weight]))
        row = {"call": f"{NORMS}, dim {dim}", "correct": error <= calls.LARGEST_NORM_ERROR}
        rows.append(row | report.timed_columns(timing, over_sum=("lnprune", "sum")))
        report.show(rows[-1])
    return rows


def fresh(weight: Tensor) -> Experts:
    layer = Experts(1)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def time_model(budget: float) -> list[Row]:
    """So many rankings that Python is what takes time: the channels are few."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Experts(EXPERTS, 8, 4) for _ in range(LAYERS)))
    options = {"batch_dim": 0, "include": "*.weight"}

    def all_of_it(_: Any) -> Any:
        ranking = lnprune.rank(model, 2, 1, **options)
        plan = ranking.select(0.3, scope="global", min_channels=2, multiple_of=2)
        return plan.apply(permanent=True)

    kept = [int(flags.sum()) for flags in all_of_it(None).keep.values()]
    fault = None if len(kept) == LAYERS * EXPERTS and all(k % 2 == 0 and k >= 2 for k in kept) else "counts"
    timing = interleaved({"lnprune": Peer(all_of_it)}, LIST_BUDGETS * budget, lambda: None)
    call = f"rank, select globally, apply in place: {len(kept):,} rankings"
    row: Row = {"call": call, "correct": fault is None} | report.timed_columns(timing)
    report.show(row)
    return [row]


def time_factors(budget: float) -> list[Row]:
    """Norms of elements times factors, against making the product and ranking it."""
    rows = []
    for shape, dtype, dim, other in SCALED:
        torch.manual_seed(0)
        weight, factors = torch.randn(shape).to(dtype), torch.rand(shape[other], dtype=torch.float64)
        view = [-1 if d == other else 1 for d in range(len(shape))]
        narrow, wide = factors.to(dtype).view(view), factors.view(view)

        def scaled(_: Any, w: Tensor = weight, f: Tensor = factors, d: int = dim, o: int = other) -> Any:
            return lnprune.ops.scaled_norms([w], [d], [f], [o], 2.0)

        def product(f: Tensor, w: Tensor = weight, d: int = dim) -> Any:
            return lnprune.ops.channel_norms([w * f], [d], 2.0)

        error = calls.norm_error(scaled(None)[0], product(wide)[0])
        peers = {
            "lnprune": Peer(scaled),
            "in_dtype": Peer(product, partial(lambda f: f, narrow)),
            "in_float64": Peer(product, partial(lambda f: f, wide)),
            "rank": Peer(lambda _, w=weight, d=dim: lnprune.ops.channel_norms([w], [d], 2.0)),
        }
        timing = interleaved(peers, LIST_BUDGETS * budget, partial(calls.read_all, [weight]))
        row: Row = {
            "shape": report.shape_name(shape),
            "dtype": report.dtype_name(dtype),
            "dim": dim,
            "n": 2,
            "correct": error <= calls.LARGEST_NORM_ERROR,
        }
        row |= report.timed_columns(
            timing, over_dtype=("in_dtype", "lnprune"), over_float64=("in_float64", "lnprune")
        )
        rows.append(row)
        report.show(rows[-1])
    return rows


def time_taylor(budget: float) -> list[Row]:
    """First-order Taylor scores of ResNet-50's weights, against Torch-Pruning's of the same layers."""
    if torch_pruning is None:
        print("Torch-Pruning is not installed: left out", flush=True)
        return []
    torch.manual_seed(0)
    model, images = resnet50(), torch.randn(2, 3, 64, 64)
    model(images).square().sum().backward()
    graph = torch_pruning.DependencyGraph().build_dependency(model, images)
    groups = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    roots = [group[0].dep.layer for group in groups]
    importance = torch_pruning.importance.GroupTaylorImportance(group_reduction="first", normalizer=None)
    pairs = [(layer, "weight") for layer in roots]

    def mine(_: Any) -> list[Tensor]:
        scores = {pair: pair[0].weight.detach() * pair[0].weight.grad for pair in pairs}
        return list(lnprune.rank(pairs, 1, "out", scores).norms.values())

    def theirs(_: Any) -> list[Tensor]:
        return [importance(group) for group in groups]

    found, wanted = torch.cat(mine(None)), torch.cat(theirs(None))
    error = calls.norm_error(wanted.double(), found)
    peers = {"lnprune": Peer(mine), "peer": Peer(theirs)}
    timing = interleaved(peers, LIST_BUDGETS * budget, lambda: None)
    # The peer sums in float32.
    row: Row = {"call": "Taylor scores, ResNet-50", "correct": error <= LARGEST_ERROR, "error": error}
    row |= report.timed_columns(timing, over_peer=("peer", "lnprune"))
    report.show(row)
    return [row]


def verdicts(sections: Sections) -> list[Verdict]:
    """What was asked for, and what was found."""
    found = []
    for row in sections["experts"]:
        call = row["call"].rpartition(",")[0]
        if call in LEAST:
            least = LEAST[call]
            met = row["speedup"] >= least
            found.append(Verdict(row["call"], f"{least:g} x", report.cell("speedup", row), met))
        if "over_sum" in row:
            shown = report.cell("over_sum", row)
            found.append(Verdict(row["call"], "1.3 at most", shown, row["over_sum"] <= 1.3))
    for row in sections["model"]:
        met = row["lnprune"] < 0.2
        found.append(Verdict(row["call"], "less than 0.2 s", report.cell("lnprune", row), met))
    for row in sections["factors"]:
        for key, what in (("over_float64", "float64"), ("over_dtype", "dtype")):
            shown = report.cell(key, row)
            what = f"{report.case_name(row)}, product in {what}"
            found.append(Verdict(what, "2 x", shown, row[key] >= 2))
    return found


def speed_lines(machine: dict[str, Any], sections: Sections) -> list[str]:
    """What the README says of the speed."""
    return report.table(sections["experts"])


def markdown(machine: dict[str, Any], sections: Sections, seconds: float) -> str:
    """The page."""
    lines = [
        "# Experts and scaled norms, on the CPU",
        "",
        report.provenance(machine, seconds),
        report.cpu_of(machine),
        program.conditions(machine, sections),
        *report.fault_lines(sections),
        "",
        f"{SHAPE[0]} experts of {SHAPE[1]} x {SHAPE[2]} in one parameter, half of the channels of each "
        "pruned, against a loop over experts:",
        "",
        *speed_lines(machine, sections),
        "",
        f"A model of {LAYERS} layers with {EXPERTS} small experts each, where Python takes the time:",
        "",
        *report.table(sections["model"]),
        "",
        "Norms of elements times a factor for each index of the other dim (`rank` is without factors), "
        "against norms of the product, made in the weight's dtype or, as exact, in float64:",
        "",
        *report.table(sections["factors"]),
        "",
        "`|weight * gradient|` through `importance_scores`, against Torch-Pruning's "
        "`GroupTaylorImportance` of the same layers, which sums in float32:",
        "",
        *(report.table(sections["taylor"]) if sections["taylor"] else ["Not measured in this run."]),
    ]
    return "\n".join([*lines, *program.warning(machine)]) + "\n"


PROGRAM = Program(
    module="benchmarks.experts",
    description=__doc__,
    budget=0.4,
    sections={
        "experts": lambda o: time_experts(o.budget),
        "model": lambda o: time_model(o.budget),
        "factors": lambda o: time_factors(o.budget),
        "taylor": lambda o: time_taylor(o.budget),
    },
    states={RECYCLED: ["experts", "model", "factors", "taylor"]},
    verdicts=verdicts,
    markdown=markdown,
    speed_lines=speed_lines,
    pictures=lambda _: {},
)


if __name__ == "__main__":
    sys.exit(program.main(PROGRAM))
