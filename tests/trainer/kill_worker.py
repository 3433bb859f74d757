"""Run a recipe in process after process, each of which is killed; see test_resume.py.

Arguments: recipe, folder of the runs, and where to kill: a part of a line that
describes an event. Events are the end of an epoch ("round 0 sparse") and each file
operation below the folder ("open .../round.json", "os.rename ..."). Prints the exit
status of every process; the last one is left alone.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from trainer.config import load_config
from trainer.rounds import run_rounds


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


def main(recipe, runs, moments):
    torch.set_num_threads(1)
    for moment in [*moments, ""]:
        # Forked, because importing torch takes longer than the run.
        child = os.fork()
        if not child:
            run_rounds(load_config(recipe), runs, progress=kill_at(moment, runs))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
