"""A checkpoint: one file, or a folder of several with an index; all of its headers agree."""

from __future__ import annotations

import json
import os
import pathlib
import re
from dataclasses import dataclass, field
from typing import Any

from lnprune.checkpoints.failures import UnusableCheckpoint
from lnprune.checkpoints.safetensors_file import read_header
from lnprune.checkpoints.stored import StoredTensor
from lnprune.checkpoints.torch_file import read_state_dict

INDEX = ".index.json"
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
# What a folder is looked through for, in this order.
_INDICES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
_TORCH_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk.

    Attributes:
        path: what was asked for.
        files: those that hold tensors.
        tensors: all of them, in natural order of their names or, from torch.save, in the order there.
        folder: where the files are, of a checkpoint that is a folder or has an index; None: it is one file.
        index: the file that says which tensor is in which file, if there are several.
        config: what ``config.json`` beside the files says.
    """

    path: str
    files: list[str]
    tensors: list[StoredTensor]
    folder: str | None = None
    index: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The bytes of its files."""
        return sum(os.stat(file).st_size for file in self.files)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads all headers of a checkpoint, and checks them against each other.

    Args:
        path: a file of safetensors or of torch.save, an index of several (``*.index.json``), or a folder
            with one or the other.

    Raises:
        ImportError: safetensors is not installed.
        UnusableCheckpoint: it cannot be used; the message says which file, and why.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return _folder(path)
    if not os.path.exists(path):
        link = " (a link that leads nowhere)" if os.path.islink(path) else ""
        raise UnusableCheckpoint(f"{path}: not there{link}")
    if not os.path.isfile(path):
        raise UnusableCheckpoint(f"{path}: is no file and no folder")
    if path.endswith(INDEX):
        return _sharded(path, path)
    return Checkpoint(path, [path], _sorted(path, _tensors_of(path)), None, None, _config(path))


def _tensors_of(path: str) -> list[StoredTensor]:
    if path.endswith(".safetensors"):
        return read_header(path)
    if path.endswith(_TORCH):
        return read_state_dict(path)
    raise UnusableCheckpoint(
        f"{path}: expected a file that ends in .safetensors, {', '.join(_TORCH)} or {INDEX}, or a folder"
    )


def _folder(path: str) -> Checkpoint:
    def find(ends: tuple[str, ...]) -> list[str]:
        return sorted(name for name in os.listdir(path) if name.endswith(ends))

    for name in (*_INDICES, *find((".safetensors" + INDEX,)), _TORCH_INDEX):
        if os.path.exists(os.path.join(path, name)):
            return _sharded(path, os.path.join(path, name))
    for ends, usual in (
        ((".safetensors",), ("model.safetensors", "diffusion_pytorch_model.safetensors")),
        (_TORCH, ("pytorch_model.bin",)),
    ):
        names = find(ends)
        # What is no weights of a model: arguments and optimizers of transformers' Trainer.
        names = [n for n in names if n not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
        names = [name for name in usual if name in names][:1] or names
        if len(names) > 1:
            raise UnusableCheckpoint(
                f"{path}: holds {len(names)} files that end in {ends[0]}, and no index: name one of them"
            )
        if names:
            file = os.path.join(path, names[0])
            return Checkpoint(path, [file], _sorted(file, _tensors_of(file)), path, None, _config(file))
    raise UnusableCheckpoint(f"{path}: holds no .safetensors, no .bin and no {INDEX[1:]}")


def _sharded(path: str, index: str) -> Checkpoint:
    """What the index of several files says, where it is so."""
    folder = os.path.dirname(index)
    try:
        text = pathlib.Path(index).read_text(encoding="utf-8")
        if text.startswith("version https://git-lfs"):
            raise UnusableCheckpoint(f"{index}: is a Git LFS pointer, not the index: git lfs pull")
        places = json.loads(text)["weight_map"]
        if not all(type(each) is str for pair in places.items() for each in pair):
            raise TypeError("weight_map")
    except UnusableCheckpoint:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnusableCheckpoint(
            f'{index}: expected JSON with a "weight_map" from names to files: {error!r}'
        ) from None
    names = sorted(set(places.values()))
    for name in names:
        if os.path.basename(name) != name:
            raise UnusableCheckpoint(f"{index}: expected names of files beside it, got {name!r}")
        if not os.path.exists(os.path.join(folder, name)):
            raise UnusableCheckpoint(f"{os.path.join(folder, name)}: named by the index, not there")
    files = [os.path.join(folder, name) for name in names]
    tensors: list[StoredTensor] = []
    found: dict[str, str] = {}
    for name, file in zip(names, files, strict=True):
        for tensor in _tensors_of(file):
            tensors.append(tensor)
            for each in tensor.names:
                said = places.get(each)
                if each in found:
                    raise UnusableCheckpoint(f"{each}: found in {found[each]} and in {name}")
                if said != name:
                    said = "nothing" if said is None else said
                    raise UnusableCheckpoint(f"{each}: index says {said}, found in {name}")
                found[each] = name
    for each, name in places.items():
        if each not in found:
            raise UnusableCheckpoint(f"{each}: index says {name}, not there")
    if index.endswith(_TORCH_INDEX):
        order = {name: i for i, name in enumerate(places)}
        tensors.sort(key=lambda each: order[each.name])
    else:
        tensors.sort(key=lambda each: natural(each.name))
    return Checkpoint(path, files, tensors, folder, index, _config(index))


def _config(path: str) -> dict[str, Any]:
    """What config.json beside a file says; nothing where there is none that can be read."""
    try:
        config = json.loads(pathlib.Path(path).with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _sorted(path: str, tensors: list[StoredTensor]) -> list[StoredTensor]:
    return tensors if path.endswith(_TORCH) else sorted(tensors, key=lambda each: natural(each.name))


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts names by the numbers in them: layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
