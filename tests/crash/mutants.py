# SPDX-License-Identifier: Apache-2.0
"""Is the proof any good? Break the store on purpose, one way at a time.

``python -m tests.crash.mutants`` prints, for each way, what found it; it ends with 1 if
nothing did, or if the line to break is not there any more.
"""

import errno
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from edge_runtime.files import Files
from tests.crash import world
from tests.crash.disk import read_tree
from tests.crash.explore import (
    Count,
    cut_power,
    fail_everywhere,
    fail_reads,
    kill_then_cut,
    live,
)
from tests.crash.kills import two_writers
from tests.crash.recording import (
    LIFE,
    TROUBLE,
    Recording,
    install,
    rollback,
    rollback_far,
    update,
)

ROOT = Path(__file__).parents[2]
FULL = (install, update, update, update)
QUICK = (update, rollback_far)
ROTTEN = (install, update, update, rollback, Recording.rot_slot)

# What is broken: the file, the text, and what stands there instead.
MUTANTS = {
    "no sync of a file's content": (
        "files",
        "                    self.sync(file.fileno())\n",
        "                    pass\n",
    ),
    "no sync of the store's parent": (
        "files",
        "            self.sync_folder(folder.parent)\n",
        "",
    ),
    "'current' is removed, then made": (
        "files",
        "self.symlink(part, folder)\n        self.rename(part, link)",
        "self.unlink(link)\n        self.symlink(link, folder)",
    ),
    "no sync of model/": (
        "store/beginning",
        "        self.files.sync_folder(folder)\n",
        "",
    ),
    "no sync of a slot's names": (
        "store/store",
        "        self.files.sync_folder(part)\n",
        "",
    ),
    "no sync of slots/": (
        "store/store",
        "        self.files.sync_folder(folder.parent)\n",
        "",
    ),
    "no sync of reverse/": (
        "store/store",
        "        self.files.sync_folder(path.parent)\n",
        "",
    ),
    "a way back is promised, not written": (
        "store/store",
        "self.files.write(path, [data])\n        self.files.sync_folder(path.parent)\n",
        "self.files.sync_folder(path.parent)\n",
    ),
    "no sync after a commit": (
        "files",
        "        if durable:\n            self.sync_folder(path.parent)\n",
        "",
    ),
    "the state is written in place": (
        "store/store",
        'self.files.replace(path, data, suffix=".part")',
        "self.files.write(path, [data])\n            self.files.sync_folder(self.root)",
    ),
    "the copy is written after the state": (
        "store/store",
        "for path in (self._copy_path, self._state_path):",
        "for path in (self._state_path, self._copy_path):",
    ),
    "no copy of the state": (
        "store/store",
        "for path in (self._copy_path, self._state_path):",
        "for path in (self._state_path,):",
    ),
    "the copy is not mended": (
        "store/store",
        "            if not mended:\n                self._mend(state)\n",
        "",
    ),
    "the state's checksum is not looked at": (
        "store/state",
        "if digest != _digest(values):",
        "if digest is None:",
    ),
    "no sync before old slots are removed": (
        "store/store",
        "        if doomed:\n",
        "        if not doomed:\n",
    ),
    "old slots are removed before the commit": (
        "update/device",
        "        self.store.commit(state)\n        try:\n            self._run_hooks",
        "        self.store.state = state\n        self.store.collect()\n"
        "        self.store.commit(state)\n        try:\n            self._run_hooks",
    ),
    "nothing is tidied up": (
        "store/store",
        "        for path in sorted(doomed):\n            self.files.remove(path)\n",
        "",
    ),
    "a try is not counted before the trial": (
        "update/tries",
        "    store.commit(before.tried(slot.target))\n",
        "",
    ),
    "hooks run before the commit": (
        "update/device",
        "        self.store.commit(state)\n        try:\n            self._run_hooks(",
        '        self._run_hooks("after-apply", event, slot)\n'
        "        self.store.commit(state)\n        try:\n            self._run_hooks(",
    ),
    "a damaged kept slot stays in the state": (
        "store/slots",
        "        store.commit(store.state.without(kept))\n",
        "",
    ),
    "a kept slot is not looked at": (
        "store/slots",
        "            return store.check_slot(target)\n",
        "            return store.slot_folder(target)\n",
    ),
    "room is made at the cost of the active slot": (
        "store/slots",
        "needed = (state.active, parent)\n",
        "needed = (parent,)\n",
    ),
    "room is made before the result is proved": (
        "store/slots",
        "        new.prove()\n        if not _give_up",
        "        if not _give_up",
    ),
    "a damaged kept slot is dropped before the new one is proved": (
        "store/slots",
        "        new.prove()\n        store.commit",
        "        store.commit",
    ),
    "the copy is given up for a state that is damaged itself": (
        "store/store",
        "        except (OSError, StoreError):\n            return False\n",
        "        except (OSError, StoreError):\n            pass\n",
    ),
    "the copy is given up, and may come back": (
        "store/store",
        "        self.files.unlink(self._copy_path)\n"
        "        # An older copy must not come back beside a newer state.\n"
        "        self.files.sync_folder(self.root)\n",
        "        self.files.unlink(self._copy_path)\n",
    ),
    "a rollback lowers the release floor": (
        "store/state",
        'replace(slot, parent=""), slot.counter > self.floor\n',
        'replace(slot, parent=""), True\n',
    ),
    "no lock": (
        "store/store",
        "lock_file(file, Path(file.name))",
        "pass",
    ),
    "the state is not read again under the lock": (
        "store/store",
        "state = self.reload()\n",
        'state = getattr(self, "state", None) or self.reload()\n',
    ),
    "believed before it is written": (
        "store/store",
        "        data = encode_state(state)\n",
        "        data, self.state = encode_state(state), state\n",
    ),
}


