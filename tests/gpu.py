"""Builds, tests and measures lnprune on a machine with a GPU and without a network: `make gpu`.

Uses the Python that runs it, with that machine's own torch and nvcc. Stages run in a fixed order, what
matters most first. Each has a time limit of its own; one that fails does not stop those after it. What they
print and find is written as it comes, into the folder that is named. Where the sources come without their
history, LNPRUNE_COMMIT says which commit they are.

    make gpu                                                what a first look needs: FIRST_CALL
    make gpu STAGES="build synccheck initcheck variants"    what a second one adds
    make gpu STAGES="build tests"                           these stages
    make gpu STAGES="build benchmarks" BEFORE=other/folder  also the sources there, of another commit
    make gpu STAGES="build profile" SECTIONS=norms          what a section of the benchmarks does
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
# Two calls fit into a quarter of an hour, with the time that a machine takes to start. The limits of a
# first call are more than that by the last stages: they run where those before them took less.
SECONDS_IN_ALL = 400
# In the order in which they run.
LIMITS = {
    "build": 150,
    "short-list": 20,
    "tests": 90,
    "benchmarks": 110,
    "memcheck": 35,
    "racecheck": 35,
    # Not part of the first call.
    "synccheck": 35,
    "initcheck": 35,
    "variants": 150,
    "drop-in": 100,
    "models": 100,
    "profile": 60,
}
FIRST_CALL = ("build", "short-list", "tests", "benchmarks", "memcheck", "racecheck")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Of the sources here, and of those of another commit.
LOG, OTHER_LOG = "log.txt", "before.txt"
RESULTS = ("cuda.json", "cuda_cases.md")
OUTPUTS = (
    LOG,
    OTHER_LOG,
    "summary.txt",
    *RESULTS,
    "variants.json",
    *(f"before/{name}" for name in RESULTS),
)
# Files that run on every device; the cases of other devices are left out.
TEST_FILES = {
    # Of the kernels.
    "tests": (
        "test_cuda.py",
        *("test_norms.py", "test_selection.py", "test_write.py", "test_zero.py", "test_repeated.py"),
        *("test_batches.py", "test_scaled_norms.py", "test_sums.py", "test_rows.py"),
    ),
    # Of the drop-in on one module, and of tensors of gigabytes.
    "drop-in": (
        *("test_ln_structured.py", "test_large.py", "test_class.py", "test_patch.py", "test_failures.py"),
        "test_all_or_nothing.py",
    ),
    # Of plans, of whole models, and of the ops themselves.
    "models": (
        *("test_ranking.py", "test_local_structured.py", "test_apply.py", "test_plan.py", "test_ops.py"),
        *("test_remove_all.py", "test_masked_models.py", "test_portability.py", "test_threads.py"),
    ),
}
LAST_LINES = 25
# What pytest and the sanitizers say last.
SUMMARIES = re.compile(r"\b\d+ (?:passed|failed|error).* in \d.*s\b|\w+ SUMMARY: .*")
DESCRIBE_GPU = """
import json, torch
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no CUDA device")
major, minor = torch.cuda.get_device_capability()
print(json.dumps({"name": torch.cuda.get_device_name(), "architecture": f"{major}.{minor}"}))
"""
IMPORT_BUILT = """
import lnprune, torch
print("torch", torch.__version__, "lnprune", lnprune.__file__, lnprune.ops.build_info())
raise SystemExit(not lnprune.ops.has_cuda())
"""


class Stage(NamedTuple):
    """One or more commands, of which each runs where those before it succeeded."""

    name: str
    limit: float
    commands: list[list[str]]
    environment: dict[str, str]
    sources: pathlib.Path = ROOT
    log: str = LOG


class Result(NamedTuple):
    name: str
    status: str
    seconds: float
    said: str  # in sum, by the program itself


def python(*arguments: str | pathlib.Path) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def missing_imports(path: pathlib.Path) -> set[str]:
    """The modules that a file, or a file of tests that it imports, imports and that are not installed."""
    missing = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in (name.partition(".")[0] for name in names):
            if (TESTS / f"{name}.py").exists():
                missing |= missing_imports(TESTS / f"{name}.py")
            elif not (ROOT / name).is_dir() and importlib.util.find_spec(name) is None:
                missing.add(name)
    return missing


def stage_of_tests(name: str, cores: int) -> tuple[Stage, list[str]]:
    """The test run, in several processes where pytest can, and what is to be said of files left out."""
    paths, notes = [], []
    for file in TEST_FILES[name]:
        missing = sorted(missing_imports(TESTS / file))
        if missing:
            notes.append(f"{file} is left out: not installed here: {', '.join(missing)}")
        else:
            paths.append(TESTS / file)
    options = ["-q", "-p", "no:cacheprovider", "-k", "cuda", "--durations=10"]
    processes = 1
    if importlib.util.find_spec("xdist") is not None:
        processes = max(1, min(6, cores // 2))
        options += ["-n", str(processes)]
    threads = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    return Stage(name, LIMITS[name], [python("-m", "pytest", *options, *paths)], threads), notes


def plan(
    folder: pathlib.Path,
    architecture: str,
    cores: int,
    names: Sequence[str] = FIRST_CALL,
    before: pathlib.Path | None = None,
    sections: Sequence[str] = (),
) -> tuple[list[list[Stage]], list[str]]:
    """The stages, those of a list side by side, and what is to be said of what they leave out.

    The sources of another commit are built beside those here, and timed before them.
    """
    groups: list[list[Stage]] = []
    notes: list[str] = []
    short_list = python(TESTS / "cuda_short_list.py")
    # One allocation per tensor: the sanitizer sees where it ends, and what nobody wrote in it.
    own_allocations = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    chosen = [f"--sections={','.join(sections)}"] if sections else []
    for name in (name for name in LIMITS if name in names):
        limit = LIMITS[name]
        if name == "build":
            build = [python("setup.py", "build_ext", "--inplace"), python("-c", IMPORT_BUILT)]
            jobs = {"TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": str(cores)}
            groups.append([Stage(name, limit, build, jobs)])
            if before is not None:
                groups[-1].append(Stage("build before", limit, build, jobs, before, OTHER_LOG))
        elif name == "variants":
            command = python("-m", "benchmarks.cuda_variants", "--out", folder)
            groups.append([Stage(name, limit, [command], {"TORCH_CUDA_ARCH_LIST": architecture})])
        elif name in TEST_FILES:
            tests, left_out = stage_of_tests(name, cores)
            groups.append([tests])
            notes += left_out
        elif name == "short-list":
            groups.append([Stage(name, limit, [short_list], {})])
        elif name == "benchmarks":
            if before is not None:
                command = python("-m", "benchmarks.cuda", "--out", folder / "before", *chosen)
                groups.append([Stage("benchmarks before", limit, [command], {}, before, OTHER_LOG)])
            command = python("-m", "benchmarks.cuda", "--out", folder, *chosen)
            groups.append([Stage(name, limit, [command], {})])
        elif name == "profile":
            if shutil.which("ncu") is None:
                notes.append("ncu is not installed here: its stage is left out")
                continue
            # The device's clocks are left as they are. The first launches of each kernel are of checks.
            ncu = ["ncu", "--clock-control", "none", "--set", "detailed", "--launch-skip", "20"]
            ncu += ["--launch-count", "6", "--kernel-name", "regex:rank|select|write|zero"]
            quick = python("-m", "benchmarks.cuda", "--quick", "--out", ROOT / "build" / "profile", *chosen)
            groups.append([Stage(name, limit, [[*ncu, *quick]], {})])
        elif shutil.which("compute-sanitizer") is None:
            notes.append(f"compute-sanitizer is not installed here: {name} is left out")
        else:
            check = ["compute-sanitizer", "--error-exitcode", "86", "--report-api-errors", "no", "--tool"]
            groups.append([Stage(name, limit, [[*check, name, *short_list]], own_allocations)])
    return groups, notes


def run_command(
    command: list[str],
    sources: pathlib.Path,
    environment: Mapping[str, str],
    log: pathlib.Path,
    seconds: float,
) -> tuple[int, bool]:
    """Its exit status, and whether it had to be stopped; what it prints is added to the log."""
    with log.open("a") as output:
        shown = ["..." if "\n" in part else part for part in command]
        output.write(f"$ {' '.join(shown)}\n")
        output.flush()
        process = subprocess.Popen(
            command,
            cwd=sources,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds), False
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL, True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the process and all that it started
                process.wait()


def run_stage(stage: Stage, folder: pathlib.Path, deadline: float) -> Result:
    """Runs the commands of a stage within its limit and what is left in all."""
    start = time.monotonic()
    end = min(start + stage.limit, deadline)
    paths = {"PYTHONPATH": str(stage.sources), "PYTHONUNBUFFERED": "1"}
    environment = {**os.environ, **paths, **stage.environment}
    log = folder / stage.log
    with log.open("a") as output:
        output.write(f"\n== {stage.name}\n")
    before = log.stat().st_size
    status = "passed"
    for command in stage.commands:
        seconds = end - time.monotonic()
        if seconds <= 0:
            status = "no time left"
            break
        code, stopped = run_command(command, stage.sources, environment, log, seconds)
        if stopped or code != 0:
            status = "stopped at its time limit" if stopped else f"failed with exit status {code}"
            break
    found = SUMMARIES.findall(log.read_bytes()[before:].decode(errors="replace"))
    return Result(stage.name, status, time.monotonic() - start, found[-1] if found else "")


def run_stages(groups: list[list[Stage]], folder: pathlib.Path, notes: list[str]) -> list[Result]:
    """Runs all stages, writes the summary after each group, and shows the log's end of one that failed."""
    deadline = time.monotonic() + SECONDS_IN_ALL
    results: list[Result] = []
    for group in groups:
        print(f"{' and '.join(stage.name for stage in group)} ...", flush=True)
        with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
            found = list(pool.map(lambda stage: run_stage(stage, folder, deadline), group))
        results += found
        for stage, result in zip(group, found, strict=True):
            if result.status != "passed":
                lines = (folder / stage.log).read_text(errors="replace").splitlines()
                print("\n".join(f"    {line[:200]}" for line in lines[-LAST_LINES:]), flush=True)
        (folder / "summary.txt").write_text("\n".join(summary(results, notes)) + "\n")
    return results


