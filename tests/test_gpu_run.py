"""`make gpu`: its stages, their limits and its summary, without a GPU."""

import re
import subprocess
import sys
import time

import gpu
import pytest


def stage(name, *codes, limit=60.0, **options):
    """A group of one stage, which runs pieces of Python."""
    return [gpu.Stage(name, limit, [gpu.python("-c", code) for code in codes], {"VALUE": name}, **options)]


def test_a_stage_that_fails_does_not_stop_those_after_it(tmp_path, capsys):
    stages = [
        stage("first", "import os; print('VALUE is', os.environ['VALUE'])"),
        stage("second", "raise SystemExit('no luck')", "print('never reached')"),
        stage("third", "print('reached')"),
    ]
    results = gpu.run_stages(stages, tmp_path, ["a note"])
    assert [result.status for result in results] == ["passed", "failed with exit status 1", "passed"]
    log = (tmp_path / gpu.LOG).read_text()
    assert "== first\n$ " in log
    assert "VALUE is first\n" in log
    assert "never reached\n" not in log
    assert log.endswith("reached\n")
    assert "    no luck" in capsys.readouterr().out
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert lines == gpu.summary(results, ["a note"])
    assert [line.split()[0] for line in lines] == ["a", "stage", "first", "second", "third"]


@pytest.mark.slow
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
    assert "began\n" in (tmp_path / gpu.LOG).read_text()
    time.sleep(max(0.0, start + 6 - time.monotonic()))
    assert not (tmp_path / "late").exists()


def test_stages_end_within_the_time_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SECONDS_IN_ALL", 1.5)
    stages = [stage("slow", "import time; time.sleep(60)"), stage("late", "", log="late.txt")]
    results = gpu.run_stages(stages, tmp_path, [])
    assert [result.status for result in results] == ["stopped at its time limit", "no time left"]
    assert "$ " not in (tmp_path / "late.txt").read_text()


def test_stages_of_a_group_run_side_by_side(tmp_path):
    wait = (
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)"
    )
    files = [str(tmp_path / name) for name in ("one", "other")]
    other = tmp_path / "sources"
    other.mkdir()
    group = [
        gpu.Stage("here", 20.0, [gpu.python("-c", wait, *files)], {}),
        gpu.Stage("there", 20.0, [gpu.python("-c", wait, *files[::-1])], {}, other, gpu.OTHER_LOG),
    ]
    results = gpu.run_stages([group, stage("next", "")], tmp_path, [])
    assert [(result.name, result.status) for result in results] == [
        ("here", "passed"),
        ("there", "passed"),
        ("next", "passed"),
    ]
    assert "== there\n" in (tmp_path / gpu.OTHER_LOG).read_text()


def test_a_stage_of_other_sources_runs_there(tmp_path):
    other = tmp_path / "sources"
    other.mkdir()
    (other / "only_there.py").write_text("print('imported')")
    code = "import os, only_there; print(os.getcwd(), os.environ['PYTHONPATH'])"
    gpu.run_stages([stage("there", code, sources=other)], tmp_path, [])
    assert f"imported\n{other} {other}\n" in (tmp_path / gpu.LOG).read_text()


def names_of(groups):
    return [[one.name for one in group] for group in groups]


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_the_first_call(tmp_path, tools):
    groups, _ = gpu.plan(tmp_path, "9.0", 16)
    # What matters most comes first. All but the sanitizers fit, each stage to its limit.
    assert names_of(groups) == [[name] for name in gpu.FIRST_CALL]
    assert gpu.FIRST_CALL == ("build", "short-list", "tests", "benchmarks", "memcheck", "racecheck")
    limits = [one.limit for group in groups for one in group if one.name not in gpu.SANITIZERS]
    assert sum(limits) < gpu.SECONDS_IN_ALL <= 400
    assert groups[0][0].environment == {"TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": "16"}
    for group in groups:
        for one in group:
            assert one.log in gpu.OUTPUTS
            assert all(type(part) is str for command in one.commands for part in command)
    assert len(gpu.OUTPUTS) <= 8


