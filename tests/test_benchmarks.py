"""The benchmarks' reports: what they make of made-up figures, and of sections that failed or never ran."""

import json
import math
import pathlib
import subprocess
import sys

import pytest
import torch

from benchmarks import cpu, cpu_report, cuda, cuda_report, models, report
from benchmarks.shapes import DTYPES, FURTHER_LAYOUTS, Case, cases

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
    size = 1 << 30
    return {
        "copy": [{"size": "256 MiB", "copy": 1e-4, "gigabytes_per_second": 4300.0}],
        "norms": [made_up((8192, 8192), n, share=0.9, error=0.0) for n in (1, 2, math.inf)],
        "whole": [made_up((4096, 4096), speedup=3.0, share=0.1), made_up((8192, 8192), share=0.85)],
        "lists": [
            made_up((8, 8), speedup=20.0) | {"shape": "ResNet-50, 54 weights", "bytes": size},
            made_up((8, 8), share=0.85) | {"shape": "7B transformer, 224 matrices", "bytes": size},
        ],
        "repeated": [made_up((8192, 8192))],
        "small": [made_up((64, 64), over_torch=0.6)],
        "memory": [made_up((8, 8)) | {"peak": 2.001, "beyond_outputs": 12345, "torch_peak": 3.5}],
        "launches": [{"call": cuda_report.RESNET50_LAUNCHES, "kernels": 2, "copies": 0, "fills": 0}],
    }


def test_figures_at_the_targets_meet_them(machine):
    sections = good_sections()
    found = cuda_report.verdicts(sections)
    assert [verdict.met for verdict in found] == [True] * 6
    text = cuda_report.markdown(machine, sections, {}, 60.0)
    assert "not measured" not in text.lower()
    assert "; 2 launches | yes |" in text
    assert "| 8192 x 8192 | float32 | 0 | inf |" in text


@pytest.mark.parametrize(
    ("section", "position", "figures", "target"),
    [
        ("norms", 1, {"share": 0.89}, 0),
        ("whole", 1, {"share": 0.84}, 1),
        ("whole", 0, {"speedup": 2.9}, 2),
        ("lists", 0, {"speedup": 19.9}, 3),
        ("launches", 0, {"kernels": 3}, 3),
        ("lists", 1, {"share": 0.84}, 4),
        ("small", 0, {"over_torch": 0.61}, 5),
    ],
)
def test_one_figure_short_of_its_target_misses_it(section, position, figures, target):
    sections = good_sections()
    sections[section][position].update(figures)
    assert [verdict.met for verdict in cuda_report.verdicts(sections)] == [i != target for i in range(6)]


@pytest.mark.parametrize("missing", SECTIONS)
def test_a_section_that_did_not_run(machine, missing):
    sections = good_sections()
    del sections[missing]
    text = cuda_report.markdown(machine, sections, {missing: "RuntimeError: no\nluck"}, 60.0)
    title = cuda_report.CHAPTERS[missing][0]
    assert f"- {title}: RuntimeError: no luck" in text
    assert text.partition(f"## {title}\n")[2].split("\n## ")[0].endswith("Not measured in this run.\n")
    met = [verdict.met for verdict in cuda_report.verdicts(sections)]
    expected = {"norms": [0], "whole": [1, 2], "lists": [3, 4], "small": [5], "launches": [3]}
    assert [i for i in range(6) if met[i] is None] == expected.get(missing, [])


def test_nothing_measured_is_said_and_no_figure_given(machine):
    found = cuda_report.verdicts({})
    assert {verdict.measured for verdict in found} == {"not measured"}
    assert cuda_report.markdown(machine, {}, {}, 0.0).count("Not measured in this run.") == len(SECTIONS)
    empty = {name: [] for name in ("norms", "first", "compiled", "repeated", "memory")}
    assert {verdict.measured for verdict in cpu_report.verdicts(empty)} == {"not measured"}


def test_without_a_copy_there_are_no_shares(machine):
    sections = good_sections()
    for row in [row for rows in sections.values() for row in rows if "share" in row]:
        del row["share"], row["over_predicted"]
    met = [verdict.met for verdict in cuda_report.verdicts(sections)]
    assert met == [None, None, True, True, None, True]
    assert "of the copy |" not in cuda_report.markdown(machine, sections, {}, 1.0).partition("## Norms")[2]


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
    assert [len(document["norms"]) for document in written] == [2, 2]
    assert "small" not in written[0]
    assert written[1]["small"][0]["over_torch"] == 0.6
    assert written[1]["failures"] == failures
    assert "## Targets" in (tmp_path / "cuda.md").read_text()
    assert "out of luck" in capsys.readouterr().err


