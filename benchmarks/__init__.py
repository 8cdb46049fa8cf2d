"""Benchmarks that check every case before they time it: ``benchmarks.cpu`` and ``benchmarks.cuda``."""
