# SPDX-License-Identifier: Apache-2.0
"""Look at everything that keeps a device from doing its work.

Each check looks at one thing and says how it is. They change nothing of the store; the
one of the file system writes a file of its own there, and removes it again.
"""

import shlex
from collections.abc import Callable
from pathlib import Path

from edge_runtime.agent.status import read_status
from edge_runtime.doctor import machine, services, stored
from edge_runtime.doctor.finding import Finding, Findings, Health
from edge_runtime.errors import DpuError
from edge_runtime.sync.story import read_known
from edge_runtime.update.device import Device


def examine(root: Path, folder: Path | None = None) -> list[Finding]:
    """Look at everything that keeps a device from doing its work.

    Args:
        root: The store.
        folder: The agent's folder; by default where the agent looked last.
    """
    if not root.exists():
        words = f"there is no {root}: nothing is installed, or a disk is not mounted"
        todo = f"'dpu-edge --store {shlex.quote(str(root))} init BUNDLE|URL' installs, "
        todo += "or mount the disk"
        return [Finding("store", Health.WRONG, words, todo)]
    found = list(machine.file_system(root))
    try:
        device = Device.open(root)
    except (DpuError, OSError) as err:
        todo = "the message says what to do; no bundle can give a lost state back"
        return [*found, Finding("store", Health.WRONG, str(err), todo)]
    store, status = device.store, read_status(root)
    if folder is None and status.get("folder"):
        folder = Path(status["folder"])
    known = read_known(folder)
    checks: tuple[Callable[[], Findings], ...] = (
        lambda: machine.clock(store, known),
        lambda: machine.space(store, folder),
        lambda: machine.runtime(device),
        lambda: stored.keys(store),
        lambda: stored.hooks(store),
        lambda: stored.lock(store),
        lambda: stored.whole(store),
        machine.unit,
        lambda: services.agent(root, status),
        lambda: services.folder(root, folder),
        lambda: services.sync(store, status, known),
        lambda: services.reports(root, folder),
    )
    for check in checks:
        found += check()
    return found
