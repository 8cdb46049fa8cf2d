"""Files that are there whole or not at all: failing writes, links, modes, all that the package writes."""

import contextlib
import errno
import os
import pathlib
import re
import resource
import stat
import subprocess
import sys
import tempfile

import pytest
import torch
from torch import nn

import lnprune
from lnprune.atomic_file import replacing

OLD = b"what was there before"
# Larger than any limit below.
NEW = b"x" * (1 << 20)


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    return path


def assert_alone_and_old(path):
    """The file is as it was, and nothing else is left in its folder."""
    assert path.read_bytes() == OLD
    assert list(path.parent.iterdir()) == [path]


def write(path, content=NEW):
    with replacing(path) as file:
        file.write(content)


def test_until_the_end_the_old_file_is_there(old):
    with replacing(old) as file:
        file.write(NEW)
        file.flush()
        assert old.read_bytes() == OLD
    assert old.read_bytes() == NEW
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=repr)
def test_a_block_that_raises_changes_nothing(old, error):
    def content():
        yield NEW
        raise error

    with pytest.raises(type(error)), replacing(old) as file:
        file.writelines(content())
    assert_alone_and_old(old)


@pytest.mark.parametrize("call", ["chmod", "fsync", "replace"])
def test_a_step_that_fails_changes_nothing(old, call, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.EIO, "failed on purpose")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="on purpose"):
        write(old)
    assert_alone_and_old(old)


def test_the_bytes_are_on_disk_before_the_name_is_theirs(old, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.fstat(file).st_size), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write(old)
    assert calls == [len(NEW), "replace"]


def test_a_new_file_has_the_mode_that_open_gives(tmp_path):
    with open(tmp_path / "opened", "wb"):
        pass
    write(tmp_path / "replaced")
    assert (tmp_path / "replaced").stat().st_mode == (tmp_path / "opened").stat().st_mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o777])
def test_a_file_keeps_its_mode_from_the_first_byte_on(old, mode):
    old.chmod(mode)
    with replacing(old) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode
    assert stat.S_IMODE(old.stat().st_mode) == mode


@pytest.mark.parametrize("kind", ["absolute", "relative", "of a link", "to nothing"])
def test_links_stay_and_what_they_lead_to_is_replaced(kind, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    target, link = tmp_path / "there" / "target", tmp_path / "here" / "link"
    if kind != "to nothing":
        target.write_bytes(OLD)
    if kind == "of a link":
        (tmp_path / "there" / "second").symlink_to("target")
    link.symlink_to(
        {"absolute": target, "of a link": "../there/second"}.get(kind, pathlib.Path("../there/target"))
    )
    before = os.readlink(link)
    write(link)
    assert os.readlink(link) == before
    assert target.read_bytes() == NEW
    assert list(link.parent.iterdir()) == [link]


def test_a_pipe_is_written_directly():
    script = (
        "from lnprune.atomic_file import replacing\nwith replacing('/dev/stdout') as f: f.write(b'text')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"text"


def test_a_folder_and_a_missing_folder_are_refused_as_by_open(tmp_path):
    with pytest.raises(IsADirectoryError):
        write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/missing/file'$"):
        write(tmp_path / "missing" / "file")
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def as_nobody(folder):
    """Inside, a user whom modes bind, who owns the folder."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, 65534, -1)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_that_must_not_be_written_is_not_replaced():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with as_nobody(folder):
            path = folder / "file"
            path.write_bytes(OLD)
            path.chmod(0o444)
            with pytest.raises(PermissionError):
                write(path)
            assert_alone_and_old(path)


def plan():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4096), nn.Linear(4096, 64))
    return lnprune.rank(model, 2, 0).select(0.5)


@contextlib.contextmanager
def full_disk(limit=4096):
    """Inside, no file of this process gets longer; Python ignores the signal, so that writes raise."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITTEN = {
    "plan.json": lambda path: plan().save(path),
    "plan.png": lambda path: plan().plot(path),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_leaves_the_old_file(name, tmp_path):
    save, path = WRITTEN[name], tmp_path / name
    save(path)
    assert path.stat().st_size > 4096
    path.write_bytes(OLD)
    with full_disk(), pytest.raises(OSError, match="File too large"):
        save(path)
    assert_alone_and_old(path)


# The first bytes of each type of picture.
PICTURES = {
    "plan.png": ("plan.png", b"\x89PNG"),
    "plan.pdf": ("plan.pdf", b"%PDF"),
    "plan.svg": ("plan.svg", b"<?xml"),
    "plan.jpg": ("plan.jpg", b"\xff\xd8"),
    "plan.SVGZ": ("plan.SVGZ", b"\x1f\x8b"),
    "plan": ("plan.png", b"\x89PNG"),
    "plan.": ("plan.png", b"\x89PNG"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_suffix_of_a_picture_is_its_format(name, tmp_path):
    written, beginning = PICTURES[name]
    plan().plot(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [written]
    assert (tmp_path / written).read_bytes().startswith(beginning)


def test_an_unknown_format_writes_nothing(tmp_path):
    path = tmp_path / "plan.word"
    path.write_bytes(OLD)
    with pytest.raises(ValueError, match="'word' is not supported"):
        plan().plot(path)
    assert_alone_and_old(path)


def test_nothing_else_writes_a_file():
    """All that the package, its examples and its benchmarks write goes through one door."""
    root = pathlib.Path(__file__).resolve().parent.parent
    files = [
        path
        for folder in ("lnprune", "examples", "benchmarks", "docs")
        for path in (root / folder).rglob("*.py")
    ]
    assert len(files) > 20
    writes = re.compile(r"""\.write_(?:text|bytes)\(|\bsavefig\(|open\([^)]*["'][wax]b?["']""")
    found = {
        str(path.relative_to(root))
        for path in files
        for line in path.read_text().splitlines()
        if writes.search(line) and '"/proc/' not in line
    }
    assert found == {"lnprune/atomic_file.py", "lnprune/plans/report.py"}