def summary(results: list[Result], notes: list[str]) -> list[str]:
    """The notes, and a table of the stages."""
    rows = [("stage", "status", "seconds", "said")]
    rows += [(r.name, r.status, f"{r.seconds:.0f}", r.said) for r in results]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    table = [f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>7}  {row[3]}".rstrip() for row in rows]
    return [*notes, *table]


def words(text: str) -> list[str]:
    """The names of a list, between commas or blanks."""
    return text.replace(",", " ").split()


def main() -> int:
    """Exits with 0 where every stage passed."""
    parser = argparse.ArgumentParser(description="stages: " + ", ".join(LIMITS))
    parser.add_argument("folder", nargs="?", default="build/gpu", type=pathlib.Path)
    parser.add_argument("--stages", default="", help=f"names; none: {', '.join(FIRST_CALL)}")
    parser.add_argument("--before", default="", help="the folder with the sources of another commit")
    parser.add_argument("--sections", default="", help="of the benchmarks; none: all")
    given = parser.parse_args()
    names = words(given.stages) or list(FIRST_CALL)
    if unknown := [name for name in names if name not in LIMITS]:
        parser.error(f"no such stage: {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    before = pathlib.Path(given.before).resolve() if given.before else None
    if before is not None and not (before / "setup.py").exists():
        parser.error(f"--before: expected a folder with the sources of a commit, got {given.before}")

    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)
    described = subprocess.run(python("-c", DESCRIBE_GPU), capture_output=True, text=True, check=False)
    if described.returncode != 0:
        print(f"nothing was run: {described.stderr.strip()}")
        return 1
    gpu = json.loads(described.stdout.splitlines()[-1])
    sections = words(given.sections)
    groups, notes = plan(folder, gpu["architecture"], os.cpu_count() or 1, names, before, sections)
    notes.insert(0, f"{gpu['name']}, architecture {gpu['architecture']}; logs and results in {folder}")
    results = run_stages(groups, folder, notes)
    print("\n".join(["", *summary(results, notes)]))
    return 0 if all(result.status == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
