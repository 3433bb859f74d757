# SPDX-License-Identifier: Apache-2.0
"""Real file systems: full, read-only, and cut off in the middle of work.

Mounting needs a namespace of our own: as root, or as a user who may make one
(``unshare --map-root-user``). Loop devices need root. As a program this module prints
one JSON object; what could not run is in it, with the reason.
"""

import fcntl
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_runtime import Device
from edge_runtime.errors import DpuError, VerificationError
from edge_runtime.files import Files
from edge_runtime.store.slots import SPARE_BYTES
from tests.crash import world
from tests.crash.kills import Worker, is_good, promises, spawn

PAGE = 4096
ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--mount"] + ["--map-root-user"] * (os.geteuid() != 0)
SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, struct.pack("I", 2)  # FS_IOC_SHUTDOWN


class Optimist(Files):
    """Finds room everywhere, so that the disk itself has to say no."""

    def free_bytes(self, path):
        return 1 << 40


def run(*command):
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def mounted(folder, *options):
    folder.mkdir(exist_ok=True)
    run("mount", *options, str(folder))
    try:
        yield folder
    finally:
        run("umount", "--lazy", str(folder))


def steps(device):
    """What is tried where the disk says no."""
    return {
        "update": lambda: device.update(world.next_patch(device.store.state)),
        "rollback": lambda: device.rollback(1),
    }


def settled(folder):
    """A store with two slots and a reverse patch."""
    device = world.install(folder / "store")
    for _ in range(3):
        device.update(world.next_patch(device.store.state))
    return folder / "store"


def full_disk(folder):
    """Leave a store 0, 1, 2 ... pages of room, until everything fits.

    Returns:
        Attempts, how many were refused, and how many of them broke a promise.
    """
    count = {"attempts": 0, "refused": 0, "bad": 0}
    tmpfs = "-t", "tmpfs", "-o", "size=4m", "tmpfs"
    for pages in range(40):
        with mounted(folder / "full", *tmpfs) as disk:
            fill(disk / "ballast", pages)
            count["attempts"] += 1
            try:
                world.install(disk / "store", Optimist())
            except (DpuError, OSError):
                count["refused"] += 1
            (disk / "ballast").unlink()
            if not (disk / "store" / "state.json").exists():
                world.install(disk / "store")
            device = Device.open(disk / "store")
            count["bad"] += not is_good(disk / "store", device.store.state)
    for name in ("update", "rollback"):
        for pages in range(40):
            with mounted(folder / "full", *tmpfs) as disk:
                root = settled(disk)
                device = Device.open(root, files=Optimist(), trial=world.no_trial)
                before = device.store.state
                fill(disk / "ballast", pages)
                count["attempts"] += 1
                try:
                    steps(device)[name]()
                except (DpuError, OSError):
                    count["refused"] += 1
                else:
                    before = device.store.state
                good = is_good(root, before)
                (disk / "ballast").unlink()
                device = Device.open(root, trial=world.no_trial)
                device.update(world.next_patch(device.store.state))
                good = good and is_good(root, device.store.state)
                count["bad"] += not good
    return count


