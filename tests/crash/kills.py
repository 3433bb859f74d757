# SPDX-License-Identifier: Apache-2.0
"""Real processes that apply the patches of a real run, killed without a warning.

``python -m tests.crash.kills`` prints one JSON object. Workers are forked from a
process that has imported everything, ONNX Runtime too, so a thousand are affordable;
the trial session of each of their updates is forked as well, and is real otherwise.
Commands are ``dpu-edge apply``, started and tried as on any device.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click

from edge_runtime import Device
from edge_runtime.errors import (
    DpuError,
    StoreError,
    TrialError,
    TrustError,
    WrongParentError,
)
from edge_runtime.store.state import decode_state, encode_state
from edge_runtime.update.trial import try_slot
from tests.crash import world
from tests.crash.served import ROOT, Server, train

WEIGHTS = {"update": 8, "refused": 1, "rollback": 1, "rollback_far": 1, "pin": 1}


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
    except BrokenPipeError:
        os._exit(1)  # the one who asked was killed
    except BaseException as err:  # noqa: BLE001 - a child must never return
        with suppress(OSError):
            os.write(2, f"{type(err).__name__}: {err}\n".encode())
        os._exit(1)


def read_all(pipe):
    """Read what a process wrote, to the end."""
    data = b"".join(iter(lambda: os.read(pipe, 1 << 16), b""))
    os.close(pipe)
    return data


def forked_trial(slot, model, *, expected):
    """Try a slot in a process of its own that imports nothing anew."""

    def work(out):
        try:
            try_slot(slot, model, expected)
        except TrialError as err:
            os.write(out, str(err).encode())

    child, pipe = spawn(work)
    said = read_all(pipe).decode()
    if os.waitpid(child, 0)[1] or said:
        raise TrialError(said or "the trial session ended without a result")


class Worker:
    """Takes steps on a real store, and says after each one what it promised."""

    def __init__(self, server, root, out, trial=forked_trial, files=None):
        self.server, self.out = server, out
        self.device = Device.open(root, files=files, trial=trial)

    @property
    def state(self):
        return self.device.store.state

    def acknowledge(self):
        data = encode_state(self.state)
        os.write(self.out, len(data).to_bytes(4, "little") + data)

    def work(self, seed):
        """Take steps until something ends this process."""
        rng = random.Random(seed)
        steps = rng.choices(list(WEIGHTS), WEIGHTS.values(), k=100_000)
        # The first step is ready to go, so that many kills hit the store at work.
        for step in ["update", *steps]:
            getattr(self, step)()
            self.acknowledge()

    def update(self):
        if self.state.pinned:
            self.device.pin(held=False)
            self.acknowledge()
        patch = self.server.next_patch(self.state)
        if patch is None:  # it has every round: back to the first one, and again
            self.rollback_far()
            self.acknowledge()
            patch = self.server.next_patch(self.state)
        # Forced: its trials may have been killed three times.
        self.device.update(patch, force=True)

    def refused(self):
        """A bad model of a good signature is refused, and remembered."""
        if self.state.pinned or not self.server.bad:
            return
        bad = self.server.bad[self.state.active_slot.round]
        with suppress(TrialError):
            self.device.update(bad, force=True)
            raise StoreError("a bad model was installed")

    def rollback(self):
        # That there is nothing to go back to is no failure.
        if self.state.earlier() is not None:
            self.device.rollback()

    def rollback_far(self):
        reachable = self.device.status()["reachable_rounds"]
        if reachable:
            self.device.rollback(min(reachable))

    def pin(self):
        self.device.pin(held=not self.state.pinned)


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


def promises(pipe):
    """Read the states that a worker acknowledged, to the end."""
    data, found = read_all(pipe), []
    while len(data) >= 4 and len(data) >= 4 + int.from_bytes(data[:4], "little"):
        size = 4 + int.from_bytes(data[:4], "little")
        found.append(decode_state(data[4:size]))
        data = data[size:]
    return found


def keeps(found, promised):
    """Whether a state holds all that was promised: it, or one that came after it."""
    # One step more was under way, and a step writes at most two events.
    return found.floor >= promised.floor and promised.history[-1] in found.history[-3:]


def is_good(root, promised):
    """Whether a store opens, all its slots are whole, and a promise was kept."""
    try:
        device = Device.open(root)
        for slot in device.store.state.slots:
            device.store.check_slot(slot.target)
        if not (root / "current" / "weights.safetensors").exists():
            raise StoreError("'current' leads nowhere")
    except DpuError as err:
        print(f"  broken: {err}", file=sys.stderr)
        return False
    return keeps(device.store.state, promised)


def kill_workers(server, root, kills, trial=forked_trial, seed=0):
    """Kill workers at random moments; each goes on where the one before ended.

    Once a store has every round a new one takes its place now and then, so that
    patches are applied for the first time too.
    """
    rng, count = random.Random(seed), Kills()
    fresh = root.with_name("fresh")
    shutil.copytree(root, fresh, symlinks=True)
    last = Device.open(root).store.state
    step_s = _time_of_a_step(server, root, trial)
    while count.kills < kills:
        if rng.random() < 0.1:
            shutil.rmtree(root)
            shutil.copytree(fresh, root, symlinks=True)
            last = Device.open(root).store.state
        server.next_patch(last)  # made before, so that it takes no time below
        seed = rng.random()
        child, pipe = spawn(
            lambda out, seed=seed: Worker(server, root, out, trial).work(seed)
        )
        time.sleep(rng.uniform(0, 3 * step_s))
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


def _time_of_a_step(server, root, trial):
    copy = root.with_name("timed")
    shutil.copytree(root, copy, symlinks=True)
    device, start = Device.open(copy, trial=trial), time.perf_counter()
    for _ in range(3):
        device.update(server.next_patch(device.store.state))
    return (time.perf_counter() - start) / 3


def kill_commands(server, folder, kills, seed=0):
    """Kill ``dpu-edge apply``, with its trial session, at random moments."""
    rng, count, root = random.Random(seed), Kills(), folder / "device"
    Device.install(root, server.bundle)
    patch, seconds = folder / "round.dpu", 0.0
    while count.kills < kills:
        device = Device.open(root)
        if (data := server.next_patch(device.store.state)) is None:
            device.rollback(min(device.status()["reachable_rounds"]))
            data = server.next_patch(device.store.state)
        state = device.store.state
        patch.write_bytes(data)
        command = [sys.executable, "-m", "edge_runtime", "--store", str(root)]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "apply", str(patch), "--force"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # "3 trials were cut off", and so they were
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
        How many updates were made, how often one was turned away, and how many of
        the updates were lost.
    """

    def work(out):
        done = refused = 0
        device = Device.open(root, trial=world.no_trial)
        while done < updates:
            try:
                patch = world.next_patch(device.store.reload())
                done += device.update(patch) == "applied"
            except (TrustError, WrongParentError):
                refused += 1  # the other was faster: the patch is old now
            except StoreError as err:
                if "another process" not in str(err):
                    raise
                refused += 1
        os.write(out, json.dumps([done, refused]).encode())

    device = world.install(root)
    # One that opened the store before an update knows of it when it writes.
    late = Device.open(root, trial=world.no_trial)
    device.update(world.next_patch(device.store.state))
    late.pin()
    late.pin(held=False)
    before = device.store.reload().floor
    workers = [spawn(work) for _ in range(2)]
    told = [json.loads(read_all(pipe) or b"[0, 0]") for _, pipe in workers]
    ends = [os.waitpid(child, 0)[1] for child, _ in workers]
    state = Device.open(root).store.state
    made = sum(done for done, _ in told)
    bad = (
        (before != 1)
        + (before + made != state.floor)
        + sum(map(bool, ends))
        + (not is_good(root, state))
    )
    return {
        "updates": made,
        "turned_away": sum(refused for _, refused in told),
        "bad": bad,
    }


@click.command()
@click.option("--kills", default=1000)
@click.option("--commands", default=30)
@click.option("--updates", default=100)
@click.option("--run", type=click.Path(path_type=Path), help="A run with patches.")
def main(kills, commands, updates, run):
    """Kill processes; then let two of them fight over a store."""
    with world.scratch() as folder:
        server = Server(run or train(folder / "runs"))
        Device.install(folder / "store", server.bundle)
        results = {
            "killed at work": vars(kill_workers(server, folder / "store", kills)),
            "dpu-edge apply killed": vars(kill_commands(server, folder, commands)),
            "two writers": two_writers(folder / "shared", updates),
        }
    print(json.dumps(results))


def in_process(*options):
    """Run this module in a process that never imported anything else.

    Returns:
        The results by name.
    """
    command = [sys.executable, "-m", "tests.crash.kills", *map(str, options)]
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT)
    finally:
        world.sweep()
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
