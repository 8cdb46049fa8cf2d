"""The report of a run of the CUDA benchmark: every case, the targets, and what was measured of them."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import torch

from benchmarks import report
from benchmarks.report import Row, Verdict
from benchmarks.timing import geometric_mean

# From here on a tensor counts as large.
LARGE_BYTES = 256_000_000
LARGEST_BYTES = 1_000_000_000
# What is timed over the size of the weight.
NORMS, WHOLE = "channel_norms", "ln_structured"
RESNET50_LAUNCHES = "prune_channels, the 54 weights of ResNet-50"
NOT_MEASURED: tuple[str, bool | None] = ("not measured", None)


def environment() -> dict[str, Any]:
    """Everything needed to say where and how the figures came about."""
    gpu = torch.cuda.get_device_properties()
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    driver = report.output_of(
        "nvidia-smi", f"--id={index}", "--query-gpu=driver_version", "--format=csv,noheader"
    )
    return report.environment("benchmarks.cuda") | {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
        "cache_mib": round(gpu.L2_cache_size / 2**20, 1),
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
    }


def _share(rows: list[Row], limit: float) -> tuple[str, bool | None]:
    """How often the share of the copy's bytes per second reaches the limit, and the worst case."""
    rows = [row for row in rows if "share" in row]
    if not rows:
        return NOT_MEASURED
    worst = min(rows, key=lambda row: row["share"])
    reached = sum(row["share"] >= limit for row in rows)
    mean = geometric_mean(row["share"] for row in rows)
    text = (
        f"{reached} of {len(rows)} cases; geometric mean {100 * mean:.1f} %, "
        f"worst {100 * worst['share']:.1f} % ({report.case_name(worst)})"
    )
    return text, reached == len(rows)


def _speedup(rows: list[Row], limit: float) -> tuple[str, bool | None]:
    """The least speed-up over torch in device time, with that of wall time beside it."""
    if not rows:
        return NOT_MEASURED
    worst = min(rows, key=lambda row: row["speedup"])
    text = (
        f"{worst['speedup']:.1f} x in device time, {worst['wall_speedup']:.1f} x in wall time, "
        f"worst of {len(rows)} cases ({report.case_name(worst)})"
    )
    return text, worst["speedup"] >= limit


def _resnet50(rows: list[Row], launches: list[Row]) -> tuple[str, bool | None]:
    """The speed-up of the list, and the kernels that it takes."""
    text, met = _speedup(rows, 20)
    kernels = [row["kernels"] for row in launches if row["call"] == RESNET50_LAUNCHES]
    if not rows or not kernels:
        return f"{text}; launches not counted" if rows else text, None
    return f"{text}; {kernels[0]} launches", met and kernels[0] <= 2


def _small(rows: list[Row]) -> tuple[str, bool | None]:
    if not rows:
        return NOT_MEASURED
    worst = max(row["over_torch"] for row in rows)
    return f"{worst:.2f} in the worst of {len(rows)} cases", worst <= 0.6


def _norms(rows: list[Row]) -> tuple[str, bool | None]:
    """The shares of norms of 256 MB, and of 1 GB."""
    sizes = [[row for row in rows if LARGE_BYTES <= row["bytes"] < LARGEST_BYTES]]
    sizes.append([row for row in rows if row["bytes"] >= LARGEST_BYTES])
    (text, met), (larger_text, larger_met) = (
        _share(some, limit) for some, limit in zip(sizes, (0.85, 0.90), strict=True)
    )
    if met is None and larger_met is None:
        return NOT_MEASURED
    return f"{text} / {larger_text}", None if None in (met, larger_met) else met and larger_met


def _both_dims(rows: list[Row], limits: tuple[float, float]) -> tuple[str, bool | None]:
    """The speed-ups along dim 0 and dim 1."""
    found = [_speedup([row for row in rows if row["dim"] == dim], limits[dim]) for dim in (0, 1)]
    if NOT_MEASURED in found:
        return NOT_MEASURED
    return " / ".join(text for text, _ in found), all(met for _, met in found)


def verdicts(sections: dict[str, list[Row]]) -> list[Verdict]:
    """Each target with what was measured and whether it is met; sections may be missing."""
    norms, whole, in_place, lists = (
        sections.get(name, []) for name in ("norms", "whole", "in_place", "lists")
    )
    norms = [*norms, *sections.get("further", [])]
    single = [row for row in whole if row["dtype"] == "float32"]
    matrix = [row for row in single if row["shape"] == "4096 x 4096"]
    convolution = [row for row in single if row["shape"] == "512 x 512 x 3 x 3"]
    resnet50 = [row for row in lists if row["shape"].startswith("ResNet-50")]
    transformer = [row for row in lists if row["shape"].startswith("7B transformer")]
    return [
        Verdict(
            "norms of 256 MB / 1 GB, share of the copy's bytes per second", "0.85 / 0.90", *_norms(norms)
        ),
        Verdict(
            "first call of 1 GB, share, counting 4 passes",
            "0.87",
            *_share([row for row in whole if row["bytes"] >= LARGEST_BYTES], 0.87),
        ),
        Verdict(
            "in place, 1 GB, dim 0, share",
            "0.85",
            *_share([r for r in in_place if r["bytes"] >= LARGEST_BYTES and r["dim"] == 0], 0.85),
        ),
        Verdict(
            "54 weights of ResNet-50 as one list, device time against torch's loop",
            "20 x, two launches",
            *_resnet50(resnet50, sections.get("launches", [])),
        ),
        Verdict(
            "one 4096 x 4096 float32, dim 0 / dim 1, against torch",
            "2.4 x / 6 x",
            *_both_dims(matrix, (2.4, 6)),
        ),
        Verdict(
            "512 x 512 x 3 x 3 float32, dim 1, against torch",
            "10 x",
            *_speedup([row for row in convolution if row["dim"] == 1], 10),
        ),
        Verdict(
            "224 matrices of a 7B transformer in bfloat16, as one list, share",
            "0.85",
            *_share(transformer, 0.85),
        ),
        Verdict(
            "64 x 64, wall time of a call over torch's",
            "0.6 at most",
            *_small(sections.get("small", [])),
        ),
    ]