def fill(path, pages):
    """Fill a disk but for some pages."""
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(PAGE)):
                pass
        except OSError:
            file.truncate(max(0, file.tell() // PAGE - pages) * PAGE)


def small(folder, full):
    """Garbage costs nothing where bytes or inodes are used up; a good patch applies.

    Args:
        folder: Where to mount a small file system.
        full: Called with it, once there is a store; uses up what it is about.

    Returns:
        Attempts, how many were refused, and how many of them broke a promise.
    """
    count = {"attempts": 0, "refused": 0, "bad": 0}
    with mounted(folder / "small", "-t", "tmpfs", "-o", "size=4m", "tmpfs") as disk:
        root = settled(disk)
        device = Device.open(root, trial=world.no_trial)
        full(disk)
        for _ in range(3):
            before = device.store.state
            try:
                device.update(world.garbage(before))
            except VerificationError:
                count["refused"] += 1
            count["attempts"] += 1
            count["bad"] += device.store.state != before or not is_good(root, before)
        for _ in range(3):
            device.update(world.next_patch(device.store.state))
            count["attempts"] += 1
            count["bad"] += not is_good(root, device.store.state)
    return count


def few_bytes(disk):
    """Leave too little for one more slot, and enough once a kept one is gone."""
    free = shutil.disk_usage(disk).free
    slot = world.INIT.layout.file_size
    (disk / "ballast").write_bytes(bytes(free - SPARE_BYTES - slot + PAGE))


def no_inodes(disk):
    """Leave not one."""
    used = os.statvfs(disk)
    run("mount", "-o", f"remount,nr_inodes={used.f_files - used.f_ffree}", str(disk))


def read_only(folder):
    """Mount a store read-only: it answers, and refuses to change."""
    count = {"attempts": 0, "refused": 0, "bad": 0}
    with mounted(folder / "ro", "-t", "tmpfs", "tmpfs") as disk:
        root = settled(disk)
        for name in ("update", "rollback"):
            run("mount", "-o", "remount,ro", str(disk))
            device = Device.open(root, trial=world.no_trial)
            before = device.store.state
            count["attempts"] += 1
            try:
                steps(device)[name]()
            except (DpuError, OSError):
                count["refused"] += 1
            device.verify()
            count["bad"] += not is_good(root, before)
            run("mount", "-o", "remount,rw", str(disk))
        device.update(world.next_patch(device.store.state))
        count["bad"] += not is_good(root, device.store.state)
    return count


def power_cuts(folder, cuts, options="", files=None):
    """Shut a real ext4 down without a flush, at random moments, and mount it again."""
    count = {"attempts": 0, "acknowledged": 0, "bad": 0}
    image, place, rng = folder / "image", folder / "disk", random.Random(cuts)
    with open(image, "wb") as file:
        file.truncate(48 << 20)
    run("mkfs.ext4", "-q", "-F", str(image))
    mount, root = ("-o", f"loop{options}", str(image)), place / "store"
    with mounted(place, *mount) as disk:
        start = time.perf_counter()
        promised = Device.open(settled(disk)).store.state
        wait_s = time.perf_counter() - start
    for _ in range(cuts):
        world.next_patch(promised)
        seed = rng.random()
        with mounted(place, *mount):
            child, pipe = spawn(lambda out, s=seed: cut_off(root, out, s, files))
            time.sleep(rng.uniform(0, wait_s))
            handle = os.open(place, os.O_RDONLY)
            fcntl.ioctl(handle, SHUTDOWN, WITHOUT_FLUSH)
            os.close(handle)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            acknowledged = promises(pipe)
        with mounted(place, *mount):
            count["attempts"] += 1
            count["acknowledged"] += len(acknowledged)
            # On a machine of any speed and load, many cuts come after a promise.
            wait_s *= 0.8 if acknowledged else 1.25
            promised = (acknowledged or [promised])[-1]
            count["bad"] += not is_good(root, promised)
            if files is not None and count["bad"]:
                break  # it had to break, and did
            promised = Device.open(root).store.state
    return count


class Careless(Files):
    """Never syncs."""

    def sync(self, handle):
        pass


def cut_off(root, out, seed, files):
    """Work until the disk is gone."""
    with suppress(OSError, DpuError):
        Worker(world, root, out, world.no_trial, files).work(seed)


def careless(folder, cuts):
    """The same without any sync: a test that cannot fail would prove nothing."""
    count = power_cuts(folder, cuts, files=Careless())
    return count | {"bad": int(not count["bad"])}


def main():
    if sys.argv[1:] == ["--small"]:
        with world.scratch() as folder:
            found = [small(folder, full) for full in (few_bytes, no_inodes)]
            print(json.dumps(found))
        return
    cuts = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    weak = ",data=writeback,noauto_da_alloc"
    tries = {
        "full disk": full_disk,
        "too few bytes": lambda folder: small(folder, few_bytes),
        "no inodes": lambda folder: small(folder, no_inodes),
        "read-only disk": read_only,
        "power cuts, ext4": lambda folder: power_cuts(folder, cuts),
        f"power cuts, ext4{weak}": lambda folder: power_cuts(folder, cuts, weak),
        "  and without syncs it breaks": lambda folder: careless(folder, cuts),
    }
    results = {}
    for name, work in tries.items():
        with world.scratch() as folder:
            try:
                results[name] = work(folder)
            except (subprocess.CalledProcessError, FileNotFoundError) as err:
                said = getattr(err, "stderr", b"") or b""
                results[name] = {"not run": said.decode().strip() or str(err)}
    print(json.dumps(results))


def obstacle():
    """Say why nothing can be mounted where it harms nobody; empty if it can."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    probe = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
    done = subprocess.run(probe, capture_output=True, text=True)
    return f"nothing can be mounted: {done.stderr.strip()}" * bool(done.returncode)


def run_in_namespace(word):
    """Run this module where mounting harms nobody, and return what it prints."""
    command = [*NAMESPACE, sys.executable, "-m", "tests.crash.realdisk", word]
    try:
        return json.loads(subprocess.check_output(command, cwd=ROOT))
    finally:
        world.sweep()


def in_namespace(cuts):
    """Run all of it.

    Returns:
        The results by name; what could not run says ``not run``.
    """
    if why := obstacle():
        return {"real disks": {"not run": why}}
    return run_in_namespace(str(cuts))


if __name__ == "__main__":
    main()
