"""`make gpu`: its stages, their limits and its summary, without a GPU."""

import subprocess
import sys
import time

import gpu
import pytest


def stage(name, *codes, limit=60.0, log="log"):
    """A stage that runs pieces of Python."""
    return gpu.Stage(name, limit, log, [gpu.python("-c", code) for code in codes], {"VALUE": name})


def test_a_stage_that_fails_does_not_stop_those_after_it(tmp_path, capsys):
    stages = [
        stage("first", "import os; print('VALUE is', os.environ['VALUE'])"),
        stage("second", "raise SystemExit('no luck')", "print('never reached')"),
        stage("third", "print('reached')"),
    ]
    results = gpu.run_stages(stages, tmp_path, ["a note"])
    assert [result.status for result in results] == ["passed", "failed with exit status 1", "passed"]
    log = (tmp_path / "log").read_text()
    assert "VALUE is first\n" in log
    assert "never reached\n" not in log
    assert log.endswith("reached\n")
    assert "    no luck" in capsys.readouterr().out
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert lines == gpu.summary(results, ["a note"])
    assert [line.split()[0] for line in lines] == ["a", "stage", "first", "second", "third"]


def test_a_stage_is_stopped_at_its_limit_with_all_that_it_started(tmp_path):
    late = f"import time; time.sleep(4); open({str(tmp_path / 'late')!r}, 'w')"
    code = (
        "import subprocess, sys, time\n"
        "print('began')\n"
        f"subprocess.Popen([sys.executable, '-c', {late!r}])\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    results = gpu.run_stages([stage("slow", code, limit=2.0), stage("next", "")], tmp_path, [])
    assert [result.status for result in results] == ["stopped at its time limit", "passed"]
    assert "began\n" in (tmp_path / "log").read_text()
    time.sleep(max(0.0, start + 6 - time.monotonic()))
    assert not (tmp_path / "late").exists()


def test_stages_end_within_the_time_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SECONDS_IN_ALL", 1.5)
    stages = [stage("slow", "import time; time.sleep(60)"), stage("late", "", log="late.log")]
    results = gpu.run_stages(stages, tmp_path, [])
    assert [result.status for result in results] == ["stopped at its time limit", "no time left"]
    assert not (tmp_path / "late.log").exists()


def test_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    stages, _ = gpu.plan(tmp_path, "9.0", 16)
    names = [one.name for one in stages]
    assert names == ["build", "tests", "short list", *gpu.SANITIZERS, "benchmarks"]
    assert {one.log for one in stages} <= set(gpu.OUTPUTS)
    assert len(gpu.OUTPUTS) <= 8
    assert gpu.SECONDS_IN_ALL < 9 * 60
    assert stages[0].environment == {"TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": "16"}
    for one in stages:
        for command in one.commands:
            assert all(type(part) is str for part in command)


def test_what_is_not_installed_is_left_out_and_said(tmp_path, monkeypatch):
    find_spec = gpu.importlib.util.find_spec
    absent = {"hypothesis", "xdist"}
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name)
    )
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    stages, notes = gpu.plan(tmp_path, "9.0", 16)
    assert [one.name for one in stages] == ["build", "tests", "short list", "benchmarks"]
    (command,) = stages[1].commands
    assert "-n" not in command
    left_out = {"test_norms.py", "test_selection.py", "test_repeated.py", "test_ln_structured.py"}
    assert {line.split()[0] for line in notes} == left_out | {"compute-sanitizer"}
    assert all("hypothesis" in line for line in notes if line.startswith("test_"))
    files = {part.rpartition("/")[2] for part in command if part.endswith(".py")}
    assert files == set(gpu.DEVICE_TESTS) - left_out


def test_imports_of_imported_test_files_count(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TESTS", tmp_path)
    (tmp_path / "test_one.py").write_text("import os.path\nimport helper\nfrom torch import nn\n")
    (tmp_path / "helper.py").write_text("from no_such_module.part import thing\nimport lnprune\n")
    assert gpu.missing_imports(tmp_path / "test_one.py") == {"no_such_module"}


@pytest.mark.parametrize("name", [name for name in gpu.DEVICE_TESTS if name != "test_cuda.py"])
def test_files_that_are_run_are_run_on_every_device(name):
    text = (gpu.TESTS / name).read_text()
    assert 'parametrize("device", cases.DEVICES' in text or 'parametrize("device", DEVICES)' in text


def test_without_a_gpu_nothing_is_run(tmp_path):
    # A torch that sees no device, also where there is one.
    command = [sys.executable, str(gpu.TESTS / "gpu.py"), str(tmp_path)]
    finished = subprocess.run(
        command,
        env={**gpu.os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert "nothing was run: " in finished.stdout
    assert "sees no CUDA device" in finished.stdout
    assert list(tmp_path.iterdir()) == []
