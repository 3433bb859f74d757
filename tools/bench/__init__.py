# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, each with ``--json`` and ``--check``."""
