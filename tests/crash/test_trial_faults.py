# SPDX-License-Identifier: Apache-2.0
"""The trial's process meets a fault of the system wherever it opens a file."""

import errno
import io
import itertools
import os
import shutil
import sys

import pytest

from edge_runtime import Device, UpdateResult
from edge_runtime.errors import BackendError, BlockedError
from edge_runtime.update import trial_process
from edge_runtime.update.programs import Ended
from edge_runtime.update.trial import end_of_trial
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round
from tests.crash.kills import read_all, spawn

ERRORS = (errno.EIO, errno.EMFILE, errno.EACCES, errno.ENOMEM, errno.ENOENT)
FAILED = b"it failed"


class Faults:
    """Lets open number ``left`` of a process fail, and tells a pipe."""

    left = -1

    def __init__(self):
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        if event != "open" or self.left < 0:
            return
        self.left -= 1
        if self.left < 0:
            os.write(self.out, FAILED)
            raise OSError(self.error, os.strerror(self.error), str(arguments[0]))


faults = Faults()


def faulty_trial(number, error):
    """A trial in a forked process, one of whose opens fails; and whether it did."""
    fired = []

    def trial(slot, model, *, expected):
        def work(out):
            faults.out, faults.error = out, error
            words = [str(os.getppid()), "60", str(slot), str(model), ""]
            sys.argv = ["trial", *words]
            sys.stdin = io.TextIOWrapper(io.BytesIO(expected.values))
            os.dup2(printed, sys.__stdout__.fileno())
            sys.stdout, sys.stderr = sys.__stdout__, io.StringIO()
            faults.left = number
            code = trial_process.main()
            faults.left = -1
            os._exit(code)

        said, printed = os.pipe()
        child, pipe = spawn(work)
        os.close(printed)
        fired.append(read_all(pipe) == FAILED)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with open(said, "rb") as file:
            if fault := end_of_trial(Ended(code, "told", file.read())):
                raise fault

    return trial, fired


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_no_fault_of_the_system_in_a_trial_refuses_a_release(run, tmp_path, error):
    root = tmp_path / "store"
    Device.install(root, build_bundle(read_round(run.path / "round_00")).data)
    patch = pack_round(read_round(run.path / "round_01")).data
    blocked = 0
    for number in itertools.count():
        copy = tmp_path / f"copy{number}"
        shutil.copytree(root, copy, symlinks=True)
        trial, fired = faulty_trial(number, error)
        try:
            Device.open(copy, trial=trial).update(patch)
        except (BlockedError, BackendError):
            blocked += 1
            state = Device.open(copy).store.state
            assert (state.tries, state.skipped) == ({}, [])
            trial, _ = faulty_trial(-1, error)
            again = Device.open(copy, trial=trial).update(patch)
            assert again is UpdateResult.APPLIED
        if fired == [False]:
            break
    assert blocked >= 4  # graph, weights, contract, golden inputs