# Title, text and ratios to summarise of each section.
CHAPTERS: dict[str, tuple[str, str, list[str]]] = {
    "copy": (
        "Copy",
        "A copy from one block of the device's memory to another: bytes read and written per second. "
        "The shares below are shares of the fastest.",
        [],
    ),
    "whole": (
        "Whole call",
        "`ln_structured(module, 'weight', amount=0.5, n, dim)` on a module that is not pruned yet. Four "
        "passes: the weight is read twice, mask and masked weight are written.",
        ["share", "speedup", "over_predicted"],
    ),
    "in_place": (
        "In place",
        "`local_structured([(module, 'weight')], amount=0.5, n, dim, permanent=True)` against "
        "`ln_structured` and `remove`, each on a weight of its own. The weight is read once, and half of "
        "it is written.",
        ["share", "speedup", "over_predicted"],
    ),
    "lists": (
        "Lists",
        "Masks and masked weights of a model by one `torch.ops.lnprune.prune_channels`, against the steps "
        "of torch's `ln_structured` on one weight after the other. Four passes.",
        [],
    ),
    "norms": (
        "Norms",
        "`lnprune.channel_norms` (float64 sums) against `torch.norm` over the other dims, which torch's "
        "pruning calls. Each weight is read once. The relative error is against `torch.norm` in float64.",
        ["share", "speedup", "over_predicted"],
    ),
    "sizes": (
        "Sizes",
        "`channel_norms` and `ln_structured` over the size of a float32 matrix, n = 2, and a copy of as "
        "many bytes.",
        [],
    ),
    "repeated": (
        "Repeated call",
        "The second `ln_structured` on a module, again with amount=0.5. Six passes: weight and mask are "
        "read to rank, mask and original to write, mask and weight are written. Torch's call waits for the "
        "device half-way, so that its device time holds the time of launching what follows.",
        ["share", "speedup", "over_predicted"],
    ),
    "small": (
        "Small call",
        "`ln_structured` on a float32 weight of 64 x 64 that is not pruned yet. The wall time is that of "
        "Python and of launching.",
        [],
    ),
    "memory": (
        "Memory",
        "The device's memory at the peak of a call, less what was held before it, in units of the weights. "
        "Mask and masked weight, which stay, are 2; the rest is norms, flags, tables and partial sums.",
        [],
    ),
    "further": (
        "Norms of other layouts and dtypes",
        "As above.",
        ["share", "speedup", "over_predicted"],
    ),
    "launches": (
        "Launches",
        "What one call puts on the device, by torch's profiler: kernels, copies of memory (the table of a "
        "call is one), fills of memory.",
        [],
    ),
}


def gpu_of(machine: dict[str, Any]) -> str:
    """The GPU, the machine around it and the versions, as a sentence."""
    return (
        f"{machine['gpu']} (compute capability {machine['capability']}, {machine['multiprocessors']} "
        f"multiprocessors, {machine['gpu_memory_gib']} GiB, {machine['cache_mib']} MiB of cache), driver "
        f"{machine['driver']}, CUDA {machine['cuda']}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {machine['system']}; Python {machine['python']}, torch "
        f"{machine['torch']}, lnprune {machine['lnprune']} (native library: {report.build_of(machine)})."
    )


def conditions(sections: dict[str, list[Row]]) -> str:
    """How figures came about."""
    checked = sum("correct" in row for rows in sections.values() for row in rows)
    return (
        f"Each of the {checked} cases was checked before it was timed; {len(report.faults(sections))} "
        "failed. Times are medians of device time: between events, from cold caches, all launches queued "
        "before the first of them starts. Wall time is that of one call after the other, Python included, "
        "until the device is done. Ratios are medians of the ratios within one round of interleaved runs. "
        "Predicted times are those of `benchmarks/predictions.py` for the copy of this run."
    )


def markdown(
    machine: dict[str, Any], sections: dict[str, list[Row]], failures: dict[str, str], seconds: float
) -> str:
    """The report of the sections that have run so far."""
    lines = [
        "# lnprune on a GPU: all cases",
        "",
        report.provenance(machine, seconds),
        "",
        gpu_of(machine),
        "",
        conditions(sections),
        "",
        "## Targets",
        "",
        *report.verdict_lines(verdicts(sections)),
        *report.fault_lines(sections),
    ]
    if failures:
        lines += ["", "Sections that failed, with the rows that they had before:", ""]
        lines += [f"- {CHAPTERS[name][0]}: {' '.join(why.split())}" for name, why in failures.items()]
    for name, (title, text, ratios) in CHAPTERS.items():
        rows = sections.get(name, [])
        lines += report.section(title, text, rows, [r for r in ratios if any(r in row for row in rows)])
    return "\n".join(lines) + "\n"


def write(
    folder: pathlib.Path,
    machine: dict[str, Any],
    sections: dict[str, list[Row]],
    failures: dict[str, str],
    seconds: float,
) -> None:
    """Writes cuda_cases.md and cuda.json."""
    head = {"environment": machine, "seconds": seconds, "failures": failures}
    text = markdown(machine, sections, failures, seconds)
    report.save_json(folder / "cuda.json", head, verdicts(sections), sections)
    report.save_text(folder / "cuda_cases.md", text)
