# SPDX-License-Identifier: Apache-2.0
"""``dpu-edge``, also as ``python -m edge_runtime``; where all commands begin."""

import signal
from importlib import import_module


def _hold_interrupts() -> None:
    """Let Ctrl-C wait while commands are imported, for a tenth of a second.

    The command lets it through again, once it can say what was interrupted:
    ``release_interrupts`` of :mod:`edge_runtime.commandline`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def start(module: str, command: str, name: str) -> None:
    """Import a command and run it."""
    _hold_interrupts()
    getattr(import_module(module), command)(prog_name=name)


def main() -> None:
    """Run ``dpu-edge``."""
    start("edge_runtime.cli.main", "main", "dpu-edge")


if __name__ == "__main__":
    main()
