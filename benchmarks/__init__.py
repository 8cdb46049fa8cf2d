"""Benchmarks that check every case before they time it; run with ``python -m benchmarks.cpu``."""
