"""The command line: `python -m lnprune`, or `lnprune`, for checkpoints on disk."""
