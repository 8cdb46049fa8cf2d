"""Builds, tests and measures lnprune on a machine with a GPU and without a network: `make gpu`.

Uses the Python that runs it, with that machine's own torch and nvcc. Every stage has a time limit and a log
in the folder that is named; one that fails does not stop those after it. Where the sources come without
their history, LNPRUNE_COMMIT says which commit they are.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
# Under nine minutes. A stage that ends before its limit leaves its time to the later ones.
SECONDS_IN_ALL = 530
OUTPUTS = (
    "build.log",
    "tests.log",
    "sanitizers.log",
    "benchmarks.log",
    "cuda.md",
    "cuda.json",
    "summary.txt",
)
# Files that run on every device; the cases of other devices are left out.
DEVICE_TESTS = (
    "test_cuda.py",
    "test_norms.py",
    "test_selection.py",
    "test_write.py",
    "test_zero.py",
    "test_repeated.py",
    "test_ln_structured.py",
    "test_large.py",
)
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
LAST_LINES = 25
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
    log: str
    commands: list[list[str]]
    environment: dict[str, str]


class Result(NamedTuple):
    name: str
    status: str
    seconds: float


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


def stage_of_tests(cores: int) -> tuple[Stage, list[str]]:
    """The test run, in several processes where pytest can, and what is to be said of files left out."""
    paths, notes = [], []
    for name in DEVICE_TESTS:
        missing = sorted(missing_imports(TESTS / name))
        if missing:
            notes.append(f"{name} is left out: not installed here: {', '.join(missing)}")
        else:
            paths.append(TESTS / name)
    options = ["-q", "-p", "no:cacheprovider", "-k", "cuda", "--durations=10"]
    processes = 1
    if importlib.util.find_spec("xdist") is not None:
        processes = max(1, min(6, cores // 2))
        options += ["-n", str(processes)]
    threads = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    command = python("-m", "pytest", *options, *paths)
    return Stage("tests", 150, "tests.log", [command], threads), notes


def plan(folder: pathlib.Path, architecture: str, cores: int) -> tuple[list[Stage], list[str]]:
    """The stages, and what is to be said of what they leave out."""
    tests, notes = stage_of_tests(cores)
    short_list = python(TESTS / "cuda_short_list.py")
    # One allocation per tensor: the sanitizer sees where it ends, and what nobody wrote in it.
    own_allocations = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    build = {"TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": str(cores)}
    stages = [
        Stage(
            "build",
            150,
            "build.log",
            [python("setup.py", "build_ext", "--inplace"), python("-c", IMPORT_BUILT)],
            build,
        ),
        tests,
        Stage("short list", 40, "sanitizers.log", [short_list], {}),
    ]
    if shutil.which("compute-sanitizer") is None:
        notes.append("compute-sanitizer is not installed here: its stages are left out")
    else:
        check = ["compute-sanitizer", "--error-exitcode", "86", "--report-api-errors", "no", "--tool"]
        stages += [
            Stage(tool, 45, "sanitizers.log", [[*check, tool, *short_list]], own_allocations)
            for tool in SANITIZERS
        ]
    benchmarks = python("-m", "benchmarks.cuda", "--out", folder)
    return [*stages, Stage("benchmarks", 240, "benchmarks.log", [benchmarks], {})], notes


def run_command(
    command: list[str], environment: Mapping[str, str], log: pathlib.Path, seconds: float
) -> tuple[int, bool]:
    """Its exit status, and whether it had to be stopped; what it prints is added to the log."""
    with log.open("a") as output:
        shown = ["..." if "\n" in part else part for part in command]
        output.write(f"$ {' '.join(shown)}\n")
        output.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
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
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **stage.environment}
    log = folder / stage.log
    status = "passed"
    for command in stage.commands:
        seconds = end - time.monotonic()
        if seconds <= 0:
            status = "no time left"
            break
        code, stopped = run_command(command, environment, log, seconds)
        if stopped or code != 0:
            status = "stopped at its time limit" if stopped else f"failed with exit status {code}"
            break
    return Result(stage.name, status, time.monotonic() - start)


def run_stages(stages: list[Stage], folder: pathlib.Path, notes: list[str]) -> list[Result]:
    """Runs all stages, writes the summary after each, and shows the end of the log of one that failed."""
    deadline = time.monotonic() + SECONDS_IN_ALL
    results: list[Result] = []
    for stage in stages:
        print(f"{stage.name} ...", flush=True)
        result = run_stage(stage, folder, deadline)
        results.append(result)
        if result.status != "passed" and (folder / stage.log).exists():
            lines = (folder / stage.log).read_text(errors="replace").splitlines()
            print("\n".join(f"    {line[:200]}" for line in lines[-LAST_LINES:]), flush=True)
        (folder / "summary.txt").write_text("\n".join(summary(results, notes)) + "\n")
    return results


def summary(results: list[Result], notes: list[str]) -> list[str]:
    """The notes, and a table of the stages."""
    rows = [("stage", "status", "seconds"), *((r.name, r.status, f"{r.seconds:.0f}") for r in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    table = [f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>7}" for row in rows]
    return [*notes, *table]


def main() -> int:
    """Exits with 0 where every stage passed."""
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "build/gpu").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)
    described = subprocess.run(python("-c", DESCRIBE_GPU), capture_output=True, text=True, check=False)
    if described.returncode != 0:
        print(f"nothing was run: {described.stderr.strip()}")
        return 1
    gpu = json.loads(described.stdout.splitlines()[-1])
    stages, notes = plan(folder, gpu["architecture"], os.cpu_count() or 1)
    notes.insert(0, f"{gpu['name']}, architecture {gpu['architecture']}; logs and results in {folder}")
    results = run_stages(stages, folder, notes)
    print("\n".join(["", *summary(results, notes)]))
    return 0 if all(result.status == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
