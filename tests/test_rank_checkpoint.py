"""Ranking files: the norms of the loaded model, bit for bit; every file that cannot be used is named."""

import json
import math
import os
import pathlib
import struct

import pytest
import torch
from stored_files import KINDS, raw_safetensors, save, small_model
from torch import nn

import lnprune
from lnprune.checkpoints import stored, streaming
from lnprune.checkpoints.checkpoint import natural, open_checkpoint

ORDERS = [2, 1, 0, 3.5, -1, math.inf, -math.inf]
TAKEN = {f"{i}.weight" for i in (0, 1, 2, 3)}


def assert_same_norms(ranking, expected):
    assert ranking.norms.keys() == expected.norms.keys()
    for name, norms in expected.norms.items():
        assert torch.equal(ranking.norms[name], norms), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norms_and_flags_are_those_of_the_loaded_model(tmp_path, kind, dtype):
    model = small_model(dtype)
    path = save(model.state_dict(), tmp_path, kind)
    for n in ORDERS:
        for dim in ("out", "in"):
            expected = lnprune.rank(model, n=n, dim=dim, exclude=nn.Embedding)
            ranking = lnprune.rank_checkpoint(path, n, dim)
            assert_same_norms(ranking, expected)
            for scope in ("local", "global"):
                plan, other = (each.select(0.4, scope=scope) for each in (ranking, expected))
                assert all(torch.equal(plan.keep[name], keep) for name, keep in other.keep.items())
                assert plan.to_dict() == other.to_dict()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8(tmp_path, dtype):
    weight = torch.randn(12, 40).to(dtype)
    ranking = lnprune.rank_checkpoint(save({"a.weight": weight}, tmp_path, "safetensors"), 2)
    assert torch.equal(ranking.norms["a.weight"], lnprune.channel_norms(weight, 2, 0))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(700, 300), (3, 5), (1, 4000), (40, 30, 5, 3)])
