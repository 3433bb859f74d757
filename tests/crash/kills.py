"""Real processes that apply real patches, and are killed without a warning."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

from edge_runtime import Device, UpdateResult
from edge_runtime.errors import DpuError, StoreError
from edge_runtime.state import decode_state, encode_state
from packager.build import pack_round
from packager.bundle import build_bundle
from packager.rounds import read_round
from tests.conftest import Run
from tests.crash import world
from tests.crash.recording import Recording

STEPS = {
    Recording.update: 6,
    Recording.refused: 1,
    Recording.rollback: 1,
    Recording.rollback_far: 1,
    Recording.pin: 1,
}


class Worker(Recording):
    """Takes steps on a real store, and says after each one what it promised."""

    def __init__(self, root, out, files=None):
        self.files, self.out, self._bad_model = files, out, False
        self.device = Device.open(root, files=files, trial=self._trial)

    def acknowledge(self):
        data = encode_state(self.device.store.state)
        os.write(self.out, len(data).to_bytes(4, "little") + data)

    def work(self, seed):
        """Take steps until something ends this process.

        That there is nothing to go back to is no failure.
        """
        rng = random.Random(seed)
        choice = rng.choices(list(STEPS), STEPS.values(), k=100_000)
        # The first step is ready to go, so that many kills hit the store at work.
        for step in [Recording.update, *choice]:
            try:
                step(self)
                self.acknowledge()
                if self.device.store.state.pinned:
                    self.unpin()
                    self.acknowledge()
            except StoreError as err:
                if "no earlier slot" not in str(err):
                    raise


@dataclass
class Kills:
    """What a series of kills saw.

    Attributes:
        kills: Processes killed.
        at_work: Of those, how many left something half done in the store.
        acknowledged: Steps that were acknowledged before the kills.
        bad: Promises that were broken.
    """

    kills: int = 0
    at_work: int = 0
    acknowledged: int = 0
    bad: int = 0


def spawn(work):
    """Fork a process that does some work; return its id and what it writes to."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    try:
        os.close(read)
        work(write)
        os._exit(0)
    except BaseException as err:  # noqa: BLE001 - a child must never return
        with suppress(OSError):
            os.write(2, f"{type(err).__name__}: {err}\n".encode())
        os._exit(1)


def promises(pipe):
    """Read the states that a worker acknowledged, to the end."""
    data = b"".join(iter(lambda: os.read(pipe, 1 << 16), b""))
    os.close(pipe)
    found = []
    while len(data) >= 4 and len(data) >= 4 + int.from_bytes(data[:4], "little"):
        size = 4 + int.from_bytes(data[:4], "little")
        found.append(decode_state(data[4:size]))
        data = data[size:]
    return found


def keeps(found, promised):
    """Whether a state holds all that was promised: it, or one that came after it."""
    # One step more was under way, and a step writes at most two events.
    return found.floor >= promised.floor and promised.history[-1] in found.history[-3:]


def kill_workers(root, kills, seed=0):
    """Kill workers at random moments; each goes on where the one before ended."""
    rng, count = random.Random(seed), Kills()
    device = Device.open(root, trial=world.no_trial)
    step_s = _time_of_a_step(device)
    last = device.store.state
    while count.kills < kills:
        world.next_patch(last)  # made before, so that it takes no time below
        seed = rng.random()
        child, pipe = spawn(lambda out, seed=seed: Worker(root, out).work(seed))
        time.sleep(rng.uniform(0, 4 * step_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        acknowledged = promises(pipe)
        count.kills += 1
        count.acknowledged += len(acknowledged)
        count.at_work += _is_half_done(root)
        last = (acknowledged or [last])[-1]
        count.bad += not (os.WIFSIGNALED(status) and is_good(root, last))
        last = Device.open(root).store.state
    return count


def is_good(root, promised):
    """Whether a store opens, all its slots are whole, and a promise was kept."""
    try:
        device = Device.open(root)
        for slot in device.store.state.slots:
            device.store.check_slot(slot.target)
    except DpuError as err:
        print(f"  broken: {err}", file=sys.stderr)
        return False
    return keeps(device.store.state, promised)


def kill_commands(folder, kills, seed=0):
    """Kill ``dpu-edge apply``, with its trial session, at random moments."""
    rng, count, run = random.Random(seed), Kills(), Run(folder / "runs" / "tiny")
    round_0, root = read_round(run.add(0)), folder / "store"
    Device.install(root, build_bundle(round_0).data)
    patch, seconds = folder / "round.dpu", 0.0
    while count.kills < kills:
        state = Device.open(root).store.state
        if state.floor == len(list(run.path.glob("round_*"))) - 1:
            number = state.floor + 1
            patch.write_bytes(pack_round(read_round(run.add(number))).data)
        command = [sys.executable, "-m", "edge_runtime", "--store", str(root)]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "apply", str(patch), "--force"], stdout=subprocess.DEVNULL
        )
        if not seconds:  # the first one may end, to know how long it takes
            process.wait()
            seconds = time.perf_counter() - start
            continue
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 1.1 * seconds))
            count.acknowledged += process.returncode == 0
            state = Device.open(root).store.state
        process.kill()
        count.kills += process.wait() == -signal.SIGKILL
        count.at_work += _is_half_done(root)
        count.bad += not is_good(root, state)
    return count


def _time_of_a_step(device):
    start = time.perf_counter()
    for _ in range(5):
        device.update(world.next_patch(device.store.state))
    return (time.perf_counter() - start) / 5


def _is_half_done(root):
    try:
        copied = (root / "state.copy").read_bytes()
    except OSError:
        return True
    store = Device.open(root).store
    named = {store.slot_folder(slot.target) for slot in store.state.slots}
    return (
        copied != (root / "state.json").read_bytes()
        or bool(list(root.rglob("*.part")))
        or set((root / "slots").iterdir()) != named
    )


def two_writers(root, updates):
    """Two processes update one store at the same time.

    Returns:
        How many updates each of them made, and how often one was turned away.
    """

    def work(out):
        done = refused = 0
        device = Device.open(root, trial=world.no_trial)
        while done < updates:
            try:
                result = device.update(world.next_patch(device.store.reload()))
                done += result is UpdateResult.APPLIED
            except StoreError as err:
                if "another process" not in str(err):
                    raise
                refused += 1
            except DpuError:
                refused += 1  # the other was faster: the patch is an old one now
        os.write(out, json.dumps([done, refused]).encode())

    workers = [spawn(work) for _ in range(2)]
    results = []
    for child, pipe in workers:
        results.append(json.loads(os.read(pipe, 100)))
        os.close(pipe)
        os.waitpid(child, 0)
    return results


def main():
    """``python -m tests.crash.kills KILLS UPDATES`` prints one JSON object."""
    kills, updates = map(int, sys.argv[1:])
    with world.scratch() as folder:
        root = folder / "store"
        world.install(root)
        killed = vars(kill_workers(root, kills))
        floor = Device.open(root).store.state.floor
        made = sum(done for done, _ in two_writers(root, updates))
        result = {"killed": killed, "made": made}
        result["updates"] = Device.open(root).store.state.floor - floor
    print(json.dumps(result))


if __name__ == "__main__":
    main()
