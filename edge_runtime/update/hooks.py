# SPDX-License-Identifier: Apache-2.0
"""Hooks: the owner's own programs, run before and after the weights change.

``STORE/hooks/before-apply.d`` may refuse an update (stop a service, check a battery);
``STORE/hooks/after-apply.d`` learns of every change, a rollback too. As with
``run-parts``, a folder's programs run in the order of their names. A hook is a safety
gate: one that lost its run bit refuses as one that fails. Hidden files, ``README*`` and
``*.disabled`` are no hooks.
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.errors import HeldError
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
    for path in _hooks(root / "hooks" / f"{when}.d"):
        if not os.access(path, os.X_OK):
            raise HeldError(
                f"the hook {path.name} may not be run; if it is to be asked: chmod +x "
                f"{shlex.quote(str(path))}; if not, call it {path.name}.disabled"
            )
        try:
            problem = run_program([str(path)], os.environ | facts, timeout_s).problem
        except OSError as err:
            problem = f"cannot be run ({err.strerror})"
        if problem:
            raise HeldError(f"the hook {path.name} {problem}")


def _hooks(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.glob("*")):
        is_note = path.name.startswith((".", "README")) or path.suffix == ".disabled"
        if path.is_file() and not is_note:
            yield path
