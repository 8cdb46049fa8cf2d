"""The benchmarks: how they time, what they check, and what reports make of figures and of failures."""

import collections
import json
import math
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import lnprune
from benchmarks import (
    calls,
    checkpoints,
    coupling,
    cpu,
    cpu_report,
    cuda,
    cuda_page,
    cuda_report,
    cuda_variants,
    lists,
    models,
    peers,
    program,
    report,
    sharded,
)
from benchmarks.program import FRESH, RECYCLED, RECYCLING, Options
from benchmarks.resnet50 import resnet50
from benchmarks.shapes import (
    DTYPES,
    FLOAT8_DTYPES,
    FURTHER_LAYOUTS,
    NAMED_ORDERS,
    RESNET50,
    Case,
    cases,
)
from benchmarks.timing import Peer, Timing, geometric_mean, interleaved, settle

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECTIONS = list(cuda_report.CHAPTERS)


@pytest.fixture(scope="module")
def machine():
    gpu = {"gpu": "a GPU", "capability": "9.0", "multiprocessors": 132, "gpu_memory_gib": 139.0}
    return report.environment("benchmarks.cuda") | gpu | {"cache_mib": 60.0, "driver": "1", "cuda": "13.0"}


def made_up(shape, n=2.0, dtype=torch.float32, **figures):
    """A row of a case, with figures that meet every target."""
    times = {"lnprune": 1e-4, "torch": 1e-2, "wall": 2e-4, "torch_wall": 2e-2, "over_torch": 0.5}
    ratios = {"share": 0.95, "speedup": 100.0, "wall_speedup": 100.0, "over_predicted": 1.1}
    return report.case_row(Case(shape, dtype, 0, n), None) | times | ratios | figures


def good_sections():
    """Sections whose figures meet every target, by a little in each."""
    large, small = (16384, 16384), (8192, 8192)
    convolution = (512, 512, 3, 3)
    return {
        "copy": [{"size": "256 MiB", "copy": 1e-4, "gigabytes_per_second": 4300.0}],
        "whole": [
            made_up((4096, 4096), speedup=2.4, share=0.1),
            made_up((4096, 4096), speedup=6.0, share=0.1) | {"dim": 1},
            made_up(convolution, speedup=2.0, share=0.1),
            made_up(convolution, speedup=10.0, share=0.1) | {"dim": 1},
            made_up(large, share=0.87),
            made_up(small, share=0.5),
        ],
        "in_place": [made_up(large, share=0.85), made_up(large, share=0.2) | {"dim": 1}],
        "lists": [
            made_up((8, 8), speedup=20.0) | {"shape": "ResNet-50, 54 weights", "bytes": 1 << 30},
            made_up((8, 8), share=0.85) | {"shape": "7B transformer, 224 matrices", "bytes": 1 << 30},
        ],
        "norms": [
            *(made_up(small, n, share=0.85, error=0.0) for n in (1, 2, math.inf)),
            made_up(large, share=0.9, error=0.0),
            made_up((512, 512), share=0.1, error=0.0),
        ],
        "sizes": [
            {"call": call, **made_up(shape), "dim": dim, "copy": 1e-4}
            for shape in ((64, 64), large)
            for call in (cuda_report.NORMS, cuda_report.WHOLE)
            for dim in (0, 1)
        ],
        "repeated": [made_up((8192, 8192))],
        "small": [made_up((64, 64), over_torch=0.6)],
        "memory": [made_up((8, 8)) | {"peak": 2.001, "beyond_outputs": 12345, "torch_peak": 3.5}],
        "further": [made_up(small, dtype=torch.float64, share=0.85, error=0.0)],
        "launches": [{"call": cuda_report.RESNET50_LAUNCHES, "kernels": 2, "copies": 0, "fills": 0}],
    }


def test_figures_at_the_targets_meet_them(machine):
    sections = good_sections()
    assert list(sections) == SECTIONS
    found = cuda_report.verdicts(sections)
    assert [verdict.met for verdict in found] == [True] * 8
    text = cuda_report.markdown(machine, sections, {}, 60.0)
    assert "not measured" not in text.lower()
    assert "; 2 launches | yes |" in text
    assert "| 8192 x 8192 | float32 | 0 | inf |" in text


@pytest.mark.parametrize(
    ("section", "position", "figures", "target"),
    [
        ("norms", 1, {"share": 0.84}, 0),
        ("norms", 3, {"share": 0.89}, 0),
        ("further", 0, {"share": 0.84}, 0),
        ("whole", 4, {"share": 0.86}, 1),
        ("in_place", 0, {"share": 0.84}, 2),
        ("lists", 0, {"speedup": 19.9}, 3),
        ("launches", 0, {"kernels": 3}, 3),
        ("whole", 0, {"speedup": 2.3}, 4),
        ("whole", 1, {"speedup": 5.9}, 4),
        ("whole", 3, {"speedup": 9.9}, 5),
        ("lists", 1, {"share": 0.84}, 6),
        ("small", 0, {"over_torch": 0.61}, 7),
    ],
)
def test_one_figure_short_of_its_target_misses_it(section, position, figures, target):
    sections = good_sections()
    sections[section][position].update(figures)
    assert [verdict.met for verdict in cuda_report.verdicts(sections)] == [i != target for i in range(8)]


@pytest.mark.parametrize("missing", SECTIONS)
def test_a_section_that_did_not_run(machine, missing):
    sections = good_sections()
    del sections[missing]
    text = cuda_report.markdown(machine, sections, {missing: "RuntimeError: no\nluck"}, 60.0)
    title = cuda_report.CHAPTERS[missing][0]
    assert f"- {title}: RuntimeError: no luck" in text
    assert text.partition(f"## {title}\n")[2].split("\n## ")[0].endswith("Not measured in this run.\n")
    met = [verdict.met for verdict in cuda_report.verdicts(sections)]
    expected = {"norms": [0], "whole": [1, 4, 5], "in_place": [2], "lists": [3, 6], "launches": [3]}
    expected["small"] = [7]
    assert [i for i in range(8) if met[i] is None] == expected.get(missing, [])


