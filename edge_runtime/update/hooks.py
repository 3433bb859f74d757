# SPDX-License-Identifier: Apache-2.0
"""Hooks: the owner's own programs, run before and after the weights change.

``STORE/hooks/before-apply.d`` may refuse an update (stop a service, check a battery);
``STORE/hooks/after-apply.d`` learns of every change, a rollback too. As with
``run-parts``, a folder's programs run in the order of their names. A hook is a safety
gate: one that lost its run bit, a link that leads nowhere and a folder that cannot be
read refuse as one that fails does. Hidden files, ``README*`` and ``*.disabled`` are no
hooks.
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.errors import HeldError
from edge_runtime.reading import names_in
from edge_runtime.store.state import Slot
from edge_runtime.update.programs import run_program

TIMEOUT_S = 60.0  # for each program


def run_hooks(
    root: Path, when: str, event: str, slot: Slot, *, timeout_s: float = TIMEOUT_S
) -> None:
    """Run the owner's programs, one after the other.

    Args:
        root: The store's directory.
        when: ``before-apply`` or ``after-apply``.
        event: What happens, in the words of the history.
        slot: What it leads to.
        timeout_s: Kill a program, and all that it started, after this many seconds.

    Raises:
        HeldError: One failed or took too long; those after it did not run.
    """
    facts = {"DPU_STORE": str(root), "DPU_EVENT": event, "DPU_ROUND": str(slot.round)}
    facts["DPU_FINGERPRINT"] = slot.target
    for path in find_hooks(root, when):
        try:
            problem = run_program([str(path)], os.environ | facts, timeout_s).problem
        except OSError as err:
            problem = f"cannot be run ({err.strerror})"
        if problem:
            raise HeldError(f"the hook {path.name} {problem}")


def find_hooks(root: Path, when: str) -> Iterator[Path]:
    """Yield the owner's programs, in the order in which they run.

    Raises:
        HeldError: There may be one that cannot be asked.
    """
    folder = root / "hooks" / f"{when}.d"
    try:
        for name in names_in(folder):
            is_note = name.startswith((".", "README")) or name.endswith(".disabled")
            if not is_note:
                yield _insist_runs(folder / name)
    except OSError as err:
        raise HeldError(
            f"whether {folder} holds a hook cannot be read ({err}); let this user read "
            "it, mount what it leads to, or remove it"
        ) from err


def _insist_runs(path: Path) -> Path:
    name, quoted = path.name, shlex.quote(str(path))
    if not path.is_file():  # a link whose disk is not mounted, a container's volume
        raise HeldError(
            f"the hook {name} is no file; if it is to be asked, restore or mount what "
            f"should be {quoted}; if not, call it {name}.disabled"
        )
    if not os.access(path, os.X_OK):
        raise HeldError(
            f"the hook {name} may not be run; if it is to be asked: chmod +x {quoted}; "
            f"if not, call it {name}.disabled"
        )
    return path