def test_pieces_do_not_show(tmp_path, monkeypatch, dim, shape):
    monkeypatch.setattr(streaming, "PIECE", 4096)
    weight = torch.randn(shape)
    path = save({"a.weight": weight}, tmp_path, "safetensors")
    pieces = []
    read_into = stored.Reader.read_into
    monkeypatch.setattr(
        stored.Reader,
        "read_into",
        lambda self, *args: (pieces.append(len(args[0])), read_into(self, *args)),
    )
    ranking = lnprune.rank_checkpoint(path, 2, {"a": dim})
    assert torch.equal(ranking.norms["a.weight"], lnprune.channel_norms(weight, 2, dim))
    of_data = pieces[2:]  # after the header
    assert sum(of_data) == weight.numel() * 4
    if dim == 0 and shape[0] > 1 and weight.numel() > 4096:
        assert max(of_data) <= max(4096, 4 * weight.numel() // shape[0])


def test_matrices_of_experts(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 2048)
    experts = nn.ParameterDict(
        {"gate_up_proj": torch.randn(6, 20, 12), "down_proj": torch.randn(6, 12, 10)}
    )
    path = save(nn.ModuleDict({"experts": experts}).state_dict(), tmp_path, "safetensors")
    for dim in (1, 2):
        batch = {"*": 0}
        ranking = lnprune.rank_checkpoint(path, 2, {"experts.*": dim}, batch_dim=batch)
        for name, weight in experts.items():
            for i, matrix in enumerate(weight):
                norms = lnprune.channel_norms(matrix.detach(), 2, dim - 1)
                assert torch.equal(ranking.norms[f"experts.{name}[{i}]"], norms)
    with pytest.raises(
        ValueError, match=r"shape 6 x 12 x 10 has no known output dim: say batch_dim and dim"
    ):
        lnprune.rank_checkpoint(path, 2, include="*.down_proj")
    with pytest.raises(ValueError, match="nothing to rank among 2 tensors"):
        lnprune.rank_checkpoint(path, 2)


def test_what_is_left_out_is_said_and_can_be_included(tmp_path):
    path = save(small_model().state_dict(), tmp_path, "safetensors")
    assert "left out: embed_tokens.weight: " in str(lnprune.rank_checkpoint(path, 2))
    assert lnprune.rank_checkpoint(path, 2, include=["embed_*"], dim=1).names == ["embed_tokens.weight"]
    assert lnprune.rank_checkpoint(path, 2, exclude="[01]").names == ["2.weight", "3.weight"]
    assert lnprune.rank_checkpoint(path, 2, include="[0-1]", exclude="0").names == ["1.weight"]
    for options, message in (
        ({"include": "x"}, "include: 'x' matches none"),
        ({"exclude": "embed_*"}, r"exclude: 'embed_\*' matches none"),
        ({"dim": {"x": 0}}, "dim: 'x' matches none"),
        ({"dim": "rows"}, "0.weight: expected a number, 'out' or 'in' as its dim, got 'rows'"),
        ({"batch_dim": {"1": 0}}, r"1.weight: expected three dims or more"),
        ({"batch_dim": {"0": 0}, "dim": 0}, r"0.weight: expected a dim other than batch_dim=0"),
    ):
        with pytest.raises(ValueError, match=message):
            lnprune.rank_checkpoint(path, 2, **options)
    with pytest.raises(IndexError, match=r"1.weight: dim 2 is out of range for shape \(16, 24\)"):
        lnprune.rank_checkpoint(path, 2, {"1": 2})
    with pytest.raises(TypeError, match=r"0.weight: expected a number as its dim, got 0.5"):
        lnprune.rank_checkpoint(path, 2, 0.5)
    with pytest.raises(TypeError, match="include: expected patterns of names, got 3"):
        lnprune.rank_checkpoint(path, 2, include=3)
    with lnprune.reference_ranking(), pytest.raises(RuntimeError, match="outside of reference_ranking"):
        lnprune.rank_checkpoint(path, 2)
    # What torch says of it differs between its versions.
    with pytest.raises((RuntimeError, TypeError), match=r"^0\.weight: "):
        lnprune.rank_checkpoint(path, "fro2")


def test_plans_go_to_models_and_to_pictures(tmp_path):
    model = small_model()
    plan = lnprune.rank_checkpoint(save(model.state_dict(), tmp_path, "sharded"), 2).select(0.5)
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000
    plan.save(tmp_path / "plan.json")
    lnprune.load_plan(tmp_path / "plan.json", model).apply(permanent=True)
    expected = lnprune.rank(small_model(), n=2, dim="out", exclude=nn.Embedding).select(0.5)
    assert [int((model[1].weight == 0).all(dim=1).sum())] == [expected.entries[1].channels - 8 + 1]
    with pytest.raises(RuntimeError, match="the plan was made without a model"):
        plan.apply()


def test_memory_formats_views_and_tied_weights_of_torch(tmp_path):
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    base = torch.randn(20, 30)
    tensors = {
        "conv.weight": conv.weight.detach(),
        "conv.bias": conv.bias.detach(),
        "view.weight": base[3:9, 2:7],
        "turned.weight": base.t(),
        "tied.weight": base,
        "again.weight": base,
        "empty.weight": torch.empty(0, 4),
    }
    torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "model.pth")
    ranking = lnprune.rank_checkpoint(tmp_path / "model.pth", 2, 0)
    assert ranking.names == ["conv.weight", "view.weight", "turned.weight", "tied.weight", "empty.weight"]
    for name in ranking.names:
        assert torch.equal(ranking.norms[name], lnprune.channel_norms(tensors[name], 2, 0)), name
    plan = ranking.select(0.5)
    assert plan.to_dict()["parameters"][3]["shared_with"] == ["again.weight"]


def test_natural_order():
    assert sorted(["a.10.w", "a.9.w", "b", "a.w"], key=natural) == ["a.9.w", "a.10.w", "a.w", "b"]


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
GOOD = {"a.weight": ENTRY}


def with_entry(**values):
    return {"a.weight": {**ENTRY, **values}}


