# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a device, and what to do about it.

Each check looks at one thing and says how it is. They change nothing of the store; the
one of the file system writes a file of its own there, and removes it again.
"""

import fcntl
import importlib.metadata
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from edge_runtime.agent.status import read_status
from edge_runtime.errors import DpuError
from edge_runtime.files import Files, lock_file
from edge_runtime.formats.identity import SHOWN
from edge_runtime.inference.predictor import Predictor
from edge_runtime.live.outbox import Outbox, read_told
from edge_runtime.live.proof import read_key
from edge_runtime.store.contents import KEY_NAME
from edge_runtime.store.store import Store
from edge_runtime.sync.plan import SyncResult
from edge_runtime.sync.story import QUIET_S, Known, age, read_known, span, tell
from edge_runtime.sync.sync import FAILED
from edge_runtime.times import seconds_of, utc
from edge_runtime.update.device import Device
from edge_runtime.update.repair import find_damage

SLACK_S = 300  # by which a clock may be behind what somebody else signed
FAR_S = 10 * 366 * 86_400  # ahead of everything that was ever seen here
SILENT_S = 2 * 86_400  # without an answer of the channel's server
SOON_S = 30 * 86_400  # before a key list expires
_SYSTEMD = Path("/run/systemd/system")
_IN_MEMORY = {"tmpfs", "ramfs"}
_PACKAGES = ("numpy", "onnxruntime", "zstandard", "cryptography", "urllib3")


class Health(StrEnum):
    """How something is."""

    OK = "ok"
    NOTE = "note"  # nothing is wrong, and a person may want to know it
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Attributes:
        check: What was looked at, in a word.
        health: How it is.
        words: What was found.
        todo: What to do about it; empty where nothing is to be done.
    """

    check: str
    health: Health
    words: str
    todo: str = ""


Findings = Iterator[Finding]


def examine(root: Path, folder: Path | None = None) -> list[Finding]:
    """Look at everything that keeps a device from doing its work.

    Args:
        root: The store.
        folder: The agent's folder; by default where the agent looked last.
    """
    if not root.exists():
        words = f"there is no {root}: nothing is installed, or a disk is not mounted"
        todo = f"'dpu-edge --store {root} init BUNDLE|URL' installs, or mount the disk"
        return [Finding("store", Health.WRONG, words, todo)]
    found = list(_file_system(root))
    try:
        device = Device.open(root)
    except (DpuError, OSError) as err:
        todo = "the message says what to do; no bundle can give a lost state back"
        return [*found, Finding("store", Health.WRONG, str(err), todo)]
    agent = read_status(root)
    if folder is None and agent.get("folder"):
        folder = Path(agent["folder"])
    known = read_known(folder)
    checks: tuple[Callable[[], Findings], ...] = (
        lambda: _clock(device.store, known),
        lambda: _space(device.store, folder),
        lambda: _runtime(device),
        lambda: _keys(device.store),
        lambda: _store(device.store),
        _unit,
        lambda: _agent(root, agent),
        lambda: _sync(device.store, agent, known),
        lambda: _reports(root, folder),
    )
    for check in checks:
        found += check()
    return found


def _clock(store: Store, known: Known) -> Findings:
    now, seen = time.time(), known.state.seen if known.state else 0
    if (key_list := store.state.key_list) and key_list.seen:
        seen = max(seen, _seconds(key_list.seen))
    events = [_seconds(event.at) for event in store.state.history]
    todo = "set the clock, for example with 'timedatectl set-ntp true'"
    if now < seen - SLACK_S:
        words = f"it is {utc(now)} here, and something was signed at {utc(seen)}"
        yield Finding("clock", Health.WRONG, words, todo)
    elif now < max(events, default=0) - SLACK_S:
        words = f"it is {utc(now)} here, and the history goes up to {utc(max(events))}"
        yield Finding("clock", Health.WRONG, words, todo)
    elif now > max([seen, *events]) + FAR_S:
        words = f"it is {utc(now)} here, years after all that this device has seen"
        yield Finding("clock", Health.WRONG, words, todo)
    else:
        yield Finding("clock", Health.OK, utc(now))


def _seconds(text: str) -> int:
    with suppress(ValueError):
        return seconds_of(text)
    return 0


