# SPDX-License-Identifier: Apache-2.0
"""Is the machine fit: clock, space, file system, runtime, units of systemd?"""

import importlib.metadata
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from edge_runtime.doctor.finding import Finding, Findings, Health
from edge_runtime.errors import BlockedError, DpuError
from edge_runtime.files import Files, lock_file
from edge_runtime.inference.predictor import Predictor
from edge_runtime.store.store import Store
from edge_runtime.sync.story import Known
from edge_runtime.times import UPTIME_S, seconds_of, utc
from edge_runtime.update.device import Device

SLACK_S = 300  # by which a clock may be behind what somebody else signed
FAR_S = 10 * 366 * 86_400  # ahead of everything that was ever seen here
_SYSTEMD = Path("/run/systemd/system")
_IN_MEMORY = {"tmpfs", "ramfs"}
_PACKAGES = ("numpy", "onnxruntime", "zstandard", "cryptography", "urllib3")


def clock(store: Store, known: Known) -> Findings:
    """Hold the clock against all that this device has seen."""
    now, seen = time.time(), known.state.seen if known.state else 0
    if (key_list := store.state.key_list) and key_list.seen:
        seen = max(seen, seconds(key_list.seen))
    events = [seconds(event.at) for event in store.state.history]
    newest = max([seen, *events])
    todo = "set the clock, for example with 'timedatectl set-ntp true'"
    if now < seen - SLACK_S:
        words = f"it is {utc(now)} here, and something was signed at {utc(seen)}"
        yield Finding("clock", Health.WRONG, words, todo)
    elif now < max(events, default=0) - SLACK_S:
        words = f"it is {utc(now)} here, and the history goes up to {utc(max(events))}"
        yield Finding("clock", Health.WRONG, words, todo)
    # What was seen before this clock was ever set says nothing of it.
    elif now > newest + FAR_S and newest > UPTIME_S:
        words = f"it is {utc(now)} here, years after all that this device has seen"
        yield Finding("clock", Health.WRONG, words, todo)
    else:
        yield Finding("clock", Health.OK, utc(now))


def seconds(text: str) -> int:
    """Return a time in seconds since 1970; 0 for what is none."""
    with suppress(ValueError):
        return seconds_of(text)
    return 0


def space(store: Store, folder: Path | None) -> Findings:
    """Look for room for one more slot."""
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


def file_system(root: Path) -> Findings:
    """Try what an update needs of the file system."""
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


def _try_out(root: Path, *, again: bool = True) -> None:
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
    except FileNotFoundError:
        # An update that ended just now took it for what a killed process left.
        if not again:
            raise
        _try_out(root, again=False)
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


def runtime(device: Device) -> Findings:
    """Load the active weights."""
    versions = ", ".join(f"{name} {version}" for name, version in runtime_versions())
    try:
        folder = device.store.slot_folder(device.store.state.active)
        backend = Predictor(folder, device.store.contract).backend
    except (DpuError, OSError) as err:
        todo = "install the runtime that the message names, or repair the store"
        todo = "" if isinstance(err, BlockedError) else todo  # its message says it
        yield Finding("runtime", Health.WRONG, f"{err} ({versions})", todo)
    else:
        yield Finding("runtime", Health.OK, f"{backend} runs the model; {versions}")


def runtime_versions() -> Iterator[tuple[str, str]]:
    """Yield what is installed here of all that this runtime may use."""
    yield "Python", sys.version.split()[0]
    for name in ("dpu-edge", *_PACKAGES):
        with suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def unit() -> Findings:
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