def test_nothing_measured_is_said_and_no_figure_given(machine):
    found = cuda_report.verdicts({})
    assert {verdict.measured for verdict in found} == {"not measured"}
    assert cuda_report.markdown(machine, {}, {}, 0.0).count("Not measured in this run.") == len(SECTIONS)
    empty = {name: [] for name in cpu.PROGRAM.sections}
    assert {(verdict.measured, verdict.met) for verdict in cpu_report.verdicts(empty)} == {
        ("not measured", None)
    }


def test_wrong_results_are_named(machine):
    sections = good_sections()
    sections["whole"][0] |= {"correct": False, "fault": "the weight is not mask * original"}
    text = cuda_report.markdown(machine, sections, {}, 1.0)
    assert "- 4096 x 4096 float32 dim 0 n 2.0: the weight is not mask * original" in text


def test_results_outlive_a_section_that_fails(machine, tmp_path, capsys):
    rows = good_sections()

    def norms():
        """Two rows, then no more."""
        yield from rows["norms"][:2]
        raise RuntimeError("out of luck")

    def small():
        """All rows."""
        yield from rows["small"]

    written = []

    def write(found, failures):
        cuda_report.write(tmp_path, machine, found, failures, 1.0)
        written.append(json.loads((tmp_path / "cuda.json").read_text()))

    found, failures = cuda.run_sections({"norms": norms, "small": small}, write)
    assert list(found) == ["norms", "small"]
    assert failures == {"norms": "RuntimeError: out of luck"}
    # After each row, should the run be stopped, and where a section fails.
    assert [len(document["norms"]) for document in written] == [1, 2, 2, 2]
    assert "small" not in written[2]
    assert written[3]["small"][0]["over_torch"] == 0.6
    assert written[3]["failures"] == failures
    assert "## Targets" in (tmp_path / "cuda_cases.md").read_text()
    assert "out of luck" in capsys.readouterr().err


def test_cases_are_what_the_targets_speak_of():
    grid = list(cuda.large_cases([256 << 20, 1 << 30], DTYPES, [2]))
    grid += [Case(shape, torch.float32, dim, 2) for shape, dim in FURTHER_LAYOUTS]
    assert len(grid) == 2 * 4 * 2 * 2 + len(FURTHER_LAYOUTS)
    assert all(cuda_report.LARGE_BYTES <= case.bytes < 1.2e9 + (1 << 28) for case in grid)
    counts = {name: len(cuda.list_cases(name, 0)) for name in cuda.LISTS}
    assert counts == {"ResNet-50, 54 weights": 54, "7B transformer, 224 matrices": 224}
    parameters = sum(math.prod(case.shape) for case in cuda.list_cases("7B transformer, 224 matrices", 0))
    assert 6e9 < parameters < 7e9


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
class OnTheCpu:
    """In place of the GPU: every peer runs, on the CPU, and made-up times come back."""

    def __init__(self):
        self.ran = []

    def interleaved(self, peers, budget):
        for name, peer in peers.items():
            peer.run(peer.prepare())
            self.ran.append(name)
        timing = Timing({name: [1e-3] for name in peers})
        return timing, timing

    def copy_seconds(self, size, budget):
        return 1e-3


ON_THE_CPU = ["norms", "whole", "in_place", "sizes", "repeated", "small", "further"]


@pytest.fixture
def small_cases(monkeypatch):
    """Small tensors in place of large ones, on the CPU."""
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "MEBIBYTE", 1 << 7)
    monkeypatch.setattr(cuda, "ONE_MATRIX", (40, 40))
    monkeypatch.setattr(cuda, "MANY_CHANNELS", (5000, 3))
    monkeypatch.setattr(cuda, "CONVOLUTION", (12, 10, 3, 3))
    monkeypatch.setattr(cuda, "FURTHER_LAYOUTS", [((7, 9), 1)])
    monkeypatch.setattr(cuda_report, "LARGE_BYTES", 256 << 7)
    monkeypatch.setattr(cuda_report, "LARGEST_BYTES", 1024 << 7)


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "all"])
@pytest.mark.parametrize("section", ON_THE_CPU)
def test_the_cases_of_the_gpu_are_checked_and_timed(section, quick, small_cases):
    """All but what asks the device itself."""
    gpu = OnTheCpu()
    rows = list(cuda.Benchmark(gpu, quick).sections()[section]())
    assert rows
    assert report.faults({section: rows}) == []
    assert len(gpu.ran) == 2 * len(rows)
    for row in rows:
        report.show(row)


@pytest.fixture
def saved_run(machine, small_cases, tmp_path):
    """The folder that a whole run leaves, and its sections."""
    benchmark = cuda.Benchmark(OnTheCpu(), quick=False)
    benchmark.copy_bytes_per_second = 4.3e12
    sections = good_sections() | {name: list(benchmark.sections()[name]()) for name in ON_THE_CPU}
    for row in sections["norms"]:  # twice as long as n = inf, along dim 1 three times
        row["lnprune"] = {2: 2e-3 + 1e-3 * row["dim"]}.get(row["n"], 1e-3)
    sections["lists"] *= 2
    folder = tmp_path / "run"
    folder.mkdir()
    cuda_report.write(folder, machine, sections, {}, 60.0)
    ratios = {"over_lnprune": 0.9, "wall_over_lnprune": 1.1}
    variants = [{"variant": name, **made_up((8, 8)), **ratios} for name in cuda_variants.VARIANTS]
    variants[2] |= {"over_lnprune": 0.8} | {"variant": variants[1]["variant"]}
    variants[3] = {"variant": variants[3]["variant"], "fault": "not built: no luck"}
    report.save_json(folder / "variants.json", {}, [], {"variants": variants})
    (folder / "summary.txt").write_text(
        "a note with a folder\nstage  said\n" + 10 * "tests  9 passed in 1.0s\n"
    )
    return folder, sections