def test_infinite_orders_travel_as_text(machine, tmp_path):
    cuda_report.write(tmp_path, machine, good_sections(), {}, 1.0)
    document = json.loads((tmp_path / "cuda.json").read_text())
    assert [row["n"] for row in document["norms"]] == [1, 2, "inf"]
    assert document["environment"]["gpu"] == "a GPU"
    assert len(document["targets"]) == 6


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
def test_without_a_gpu_nothing_is_written(tmp_path):
    command = [sys.executable, "-m", "benchmarks.cuda", "--out", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "no CUDA device" in finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_page_of_whole_models_says_what_its_figures_say():
    folder = ROOT / "benchmarks" / "results"
    saved = json.loads((folder / "models.json").read_text())
    sections = {name: saved[name] for name in models.CHAPTERS}
    text = models.markdown(saved["environment"], sections, saved["seconds"])
    assert text == (folder / "models.md").read_text()
    assert [verdict._asdict() for verdict in models.verdicts(sections)] == saved["targets"]
    sections["lists"][0] |= {"speedup": 0.5, "correct": False, "fault": "on purpose"}
    assert not models.verdicts(sections)[0].met
    assert "1 failed" in models.markdown(saved["environment"], sections, saved["seconds"])


README = ROOT / report.README
RESULTS = ROOT / report.RESULTS


def test_the_readme_says_what_the_page_of_whole_models_says():
    sections = json.loads((RESULTS / "models.json").read_text())
    assert report.marked(README, "benchmarks.models").splitlines() == models.speed_lines(sections)


def test_the_readme_says_what_the_page_of_the_cpu_says():
    lines = report.marked(README, "benchmarks.cpu")
    assert lines.count("\n") > 10
    assert lines in (RESULTS / "cpu.md").read_text()


def test_the_page_of_the_cpu_is_about_one_screen():
    assert len((RESULTS / "cpu.md").read_text().splitlines()) <= 75
    assert not (RESULTS / "cpu.json").exists()


@pytest.fixture(scope="module")
def cpu_sections():
    """A run of the smallest grid."""
    grid = list(cases([(8, 8), (600, 700)], [torch.float32], [2, math.inf]))
    return {
        "norms": cpu.time_norms(grid, 1e-4),
        "first": cpu.time_first(grid, 1e-4),
        "compiled": [],
        "repeated": cpu.time_repeated([case for case in grid if case.n == 2], 1e-4),
        "memory": [
            {"call": name, "dim": dim, "n": 2, "peak": 2.0 if name == "lnprune" else 3.0}
            for name in ("lnprune", "torch")
            for dim in (0, 1)
        ],
    }


def run_cpu(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["benchmarks.cpu", *arguments])
    assert cpu.main() == 0


def test_a_run_writes_page_picture_readme_and_every_case(cpu_sections, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "measure", lambda quick: cpu_sections)
    begin, end = "<!-- made by python -m benchmarks.cpu -->", "<!-- end of benchmarks.cpu -->"
    (tmp_path / "README.md").write_text(f"before\n\n{begin}\n\nold\n\n{end}\n\nafter\n")
    run_cpu(monkeypatch, tmp_path)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    results = {"benchmarks/results/cpu.md", "benchmarks/results/cpu.png", "README.md"}
    assert written == results | {"build/benchmarks/cpu.json"}
    lines = "\n".join(cpu_report.speed_lines(cpu_sections))
    text = (tmp_path / "README.md").read_text()
    assert text == f"before\n\n{begin}\n\n{lines}\n\n{end}\n\nafter\n"
    page = (tmp_path / "benchmarks/results/cpu.md").read_text()
    assert lines in page
    assert "| 8 x 8 | float32 | 0 | " in lines
    assert "| float32, under 1 MiB | " in page
    assert "| float32, 1 to 32 MiB | " in page
    assert "over 32 MiB" not in page
    assert "Memory at the peak of a call, in weights: 2.00, torch 3.00." in lines
    # The page again, from every case alone.
    run_cpu(monkeypatch, tmp_path, "--from", "build/benchmarks/cpu.json", "--out", "again")
    assert (tmp_path / "again" / "cpu.md").read_text() == page
    assert (tmp_path / "README.md").read_text() == text


def test_a_quick_run_leaves_the_results_alone(cpu_sections, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "measure", lambda quick: cpu_sections if quick else None)
    run_cpu(monkeypatch, tmp_path, "--quick")
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {f"build/benchmarks/cpu.{kind}" for kind in ("md", "png", "json")}


def test_slower_calls_are_named(cpu_sections):
    sections = {name: [dict(row) for row in rows] for name, rows in cpu_sections.items()}
    for rows in sections.values():
        for row in rows:
            row["speedup"] = 2.0
    assert cpu_report.speed_lines(sections)[-1] == (
        "Slower than torch: first calls none of 8; repeated calls none of 4; norms alone none of 8."
    )
    sections["first"][-1]["speedup"] = 0.5
    for row in sections["norms"][:5]:
        row["speedup"] = 0.25
    assert cpu_report.speed_lines(sections)[-1] == (
        "Slower than torch: first calls 1 of 8 (600 x 700 float32 dim 1 n inf: 0.50 x); repeated calls "
        "none of 4; norms alone 5 of 8 (1 of them with n = 2 along dim 0, 4 on 8 x 8; down to 0.25 x)."
    )


def test_a_page_without_the_marks_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="expected the lines"):
        report.replace_marked(page, "benchmarks.cpu", ["new"])
    assert page.read_text() == "no marks\n"