def hunt(folder):
    """Return what is found first, and by which part of the suite; None for nothing."""
    for name, work in (
        ("no harm done", lambda _: _live(folder)),
        ("cut: update", lambda c: _cut(folder, c, FULL, *QUICK)),
        ("cut: damage", lambda c: _cut(folder, c, ROTTEN, Recording.come_forward)),
        ("two writers", lambda c: _two(folder, c)),
        ("cut: installation", lambda c: _cut(folder, c, (), install)),
        ("killed, then cut", lambda c: _kill(folder, c)),
        ("read errors", lambda c: _fail(folder, fail_reads, c)),
        ("I/O errors", lambda c: _fail(folder, fail_everywhere, c)),
        ("no room", lambda c: _no_room(folder, c)),
        ("cut: life", lambda c: _cut(folder, c, (install,), *LIFE)),
        ("cut: trouble", lambda c: _cut(folder, c, (install,), *TROUBLE)),
    ):
        count = Count(enough=1)
        print(name, file=sys.stderr, flush=True)
        try:
            work(count)
        except Exception as err:  # noqa: BLE001 - any failure is a find
            return name, f"{type(err).__name__}: {err}"
        if count.bad:
            return name, next(iter(count.bad))
    return None


def _record(folder, before, steps):
    base = Path(tempfile.mkdtemp(dir=folder))
    states = Recording(base).play(*before).states() if before else [None]
    return Recording(base, states=states).play(*steps)


def _cut(folder, count, before, *steps):
    cut_power(_record(folder, before, steps), count)


def _live(folder):
    base = Path(tempfile.mkdtemp(dir=folder))
    live(base, install, *LIFE, *TROUBLE)


def _two(folder, count):
    counts = two_writers(folder / "shared", 30)
    if counts["bad"]:
        count.report(f"{counts['updates']} updates, {counts['bad']} bad", "two writers")


def _kill(folder, count):
    kill_then_cut(_record(folder, FULL, QUICK), count, after="rename")


def _fail(folder, work, count):
    for before, step in (((), install), (FULL, update), (FULL, rollback_far)):
        base = Path(tempfile.mkdtemp(dir=folder))
        states = Recording(base).play(*before).states() if before else [None]
        work(step, read_tree(base), states, count)


def _no_room(folder, count):
    """One operation after the other finds a disk without a block or inode left."""
    is_full, Files.is_full = Files.is_full, lambda *_: True
    try:
        for before in ((install, update), (install, update, Recording.rot_state)):
            base = Path(tempfile.mkdtemp(dir=folder))
            states = Recording(base).play(*before).states()
            faults = [(errno.ENOSPC, False)]
            fail_everywhere(update, read_tree(base), states, count, faults)
    finally:
        Files.is_full = is_full


def break_and_hunt(name, seconds):
    """Break a copy of the runtime, and let another process hunt for it."""
    module, old, new = MUTANTS[name]
    with world.scratch() as folder:
        for package in ("tests", "packager"):
            (folder / package).symlink_to(ROOT / package)
        shutil.copytree(ROOT / "edge_runtime", folder / "edge_runtime")
        path = folder / "edge_runtime" / f"{module}.py"
        text = path.read_text()
        if text.count(old) != 1:
            return None, f"found {text.count(old)} times in {module}.py"
        path.write_text(text.replace(old, new))
        command = [sys.executable, "-m", "tests.crash.mutants", "--hunt"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired as err:
            last = (err.stderr or b"").decode().split("\n")[-2:-1]
            return None, f"not found in {seconds} s, of which the last in: {last}"
        finally:
            world.sweep()
    if done.returncode:
        return None, done.stderr.strip()[-160:] or f"ended {done.returncode}"
    return json.loads(done.stdout) or (None, "not found")


@click.command()
@click.option("--hunt", "hunting", is_flag=True, help="Look for a fault in this one.")
@click.option("--only", multiple=True, help="Only names with one of these texts.")
@click.option("--seconds", default=300, show_default=True, help="For each of them.")
def main(*, hunting, only, seconds):
    """Break the store on purpose; the suite must find out each time."""
    if hunting:
        with world.scratch() as folder:
            print(json.dumps(hunt(folder)))
        return
    missed = 0
    for name in MUTANTS:
        if only and not any(text in name for text in only):
            continue
        start = time.perf_counter()
        found, how = break_and_hunt(name, seconds)
        missed += found is None
        text = f"{found or 'MISSED':<24}{time.perf_counter() - start:4.0f} s  {how}"
        print(f"{name:<45}{text[:160]}", flush=True)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
