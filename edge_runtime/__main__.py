# SPDX-License-Identifier: Apache-2.0
"""``dpu-edge``, also as ``python -m edge_runtime``; where all commands begin."""

import signal
from importlib import import_module


def start(module: str, command: str, name: str) -> None:
    """Import a command and run it.

    Ctrl-C meanwhile, for a tenth of a second, waits until it can be told properly.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    getattr(import_module(module), command)(prog_name=name)


def main() -> None:
    """Run ``dpu-edge``."""
    start("edge_runtime.cli.main", "main", "dpu-edge")


if __name__ == "__main__":
    main()
