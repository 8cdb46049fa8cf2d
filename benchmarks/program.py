"""How a page of benchmarks comes about: sections in processes of their own, in two states of memory."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks import report
from benchmarks.report import Row, Verdict
from benchmarks.timing import STEADY_ROUNDS, STEADY_SHARE, Peer, batch, page_faults, settle
from lnprune.plans.report import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Sections = dict[str, list[Row]]
# What glibc's allocator reads when a process starts. With these it keeps what is freed and gives it out
# again; without them, blocks of up to 32 MB come fresh from the system at first, larger ones always.
RECYCLING = {
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
RECYCLED, FRESH = "recycled", "fresh"
STATES: dict[str, dict[str, str]] = {RECYCLED: RECYCLING, FRESH: {}}
# Where runs that are not for the repository go, and what is too long for it.
BUILD = pathlib.Path("build/benchmarks")
# Fresh memory may be slow for seconds, until the host of a virtual machine has handed it out.
_WARM_BYTES, _WARM_BLOCKS = 256 << 20, 6
_LONGEST_WARMING = 10.0
_PROBE_BYTES = 64 << 20
# With more of the processor taken by others, threads that wait for each other wait for the scheduler.
_MOST_OTHERS = 0.05


class Options(NamedTuple):
    """How thorough a run is: seconds for each case, and whether a few cases are enough."""

    budget: float
    quick: bool


class Program(NamedTuple):
    """A page: what is measured for it, and what it makes of that."""

    module: str
    description: str
    budget: float
    sections: dict[str, Callable[[Options], list[Row]]]
    states: dict[str, list[str]]  # the names of the sections that are measured in each
    verdicts: Callable[[Sections], list[Verdict]]
    markdown: Callable[[dict[str, Any], Sections, float], str]
    speed_lines: Callable[[dict[str, Any], Sections], list[str]]  # what the README says too
    pictures: Callable[[Sections], dict[str, Figure]]

    @property
    def name(self) -> str:
        return self.module.removeprefix("benchmarks.")


def _fresh_memory() -> list[torch.Tensor]:
    return [torch.empty(_WARM_BYTES, dtype=torch.uint8).fill_(1) for _ in range(_WARM_BLOCKS)]


def probe() -> float:
    """Page faults of writing 64 MiB of new memory: none where memory is recycled."""
    before = page_faults()
    torch.empty(_PROBE_BYTES, dtype=torch.uint8).fill_(1)
    return page_faults() - before


def measure_here(program: Program, names: list[str], state: str, options: Options) -> dict[str, Any]:
    """Measures sections in this process, whose memory is in the state already."""
    settle({"memory": lambda: batch(Peer(lambda _: _fresh_memory()), 1)}, _LONGEST_WARMING)
    found: dict[str, Any] = {"faults": probe(), "sections": {}}
    for name in names:
        start = time.perf_counter()
        print(f"\n{name}, memory {state}", flush=True)
        rows = program.sections[name](options)
        found["sections"][name] = [{**row, "state": state} for row in rows]
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    return found


def measure_apart(module: str, names: list[str], state: str, options: Options) -> dict[str, Any]:
    """Measures sections in a process whose memory is in the state from its start."""
    environment = {key: value for key, value in os.environ.items() if key not in RECYCLING}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "found.json"
        task = json.dumps([module, names, state, options, torch.get_num_threads(), str(file)])
        work = "import sys; from benchmarks.program import work; work(sys.argv[1])"
        command = [sys.executable, "-c", work, task]
        subprocess.run(command, env=environment | STATES[state], check=True)
        return json.loads(file.read_text())


def work(task: str) -> None:
    """What the process of :func:`measure_apart` does."""
    module, names, state, options, threads, file = json.loads(task)
    torch.set_num_threads(threads)
    program: Program = importlib.import_module(module).PROGRAM
    found = measure_here(program, names, state, Options(*options))
    found["sections"] = {name: report.json_rows(rows) for name, rows in found["sections"].items()}
    report.save_text(pathlib.Path(file), json.dumps(found))


def _busy_seconds() -> tuple[float, float]:
    """What the processor has worked so far, for all and for this process and those it has waited for."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, *interrupts_and_stolen = map(int, file.readline().split()[1:9])
    all_work = (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    return all_work, times.user + times.system + times.children_user + times.children_system


def measure(program: Program, options: Options) -> tuple[Sections, dict[str, Any]]:
    """All sections, one state after the other, and what shows whether they can be trusted.

    That is the page faults of a probe in each state, and the share of the processor that others had.
    """
    sections: Sections = {name: [] for name in program.sections}
    faults = {}
    start, busy = time.perf_counter(), _busy_seconds()
    for state, names in program.states.items():
        found = measure_apart(program.module, names, state, options)
        faults[state] = found["faults"]
        for name, rows in found["sections"].items():
            sections[name] += report.rows_of_json(rows)
    all_work, own_work = (after - before for before, after in zip(busy, _busy_seconds(), strict=True))
    available = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return sections, {"faults": faults, "others": max(0.0, all_work - own_work) / available}


def conditions(machine: dict[str, Any], sections: Sections) -> str:
    """How times were taken, and what shows whether they can be trusted, for the pages."""
    settled = [row["settled"] for rows in sections.values() for row in rows if "settled" in row]
    faults = " / ".join(f"{state} {count:.0f}" for state, count in machine["faults"].items())
    return (
        "What is compared runs in turn. Ratios are medians of those within one round, of several cases "
        f"geometric means. Cases are timed once {STEADY_ROUNDS} rounds bring no time that is over "
        f"{100 * STEADY_SHARE:.0f} % below the lowest so far; {settled.count(False)} of {len(settled)} did "
        f"not get there. Page faults of filling 64 MiB: {faults}. Other processes took "
        f"{100 * machine['others']:.0f} % of the processor."
    )


def warning(machine: dict[str, Any]) -> list[str]:
    """What is said beside figures that others spoilt; where they did not, nothing."""
    if machine["others"] <= _MOST_OTHERS:
        return []
    share = f"{100 * machine['others']:.0f} %"
    return [
        "",
        f"**Measured while other processes had {share} of the processor: no figure here means much.**",
    ]


def load(path: pathlib.Path, program: Program) -> tuple[dict[str, Any], Sections, float]:
    """The machine, the sections and the seconds of a run, from its JSON."""
    saved = json.loads(path.read_text())
    sections = {name: report.rows_of_json(saved[name]) for name in program.sections}
    return saved["environment"], sections, saved["seconds"]


def write(
    program: Program, folder: pathlib.Path, machine: dict[str, Any], sections: Sections, seconds: float
) -> list[pathlib.Path]:
    """Writes the page and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = [folder / f"{program.name}.md"]
    report.save_text(pages[0], program.markdown(machine, sections, seconds))
    for name, figure in program.pictures(sections).items():
        pages.append(folder / f"{name}.png")
        save_figure(figure, pages[-1], dpi=110)
    return pages


def main(program: Program) -> int:
    """Measures, or takes what was measured, and writes JSON, page, pictures and the README's part."""
    parser = argparse.ArgumentParser(prog=f"python -m {program.module}", description=program.description)
    parser.add_argument("--quick", action="store_true", help="few cases, and less time for each")
    parser.add_argument(
        "--budget",
        type=float,
        help=f"seconds for each case ({program.budget:g}), besides those that settle",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help=f"folder of the page and its pictures ({report.RESULTS}; --quick or --budget: {BUILD})",
    )
    parser.add_argument("--threads", type=int, help="threads for torch and lnprune (default: torch's)")
    parser.add_argument(
        "--from", dest="saved", type=pathlib.Path, help="the JSON of a run, to write its page"
    )
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)

    written = []
    if given.saved is None:
        start = time.perf_counter()
        usual = program.budget / 4 if given.quick else program.budget
        options = Options(usual if given.budget is None else given.budget, given.quick)
        machine = report.environment(program.module)
        sections, trust = measure(program, options)
        machine |= trust
        seconds = time.perf_counter() - start
        written.append(BUILD / f"{program.name}.json")
        head = {"environment": machine, "seconds": seconds}
        report.save_json(written[0], head, program.verdicts(sections), sections)
    else:
        machine, sections, seconds = load(given.saved, program)
    trial = given.quick or given.budget is not None
    folder = given.out or (BUILD if trial else report.RESULTS)
    written += write(program, folder, machine, sections, seconds)
    if folder == report.RESULTS:
        lines = [*program.speed_lines(machine, sections), *warning(machine)]
        report.replace_marked(report.README, program.module, lines)
        written.append(report.README)
    targets = report.verdict_lines(program.verdicts(sections))
    written.append(BUILD / f"{program.name}_targets.md")
    report.save_text(written[-1], "\n".join(targets) + "\n")
    print("\n" + "\n".join(targets))
    print("\n".join(warning(machine)))
    print(f"\n{seconds:.0f} s; wrote {', '.join(map(str, written))}")
    return 1 if report.faults(sections) else 0
