"""The command line: what it prints where, its exit codes, and what it says where the package is broken."""

import json
import os
import pathlib
import pty
import select
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from stored_files import raw_safetensors, save, small_model

import lnprune
from lnprune.checkpoints import measurements
from lnprune.commands import output
from lnprune.commands.main import main
from lnprune.import_report import is_command_line

ROOT = pathlib.Path(lnprune.__file__).parent.parent


@pytest.fixture
def run(capsys):
    def call(*words, code=0):
        """What a command prints on stdout and stderr."""
        capsys.readouterr()
        try:
            found = main([str(word) for word in words])
        except SystemExit as end:  # argparse's
            found = end.code
        out, err = capsys.readouterr()
        assert found == code, err
        return out, err

    return call


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    return save(small_model().state_dict(), tmp_path / "source", "sharded")


def test_inspect(run, path):
    out, err = run("inspect", path)
    lines = [line.split() for line in out.splitlines()]
    assert ["1.weight", "F32", "16", "x", "24", "0", "16", "its", "bias"] in lines
    assert ["2.weight", "F32", "6", "x", "10", "x", "3", "x", "3", "1", "10", "its", "bias"] in lines
    assert "3 files" in out
    assert "embed_tokens" not in out
    assert err == ""
    out, _ = run("inspect", path, "--all", "--dim", "in")
    assert "embed_tokens.weight   F32" in out
    assert "is an embedding" in out
    found = {each["names"][0]: each for each in json.loads(run("inspect", path, "--json")[0])["tensors"]}
    assert len(found) == len(small_model().state_dict())
    assert found["2.weight"] | {"file": ""} == {
        **{"names": ["2.weight"], "dtype": "F32", "shape": [6, 10, 3, 3], "file": "", "is_taken": True},
        **{"why": "its bias", "dim": 1, "channels": 10, "is_doubtful": False},
    }
    assert found["embed_tokens.weight"]["is_taken"] is False


def test_doubtful_dims_are_marked(run, tmp_path):
    path = save({"a.weight": torch.ones(8, 4)}, tmp_path, "safetensors")
    out, err = run("inspect", path)
    assert "0?" in out
    assert "1 dims are assumed (?)" in err
    assert "1 of 1 dims are assumed, that of a.weight" in run("rank", path)[1]
    assert run("rank", path, "-q") == ("", "")
    assert run("rank", path, "--dim", "0")[1] == ""


def test_rank_and_plan(run, path, tmp_path):
    ranking, plan, picture = (tmp_path / name for name in ("r.safetensors", "plan.json", "plan.png"))
    out, err = run("rank", path, "--save", ranking, "-n", "1", "--plot", picture)
    assert out.splitlines()[-2:] == [str(ranking), str(picture)]
    assert err == ""
    expected = lnprune.rank_checkpoint(path, 1).select(0.3, scope="global", multiple_of=2)
    options = ("--amount", 0.3, "--scope", "global", "--multiple-of", 2)
    for source, order in ((ranking, ()), (path, ("-n", "1"))):
        plan.unlink(missing_ok=True)
        out, err = run("plan", source, *options, *order, "-o", plan, "--plot", picture)
        assert err == ""
        assert out.startswith(str(expected))
        assert out.splitlines()[-2:] == [str(plan), str(picture)]
        assert json.loads(plan.read_text()) == json.loads(json.dumps(expected.to_dict()))
    assert picture.stat().st_size > 1000
    assert run("plan", ranking, "--amount", 3, "-o", plan, "-q") == (f"{plan}\n", "")
    found = json.loads(run("plan", ranking, "--amount", 0.3, "--json")[0])
    assert [each["kept"] for each in found["parameters"]] == [6, 11, 7, 8]
    found = json.loads(run("rank", path, "--json")[0])
    zero = {each["tensor"]: each["zero"] for each in found["tensors"]}
    assert zero == {"0.weight": 0, "1.weight": 1, "2.weight": 0, "3.weight": 0}


def test_a_ranking_says_which_channels_are_gone(run, tmp_path):
    """For norms of order -1 a channel with one zero has the norm 0, and is not gone."""
    weight = torch.rand(6, 4) + 0.1
    weight[1], weight[2, 0] = 0, 0
    path = save({"a.weight": weight}, tmp_path, "safetensors")
    run("rank", path, "-n", "-1", "--save", tmp_path / "r.safetensors", "-q")
    found = measurements.load(str(tmp_path / "r.safetensors"))
    assert found.counts[0].tolist() == [4, 0, 3, 4, 4, 4]
    kept = found.ranking().select(1).keep["a.weight"]
    assert kept.tolist() == [True, False, False, True, True, True]


