"""Code beside a model whose config cannot say that heads are gone: a class, and the sizes it has."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from lnprune.atomic_file import replacing
from lnprune.pretrained import fewer_heads
from lnprune.removal.cutting import Cut, Setting, without

FILE = "modeling_fewer_heads"
_CLASS = '''

class {name}(transformers.{base}):
    """{base} of the sizes in its config."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        resize_(self, config.lnprune_sizes)
'''


def sizes_without(model: nn.Module, cuts: Sequence[Cut], settings: Sequence[Setting]) -> dict[str, Any]:
    """The shapes of parameters and the numbers in attributes that change when slices go."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    small = without(model, tensors, cuts, settings)
    shapes = {
        name: list(parameter.shape)
        for name, parameter in small.named_parameters()
        if parameter.shape != tensors[name].shape
    }
    attributes = {}
    for (path, module), other in zip(model.named_modules(), small.modules(), strict=True):
        for key, value in vars(module).items():
            new = vars(other)[key]
            if type(value) is int and value != new:
                attributes[f"{path}.{key}"] = new
    return {"shapes": shapes, "attributes": attributes}


def write(folder: str, model_class: type, sizes: dict[str, Any]) -> None:
    """Writes the code into a folder with a saved model, and says so in its config."""
    base = model_class.__name__
    name = f"{base}WithFewerHeads"
    with open(fewer_heads.__file__) as file:
        code = file.read()
    code = code.replace("import torch\n", "import torch\nimport transformers\n", 1)
    with replacing(os.path.join(folder, f"{FILE}.py")) as made:
        made.write((code + _CLASS.format(name=name, base=base)).encode())
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        config = json.load(file)
    config["architectures"] = [name]
    config["auto_map"] = {_auto_class(base): f"{FILE}.{name}"}
    config["lnprune_sizes"] = sizes
    with replacing(path) as made:
        made.write((json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def read(folder: str, model_class: type) -> Any:
    """The class that the code in a folder defines."""
    path = os.path.join(folder, f"{FILE}.py")
    found = importlib.util.spec_from_file_location(FILE, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, f"{model_class.__name__}WithFewerHeads")


def _auto_class(name: str) -> str:
    """Which of the classes of transformers that look at a config loads a class."""
    if name.endswith("LMHeadModel"):
        return "AutoModelForCausalLM"
    task = re.search(r"For\w+$", name)
    return f"AutoModel{task.group() if task else ''}"
