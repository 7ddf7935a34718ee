"""Benchmarks: whole processes beside their peers, with dated results in LOG.md."""