def _space(store: Store, folder: Path | None) -> Findings:
    from edge_runtime.store.slots import shortage

    try:
        problem = shortage(store)
    except (OSError, DpuError) as err:  # the recipe tells the size
        yield Finding("space", Health.WRONG, str(err))
        return
    if problem and len(store.state.slots) > 1:
        words = f"{problem}; an older slot would be given up for it"
        yield Finding("space", Health.NOTE, words)
    elif problem:
        yield Finding("space", Health.WRONG, str(problem), "free some space")
    else:
        free = store.files.free_bytes(store.root)
        yield Finding("space", Health.OK, f"{free} bytes free")
    for path in filter(None, [store.root, folder]):
        with suppress(OSError):
            if Files().is_full(path):
                words = f"{path} has hardly a block or an inode left"
                yield Finding("space", Health.WRONG, words, "remove files there")


def _file_system(root: Path) -> Findings:
    kind = _kind_of(root)
    where = f"{root} is on {kind}" if kind else str(root)
    try:
        read_only = os.statvfs(root).f_flag & os.ST_RDONLY
    except OSError as err:
        yield Finding("file system", Health.WRONG, str(err), "mount it, or install")
        return
    if read_only:
        todo = "mount it for writing; a card that fails is mounted so by the kernel"
        yield Finding("file system", Health.WRONG, f"{where}, read-only", todo)
        return
    if not os.access(root, os.W_OK):
        words = f"{where}; this user may not write there, so no more was tried"
        yield Finding("file system", Health.NOTE, words, "run this as the agent's user")
        return
    try:
        _try_out(root)
    except OSError as err:
        todo = "use a folder on a local disk"
        yield Finding("file system", Health.WRONG, f"{where}: {err}", todo)
        return
    if kind in _IN_MEMORY:
        todo = "move the store to a disk"
        words = f"{where}, in memory: a power cut takes all of it"
        yield Finding("file system", Health.WRONG, words, todo)
    else:
        words = f"{where}: writes, syncs, renames and locks"
        yield Finding("file system", Health.OK, words)


def _try_out(root: Path) -> None:
    """Write, sync, lock and rename a file, as an update does; nothing is left."""
    files = Files()
    # Names that a store removes by itself, should this be killed.
    first, second = (root / f".doctor.{secrets.token_hex(8)}.part" for _ in range(2))
    try:
        files.write(first, [b"dpu-edge doctor\n"])
        with first.open("ab") as file:
            lock_file(file, first)
        files.rename(first, second)
        files.sync_folder(root)
    finally:
        files.unlink(first)
        files.unlink(second)


def _kind_of(path: Path) -> str:
    """Return the type of the file system that holds a path; empty if unknown."""
    best, kind = "", ""
    with suppress(OSError):
        real = os.path.realpath(path)
        for line in (
            Path("/proc/self/mounts").read_text("utf-8", "replace").splitlines()
        ):
            _, mount, found, *_ = line.split(" ")
            mount = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), mount)
            inside = real == mount or real.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(best):
                best, kind = mount, found
    return kind


def _runtime(device: Device) -> Findings:
    versions = ", ".join(f"{name} {version}" for name, version in runtime_versions())
    try:
        folder = device.store.slot_folder(device.store.state.active)
        backend = Predictor(folder, device.store.contract).backend
    except (DpuError, OSError) as err:
        todo = "install the runtime that the message names, or repair the store"
        yield Finding("runtime", Health.WRONG, f"{err} ({versions})", todo)
    else:
        yield Finding("runtime", Health.OK, f"{backend} runs the model; {versions}")


def runtime_versions() -> Iterator[tuple[str, str]]:
    """Yield what is installed here of all that this runtime may use."""
    yield "Python", sys.version.split()[0]
    for name in ("dpu-edge", *_PACKAGES):
        with suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _keys(store: Store) -> Findings:
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
        is_soon = _seconds(expires) - time.time() < SOON_S
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


def _store(store: Store) -> Findings:
    damage = find_damage(store)
    for name, problem in damage.items():
        todo = "'dpu-edge repair BUNDLE|URL' makes it whole again"
        what, _, target = name.partition(" ")
        words = f"{what} {target[:SHOWN]}".strip() + f": {problem}"
        yield Finding("store", Health.WRONG, words, todo)
    if not damage:
        slot = store.state.active_slot
        words = f"round {slot.round} ({slot.target[:SHOWN]}) and all beside it verify"
        yield Finding("store", Health.OK, words)


