"""Which dim of a stored weight is its output channels: from names, shapes and config.json alone.

What decides first is the bias beside a weight: its length is the number of outputs. Weights without one
that tells go by those of the same part of the model. What nothing tells is taken as torch's own layers
store it, and marked as doubtful.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lnprune.checkpoints.stored import DTYPES, StoredTensor

# Models of transformers whose linear layers are Conv1D, which stores [in, out].
_STORES_INPUTS_FIRST = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_EMBEDDING = re.compile(r"embed|^(wte|wpe|shared|relative_attention_bias)$")
_OUTPUT_LAYER = re.compile(r"(^|\.)(lm_head|embed_out|predictions\.decoder)$|^output$")
_ROUTER = re.compile(r"^(gate|router)$")
_LONG_KERNEL = 128  # a last dim of so many, of three, is no kernel of a convolution


class Channels(NamedTuple):
    """Where the channels of a weight are.

    Attributes:
        out: the dim of the outputs.
        into: that of the inputs.
        why: what told.
        is_doubtful: whether nothing proved it.
    """

    out: int
    into: int
    why: str
    is_doubtful: bool = False


class LeftAlone(NamedTuple):
    """A tensor that is not taken unless it is asked for by name."""

    why: str
    channels: Channels | None = None  # where they are, if it is


def channel_dims(
    tensors: Sequence[StoredTensor], config: Mapping[str, Any]
) -> dict[StoredTensor, Channels | LeftAlone]:
    """What becomes of each tensor of a checkpoint where nothing is said about it."""
    shapes = {name: tensor.shape for tensor in tensors for name in tensor.names}
    proofs = _Proofs(tensors, shapes, config)
    return {tensor: _found(tensor, shapes, proofs) for tensor in tensors}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _bias(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The length of the bias beside a weight."""
    known = re.sub(r"weight$", "bias", name)
    shape = shapes.get(known) if known != name else None
    return shape[0] if shape is not None and len(shape) == 1 else None


def _proven(shape: Sequence[int], bias: int | None) -> int | None:
    """The dim of the outputs, where a bias fits one dim only."""
    if bias is None:
        return None
    first = bias == shape[0]
    second = bias == shape[1] if len(shape) == 2 else shape[1] > 1 and bias % shape[1] == 0
    return None if first == second else 0 if first else 1


class _Proofs:
    """The dims that biases prove, by the modules that they are in."""

    def __init__(
        self,
        tensors: Sequence[StoredTensor],
        shapes: Mapping[str, tuple[int, ...]],
        config: Mapping[str, Any],
    ):
        self._under: dict[tuple[bool, str], set[int]] = {}
        self._type = config.get("model_type")
        for tensor in tensors:
            if len(tensor.shape) < 2:
                continue
            out = _proven(tensor.shape, _bias(tensor.name, shapes))
            if out is not None:
                module, is_matrix = tensor.name, len(tensor.shape) == 2
                while module:
                    module = _module(module)
                    self._under.setdefault((is_matrix, module), set()).add(out)

    def near(self, name: str, is_matrix: bool) -> set[int]:
        """The dims of outputs that are proven nearest to a weight, of matrices or of convolutions."""
        module = name
        while module:
            module = _module(module)
            if (is_matrix, module) in self._under:
                return self._under[is_matrix, module]
        return set()

    def said(self) -> Channels | None:
        """What config.json says of matrices."""
        if not isinstance(self._type, str):
            return None
        if self._type in _STORES_INPUTS_FIRST:
            return Channels(1, 0, f"config.json says {self._type}")
        return Channels(0, 1, f"config.json says {self._type}")


def _found(
    tensor: StoredTensor, shapes: Mapping[str, tuple[int, ...]], proofs: _Proofs
) -> Channels | LeftAlone:
    name, shape = tensor.name, tensor.shape
    if len(shape) < 2:
        return LeftAlone("has fewer than two dims")
    if tensor.dtype not in DTYPES:
        return LeftAlone(f"is of dtype {tensor.dtype}")
    module, last = _module(name), name.rpartition(".")[2]
    if tensor.dtype.startswith("F8") and any(
        each.startswith(f"{module}.") and "scale" in each[len(module) :] for each in shapes
    ):
        return LeftAlone("is float8 with scales of its own")
    if "lora_" in name:
        return LeftAlone("is an adapter (LoRA)")
    if last.endswith("_orig") and name.removesuffix("_orig") + "_mask" in shapes:
        return LeftAlone("is masked: torch.nn.utils.prune.remove() it and save the model again")
    if last == "in_proj_weight" and name.removesuffix("weight") + "bias" in shapes and len(shape) == 2:
        return Channels(0, 1, "is the projections of an attention")
    if last != "weight":
        return LeftAlone("is not called .weight")
    bias = _bias(name, shapes)
    where = _of_matrix(tensor, bias, proofs) if len(shape) == 2 else _of_convolution(tensor, bias, proofs)
    if len(shape) > 2:
        return where
    assert isinstance(where, Channels)
    part = module.rpartition(".")[2]
    if any(_OUTPUT_LAYER.search(_module(each)) for each in tensor.names):
        return LeftAlone("is the output layer", where)
    if bias is None and any(_EMBEDDING.search(_module(each).rpartition(".")[2]) for each in tensor.names):
        return LeftAlone("is an embedding", Channels(1, 0, "is an embedding"))
    if _ROUTER.match(part) and any(each.startswith(f"{_module(module)}.experts.") for each in shapes):
        return LeftAlone("is a router of experts", where)
    return where


def _of_matrix(tensor: StoredTensor, bias: int | None, proofs: _Proofs) -> Channels:
    out = _proven(tensor.shape, bias)
    if out is not None:
        return Channels(out, 1 - out, "its bias")
    near = proofs.near(tensor.name, is_matrix=True)
    if len(near) == 1:
        (out,) = near
        return Channels(out, 1 - out, "the biases of its neighbours")
    said = proofs.said()
    if said is not None and not near:
        return said
    return Channels(0, 1, "assumed", True)


def _of_convolution(tensor: StoredTensor, bias: int | None, proofs: _Proofs) -> Channels | LeftAlone:
    name, shape = tensor.name, tensor.shape
    out = _proven(shape, bias)
    if bias is None and (
        re.search(r"expert|(^|\.|_)moe(\.|_|$)", name) or (len(shape) == 3 and shape[2] >= _LONG_KERNEL)
    ):
        return LeftAlone("may be the matrices of experts")
    if out is not None:
        return Channels(out, 1 - out, "its bias")
    near = proofs.near(name, is_matrix=False)
    is_named = re.search(r"transpose|deconv", name, re.IGNORECASE) is not None
    fits = bias is None or shape[1] == 0 or bias % shape[1] == 0
    if fits and shape[1] > 1 and (is_named or near == {1}):
        return Channels(1, 0, "assumed: transposed, as its neighbours" if near == {1} else "its name", True)
    # A bias of so many as the first dim fits both kinds where that is a multiple of the second.
    is_proven = bias == shape[0] and 1 not in near
    return Channels(0, 1, "its bias" if is_proven else "assumed", not is_proven)
