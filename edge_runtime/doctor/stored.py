# SPDX-License-Identifier: Apache-2.0
"""Is what the store holds fit: keys, hooks, lock, state, and all beside it?"""

import fcntl
import os
import stat
import time
from pathlib import Path

from edge_runtime.doctor.finding import Finding, Findings, Health
from edge_runtime.doctor.machine import seconds
from edge_runtime.errors import DpuError, HeldError
from edge_runtime.formats.identity import SHOWN
from edge_runtime.live.proof import read_key
from edge_runtime.store.contents import KEY_NAME
from edge_runtime.store.state import decode_state
from edge_runtime.store.state_file import COPY_NAME, STATE_NAME, state_bytes
from edge_runtime.store.store import Store
from edge_runtime.update.hooks import find_hooks
from edge_runtime.update.repair import find_damage

SOON_S = 30 * 86_400  # before a key list expires


def keys(store: Store) -> Findings:
    """Look at whom this device trusts, and at its own key."""
    state, path = store.state, store.root / KEY_NAME
    if not state.trust.keys:
        words = "no keys are trusted: anybody's patches are taken"
        todo = "'dpu-edge trust add --trust-on-first-use N.root.json', if you know "
        todo += "whose list it is; or install anew with --trust KEY.pub.pem"
        yield Finding("trust", Health.NOTE, words, todo)
    elif (key_list := state.key_list) is None:
        yield Finding("trust", Health.OK, f"{len(state.trust.keys)} keys are trusted")
    elif problem := state.expired():
        todo = "bring the next list: 'dpu-edge trust add N.root.json'"
        yield Finding("trust", Health.WRONG, problem, todo)
    else:
        expires = key_list.root.expires
        words = f"key list {key_list.root.version}, until {expires}"
        is_soon = seconds(expires) - time.time() < SOON_S
        health = Health.NOTE if is_soon else Health.OK
        yield Finding("trust", health, words + (": soon" if is_soon else ""))
    try:
        key, mode = read_key(path), stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        words = "this device has no key, so its proofs are not signed"
        yield Finding("key", Health.NOTE, words, "'dpu-edge device-key' makes one")
    except PermissionError:
        words = "it is another user's, so only that it is there can be said"
        yield Finding("key", Health.OK, words)
    except (DpuError, OSError) as err:
        yield Finding("key", Health.WRONG, str(err))
    else:
        if key is not None and mode & 0o077:
            words = f"{path} has mode {mode:04o}: others may read it, and prove in "
            words += "this device's name"
            yield Finding("key", Health.WRONG, words, f"chmod 600 {path}")
        else:
            yield Finding("key", Health.OK, f"{path}, mode {mode:04o}")


def hooks(store: Store) -> Findings:
    """Look for hooks that cannot be run, and so hold every update."""
    count = 0
    for when in ("before-apply", "after-apply"):
        try:
            count += len([*find_hooks(store.root, when)])
        except HeldError as err:
            yield Finding("hooks", grave_for(store.root), str(err))
            return
    yield Finding("hooks", Health.OK, f"{count} that may be run" if count else "none")


def grave_for(root: Path) -> Health:
    """Return how bad it is that this user may not do something: others' may."""
    return Health.WRONG if os.access(root, os.W_OK) else Health.NOTE


def lock(store: Store) -> Findings:
    """Look for a process that keeps all others from writing."""
    path = store.root / "lock"
    try:
        held = is_held(path)
    except OSError as err:
        yield Finding("lock", Health.WRONG, str(err), "remove what is there")
        return
    if held:
        words = f"another process holds {path}: an update goes on, or hangs; no other "
        todo = "if it lasts longer than a trial, end that process: 'lslocks' names it"
        yield Finding("lock", Health.NOTE, words + "gets through until it ends", todo)
    elif held is None:
        words = "whether somebody holds it only its own user sees"
        yield Finding("lock", Health.NOTE, words)
    else:
        yield Finding("lock", Health.OK, "nobody holds it")


def is_held(path: Path) -> bool | None:
    """Return whether somebody holds a lock; None where only its own user sees.

    Raises:
        OSError: What is there is no lock.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except PermissionError:
        return None
    except FileNotFoundError:
        pass
    return False


def whole(store: Store) -> Findings:
    """Read all that the store holds."""
    found = [*_state(store.root), *_damage(store)]
    slot = store.state.active_slot
    words = f"round {slot.round} ({slot.target[:SHOWN]}) and all beside it verify"
    yield from found or [Finding("store", Health.OK, words)]


def _state(root: Path) -> Findings:
    for name, other in ((STATE_NAME, COPY_NAME), (COPY_NAME, STATE_NAME)):
        try:
            decode_state(state_bytes(root / name))
        except FileNotFoundError:
            pass  # a full disk had no room for the copy; the next update writes it
        except (DpuError, OSError):
            words = f"{root / name} is damaged or no file; {other} counts"
            todo = "the next update mends a file; a folder: move it away and copy "
            yield Finding("store", Health.WRONG, words, f"{todo}{other} there")


def _damage(store: Store) -> Findings:
    for name, problem in find_damage(store).items():
        todo = "'dpu-edge repair BUNDLE|URL' makes it whole again"
        what, _, target = name.partition(" ")
        words = f"{what} {target[:SHOWN]}".strip() + f": {problem}"
        yield Finding("store", Health.WRONG, words, todo)
