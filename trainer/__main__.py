# SPDX-License-Identifier: Apache-2.0
"""``dpu-train``, also as ``python -m trainer``."""

from edge_runtime.__main__ import start


def main() -> None:
    """Run ``dpu-train``."""
    start("trainer.cli", "main", "dpu-train")


if __name__ == "__main__":
    main()
