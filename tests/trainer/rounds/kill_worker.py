# SPDX-License-Identifier: Apache-2.0
"""Run a recipe once, then in processes that are killed; see test_resume.py.

Arguments: recipe, folder of the undisturbed run, folder of the killed one, and where to
kill: a part of a line that describes an event. Events are the end of an epoch
("round 0 sparse") and each file operation below the folder ("open .../round.json",
"os.rename ..."). Prints the exit status of every process; the last one is left alone.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from trainer.config import load_config
from trainer.rounds.schedule import run_rounds


def kill_at(moment, runs):
    """Run until an event comes up whose line holds ``moment``."""

    def event(line):
        if moment and moment in line:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(name, arguments):
        if name in ("open", "os.rename") and str(runs) in str(arguments[0]):
            event(f"{name} {arguments[0]}")

    sys.addaudithook(hook)
    return lambda progress: event(f"round {progress.round} {progress.phase}")


def main(recipe, whole, runs, moments):
    torch.set_num_threads(1)
    run_rounds(load_config(recipe), whole)
    for moment in [*moments, ""]:
        # Forked, because imports and a first export take longer than the run.
        child = os.fork()
        if not child:
            run_rounds(load_config(recipe), runs, progress=kill_at(moment, runs))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
