"""Folders of the library transformers: a smaller model from a larger one, which the library loads."""