def test_stages_by_name_keep_their_order(tmp_path, tools):
    chosen = ["profile", "initcheck", "models", "drop-in", "build"]
    groups, notes = gpu.plan(tmp_path, "9.0", 16, chosen)
    assert names_of(groups) == [["build"], ["initcheck"], ["drop-in"], ["models"], ["profile"]]
    assert notes == []
    (command,) = groups[-1][0].commands
    assert command[:3] == ["ncu", "--clock-control", "none"], "the device's clocks are left alone"


def test_another_commit_is_built_beside_this_one_and_timed_before_it(tmp_path, tools):
    before = tmp_path / "before"
    groups, _ = gpu.plan(tmp_path, "9.0", 16, ["build", "benchmarks"], before, ["norms", "copy"])
    assert names_of(groups) == [["build", "build before"], ["benchmarks before"], ["benchmarks"]]
    (_, build), (there,), (here,) = groups
    assert build.sources == there.sources == before
    assert build.commands == groups[0][0].commands
    assert here.sources == gpu.ROOT
    assert here.commands[0][-3:] == ["--out", str(tmp_path), "--sections=norms,copy"]
    assert there.commands[0][-2:] == [str(tmp_path / "before"), "--sections=norms,copy"]
    assert {build.log, there.log} == {gpu.OTHER_LOG}


def test_what_is_not_installed_is_left_out_and_said(tmp_path, monkeypatch):
    find_spec = gpu.importlib.util.find_spec
    absent = {"hypothesis", "xdist"}
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name)
    )
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    groups, notes = gpu.plan(tmp_path, "9.0", 16, [*gpu.FIRST_CALL, "profile"])
    assert names_of(groups) == [["build"], ["short-list"], ["tests"], ["benchmarks"]]
    (command,) = groups[2][0].commands
    assert "-n" not in command
    left_out = {"test_norms.py", "test_selection.py", "test_repeated.py"}
    assert {line.split()[0] for line in notes} == left_out | {"compute-sanitizer", "ncu"}
    assert all("hypothesis" in line for line in notes if line.startswith("test_"))
    files = {part.rpartition("/")[2] for part in command if part.endswith(".py")}
    assert files == set(gpu.TEST_FILES["tests"]) - left_out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "build nothing"], "no such stage: nothing; there are build, short-list, tests, "),
        (["--before", "no/such"], "expected a folder with the sources of a commit, got no/such"),
    ],
)
def test_what_is_not_there_is_refused(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit):
        gpu.main()
    assert said in capsys.readouterr().err


def test_imports_of_imported_test_files_count(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TESTS", tmp_path)
    (tmp_path / "test_one.py").write_text("import os.path\nimport helper\nfrom torch import nn\n")
    (tmp_path / "helper.py").write_text("from no_such_module.part import thing\nimport lnprune\n")
    assert gpu.missing_imports(tmp_path / "test_one.py") == {"no_such_module"}


def test_all_files_of_tests_for_every_device_are_run():
    listed = [name for names in gpu.TEST_FILES.values() for name in names]
    marked = re.compile(r'parametrize\(\s*"device", (?:cases\.)?DEVICES\b')
    found = {path.name for path in gpu.TESTS.glob("test_*.py") if marked.search(path.read_text())}
    assert sorted(listed) == sorted({*found, "test_cuda.py"})


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (
            "....\\n= 2 failed, 7 passed, 1 skipped in 3.21s (0:00:03) =",
            "2 failed, 7 passed, 1 skipped in 3.21s",
        ),
        ("========= ERROR SUMMARY: 0 errors", "ERROR SUMMARY: 0 errors"),
        (
            "1 passed in 2s\\n===== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
        ),
        ("nothing of the kind", ""),
    ],
)
def test_the_summary_has_what_a_program_says_in_sum(printed, said, tmp_path):
    earlier = stage("earlier", "print('9 passed in 1.00s')")
    _, result = gpu.run_stages([earlier, stage("this", f"print('{printed}')")], tmp_path, [])
    assert result.said == said
    last = (tmp_path / "summary.txt").read_text().splitlines()[-1]
    assert last.endswith(said if said else f"{result.seconds:.0f}")


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