def test_matrices_of_experts_in_a_ranking(run, tmp_path):
    path = save({"e.up": torch.randn(3, 8, 5)}, tmp_path, "safetensors")
    words = "--batch-dim", "*.up=0", "--dim", "e.up=1"
    run("rank", path, *words, "--save", tmp_path / "r.safetensors", "-q")
    expected = lnprune.rank_checkpoint(path, 2, {"*": 1}, batch_dim={"*": 0}).select(0.5)
    run("plan", tmp_path / "r.safetensors", "--amount", 0.5, "-o", tmp_path / "plan.json", "-q")
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(expected.to_dict()))
    assert "3 x 8" in run("inspect", path, *words)[0]


def damaged_ranking(path, **values):
    found = measurements.metadata_of(str(path))
    head = {**json.loads(found["ranking"]), **values}
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path, {**found, "ranking": json.dumps(head)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": "two"}, "n: expected"),
        ({"parameters": 3}, "parameters: expected list"),
        ({"parameters": [{}]}, r"parameters\[0\].names: it is missing"),
        (
            {"parameters": [{"names": ["a.weight"], "shape": [9, 4], "dim": 0}]},
            "a.weight: expected float64",
        ),
        (
            {"parameters": [{"names": ["b.weight"], "shape": [8, 4], "dim": 0}]},
            "b.weight: expected float64",
        ),
        ({"parameters": [{"names": ["a.weight"], "shape": [8, 4], "dim": 2}]}, "a dim of them"),
        (
            {"parameters": [{"names": ["a.weight"], "shape": [8, 4], "dim": 0, "batch": [1, 3]}]},
            "batch: expected a dim and a count that divides it",
        ),
    ],
)
def test_damaged_rankings(run, tmp_path, values, message):
    path = save({"a.weight": torch.ones(8, 4)}, tmp_path, "safetensors")
    ranking = tmp_path / "r.safetensors"
    run("rank", path, "--save", ranking, "-q")
    damaged_ranking(ranking, **values)
    _, err = run("plan", ranking, "--amount", 0.5, code=3)
    assert err.startswith(f"lnprune: {ranking}: the ranking is damaged")
    with pytest.raises(ValueError, match=message):
        measurements.load(str(ranking))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("inspect", "{folder}/none.pt"), 3, "none.pt: not there"),
        (("inspect", "{path}", "--include", "x"), 2, "include: 'x' matches none of"),
        (
            ("inspect", "{path}", "--dim", "side"),
            2,
            "expected out, in, a number, or PATTERN=..., got 'side'",
        ),
        (
            ("inspect", "{path}", "--dim", "0", "--dim", "1"),
            2,
            "--dim: expected one for all tensors, got 0, 1",
        ),
        (("inspect", "{path}", "--batch-dim", "0"), 2, "expected PATTERN=NUMBER, got '0'"),
        (("inspect", "{path}", "--dim", "*=7"), 2, "dim 7 is out of range for shape"),
        (("inspect", "{path}", "--threads", "0"), 2, "expected 1 or more, got 0"),
        (("plan", "{path}"), 2, "the following arguments are required: --amount"),
        (("plan", "{path}", "--amount", "1.5"), 2, "amount"),
        (("plan", "{path}", "--amount", "99"), 2, "0.weight: amount=99 is more than the 8 channels"),
        (
            ("plan", "{path}", "--amount", "1", "-o", "{folder}/none/plan.json"),
            1,
            "none/plan.json: No such file",
        ),
        (("rank", "{path}", "-n", "x"), 2, "invalid order value: 'x'"),
        (("prun", "{path}"), 2, "invalid choice: 'prun'"),
        ((), 2, "the following arguments are required: COMMAND"),
    ],
)
def test_what_goes_wrong_has_a_code_and_a_line(run, path, words, code, message):
    words = [word.format(path=path, folder=path.parent) for word in words]
    out, err = run(*words, code=code)
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1 or "usage: lnprune" in err


def test_options_of_a_ranking_are_those_of_rank(run, path, tmp_path):
    run("rank", path, "--save", tmp_path / "r.safetensors", "-q")
    for words in (("--dim", "in"), ("-n", 1), ("--include", "0")):
        _, err = run("plan", tmp_path / "r.safetensors", "--amount", 1, *words, code=2)
        assert "is a ranking, of norms of order 2" in err


def test_errors_show_where_they_come_from_if_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("LNPRUNE_DEBUG", "1")
    with pytest.raises(ValueError, match="not there"):
        main(["inspect", str(tmp_path / "none.pt")])