MALFORMED = {
    "no JSON": (b"{nonsense", 16),
    "no object": (b"[1, 2]", 16),
    "empty": (b"", 0),
    "not UTF-8": (b'{"\xff\xfe": 3}', 16),
    "nested too deeply": (b"[" * 100_000, 16),
    "no dtype": ({"a.weight": {"shape": [2, 2], "data_offsets": [0, 16]}}, 16),
    "no shape": ({"a.weight": {"dtype": "F32", "data_offsets": [0, 16]}}, 16),
    "no offsets": ({"a.weight": {"dtype": "F32", "shape": [2, 2]}}, 16),
    "unknown dtype": (with_entry(dtype="F33"), 16),
    "dtype of another type": (with_entry(dtype=32), 16),
    "shape of another type": (with_entry(shape="2"), 16),
    "negative size": (with_entry(shape=[-2, -2]), 16),
    "fractional size": (with_entry(shape=[2.0, 2.5]), 16),
    "a size that overflows": (with_entry(shape=[2**40, 2**40]), 16),
    "one offset": (with_entry(data_offsets=[0]), 16),
    "three offsets": (with_entry(data_offsets=[0, 8, 16]), 16),
    "offsets of another type": (with_entry(data_offsets=["0", "16"]), 16),
    "offsets turned around": (with_entry(data_offsets=[16, 0]), 16),
    "negative offset": (with_entry(data_offsets=[-16, 0]), 16),
    "more bytes than the shape": (with_entry(data_offsets=[0, 20]), 20),
    "fewer bytes than the shape": (with_entry(data_offsets=[0, 12]), 12),
    "a gap before": (with_entry(data_offsets=[4, 20]), 20),
    "a gap between": ({**GOOD, "b": {**ENTRY, "data_offsets": [20, 36]}}, 36),
    "an overlap": ({**GOOD, "b": {**ENTRY, "data_offsets": [8, 24]}}, 24),
    "truncated": (GOOD, 15),
    "trailing bytes": (GOOD, 17),
    "metadata of numbers": ({"__metadata__": {"a": 1}, **GOOD}, 16),
    "an entry that is a list": ({"a.weight": [1]}, 16),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_headers(tmp_path, case):
    header, length = MALFORMED[case]
    path = raw_safetensors(tmp_path / "a.safetensors", header, bytes(length))
    with pytest.raises(ValueError, match=r"a\.safetensors: ") as caught:
        lnprune.rank_checkpoint(path, 2)
    assert len(str(caught.value).splitlines()) == 1
    if case in ("truncated", "trailing bytes"):
        assert f"header needs 16 bytes of data, file has {length}: download again" in str(caught.value)


def test_the_good_header_is_one(tmp_path):
    path = raw_safetensors(tmp_path / "a.safetensors", GOOD, bytes(16))
    assert lnprune.rank_checkpoint(path, 2).names == ["a.weight"]


class Custom:
    """What a pickled checkpoint may hold."""


def broken(folder, case):
    """A path that cannot be used."""
    path = folder / "a.safetensors"
    if case == "lfs" or case == "lfs of torch":
        path = path if case == "lfs" else folder / "a.bin"
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17\n")
    elif case == "few bytes":
        path.write_bytes(b"abc")
    elif case == "no header":
        path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    elif case == "short header":
        path.write_bytes(struct.pack("<Q", 200) + b"{}")
    elif case == "objects":
        path = folder / "a.pt"
        torch.save({"model": Custom()}, path)
    elif case == "module":
        path = folder / "a.pt"
        torch.save(nn.Linear(2, 2), path)
    elif case == "old torch":
        path = folder / "a.pt"
        torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    elif case == "cut torch":
        path = folder / "a.pt"
        torch.save({"a": torch.ones(2000)}, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif case == "numbers":
        path = folder / "a.pt"
        torch.save({"epoch": 3, "rate": 0.1}, path)
    elif case == "a list":
        path = folder / "a.pt"
        torch.save([torch.ones(2)], path)
    elif case == "another ending":
        path = folder / "a.gguf"
        path.write_bytes(b"GGUF")
    elif case == "missing":
        pass
    elif case == "a dangling link":
        path.symlink_to(folder / "blob")
    elif case == "a pipe":
        os.mkfifo(path)
    elif case == "an empty folder":
        path = folder
    elif case == "two files":
        path = folder
        for name in ("a.safetensors", "b.safetensors"):
            raw_safetensors(folder / name, GOOD, bytes(16))
    else:
        path = save({"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}, folder, "sharded", 2)
        index = folder / "model.safetensors.index.json"
        said = json.loads(index.read_text())
        first, second = said["weight_map"].values()
        if case == "a missing shard":
            (folder / second).unlink()
        elif case == "another shard":
            said["weight_map"] = {"a.weight": second, "b.weight": first}
        elif case == "unnamed":
            del said["weight_map"]["b.weight"]
            said["weight_map"]["c.weight"] = second
        elif case == "not there":
            said["weight_map"]["c.weight"] = second
        elif case == "twice":
            raw_safetensors(
                folder / second, {**GOOD, "b.weight": {**ENTRY, "data_offsets": [16, 32]}}, bytes(32)
            )
        elif case == "outside":
            said["weight_map"]["b.weight"] = "../other.safetensors"
        elif case == "no map":
            del said["weight_map"]
        elif case == "numbers in the map":
            said["weight_map"]["a.weight"] = 3
        assert case == "a missing shard" or case == "twice" or said != json.loads(index.read_text())
        index.write_text(json.dumps(said))
    return path


BROKEN = {
    "lfs": "is a Git LFS pointer, not the weights: git lfs pull",
    "lfs of torch": "is a Git LFS pointer, not the weights: git lfs pull",
    "few bytes": "has 3 bytes, too few for a header: download again",
    "no header": "is no safetensors file: its first 8 bytes",
    "short header": "header needs 200 bytes, file has 2: download again",
    "objects": "holds objects, not only tensors; never unpickled here: save its state_dict",
    "module": "holds objects, not only tensors; never unpickled here: save its state_dict",
    "old torch": "is in torch's format before 1.6: torch.load it, and torch.save it again",
    "cut torch": "is no whole archive of torch.save: download again",
    "numbers": "expected a state dict, .* got the keys 'epoch', 'rate'",
    "a list": "expected a state dict, .* got a list",
    "another ending": "expected a file that ends in .safetensors",
    "missing": "a.safetensors: not there",
    "a dangling link": "a.safetensors: not there .a link that leads nowhere",
    "a pipe": "is no file and no folder",
    "an empty folder": "holds no .safetensors, no .bin and no index.json",
    "two files": "holds 2 files that end in .safetensors, and no index: name one of them",
    "a missing shard": "model-00002-of-00002.safetensors: named by the index, not there",
    "another shard": "a.weight: index says model-00002-of-00002.safetensors, found in model-00001-of-00002",
    "unnamed": "b.weight: index says nothing, found in model-00002",
    "not there": "c.weight: index says model-00002-of-00002.safetensors, not there",
    "twice": "a.weight: found in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors",
    "outside": "expected names of files beside it, got '../other.safetensors'",
    "no map": 'expected JSON with a "weight_map" from names to files',
    "numbers in the map": 'expected JSON with a "weight_map" from names to files',
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_used_is_named(tmp_path, case):
    with pytest.raises(ValueError, match=BROKEN[case]) as caught:
        open_checkpoint(broken(tmp_path, case))
    assert len(str(caught.value).splitlines()) == 1


def test_custom_objects_are_never_made(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Custom, "__setstate__", lambda self, state: made.append(state), raising=False)
    path = broken(tmp_path, "objects")
    with pytest.raises(ValueError, match="holds objects"):
        open_checkpoint(path)
    assert made == []


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("change", ["shrinks", "is written to"])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, kind, change):
    monkeypatch.setattr(streaming, "PIECE", 4096)
    path = pathlib.Path(save({"a.weight": torch.randn(400, 100)}, tmp_path, kind))
    checks = []
    read_into = stored.Reader.read_into

    def read_and_change(self, data, offset):
        if offset > 20_000 and not checks:
            checks.append(offset)
            if change == "shrinks":
                os.truncate(path, offset)
            else:
                with open(path, "r+b") as file:
                    file.seek(offset)
                    file.write(b"x")
                os.utime(path, (1, 1))
        read_into(self, data, offset)

    monkeypatch.setattr(stored.Reader, "read_into", read_and_change)
    with pytest.raises(ValueError, match="changed while it was read"):
        lnprune.rank_checkpoint(path, 2, 0)
    assert checks
