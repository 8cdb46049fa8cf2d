"""A folder of transformers: whether lnprune can work on it, its model, and the files beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

from torch import nn

from lnprune.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lnprune.checkpoints.failures import UnusableCheckpoint
from lnprune.pretrained.library import library, quiet
from lnprune.pretrained.model_types import MODEL_TYPES, ModelType

# Files that hold weights, or a program made of them: they are not those of the smaller model.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf"),
    *(".tflite", ".mlmodel", ".pb", ".xml", ".index.json"),
)
_NOT_COPIED = ".git", ".cache"
_FLOATS = "F64", "F32", "F16", "BF16"
_INTEGERS = "I64", "BOOL"  # those of buffers; packed weights are of smaller ones
_OTHER_OUTPUTS = "use_cache", "output_router_logits", "output_attentions", "output_hidden_states"


class Folder:
    """A folder that ``from_pretrained`` loads.

    Attributes:
        path: the folder.
        config: its configuration.
        model_class: the class of transformers that loads it.
        model_type: what lnprune knows of it.
        checkpoint: its weights.
    """

    def __init__(self, path: str):
        """Reads the configuration and the headers of the weights.

        Raises:
            UnusableCheckpoint: the folder holds something else, or what lnprune does not know.
        """
        library()  # which is missed here rather than later
        self.path = path
        self.config = _config(path)
        self.model_type = _known(path, self.config)
        self.model_class = _model_class(path, self.config)
        self.checkpoint: Checkpoint = open_checkpoint(path)
        for tensor in self.checkpoint.tensors:
            if tensor.dtype not in _FLOATS + _INTEGERS:
                raise UnusableCheckpoint(
                    f"{path}: {tensor.name} is of {tensor.dtype}: expected weights that are floating-point "
                    "numbers of 16 bits or more, got quantized or packed ones"
                )

    def load(self, dtype: Any = "auto") -> nn.Module:
        """The model, in the dtype of its files or another, with attention and experts as plain loops.

        Raises:
            UnusableCheckpoint: the files hold other weights than the model has.
        """
        return load(self.model_class, self.path, self.checkpoint, dtype, self.model_type)

    def plain_config(self, numbers: Mapping[str, int]) -> Any:
        """A configuration with other numbers, for a model that runs as :meth:`load` makes it."""
        options: dict[str, Any] = {name: False for name in _OTHER_OUTPUTS if hasattr(self.config, name)}
        if self.model_type.experts is not None:
            options["experts_implementation"] = "eager"
        return changed(self.config, {**numbers, **options, "attn_implementation": "eager"})

    def copy_others(self, target: str) -> None:
        """Copies what holds no weights: tokenizers, settings of other libraries, texts."""
        for folder, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if name not in _NOT_COPIED]
            into = os.path.join(target, os.path.relpath(folder, self.path))
            for name in files:
                if not name.endswith(_WEIGHTS):
                    os.makedirs(into, exist_ok=True)
                    shutil.copyfile(os.path.join(folder, name), os.path.join(into, name))


def load(
    model_class: Any,
    path: str,
    checkpoint: Checkpoint | None,
    dtype: Any,
    model_type: ModelType,
    **options: Any,
) -> nn.Module:
    """A model by ``from_pretrained``, which returns one tensor of results and runs in any dtype."""
    if model_type.experts is not None:
        options["experts_implementation"] = "eager"
    with quiet():
        model, found = model_class.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named
            attn_implementation="eager",
            **options,
        )
    floats = None
    if checkpoint is not None:
        floats = {name for each in checkpoint.tensors if each.dtype in _FLOATS for name in each.names}
    for what, names in (
        ("has no weights for", found["missing_keys"]),
        ("has weights of another shape for", {each[0] for each in found["mismatched_keys"]}),
        ("has weights that the model does not load:", found["unexpected_keys"]),
    ):
        named = sorted(names if floats is None or "not load" not in what else names & floats)
        if named:
            more = f" and {len(named) - 1} more" if len(named) > 1 else ""
            raise UnusableCheckpoint(f"{path}: {what} {named[0]}{more} of {type(model).__name__}")
    for config in {
        id(config): config for each in model.modules() if (config := vars(each).get("config"))
    }.values():
        for name in _OTHER_OUTPUTS:
            if getattr(config, name, False):
                setattr(config, name, False)
    # Some classes keep some weights in float32 whatever is asked for.
    return (model if dtype == "auto" else model.to(dtype)).eval()


def changed(config: Any, numbers: Mapping[str, Any]) -> Any:
    """A configuration with other numbers.

    Raises:
        ValueError: transformers refuses them.
    """
    named = {config.attribute_map.get(key, key): number for key, number in numbers.items()}
    try:
        with quiet():
            return type(config).from_dict({**config.to_dict(), **named})
    except Exception as error:  # those of validators have types of their own
        said = " ".join(f"{key}={number}" for key, number in numbers.items())
        why = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{type(config).__name__} does not allow {said}: {why}") from error


def _config(path: str) -> Any:
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise UnusableCheckpoint(
            f"{path}: expected a folder of transformers, with a config.json; the command prune and "
            "prune_checkpoint take checkpoints without one"
        )
    try:
        with quiet():
            config = library().AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever transformers raises for it
        why = " ".join(str(error).split())[:200]
        raise UnusableCheckpoint(f"{path}: transformers does not read its config.json: {why}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise UnusableCheckpoint(
            f"{path}: is quantized, as the quantization_config of its config.json says: expected weights "
            "that are plain numbers"
        )
    return config


def _known(path: str, config: Any) -> ModelType:
    found = MODEL_TYPES.get(config.model_type)
    if found is None:
        raise UnusableCheckpoint(
            f"{path}: which numbers of the config hold sizes is not known of the model type "
            f"{config.model_type!r}, only of {', '.join(MODEL_TYPES)}; couple(model, example_inputs), "
            "Plan.compact() and load_compact() need no config"
        )
    return found


def _model_class(path: str, config: Any) -> Any:
    names = config.architectures or []
    found = getattr(library(), names[0], None) if len(names) == 1 else None
    if not isinstance(found, type) or not issubclass(found, library().PreTrainedModel):
        raise UnusableCheckpoint(
            f"{path}: expected one class of transformers as `architectures` of its config.json, "
            f"got {names or 'none'}"
        )
    return found