def _unit() -> Findings:
    """Ask systemd, where it is, for units of this runtime that do not run."""
    if not _SYSTEMD.exists() or not (program := shutil.which("systemctl")):
        return
    words = ["list-units", "--all", "--plain", "--no-legend", "dpu-edge-*.service"]
    try:
        done = subprocess.run(
            [program, *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError) as err:
        yield Finding("unit", Health.NOTE, f"systemd did not answer: {err}")
        return
    lines = [line.split(None, 4) for line in done.stdout.splitlines() if line.strip()]
    for name, _, active, sub, *_ in (line for line in lines if len(line) > 3):
        if active == "failed" or sub == "auto-restart":
            todo = f"'journalctl -u {name}' says why"
            yield Finding("unit", Health.WRONG, f"{name} is {active} ({sub})", todo)
        else:
            yield Finding("unit", Health.OK, f"{name} is {active} ({sub})")
    if not lines:
        todo = "'dpu-edge service' prints one"
        yield Finding("unit", Health.NOTE, "systemd runs no unit of dpu-edge", todo)


def _agent(root: Path, status: Mapping[str, Any]) -> Findings:
    if not status:
        todo = "'dpu-edge agent FOLDER', or 'dpu-edge service' for a unit"
        yield Finding("agent", Health.NOTE, "none has ever looked here", todo)
        return
    quiet = time.time() - status["last_success"]
    if status["failing"]:
        yield Finding("agent", Health.WRONG, status["failing"])
        return
    runs = _is_running(root)
    words = {
        True: "it runs",
        False: "none runs now",
        None: "whether it runs only its own user sees",
    }
    if quiet > QUIET_S and not runs:
        problem = f"{words[runs]}, and none has looked for {span(quiet)}"
        yield Finding("agent", Health.WRONG, problem, "start its unit")
    else:
        known = f"{words[runs]}; all was well {age(quiet)}"
        yield Finding("agent", Health.OK, known)


def _is_running(root: Path) -> bool | None:
    """Return whether somebody holds the agent's lock; None for another user's."""
    try:
        with (root / "agent.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except PermissionError:
        return None
    except OSError:
        pass
    return False


def _sync(store: Store, agent: Mapping[str, Any], known: Known) -> Findings:
    story = tell(store, agent, known)
    if known.problem:
        todo = "remove the file if nobody can mend it: a floor goes with it"
        yield Finding("sync", Health.WRONG, known.problem, todo)
    elif known.state is None:
        yield Finding("sync", Health.NOTE, story["reason"])
    elif known.state.result == FAILED:
        yield Finding(
            "sync", Health.WRONG, f"the last look failed: {known.state.reason}"
        )
    elif known.state.checked and (story["age_s"] or 0) > SILENT_S:
        words = f"the server last answered {age(story['age_s'])}"
        yield Finding("sync", Health.WRONG, words, "is its unit running?")
    elif known.state.result == SyncResult.STALE:
        todo = "has its publisher published lately, and is this device's clock right?"
        yield Finding("sync", Health.WRONG, known.state.reason, todo)
    elif known.state.result in (SyncResult.NO_ROOM, SyncResult.NO_WAY):
        yield Finding("sync", Health.WRONG, story["summary"])
    else:
        yield Finding("sync", Health.OK, story["summary"])


def _reports(root: Path, folder: Path | None) -> Findings:
    """Look for reports that nobody fetches; they hold no update back."""
    try:
        sent = read_told(folder).sent if folder else ()
        waiting = [r for r in Outbox(root).waiting() if r.n not in sent]
        oldest = min((r.path.stat().st_mtime for r in waiting), default=time.time())
    except (DpuError, OSError) as err:
        yield Finding("reports", Health.NOTE, str(err))
        return
    if time.time() - oldest > SILENT_S:
        words = f"{len(waiting)} wait to be sent, the oldest was made "
        todo = "is sync started with --report, and does the last look say why not?"
        yield Finding("reports", Health.NOTE, words + age(time.time() - oldest), todo)