def test_the_page_of_a_run_on_a_gpu(saved_run, tmp_path, monkeypatch, capsys):
    saved, _ = saved_run
    monkeypatch.chdir(tmp_path)
    marks = "<!-- made by python -m benchmarks.cuda -->", "<!-- end of benchmarks.cuda -->"
    pathlib.Path("README.md").write_text(f"before\n\n{marks[0]}\n\nold\n\n{marks[1]}\n\nafter\n")
    monkeypatch.setattr(sys, "argv", ["benchmarks.cuda", "--from", str(saved)])
    assert cuda.main() == 0
    results = {f"benchmarks/results/{name}" for name in ("cuda.md", "cuda.png")}
    assert {name for name in written_in(tmp_path) if not name.startswith("run/")} == results | {"README.md"}
    page = (tmp_path / "benchmarks/results/cuda.md").read_text()
    assert len(page.splitlines()) <= 66
    assert "target" not in page
    assert "](cuda.png)" in page
    # Every call with its case, n = 2 against n = inf, and what the stages said.
    assert "float32 2.45 (2.00 to 3.00), bfloat16 2.45 (2.00 to 3.00)." in page
    for name in cuda_page.CALLS.values():
        assert f"\n| {name} | " in page
    assert page.count("9 passed in 1.0s") == 10
    assert "folder" not in page
    titles = [variant.title for variant in cuda_variants.VARIANTS.values()]
    assert f"\n| {titles[0]} | 1 | 0.90 (0.90 to 0.90) | 1.10 (1.10 to 1.10) |\n" in page
    assert f"\n| {titles[1]} | 2 | 0.85 (0.80 to 0.90) | 1.10 (1.10 to 1.10) |\n" in page
    assert f"\n| {titles[3]} | 1 | not built: no luck | |\n" in page
    lines = report.marked(pathlib.Path("README.md"), "benchmarks.cuda")
    assert "| 40 x 40 | float32 | 1.00 ms | 1.00 ms | 1.00 x | 1.00 ms | 1.00 ms | 1.00 x |" in lines
    assert "ResNet-50, 54 weights" in lines
    assert "on an a GPU, 20" in lines
    assert "wrote benchmarks/results/cuda.md" in capsys.readouterr().out


