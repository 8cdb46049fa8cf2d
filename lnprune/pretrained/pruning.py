"""From a folder of transformers to a smaller one: chosen, written, loaded again and compared."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lnprune.checkpoints.folders import replacing_folder
from lnprune.checkpoints.targets import check_space, check_target
from lnprune.pretrained import proof
from lnprune.pretrained.choosing import Measures, choose_coupled
from lnprune.pretrained.custom_code import read, write
from lnprune.pretrained.experts import choose_experts
from lnprune.pretrained.fewer_heads import resize_
from lnprune.pretrained.folder import Folder, changed, load
from lnprune.pretrained.inputs import example_inputs
from lnprune.pretrained.library import quiet
from lnprune.pretrained.slices import Going, without_slices
from lnprune.removal.comparison import random_value
from lnprune.steps.flags import Amount


@dataclass(frozen=True)
class Pruned:
    """What went of a folder.

    Attributes:
        path: the folder that was written.
        numbers: what changed, by what the config calls it: the number before and after.
        parameters: how many the model had, and has.
        size: how many bytes the weights took, and take.
        difference: of outputs in float64, from those of the model with zeros in place of what went: the
            largest, as a share of the largest output. None: they were not compared.
    """

    path: str
    numbers: dict[str, tuple[int | None, int]]
    parameters: tuple[int, int]
    size: tuple[int, int]
    difference: float | None


def prune_folder(
    source: str,
    target: str,
    amount: Amount,
    heads: Amount | None,
    experts: Amount | None,
    multiple_of: int,
    measures: Measures,
    custom_code: bool,
    force: bool,
    verify: bool,
) -> Pruned:
    """As :func:`lnprune.integrations.transformers.prune_pretrained`."""
    folder = Folder(source)
    check_target(folder.checkpoint, target, force)
    check_space(target, folder.checkpoint.size)
    model: Any = folder.load()
    parts = choose_coupled(model, folder.model_type, amount, heads, multiple_of, measures, custom_code)
    parts += _of_experts(model, folder, amount, experts, multiple_of, measures)
    measures.check_used({name for name, _ in model.named_parameters()})
    if not parts:
        raise ValueError("amount: expected channels, heads or experts that go, got none")
    config = changed(folder.config, {key: new for part in parts for key, new in part.config.items()})
    before = sum(parameter.numel() for parameter in model.parameters())
    small = _small(model, config, parts)
    after = sum(parameter.numel() for parameter in small.parameters())
    share = None
    with replacing_folder(target) as temporary:
        folder.copy_others(temporary)
        with quiet():
            small.save_pretrained(temporary)
        for sizes in filter(None, (part.sizes for part in parts)):
            write(temporary, type(model), sizes)
        size = _flushed(temporary)
        del model, small
        if verify:
            share = _difference(folder, temporary, parts)
    return Pruned(
        target,
        {
            key: (old, new)
            for part in parts
            for key, new in part.numbers.items()
            if (old := getattr(folder.config, key, None)) != new
        },
        (before, after),
        (folder.checkpoint.size, size),
        share,
    )


def _of_experts(
    model: Any, folder: Folder, amount: Amount, experts: Amount | None, multiple_of: int, measures: Measures
) -> list[Going]:
    """What goes of the experts of a model."""
    known = folder.model_type.experts
    if known is not None:
        return choose_experts(model, known, amount, experts, multiple_of, measures)
    if experts is not None:
        raise ValueError(f"experts: {type(model).__name__} has none")
    return []


def _state(model: nn.Module, parts: Sequence[Going]) -> dict[str, Tensor]:
    """What the files of a model hold, without what goes."""
    held = model.state_dict()
    made = without_slices({**dict(model.named_buffers()), **held}, parts)
    return {name: made[name] for name in held}


def _small(model: Any, config: Any, parts: Sequence[Going]) -> Any:
    """A model without what goes, to be saved."""
    with torch.device("meta"), quiet():
        small = type(model)(copy.deepcopy(config))
    for sizes in filter(None, (part.sizes for part in parts)):
        resize_(small, sizes)
    small.load_state_dict(_state(model, parts), assign=True)
    small.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = model.generation_config
    return small


def _flushed(path: str) -> int:
    """Waits until files are on the disk, all of one mode; the bytes of those with weights."""
    size = 0
    mode = os.stat(os.path.join(path, "config.json")).st_mode & 0o7777
    for folder, _, files in os.walk(path):
        for name in files:
            file = os.path.join(folder, name)
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            if name.endswith(".safetensors"):
                size += os.path.getsize(file)
                os.chmod(file, mode)
    return size


def _difference(folder: Folder, written: str, parts: Sequence[Going]) -> float:
    """How far the folder that was written is from the reference, with its weights and with random ones.

    Raises:
        RuntimeError: too far.
    """
    model: Any = folder.load(torch.float64)
    is_ours = any(part.sizes for part in parts)
    model_class = read(written, type(model)) if is_ours else type(model)
    small: Any = load(model_class, written, None, torch.float64, folder.model_type)
    inputs = example_inputs(model)
    got = proof.outputs_of(small, inputs)
    share = proof.difference(got, proof.reference(model, parts, inputs))
    # Weights of zeros, as layers may be initialised, would hide what is wrong behind them.
    of_random = _of_random(model, small, parts, inputs)
    if max(share, of_random) <= proof.TOLERANCE:
        return share
    what = ", ".join(part.what for part in _culprits(folder, model, parts, inputs))
    weights, worst = ("random", of_random) if share <= proof.TOLERANCE else ("their own", share)
    raise RuntimeError(
        f"what was written is not the model with zeros in place of {what}: with {weights} weights outputs "
        f"differ by {worst:.1g} of the largest. Nothing is left of it"
    )


def _culprits(
    folder: Folder, model: Any, parts: Sequence[Going], inputs: Mapping[str, Tensor]
) -> Sequence[Going]:
    """The parts without which, one at a time, a model computes something else; all where none is."""
    found = []
    for part in parts:
        with quiet():
            small = type(model)(folder.plain_config(part.config))
        if part.sizes is not None:
            resize_(small, part.sizes)
        small = small.to(torch.float64)
        if not _of_random(model, small, [part], inputs) <= proof.TOLERANCE:
            found.append(part)
    return found or parts


def _of_random(model: Any, small: Any, parts: Sequence[Going], inputs: Mapping[str, Tensor]) -> float:
    """The difference with random parameters."""
    for name, parameter in model.named_parameters():
        flat = parameter if parameter.dim() < 3 else parameter.flatten(0, -2)
        parameter.data.copy_(random_value(name, nn.Parameter(flat), torch.float64).view(parameter.shape))
    held = model.state_dict()
    for name, tensor in small.state_dict().items():  # one at a time: a second small model would not fit
        made = without_slices({name: held[name]}, parts)[name]
        if made.shape != tensor.shape:  # copy_ would repeat what is too small
            return torch.inf
        tensor.copy_(made)
    got = proof.outputs_of(small, inputs)
    return proof.difference(got, proof.reference(model, parts, inputs))