def test_names_cannot_control_a_terminal(run, tmp_path):
    name = "a\x1b[31m\r\n\u202e.weight"
    header = {name: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    path = raw_safetensors(tmp_path / "a.safetensors", header, bytes(16))
    for words in (("inspect",), ("inspect", "--json"), ("plan", "--amount", 0), ("rank",)):
        out, err = run(words[0], path, *words[1:])
        assert all(each.isprintable() or each == "\n" for each in out + err)
        assert "x1b[31m" in out or "u001b[31m" in out
    _, err = run("rank", path, "--include", "\x1b[31m", code=2)
    assert "\x1b" not in err


def test_tables_need_rich(run, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    for words in (("inspect", path), ("rank", path), ("plan", path, "--amount", 1)):
        out, err = run(*words, code=1)
        assert out == ""
        assert 'pip install "lnprune[cli]"' in err
        json.loads(run(*words, "--json")[0])


def test_safetensors_is_named_where_it_is_missing(run, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    _, err = run("inspect", path, code=1)
    assert 'needs safetensors, which the extra "cli" brings: pip install "lnprune[cli]"' in err


def test_info(run, monkeypatch):
    out, err = run("info")
    assert err == ""
    assert any(line.split() == ["test", "on", "cpu", "right"] for line in out.splitlines())
    found = json.loads(run("info", "--json")[0])
    assert found["installed"]["torch"] == metadata.version("torch")
    assert found["devices"]["cpu"] == "right"
    assert "devices" not in json.loads(run("info", "--json", "--no-test")[0])
    from lnprune.commands import info

    norms = info.channel_norms
    for broken, said in (
        (lambda *words: norms(*words) * 1.001, "norms differ from those of torch"),
        (lambda *words: 1 / 0, "fails: ZeroDivisionError: division by zero"),
    ):
        monkeypatch.setattr(info, "channel_norms", broken)
        assert said in run("info", code=1)[0]


def test_info_looks_at_what_is_pruned(run, monkeypatch):
    from lnprune.commands import info

    monkeypatch.setattr(info, "ln_structured", lambda *words, **options: None)
    assert "what is pruned differs from what torch chooses" in run("info", code=1)[0]


@pytest.mark.parametrize(
    ("argv", "is_ours"),
    [
        (["python", "-m", "lnprune", "info"], True),
        (["python", "-W", "-m", "lnprune"], True),
        (["python", "/usr/bin/lnprune", "info"], True),
        (["python", "script.py", "lnprune"], False),
        (["python", "-m", "pytest", "lnprune"], False),
        (["python"], False),
    ],
)
def test_the_command_line_is_known(argv, is_ours):
    assert is_command_line(argv) is is_ours


@pytest.fixture(scope="module")
def broken_package(tmp_path_factory):
    """A copy of the package whose native library does not load, and a script as pip makes it."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(
        ROOT / "lnprune", folder / "lnprune", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (folder / "lnprune" / "_C.py").write_text("raise ImportError('undefined symbol')")
    script = "import sys\nfrom lnprune.commands.main import main\nsys.exit(main())\n"
    (folder / "lnprune_script").mkdir()
    (folder / "lnprune_script" / "lnprune").write_text(script)
    return folder


@pytest.mark.parametrize("start", [("-m", "lnprune"), ("lnprune_script/lnprune",)])
def test_info_where_the_package_cannot_be_imported(broken_package, start):
    def run(*words):
        command = [sys.executable, *start, *words]
        environment = {**os.environ, "PYTHONPATH": str(broken_package)}
        done = subprocess.run(command, cwd=broken_package, env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done

    done = run("info")
    assert any(line.split() == ["torch", metadata.version("torch")] for line in done.stdout.splitlines())
    assert "no: import lnprune fails: ImportError: " in done.stdout
    assert "undefined symbol" in done.stdout
    found = json.loads(run("info", "--json").stdout)
    assert found["works"] is False
    done = run("inspect", "x.pt")
    assert done.stdout == ""
    assert done.stderr.startswith("lnprune: import lnprune fails: ImportError")


def test_other_programs_see_the_error_itself(broken_package):
    command = [sys.executable, "-c", "import lnprune"]
    environment = {**os.environ, "PYTHONPATH": str(broken_package)}
    done = subprocess.run(command, cwd=broken_package, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_process_of_its_own(path):
    command = [sys.executable, "-m", "lnprune", "plan", str(path), "--amount", "0.5", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert len(json.loads(done.stdout)["parameters"]) == 4


def test_a_bar_is_drawn_on_a_terminal_alone(monkeypatch, capsys):
    with output.progress("rank", 10, True) as done:
        done(5)
    assert capsys.readouterr().err == ""
    leader, follower = pty.openpty()

    def drawn():
        """All that the terminal got until now."""
        found = b""
        while select.select([leader], [], [], 0.2)[0]:
            found += os.read(leader, 100_000)
        return found

    with os.fdopen(follower, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        for wanted in (True, False):
            with output.progress("rank", 10, wanted) as done:
                done(5)
            terminal.flush()
            assert (b"rank" in drawn()) is wanted
    os.close(leader)


@pytest.mark.parametrize(
    ("count", "text"),
    [(7, "7 bytes"), (1500, "1.50 kB"), (2_264_924_160, "2.26 GB"), (10**13, "10000.00 GB")],
)
def test_sizes(count, text):
    assert output.size(count) == text
