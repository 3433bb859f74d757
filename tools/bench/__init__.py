"""Benchmarks, each with ``--json`` and ``--check``."""
