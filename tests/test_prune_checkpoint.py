"""Pruned checkpoints: the bytes of the pruned slices are zeros, all others stay; all or nothing."""

import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from stored_files import KINDS, raw_safetensors, save, small_model
from torch import nn

import lnprune
from lnprune.checkpoints import stored, writing
from lnprune.commands.main import main

PRUNE = [sys.executable, "-m", "lnprune", "prune"]


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


def digest(path):
    """Of all files at a path: names, modes and bytes."""
    path = pathlib.Path(path)
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return [(f.name, f.stat().st_mode, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]


def loaded(path):
    """The tensors of a checkpoint, by the libraries that other people use."""
    path = pathlib.Path(path)
    if path.is_file():
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    found = {}
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]):
        found |= loaded(file)
    return found


def output_of(path):
    return path.with_name("out" + path.suffix)


def leftovers(folder):
    return [each.name for each in pathlib.Path(folder).iterdir() if each.name.startswith(".lnprune")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", ["out", "in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_of_a_pruned_model(run, tmp_path, kind, dim, dtype):
    model = small_model(dtype)
    path = save(model.state_dict(), tmp_path / "source", kind)
    before = digest(path)
    out = output_of(path)
    bias = ["--bias"] if dim == "out" else []
    run("prune", path, "--amount", 0.4, "--scope", "global", "--dim", dim, "-o", out, *bias)
    assert digest(path) == before
    assert leftovers(path.parent) == []
    plan = lnprune.rank(model, n=2, dim=dim, exclude=nn.Embedding).select(0.4, scope="global")
    plan.apply(permanent=True, bias=bool(bias))
    found = loaded(out)
    assert list(found) == list(loaded(path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    plan_file, count = tmp_path / "plan.json", 8 if bias else 4
    plan.save(plan_file)
    said = run("verify", out, "--plan", plan_file, *bias)[0]
    assert said.startswith(f"{out}: as the plan says: {count} tensors")
    assert "slices that the plan prunes are not +0.0" in run("verify", path, "--plan", plan_file, code=1)[0]
    again = out.with_stem("again")
    assert run("prune", path, "--plan", plan_file, "-o", again, "-q", *bias) == (f"{again}\n", "")
    assert [each[1:] for each in digest(again)] == [each[1:] for each in digest(out)]
    run("prune", path, "--plan", plan_file, "--in-place", *bias)
    assert [each[2] for each in digest(path)] == [each[2] for each in digest(out)]
    assert leftovers(path.parent) == []


@pytest.mark.parametrize("piece", [64, 1000, 2**22])
@pytest.mark.parametrize("dim", [0, 1])
def test_all_other_bytes_stay(run, tmp_path, monkeypatch, piece, dim):
    """Of a file with unknown dtypes, gaps in the order, odd offsets and metadata."""
    monkeypatch.setattr(writing, "PIECE", piece)
    weight, data = torch.randn(30, 20), bytearray(random.Random(0).randbytes(3 + 2400 + 5))
    data[3:2403] = weight.numpy().tobytes()
    header = {
        "__metadata__": {"z": "1", "a": "2"},
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "a.weight": {"dtype": "F32", "shape": [30, 20], "data_offsets": [3, 2403]},
        "packed": {"dtype": "F8_E8M0", "shape": [5], "data_offsets": [2403, 2408]},
    }
    path = raw_safetensors(tmp_path / "a.safetensors", header, bytes(data))
    before = path.read_bytes()
    run("prune", path, "--amount", 7, "--dim", dim, "-o", tmp_path / "out.safetensors")
    after = (tmp_path / "out.safetensors").read_bytes()
    first = len(before) - len(data) + 3
    keep = lnprune.rank_checkpoint(path, 2, dim).select(7).keep["a.weight"]
    weight[(~keep,) if dim == 0 else (slice(None), ~keep)] = 0
    assert after == before[:first] + weight.numpy().tobytes() + before[first + 2400 :]


def test_zeros_are_positive_and_nan_goes(run, tmp_path):
    weight = torch.tensor([[-0.0, -1.0], [float("nan"), 1.0], [5.0, -0.0]])
    path = save({"a.weight": weight}, tmp_path, "safetensors")
    run("prune", path, "--amount", 1, "-o", tmp_path / "out.safetensors", "-q")
    found = load_file(tmp_path / "out.safetensors")["a.weight"]
    assert found[0].view(torch.int32).tolist() == [0, 0]
    assert torch.equal(found[1:].view(torch.int32), weight[1:].view(torch.int32))


def test_archives_of_torch_stay_whole(run, tmp_path):
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    base = torch.randn(20, 30)
    tensors = {
        **{"conv.weight": conv.weight.detach(), "view.weight": base[3:9, 2:7], "turned.weight": base.t()},
        **{"alone.weight": torch.randn(40, 6), "tied.weight": base, "again.weight": base},
    }
    torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "a.pt")
    run(
        "prune",
        tmp_path / "a.pt",
        "--amount",
        2,
        "--dim",
        0,
        "-o",
        tmp_path / "out.pt",
        "--exclude",
        "turned",
    )
    for name in ("a.pt", "out.pt"):
        assert zipfile.ZipFile(tmp_path / name).testzip() is None
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["epoch"] == 3
    keeps = lnprune.rank_checkpoint(tmp_path / "a.pt", 2, 0, exclude="turned").select(2).keep
    assert set(keeps) == {"conv.weight", "view.weight", "alone.weight", "tied.weight"}
    for name, keep in keeps.items():
        tensors[name][~keep] = 0  # views write through to each other, in the file as in memory
    for name, tensor in found["state_dict"].items():
        assert torch.equal(tensor, tensors[name]), name
        assert tensor.stride() == tensors[name].stride()
    record = next(
        r for r in zipfile.ZipFile(tmp_path / "out.pt").infolist() if r.filename.endswith("data/0")
    )
    data = bytearray((tmp_path / "out.pt").read_bytes())
    data[record.header_offset + 30 + len(record.filename) + 100] ^= 1
    (tmp_path / "out.pt").write_bytes(data)
    lnprune.rank_checkpoint(tmp_path / "a.pt", 2, 0, include="alone").select(2).save(tmp_path / "plan.json")
    assert "checksum" in run("verify", tmp_path / "out.pt", "--plan", tmp_path / "plan.json", code=1)[0]


def test_folders_come_with_what_lies_beside(run, tmp_path):
    source, out = save(small_model().state_dict(), tmp_path / "source", "sharded"), tmp_path / "out"
    (source / "config.json").write_text('{"model_type": "x"}')
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "tokenizer.json").symlink_to(source / "config.json")
    (source / "pytorch_model.bin").write_bytes(b"other weights")
    _, err = run("prune", source, "--amount", 0.5, "-o", out, "-q")
    assert err == ""
    names = sorted(str(each.relative_to(out)) for each in out.rglob("*"))
    assert names == sorted(
        str(each.relative_to(source)) for each in source.rglob("*") if each.name != "pytorch_model.bin"
    )
    assert not (out / "tokenizer.json").is_symlink()
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (source / index).read_bytes()
    _, err = run("prune", source / index, "--amount", 0.5, "-o", out, "--force")
    assert err == "not copied, since it may hold weights that are not pruned: pytorch_model.bin\n"
    assert leftovers(tmp_path) == []


def test_in_place_leaves_what_lies_beside(run, tmp_path):
    source = save(small_model().state_dict(), tmp_path / "source", "sharded")
    (source / "config.json").write_text("{}")
    (source / "sub").mkdir()
    (source / "sub" / "x").write_text("x")
    (source / "link").symlink_to("config.json")
    number = (source / "config.json").stat().st_ino
    run("prune", source, "--amount", 0.5, "--in-place", "-q")
    assert (source / "config.json").stat().st_ino == number
    assert (source / "config.json").stat().st_nlink == 1
    assert (source / "sub" / "x").read_text() == "x"
    assert os.readlink(source / "link") == "config.json"
    assert leftovers(tmp_path) == []


def test_plans_of_models_and_of_coupled_channels(run, tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    path = save(model.state_dict(), tmp_path, "safetensors")
    plan = lnprune.couple(model, torch.randn(2, 6)).rank(n=2).select(0.5)
    plan.save(tmp_path / "plan.json")
    plan.apply(permanent=True)
    run("prune", path, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    words = "prune", path, "--plan", tmp_path / "plan.json", "-o", tmp_path / "b.safetensors", "--bias"
    assert "the biases of coupled channels go with them" in run(*words, code=2)[1]


def test_matrices_of_experts(run, tmp_path):
    experts = nn.ParameterDict(
        {"gate_up_proj": torch.randn(6, 20, 12), "down_proj": torch.randn(6, 12, 10)}
    )
    model = nn.ModuleDict({"experts": experts})
    path = save(model.state_dict(), tmp_path, "safetensors")
    for dim in (1, 2):
        words = "--batch-dim", "*=0", "--dim", f"*={dim}", "--amount", 0.5
        run("prune", path, *words, "-o", tmp_path / "out.safetensors", "--force")
        found = load_file(tmp_path / "out.safetensors")
        for name, weight in experts.items():
            for i, matrix in enumerate(weight.detach()):
                mask = lnprune.channel_mask(matrix, 0.5, 2, dim - 1)
                assert torch.equal(
                    found[f"experts.{name}"][i] != 0, mask.unsqueeze(2 - dim).expand_as(matrix)
                ), name


TWO = {"a.weight": torch.randn(8, 6), "b.weight": torch.randn(4, 6)}


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path):
        return save({"a.weight": torch.randn(8, 6), "a.bias": torch.ones(8)}, tmp_path, "safetensors")

    def refuse(self, run, message, path, *words, code=4):
        folder = path if path.is_dir() else path.parent
        before = digest(folder)
        out, err = run("prune", path, "--amount", 1, *words, code=code)
        assert message in err
        assert len(err.splitlines()) == 1 or "usage" in err or "assumed" in err
        assert out == ""
        assert digest(folder) == before
        assert leftovers(folder) == leftovers(folder.parent) == []

    def test_targets(self, run, path, tmp_path):
        other = tmp_path / "other.safetensors"
        other.write_bytes(b"precious")
        link = tmp_path / "link.safetensors"
        link.symlink_to(other)
        dangling = tmp_path / "dangling.safetensors"
        dangling.symlink_to(tmp_path / "nothing")
        pipe = tmp_path / "pipe.safetensors"
        os.mkfifo(pipe)
        for words, message in (
            (("-o", path), "is the input: use --in-place"),
            (("-o", other), "is there already: use --force to replace it"),
            (("-o", link, "--force"), "is a link: never written through; use -o"),
            (("-o", dangling), "is a link: never written through; use -o"),
            (("-o", pipe, "--force"), "is no file: never written to"),
            (("-o", tmp_path), "is a folder, and the input a file: name a file"),
            (("-o", tmp_path / "no" / "a.safetensors"), "is not there"),
            (("-o", tmp_path / "out.pt"), "expected a name that ends as model.safetensors does"),
        ):
            self.refuse(run, message, path, *words)
        for words, message in (
            ((), "expected -o OUT, or --in-place, one of them"),
            (("-o", other, "--in-place"), "expected -o OUT, or --in-place, one of them"),
            (("--in-place", "--plan", "x"), "expected --plan FILE, or --amount A, one of them"),
        ):
            self.refuse(run, message, path, *words, code=2)

    def test_plans(self, run, path, tmp_path):
        out = tmp_path / "out.safetensors"
        for model, message in (
            (nn.ModuleDict({"b": nn.Linear(6, 8)}), "has no b.weight, which the plan prunes"),
            (nn.ModuleDict({"a": nn.Linear(7, 8)}), "a.weight has shape (8, 6), the plan is for (8, 7)"),
        ):
            lnprune.rank(model, n=2, dim="out").select(1).save(tmp_path / "plan.json")
            _, err = run("prune", path, "--plan", tmp_path / "plan.json", "-o", out, code=3)
            assert message in err
        _, err = run("prune", path, "--plan", tmp_path / "none.json", "-o", out, code=3)
        assert "none.json: No such file" in err
        (tmp_path / "plan.json").write_text("{}")
        _, err = run("prune", path, "--plan", tmp_path / "plan.json", "-o", out, code=3)
        assert "expected JSON of the format 'lnprune plan'" in err
        _, err = run("prune", path, "--plan", tmp_path / "plan.json", "--dim", 0, "-o", out, code=2)
        assert "expected no options of choosing some beside it" in err
        assert not out.exists()
        self.refuse(
            run, "--bias needs channels that are outputs", path, "--dim", 1, "--bias", "-o", out, code=2
        )

    def test_links_and_caches_in_place(self, run, path, tmp_path):
        link = tmp_path / "linked" / "model.safetensors"
        link.parent.mkdir()
        link.symlink_to(path)
        self.refuse(run, "is a link: never written through; use -o", link, "--in-place")
        link.unlink()
        os.link(path, link)
        self.refuse(run, "has 2 names (hard links): never written through; use -o", link, "--in-place")
        cache = tmp_path / "models--a--b" / "snapshots" / "0"
        shutil.copytree(link.parent, cache)
        self.refuse(run, "is in the cache of a hub, which others share: use -o", cache, "--in-place")

    def test_folders(self, run, tmp_path):
        source = save(
            {"a.weight": torch.randn(8, 6), "b.weight": torch.randn(4, 6)}, tmp_path / "s", "sharded", 2
        )
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").write_text("x")
        (tmp_path / "file").write_text("x")
        for out, message in (
            (source, "is the input: use --in-place"),
            (source / "inside", "is inside of the input, or around it: name another folder"),
            (tmp_path, "is inside of the input, or around it: name another folder"),
            (tmp_path / "full", "is there already: use --force to replace it"),
            (tmp_path / "file", "is no folder, and the input is one: name a folder"),
        ):
            self.refuse(run, message, source, "-o", out)
        run("prune", source, "--amount", 1, "-o", tmp_path / "full", "--force", "-q")
        assert not (tmp_path / "full" / "x").exists()

    def test_a_folder_that_cannot_be_exchanged(self, run, tmp_path, monkeypatch):
        from lnprune.checkpoints import system_calls

        class Library:
            @staticmethod
            def renameat2(*_):
                system_calls.ctypes.set_errno(22)  # EINVAL
                return -1

        source = save(
            {"a.weight": torch.randn(8, 6), "b.weight": torch.randn(4, 6)}, tmp_path / "s", "sharded", 2
        )
        monkeypatch.setattr(system_calls.ctypes, "CDLL", lambda *_, **__: Library)
        self.refuse(run, "cannot be replaced in one step here (Invalid argument)", source, "--in-place")

    def test_too_little_space(self, run, path, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        self.refuse(
            run, "needs 0.00 GB, 0.00 GB free: nothing written", path, "-o", tmp_path / "o.safetensors"
        )

    def test_dry_run(self, run, path, tmp_path):
        before = digest(tmp_path)
        out, _ = run("prune", path, "--amount", 1, "-o", tmp_path / "o.safetensors", "--dry-run")
        assert out.splitlines()[-1].startswith(f"would write {tmp_path / 'o.safetensors'}: ")
        words = "prune", path, "--amount", 1, "-o", tmp_path / "o.safetensors", "--dry-run", "--json"
        assert json.loads(run(*words)[0])["is_written"] is False
        assert digest(tmp_path) == before


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_source_that_changes_while_it_is_written(run, tmp_path, monkeypatch, kind, in_place):
    monkeypatch.setattr(writing, "PIECE", 4096)
    path = save({"a.weight": torch.randn(400, 100)}, tmp_path, kind)
    lnprune.rank_checkpoint(path, 2, 0).select(7).save(tmp_path / "plan.json")
    done = []
    read_into = stored.Reader.read_into

    def read_and_shrink(self, data, offset):
        if offset > 20_000 and not done:
            done.append(offset)
            os.truncate(path, offset)
        read_into(self, data, offset)

    monkeypatch.setattr(stored.Reader, "read_into", read_and_shrink)
    out = output_of(path)
    words = ("--in-place",) if in_place else ("-o", out)
    _, err = run("prune", path, "--plan", tmp_path / "plan.json", *words, code=3)
    assert "changed while it was read" in err
    assert done
    assert not out.exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signals_have_codes_and_leave_nothing(tmp_path, sent):
    path = save({"a.weight": torch.randn(400, 100)}, tmp_path, "safetensors")
    out = tmp_path / "out.safetensors"
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it\n"
        "from lnprune.checkpoints import writing\n"
        "from lnprune.commands.main import main\n"
        f"writing._copy = lambda *_: os.kill(os.getpid(), {int(sent)})\n"
        f"words = ['prune', {str(path)!r}, '--amount', '1', '--dim', '0', '-o', {str(out)!r}, '-q']\n"
        "sys.exit(main(words))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 128 + sent
    assert done.stderr == ""
    assert not out.exists()
    assert leftovers(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "times"), [("safetensors", 50), ("torch", 10), ("sharded", 20)])
def test_killed_at_any_moment(tmp_path, kind, times):
    """The target is absent, old or complete, and the source as it was."""
    source = save({f"{i}.weight": torch.randn(2000, 2000) for i in range(6)}, tmp_path / "source", kind)
    before = digest(source)
    whole, old = output_of(tmp_path / ("whole" + source.suffix)), tmp_path / ("old" + source.suffix)
    plan = tmp_path / "plan.json"
    lnprune.rank_checkpoint(source, 2, 1).select(0.5).save(plan)
    words = ["--plan", str(plan), "--force", "-q", "-o"]
    start = time.perf_counter()
    subprocess.run([*PRUNE, str(source), *words, str(whole)], check=True)
    took = time.perf_counter() - start
    complete = [each[2] for each in digest(whole)]
    if source.is_dir():
        shutil.copytree(source, old)
    else:
        shutil.copy(source, old)
    out = tmp_path / ("out" + source.suffix)
    states = set()
    rng = random.Random(time.time_ns())
    for i in range(times):
        if out.exists():
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        if i % 2:
            shutil.copytree(old, out) if old.is_dir() else shutil.copy(old, out)
        process = subprocess.Popen([*PRUNE, str(source), *words, str(out)])
        # From the first byte on: at once in the first two runs, later at any moment.
        while process.poll() is None and not leftovers(tmp_path):
            time.sleep(0.001)
        time.sleep(0 if i < 2 else took * rng.uniform(0, 0.6))
        process.kill()
        process.wait()
        if not out.exists():
            assert i % 2 == 0
            states.add("absent")
        else:
            found = [each[2] for each in digest(out)]
            assert found in (complete, [each[2] for each in digest(old)])
            states.add("complete" if found == complete else "old")
            assert i % 2 or found == complete
        for name in leftovers(tmp_path):
            stale = tmp_path / name
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    assert digest(source) == before
    assert {"absent", "old"} <= states


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own needs root")
@pytest.mark.parametrize("kind", ["safetensors", "sharded"])
def test_a_full_disk(tmp_path, kind):
    """In a private mount of 8 MB: seen before the first byte; and where free space shrinks meanwhile."""
    source = save({f"{i}.weight": torch.randn(500, 1000) for i in range(3)}, tmp_path / "source", kind)
    before = digest(source)
    small = tmp_path / "small"
    small.mkdir()
    out = small / output_of(source).name
    for late in (False, True):
        patch = "import collections, shutil\nu = shutil.disk_usage('/')\n" + (
            "shutil.disk_usage = lambda _: u._replace(free=10**12)\n" if late else ""
        )
        words = ["prune", str(source), "--amount", "1", "--dim", "0", "-o", str(out), "-q"]
        program = (
            f"import os, subprocess, sys\n{patch}"
            f"mount = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', {str(small)!r}]\n"
            "subprocess.run(mount, check=True)\n"
            "from lnprune.commands.main import main\n"
            f"code = main({words!r})\nprint(os.listdir({str(small)!r}))\nsys.exit(code)\n"
        )
        command = ["unshare", "--mount", sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True)
        if "unshare failed" in done.stderr or "permission denied" in done.stderr.lower():
            pytest.skip("no private mounts here")
        assert done.returncode == 4, done.stderr
        assert "nothing written" in done.stderr
        assert ("No space left on device" if late else "GB free") in done.stderr
        assert done.stdout == "[]\n"
    assert digest(source) == before
