# SPDX-License-Identifier: Apache-2.0
"""``dpu-pack``, also as ``python -m packager``, and ``dpu-patch``."""

from edge_runtime.__main__ import start


def pack() -> None:
    """Run ``dpu-pack``."""
    start("packager.cli.pack", "pack", "dpu-pack")


def patch() -> None:
    """Run ``dpu-patch``."""
    start("packager.cli.pack", "patch", "dpu-patch")


if __name__ == "__main__":
    pack()