def test_a_run_that_has_nothing_to_plot_writes_no_page(saved_run, tmp_path, monkeypatch, capsys):
    saved, _ = saved_run
    monkeypatch.chdir(tmp_path)
    found = json.loads((saved / "cuda.json").read_text())
    del found["sizes"]
    (saved / "cuda.json").write_text(json.dumps(found))
    for folder, said in (
        (saved, "expected the sections copy and sizes, got copy"),
        (tmp_path, "cuda.json"),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmarks.cuda", "--from", str(folder)])
        with pytest.raises(SystemExit):
            cuda.main()
        assert said in capsys.readouterr().err
    assert not (tmp_path / "benchmarks").exists()


@pytest.mark.parametrize("name", list(cuda_variants.VARIANTS))
def test_a_variant_replaces_texts_that_are_there(name, monkeypatch):
    variant = cuda_variants.VARIANTS[name]
    found = cuda_variants.sources(name)
    for file, text, replacement in variant.texts:
        assert text not in found[file]
        assert replacement in found[file]
        kernels = cuda_variants.KERNELS
        # A header is part of something that is compiled.
        assert file in (*variant.compiled, cuda_variants.OPS) or file.endswith(".h")
        assert all((kernels / each).exists() for each in variant.compiled)
    assert (
        f"STABLE_TORCH_LIBRARY_IMPL({cuda_variants.namespace(name)}, CUDA, library)"
        in found["ops_cuda.cpp"]
    )
    lost = variant._replace(texts=(("launches.h", "no such text", ""),))
    monkeypatch.setitem(cuda_variants.VARIANTS, name, lost)
    with pytest.raises(ValueError, match=r"expected once in launches\.h, found 0 times: no such text"):
        cuda_variants.sources(name)


def test_variants_are_checked_and_timed(monkeypatch):
    monkeypatch.setattr(cuda_variants, "DEVICE", "cpu")
    for name, variant in cuda_variants.VARIANTS.items():
        timed = tuple(
            each._replace(cases=[case._replace(shape=(12, 10)) for case in each.cases[:3]])
            for each in variant.timed
        )
        monkeypatch.setitem(cuda_variants.VARIANTS, name, variant._replace(timed=timed))
    ours, gpu = torch.ops.lnprune, OnTheCpu()
    for name in cuda_variants.VARIANTS:
        rows = list(cuda_variants.rows_of(name, ours, ours, gpu))
        assert [row["correct"] for row in rows] == [True] * len(cuda_variants.VARIANTS[name].timed)
        for row in rows:
            report.show(row)

    class Wrong:
        @staticmethod
        def channel_norms(weights, dims, p):
            return [norms * (1 + 1e-11) for norms in ours.channel_norms(weights, dims, p)]

        @staticmethod
        def prune_channels(weights, *others):
            masks, masked = ours.prune_channels(weights, *others)
            return masks, [masked[0].neg(), *masked[1:]]

    rows = list(cuda_variants.rows_of("one_fence", ours, Wrong, gpu))
    assert [row["correct"] for row in rows] == [False] * 4
    assert [row["fault"] for row in rows] == [*3 * ["norms differ by 1.0e-11"], "tensor 3 differs"]


def test_a_variant_that_is_not_built_is_said(monkeypatch, capsys):
    rows = list(cuda_variants.measure(["one_fence"], {"one_fence": "ninja:\nno luck"}, OnTheCpu()))
    assert rows == [{"variant": "one_fence", "fault": "not built: ninja: no luck"}]
    report.show(rows[0])
    assert "one_fence" in capsys.readouterr().out
    for arguments, said in (
        (["nothing"], "no such variant: nothing; there are one_fence, "),
        ([], "no CUDA device"),
    ):
        monkeypatch.setattr(sys, "argv", ["cuda_variants", *arguments])
        with pytest.raises(SystemExit):
            cuda_variants.main()
        assert said in capsys.readouterr().err


def test_the_plot_of_a_gpu_shows_speeds(saved_run):
    _, sections = saved_run
    axes = cuda_page.picture(sections).axes
    assert [axis.get_title() for axis in axes[:2]] == [cuda_report.NORMS, cuda_report.WHOLE]
    for axis, passes in zip(axes, (1, 4), strict=False):
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
        assert list(drawn) == ["lnprune, dim 0", "torch, dim 0", "copy", "lnprune, dim 1", "torch, dim 1"]
        for label, times in (("lnprune, dim 0", passes), ("torch, dim 1", passes), ("copy", 2)):
            assert len(drawn[label]) == 9
            for size, speed in drawn[label]:
                assert speed == pytest.approx(times * size * 2**20 / 1e-3 * 1e-9)


def test_a_wrong_zero_is_a_fault():
    case = Case((8, 6), torch.float32, 0, 2)
    weight = torch.randn(8, 6)
    norms = calls.reference_norms(weight, case)
    pruned = weight.clone()
    pruned[norms.argsort()[:4]] = 0
    assert calls.zeros_fault(pruned, weight, norms, case) is None
    assert calls.zeros_fault(weight, weight, norms, case) == "8 of 8 channels kept"
    other = weight.clone()
    other[norms.argsort()[4:]] = 0
    assert "kept a norm of" in calls.zeros_fault(other, weight, norms, case)
    pruned[norms.argmax(), 0] += 1
    assert calls.zeros_fault(pruned, weight, norms, case) == "the weight is not mask * original"


def test_without_a_gpu_nothing_is_written(tmp_path):
    command = [sys.executable, "-m", "benchmarks.cuda", "--out", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "no CUDA device" in finished.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [
        ([1.0, 1.0, 1.0], 3),
        ([9.0, 5.0, 1.0, 1.0, 1.0], 5),
        ([1.0, 0.96, 0.93, 0.93], 3),  # by less than a twentieth at a time
        ([1.0, 2.0, 0.9, 2.0, 0.9], 5),  # slower times are no reason to go on, a lower one is
    ],
)
def test_times_have_settled_when_two_rounds_bring_none_that_is_lower(seconds, rounds):
    times = iter(seconds)
    assert settle({"one": lambda: next(times), "other": lambda: 1.0}, 60)
    assert len(list(times)) == len(seconds) - rounds


def test_times_that_do_not_settle_are_given_up():
    seconds = 1.0

    def faster():
        nonlocal seconds
        time.sleep(1e-3)
        seconds *= 0.9
        return seconds

    assert not settle({"one": faster}, 0.01)


def test_ratios_are_medians_within_rounds_with_their_quartiles():
    timing = Timing({"one": [1.0, 2.0, 6.0, 8.0, 100.0], "other": [1.0, 1.0, 2.0, 2.0, 10.0]}, {})
    assert timing.ratio("one", "other") == 3.0
    assert timing.quartiles("one", "other") == (2.0, 4.0)
    row = report.timed_columns(timing, over=("one", "other"))
    assert row == {"one": 6.0, "other": 2.0, "settled": True, "over": 3.0, "over_quartiles": [2.0, 4.0]}
    assert report.spread([row, row | {"over": 27.0, "over_quartiles": [8.0, 36.0]}], "over") == (
        "9.00 (4.00 to 12.00)"
    )


def test_peers_take_turns_and_what_they_all_read_is_read_before():
    order = []
    timed = {name: Peer(lambda _, name=name: order.append(name)) for name in ("one", "other")}
    timing = interleaved(timed, 1e-4, lambda: order.append("warm"), one_by_one=True)
    assert order[::2] == ["warm"] * (len(order) // 2)
    called = order[1::2]
    assert all({*called[i : i + 2]} == set(timed) for i in range(0, len(called), 2))
    assert len(timing.rounds["one"]) == len(timing.faults["other"]) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("state", [RECYCLED, FRESH])
def test_a_process_of_its_own_has_its_state_of_memory(state, monkeypatch):
    for name, value in RECYCLING.items():  # whatever this process was started with
        monkeypatch.setenv(name, value)
    found = program.measure_apart("benchmarks.cpu", ["loop"], state, Options(1e-5, True))
    assert (found["faults"] == 0) == (state == RECYCLED)
    (row,) = found["sections"]["loop"]
    assert (row["state"], row["shape"], row["correct"]) == (state, "24 of 384 x 384", True)


def test_others_at_work_are_noticed(monkeypatch):
    monkeypatch.setattr(program, "measure_apart", lambda *_: {"faults": 0, "sections": {}})
    figures = iter([(100.0, 10.0), (160.0, 40.0)])
    monkeypatch.setattr(program, "_busy_seconds", lambda: next(figures))
    clock = iter([0.0, 30.0])
    monkeypatch.setattr(program.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(program.os, "cpu_count", lambda: 2)
    assert program.measure(cpu.PROGRAM, Options(1e-4, True))[1]["others"] == 0.5


def test_the_model_is_the_list_of_weights():
    model = resnet50()
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    counts = collections.Counter(tuple(layer.weight.shape) for layer in layers)
    assert counts == {shape: count for count, shape in RESNET50}
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_peers_of_another_result_are_faults():
    pytest.importorskip("torch_pruning")
    weights, both = peers.torch_pruning_peers()
    assert peers._fault(both) is None
    assert len(weights) == 54 + 2 * 53 + 1
    ours = both["lnprune"].run(None)
    both["peer"] = Peer(lambda _: [norms * (1.001 if i == 20 else 1) for i, norms in enumerate(ours)])
    assert "relative difference to the peer 1.0e-03" in peers._fault(both)
    both["peer"] = Peer(lambda _: ours[:-1])
    assert "the peer has" in peers._fault(both)
    same = {"lnprune": Peer(lambda _: ours), "peer": Peer(lambda _: ours)}
    assert "relative error" in peers._fault(same, [norms * 1.001 for norms in ours])


SMALL_GRID = list(cases([(8, 8), (600, 700)], [torch.float32], [2, math.inf]))


def test_wrong_norms_are_faults(monkeypatch):
    grid = [Case((40, 30), dtype, 1, 2) for dtype in (torch.float32, *FLOAT8_DTYPES)]
    right = cpu.time_norms(grid, 1e-5)
    assert [row["correct"] for row in right] == [True, True]
    # Torch has no norm of float8, and a sum of it only through another dtype.
    assert ["speedup" in row for row in right] == [True, False]
    assert all(row["over_sum"] > 0 for row in right)
    channel_norms = lnprune.channel_norms
    monkeypatch.setattr(lnprune, "channel_norms", lambda w, n, dim: channel_norms(w, n, dim) * (1 + 1e-9))
    assert "relative error 1.0e-09" in cpu.time_norms(grid, 1e-5)[0]["fault"]


def test_wrong_lists_are_faults(monkeypatch):
    shapes = [(12, 8), (10, 6, 3, 3)]
    for permanent in (False, True):
        row = lists.time_list(shapes, 1, permanent, 1e-6)
        assert row["correct"]
        assert row["speedup"] > 0
    assert lists.time_in_place(shapes, 1, 0.3, 1e-6)["correct"]
    local_structured = lnprune.local_structured
    monkeypatch.setattr(
        lnprune,
        "local_structured",
        lambda pairs, amount, n, dim, **options: local_structured(pairs, amount, n, 0, **options),
    )
    for permanent in (False, True):
        assert lists.list_fault([torch.randn(shape) for shape in shapes], 1, permanent) is not None
    monkeypatch.setattr(lnprune, "local_structured", local_structured)
    assert lists.list_fault([torch.randn(shape) for shape in shapes], 1, True, 0.3) is None


def test_the_compiled_peer(monkeypatch):
    grid = [Case((64, 48), torch.float32, dim, 2) for dim in (0, 1)]
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rows = cpu.time_compiled(grid, 1e-5)
    assert all(row["correct"] and row["compiled_speedup"] > 0 for row in rows)
    other = lambda case: lambda weight: (torch.zeros_like(weight), weight)  # noqa: E731
    monkeypatch.setattr(calls, "compiled_pruning", other)
    assert cpu.time_compiled(grid, 1e-5)[0]["fault"] == "torch.compile has another mask"

    def fails(case):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(calls, "compiled_pruning", fails)
    rows = cpu.time_compiled(grid, 1e-5)
    assert [row["note"] for row in rows] == ["RuntimeError: no compiler"] * 2
    assert cpu_report._over_compiled(rows) == cpu_report.NOT_MEASURED


def test_norms_are_timed_in_every_dtype_order_and_dim():
    grid = [case for case in cpu.norm_cases(False) if case.bytes >= cpu_report.ONE_MEGABYTE]
    wanted = {(dtype, n, dim) for dtype in DTYPES + FLOAT8_DTYPES for n in NAMED_ORDERS for dim in (0, 1)}
    for cached in (True, False):
        some = [case for case in grid if (case.bytes < cpu_report.CACHED_BYTES) == cached]
        found = {(case.dtype, case.n, case.dim) for case in some if case.n in NAMED_ORDERS}
        # Of narrow types, only the largest weight is too large for a cache; it is timed in two orders.
        wide = (torch.float32, torch.float64)
        assert found == {key for key in wanted if cached or key[0] in wide or key[1] in (2, math.inf)}
    assert len(set(cpu.norm_cases(False))) == len(cpu.norm_cases(False))
    assert len(set(cpu.call_cases(False))) == len(cpu.call_cases(False))


def row_of(shape=(2048, 2048), dtype=torch.float32, dim=0, n=2, state=RECYCLED, **ratios):
    """A row of the CPU's report, whose ratios have themselves as quartiles."""
    row = report.case_row(Case(shape, dtype, dim, n), None) | {"state": state, "settled": True}
    times = {"lnprune": 1e-3, "torch": 1e-2, "floor": 1e-3, "sum": 1e-3, "torch_over_sum": 9.0}
    return row | times | ratios | {key + report.QUARTILES: [value, value] for key, value in ratios.items()}


def good_cpu_sections():
    """Sections whose figures meet every target of the CPU, by a little in each."""
    dims = (0, 1)
    half = torch.bfloat16
    norms = [row_of(dim=dim, over_sum=1.05, speedup=13.0) for dim in dims]
    # In cache, along rows: as the conversions allow.
    norms += [row_of((1024, 1024), half, 0, over_sum=1.1, speedup=0.6)]
    norms += [row_of((1024, 1024), half, 1, n, over_sum=1.0, speedup=400.0) for n in (2, math.inf)]
    norms += [row_of(n=3, over_sum=9.0, speedup=0.5), row_of((8, 8), over_sum=9.0, speedup=0.5)]
    first = [row_of(dim=dim, over_floor=0.79, speedup=5.1 + 6 * dim, over_torch=0.1) for dim in dims]
    first += [row_of(state=FRESH, over_floor=0.74, speedup=2.0, over_torch=0.5)]
    first += [row_of((8, 8), over_floor=9.0, speedup=2.05, over_torch=0.49)]
    masks = [row_of(dim=dim, speedup=3.6 + 2.5 * dim) | {"shape": lists.ALL_OF_RESNET50} for dim in dims]
    loop = row_of((384, 384), over_torch=0.44, speedup=2.2) | {"shape": "24 of 384 x 384"}
    peer = {"call": "a peer", "correct": True, "lnprune": 1e-3, "peer": 2e-3, "over_peer": 2.0}
    return {
        "norms": norms,
        "first": first,
        "repeated": [row_of(dim=dim, speedup=5.6 + 7 * dim) for dim in dims],
        "masks": masks + [row | {"state": FRESH} for row in masks],
        "in_place": [row_of(dim=dim, over_sum=1.4 + dim) for dim in dims],
        "compiled": [row_of(dim=dim, compiled_speedup=1.3 + 3 * dim) for dim in dims],
        "loop": [loop],
        "peers": [peer],
        "memory": [
            {"call": name, "dim": dim, "n": 2, "peak": peak}
            for name, peak in (("lnprune", 2.0), ("torch", 3.0))
            for dim in dims
        ],
    }


def test_figures_at_the_targets_of_the_cpu_meet_them():
    found = cpu_report.verdicts(good_cpu_sections())
    assert [verdict.met for verdict in found] == [True] * 10


@pytest.mark.parametrize(
    ("section", "position", "figures", "target"),
    [
        ("norms", 0, {"over_sum": 1.36, "speedup": 13.0}, 0),  # the mean is still low enough
        ("norms", 3, {"over_sum": 1.61}, 0),
        ("norms", 0, {"speedup": 0.94}, 1),
        ("first", 0, {"over_floor": 0.82}, 2),
        ("first", 2, {"over_floor": 0.76}, 2),
        ("first", 0, {"speedup": 4.9}, 3),
        ("first", 1, {"speedup": 9.0}, 3),
        ("repeated", 0, {"speedup": 5.4}, 4),
        ("repeated", 1, {"speedup": 11.0}, 4),
        ("masks", 0, {"speedup": 3.4}, 5),
        ("masks", 1, {"speedup": 5.9}, 5),
        ("in_place", 0, {"over_sum": 1.51}, 6),
        ("in_place", 1, {"over_sum": 2.51}, 6),
        ("compiled", 0, {"compiled_speedup": 1.19}, 7),
        ("compiled", 1, {"compiled_speedup": 2.9}, 7),
        ("loop", 0, {"over_torch": 0.46}, 8),
        ("first", 3, {"over_torch": 0.51}, 9),
    ],
)
def test_one_figure_short_of_its_target_of_the_cpu_misses_it(section, position, figures, target):
    sections = good_cpu_sections()
    sections[section][position].update(figures)
    met = [verdict.met for verdict in cpu_report.verdicts(sections)]
    assert met == [i != target for i in range(10)]


README = ROOT / report.README
RESULTS = ROOT / report.RESULTS


@pytest.mark.parametrize("name", ["cpu", "models", "coupling", "sharded", "experts", "checkpoints"])
def test_the_readme_says_what_the_page_says(name):
    lines = report.marked(README, f"benchmarks.{name}")
    assert lines.count("\n") >= 4
    assert lines in (RESULTS / f"{name}.md").read_text()
    assert not (RESULTS / f"{name}.json").exists()


@pytest.mark.parametrize("name", ["cpu", "models", "cuda", "coupling", "sharded", "experts", "checkpoints"])
def test_the_pages_are_one_screen_of_figures(name):
    page = (RESULTS / f"{name}.md").read_text()
    assert len(page.splitlines()) <= 66
    assert "target" not in page  # those are for makers, and go to the command's output and to build/


def test_the_page_of_the_cpu_shows_its_plots():
    page = (RESULTS / "cpu.md").read_text()
    for name in cpu_report.pictures(good_cpu_sections()):
        assert f"]({name}.png)" in page
        assert (RESULTS / f"{name}.png").exists()
    assert "](benchmarks/results/cpu.png)" in README.read_text()


@pytest.fixture(scope="module")
def cpu_sections():
    """A run of the smallest grid: figures of all kinds, those that take long made up."""
    made_up_sections = good_cpu_sections()
    sections = {
        "norms": cpu.time_norms(SMALL_GRID, 1e-4),
        "first": cpu.time_first(SMALL_GRID, 1e-4),
        "repeated": cpu.time_repeated([case for case in SMALL_GRID if case.n == 2], 1e-4),
        "loop": cpu.time_loop(2, Case((40, 30), torch.float32, 0, 2), 1e-4),
    }
    measured = {
        name: [{**row, "state": state} for state in (RECYCLED, FRESH) for row in rows]
        if name == "first"
        else [{**row, "state": RECYCLED} for row in rows]
        for name, rows in sections.items()
    }
    return made_up_sections | measured


TRUST = {"faults": {RECYCLED: 0, FRESH: 32}, "others": 0.04}


def run_cpu(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["benchmarks.cpu", *arguments])
    return program.main(cpu.PROGRAM)


def written_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_writes_page_pictures_readme_and_every_case(cpu_sections, monkeypatch, tmp_path, capsys):
    given = []
    monkeypatch.setattr(
        program, "measure", lambda _, options: given.append(options) or (cpu_sections, TRUST)
    )
    begin, end = "<!-- made by python -m benchmarks.cpu -->", "<!-- end of benchmarks.cpu -->"
    (tmp_path / "README.md").write_text(f"before\n\n{begin}\n\nold\n\n{end}\n\nafter\n")
    assert run_cpu(monkeypatch, tmp_path) == 0
    assert given == [Options(cpu.PROGRAM.budget, False)]
    results = {f"benchmarks/results/{name}" for name in ("cpu.md", "cpu.png", "cpu_norms.png")}
    built = {"build/benchmarks/cpu.json", "build/benchmarks/cpu_targets.md"}
    assert written_in(tmp_path) == results | {"README.md"} | built
    targets = "\n".join(report.verdict_lines(cpu_report.verdicts(cpu_sections)))
    assert (tmp_path / "build/benchmarks/cpu_targets.md").read_text() == targets + "\n"
    assert targets in capsys.readouterr().out
    machine = {"threads": torch.get_num_threads()}
    lines = "\n".join(cpu_report.speed_lines(machine, cpu_sections))
    text = (tmp_path / "README.md").read_text()
    assert text == f"before\n\n{begin}\n\n{lines}\n\n{end}\n\nafter\n"
    page = (tmp_path / "benchmarks/results/cpu.md").read_text()
    assert lines in page
    assert "| 8 x 8 | float32 | " in lines
    assert "| ResNet-50, 54 weights | float32 | 10.00 ms | 1.00 ms | 3.60 x | " in lines
    assert "Page faults of filling 64 MiB: recycled 0 / fresh 32." in page
    assert "Other processes took 4 % of the processor." in page
    assert "no figure" not in page
    assert "| first call, fresh memory | " in page
    assert "| ResNet-50, 54 weights: a peer | 2.00 ms | 1.00 ms | 2.00 x |" in page
    assert "New memory while a call runs: 2.0 times the size of the weight, with torch 3.0 times." in lines
    mean = geometric_mean(row["speedup"] for row in cpu_sections["first"] if row["state"] == RECYCLED)
    assert f"On {torch.get_num_threads()} thread" in lines
    assert f"mean of all {len(SMALL_GRID)} first calls that were timed: {mean:.1f} x." in lines
    # The page again, from every case alone.
    assert run_cpu(monkeypatch, tmp_path, "--from", "build/benchmarks/cpu.json", "--out", "again") == 0
    assert (tmp_path / "again" / "cpu.md").read_text() == page
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize("arguments", [["--quick"], ["--budget", "0.01"]])
def test_a_trial_leaves_the_results_alone(cpu_sections, monkeypatch, tmp_path, arguments):
    monkeypatch.setattr(program, "measure", lambda *_: (cpu_sections, TRUST))
    assert run_cpu(monkeypatch, tmp_path, *arguments) == 0
    names = ("cpu.md", "cpu.png", "cpu_norms.png", "cpu.json", "cpu_targets.md")
    assert written_in(tmp_path) == {f"build/benchmarks/{name}" for name in names}


def test_a_run_that_others_spoilt_says_so_wherever_its_figures_go(cpu_sections, monkeypatch, tmp_path):
    monkeypatch.setattr(program, "measure", lambda *_: (cpu_sections, TRUST | {"others": 0.3}))
    begin, end = "<!-- made by python -m benchmarks.cpu -->", "<!-- end of benchmarks.cpu -->"
    (tmp_path / "README.md").write_text(f"{begin}\n\nold\n\n{end}")
    assert run_cpu(monkeypatch, tmp_path) == 0
    warning = "**Measured while other processes had 30 % of the processor: no figure here means much.**"
    for page in ("README.md", "benchmarks/results/cpu.md"):
        assert warning in (tmp_path / page).read_text()


def test_a_wrong_result_is_named_and_fails_the_run(cpu_sections, monkeypatch, tmp_path):
    sections = {name: [dict(row) for row in rows] for name, rows in cpu_sections.items()}
    sections["first"][0] |= {"correct": False, "fault": "on purpose"}
    sections["peers"][0] |= {"correct": False, "fault": "this one too"}
    monkeypatch.setattr(program, "measure", lambda *_: (sections, TRUST))
    assert run_cpu(monkeypatch, tmp_path, "--quick") == 1
    page = (tmp_path / "build/benchmarks/cpu.md").read_text()
    assert "; 2 failed." in page
    assert "- 8 x 8 float32 dim 0 n 2: on purpose\n- a peer: this one too\n" in page


def test_slower_calls_are_named(cpu_sections):
    sections = {name: [dict(row) for row in rows] for name, rows in cpu_sections.items()}
    for row in (row for rows in sections.values() for row in rows):
        row["speedup"] = 2.0
    machine = {"threads": 2}
    assert cpu_report.speed_lines(machine, sections)[-1] == (
        "Slower than torch: first calls none of 8; repeated calls none of 4; norms alone none of 8."
    )
    sections["first"][7]["speedup"] = 0.5
    for row in sections["norms"][:5]:
        row["speedup"] = 0.25
    assert cpu_report.speed_lines(machine, sections)[-1] == (
        "Slower than torch: first calls 1 of 8 (600 x 700 float32 dim 1 n inf: 0.50 x); repeated calls "
        "none of 4; norms alone 5 of 8 (the slowest 8 x 8 float32 dim 0 n 2: 0.25 x; of 1 MiB and more "
        "600 x 700 float32 dim 0 n 2: 0.25 x)."
    )


def test_the_page_of_coupled_channels_says_what_its_figures_say():
    sections = {
        "labels": [
            {"model": "ResNet-50", "groups": 37, "labels": 0.4, "forward": 0.2, "with_trial": 6.0}
            | {"over_forward": 2.0, "state": program.RECYCLED}
        ],
        "ranking": [
            {"call": call, "correct": True, "lnprune": 0.01, "peer": 0.09, "over_peer": 9.0, "state": state}
            for call in coupling.SPEEDUPS
            for state in (program.RECYCLED, program.FRESH)
        ],
    }
    assert set(sections) == set(coupling.PROGRAM.sections)
    machine = report.environment("benchmarks.coupling") | TRUST
    assert [verdict.met for verdict in coupling.verdicts(sections)] == [True] * 5
    page = coupling.markdown(machine, sections, 60.0)
    assert "\n".join(coupling.speed_lines(machine, sections)) in page
    assert "| again | memory as a process starts | yes | 10.00 ms | 90.00 ms | 9.00 x |" in page
    sections["labels"][0]["labels"] = 1.01
    sections["ranking"][2] |= {"over_peer": 7.9, "correct": False, "fault": "on purpose"}
    assert [verdict.met for verdict in coupling.verdicts(sections)] == [False, True, True, False, True]
    assert "on purpose" in coupling.markdown(machine, sections, 60.0)


def test_norms_of_coupled_channels_are_checked_before_they_are_timed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    coupled = lnprune.couple(model, torch.randn(2, 3))
    assert coupling.fault_of(coupled, model) is None
    ranked = coupled.rank(2)
    coupled.rank = lambda n: ranked
    model[0].weight.data[2] += 1
    assert "relative error" in coupling.fault_of(coupled, model)


def test_the_page_of_whole_models_says_what_its_figures_say():
    sections = {
        "lists": [
            row_of(dim=dim, speedup=30.0) | {"shape": shape, "call": call}
            for shape, call in (
                ("ResNet-50, 54 weights", "permanent"),
                ("1000 of 16 x 16", "masks"),
                ("1000 of 16 x 16", "permanent"),
            )
            for dim in (0, 1)
        ],
        "in_place": [row_of(over_sum=1.25) | {"amount": 0.3}],
        "selections": [{"selection": "local", "rank": 1e-2, "select": 1e-3, "over_rank": 0.09}],
        "many": [{"channels": 1_000_000, "normalize": "size", "lnprune": 0.5}],
        "memory": [{"call": "permanent", "dim": 0, "peak": 0.0, "bytes_per_channel": 12.0}],
    }
    assert set(sections) == set(models.PROGRAM.sections)
    machine = report.environment("benchmarks.models") | TRUST
    assert [verdict.met for verdict in models.verdicts(sections)] == [True] * 7
    page = models.markdown(machine, sections, 60.0)
    assert "| 0.3 | 1.00 ms | 1.00 ms | 1.25 (1.25 to 1.25) |" in page
    assert "| local | 10.00 ms | 1.00 ms | 0.090 |" in page
    assert "\n".join(models.speed_lines(machine, sections)) in page
    sections["lists"][0] |= {"speedup": 0.5, "correct": False, "fault": "on purpose"}
    assert [verdict.met for verdict in models.verdicts(sections)] == [False] + [True] * 6
    page = models.markdown(machine, sections, 60.0)
    assert "1 failed" in page
    assert "on purpose" in page


def sharded_sections():
    """Times of a machine that takes 0.1 ms for each other rank and sends a gigabyte per second."""
    layers = [
        {"model": name, "ranks": count, "dim": dim, "local": 0.4 * number / count, "exchange": 0.009}
        | {"rank": 0.5 / count, "gather": 1.0, "over_local": 0.09, "over_local_quartiles": [0.08, 0.1]}
        for count in sharded.RANKS
        for name, number in sharded.LAYERS.items()
        for dim in (0, 1)
    ]
    vectors = []
    for count in sharded.RANKS:
        for length in sharded.VECTORS:
            seconds = 1e-4 * (count - 1) + 1e-9 * sharded.sent_bytes(length, count)
            vectors.append({"channels": length, "ranks": count, "exchange": seconds})
    return {"layers": layers, "vectors": vectors}


def test_the_page_of_shards_says_what_its_figures_say():
    sections = sharded_sections()
    assert set(sections) == set(sharded.PROGRAM.sections)
    machine = report.environment("benchmarks.sharded") | TRUST
    assert [verdict.met for verdict in sharded.verdicts(sections)] == [True] * 4
    page = sharded.markdown(machine, sections, 60.0)
    assert "\n".join(sharded.speed_lines(machine, sections)) in page
    assert "100 us, 1.00 GB/s, 1.01 GB/s" in page
    assert "Nothing in this table was run" in page
    sections["layers"][-1]["over_local"] = 0.11
    assert [verdict.met for verdict in sharded.verdicts(sections)] == [True] * 3 + [False]


def test_an_estimate_is_that_of_its_constants():
    sections = sharded_sections()
    rows = {(row["model"], row["ranks"]): row for row in sharded.estimates(sections)}
    assert len(rows) == 12
    # 32 layers, each with four matrices of 4096 x 4096 and three of 4096 x 11008, 42,496 channels.
    row = rows["7 B", 64]
    weights, channels = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008), 32 * 42_496
    rate = 2 * weights / 32 / 0.4
    assert math.isclose(row["local"], 2 * weights / 64 / rate, rel_tol=1e-6)
    assert math.isclose(row["exchange"], 63e-4 + 16e-9 * channels * 63 / 64, rel_tol=1e-6)
    assert 3.9e11 < sharded.decoder_size(*sharded.DECODERS["400 B"])[0] < 4.1e11
    assert 6.6e10 < sharded.decoder_size(*sharded.DECODERS["70 B"])[0] < 7e10


@pytest.mark.slow
def test_ranks_time_what_they_exchange():
    found = sharded._on_ranks(2, sharded.exchange_vectors, 3)
    assert {int(length): len(seconds) for length, seconds in found.items()} == dict.fromkeys(
        sharded.VECTORS, 3
    )
    assert all(second > 0 for seconds in found.values() for second in seconds)


@pytest.mark.slow  # waits for the disk, and for a process of its own for each file
def test_the_page_of_checkpoints(tmp_path, monkeypatch):
    """A run of small files: its figures are right, and both sides of each target are seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "WIDTH", 32)
    monkeypatch.setattr(checkpoints, "INNER", 64)
    files = checkpoints.time_files(1e-3, 1e4)
    assert [row["call"] for row in files] == [
        f"{call}, {dtype}, dim {dim}" for dtype in ("bfloat16", "float32") for call, dim in checkpoints.MOST
    ]
    assert all(row["correct"] and row["lnprune"] > 0 and row["cp"] > 0 for row in files)
    assert list((tmp_path / checkpoints.BUILD).iterdir()) == []
    memory = checkpoints.measure_memory(1e4)
    assert {row["largest"] for row in memory} == {32 * 64 * 4 / 1e6}
    assert all(50 < row["resident"] < 2000 for row in memory)
    quick = {
        "over_cp": 0.5,
        "over_read": 1.0,
        "over_cp_quartiles": [0.4, 0.6],
        "over_read_quartiles": [1, 1],
    }
    slow = {"over_cp": 9.0, "over_read": 9.0, "over_cp_quartiles": [8, 9], "over_read_quartiles": [8, 9]}
    for changes, resident, met in ((quick, 200.0, True), (slow, 900.0, False)):
        sections = {
            "files": [{**row, **changes, "state": RECYCLED} for row in files],
            "memory": [{**row, "resident": resident, "state": RECYCLED} for row in memory],
        }
        assert {verdict.met for verdict in checkpoints.verdicts(sections)} == {met}
        machine = report.environment("benchmarks.checkpoints") | TRUST
        page = checkpoints.markdown(machine, sections, 60.0)
        assert "\n".join(checkpoints.speed_lines(machine, sections)) in page


def test_a_file_with_other_zeros_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "WIDTH", 32)
    monkeypatch.setattr(checkpoints, "INNER", 64)
    path = checkpoints.make(tmp_path / "a.safetensors", torch.float32, 1e4)
    assert not checkpoints.is_right(path, path, 0)
