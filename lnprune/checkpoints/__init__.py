"""Weights in files in place of modules: what is there, its norms, and files with zeros in it."""
