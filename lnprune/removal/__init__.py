"""Coupled channels: which slices of which tensors are one channel, so that all of them can go together."""
