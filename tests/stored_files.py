"""Checkpoints for tests: the state dict of a model in files of each kind."""

import json
import pathlib
import struct

import torch
from safetensors.torch import save_file
from torch import nn

KINDS = ("safetensors", "torch", "sharded", "sharded torch")


def small_model(dtype=torch.float32):
    """Linear layers, convolutions of both kinds, an embedding, and values of one sign and none."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Linear(24, 16), nn.ConvTranspose2d(6, 10, 3), nn.Linear(16, 12)
    )
    model.add_module("embed_tokens", nn.Embedding(9, 4))
    model.to(dtype)
    with torch.no_grad():
        model[1].weight[3] = 0
    return model


def save(tensors, folder, kind, shards=3):
    """Writes tensors as a checkpoint of a kind; its path."""
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "of": "a test"})
        return folder / "model.safetensors"
    if kind == "torch":
        torch.save(tensors, folder / "model.pt")
        return folder / "model.pt"
    stem, end = ("pytorch_model", "bin") if kind == "sharded torch" else ("model", "safetensors")
    places, parts = {}, [{} for _ in range(shards)]
    for i, (name, tensor) in enumerate(tensors.items()):
        places[name] = f"{stem}-{i % shards + 1:05}-of-{shards:05}.{end}"
        parts[i % shards][name] = tensor
    for i, part in enumerate(parts):
        path = folder / f"{stem}-{i + 1:05}-of-{shards:05}.{end}"
        torch.save(part, path) if end == "bin" else save_file(part, path, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    return folder


def raw_safetensors(path, header, data=b""):
    """Writes a safetensors file of any header: a dict, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
