# SPDX-License-Identifier: Apache-2.0
"""``dpu-pack``, also as ``python -m packager``, ``dpu-patch`` and ``dpu-fleet``."""

from edge_runtime.__main__ import start


def pack() -> None:
    """Run ``dpu-pack``."""
    start("packager.cli.pack", "pack", "dpu-pack")


def patch() -> None:
    """Run ``dpu-patch``."""
    start("packager.cli.pack", "patch", "dpu-patch")


def fleet() -> None:
    """Run ``dpu-fleet``."""
    start("packager.cli.fleet", "fleet", "dpu-fleet")


if __name__ == "__main__":
    pack()
