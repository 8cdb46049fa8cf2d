"""Rank, select, write: tensors in, tensors out; no module, no hook, no name of a layer."""
