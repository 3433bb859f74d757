# SPDX-License-Identifier: Apache-2.0
"""Folders that are complete or absent, of a run that one process trains at a time."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from edge_runtime.errors import ConfigError, TrainingError
from edge_runtime.files import lock_file
from edge_runtime.formats.model_folder import MODEL_NAME, list_rounds
from edge_runtime.reading import strangers

# What a killed process leaves of a folder that it was writing.
_ABANDONED = re.compile(rf"\.(?:{MODEL_NAME}|round_\d{{2,}})\.part")


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keep a run to this process, as :func:`only_writer`, and insist that it is one.

    Raises:
        ConfigError: Another process is training it, or something else lies there.
        OSError: The folder cannot be made or opened.
    """
    with only_writer(run_dir):
        _insist_on_run(run_dir)
        yield


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Keep other processes from writing a run; the kernel lets go if we die.

    Raises:
        ConfigError: Another process is training or publishing it.
        OSError: The folder cannot be made or opened.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        handle = os.open(run_dir, os.O_RDONLY)
        stack.callback(os.close, handle)
        try:
            lock_file(handle, run_dir)
        except BlockingIOError as err:
            raise ConfigError(
                f"another process is training or publishing {run_dir}; wait for it, or "
                "choose another run"
            ) from err
        # Only once we hold the lock: before, an empty folder may be another process's,
        # which is about to write its first round.
        stack.callback(_remove_if_empty, run_dir)
        yield


def _insist_on_run(folder: Path) -> None:
    """Insist that a folder is a run's, or may become one: nobody's things lie there.

    Raises:
        ConfigError: Something else lies there.
    """
    if (folder / MODEL_NAME).is_dir() or list_rounds(folder):
        return
    parts = [p.name for p in folder.iterdir() if _ABANDONED.fullmatch(p.name)]
    if found := strangers(folder, ["lost+found", *parts]):
        raise ConfigError(
            f"{folder} is not empty and holds no run: found {found}; choose another "
            "run.name, or give another folder with --runs"
        )


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


@contextmanager
def written_once(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that gets its name once everything is in it.

    Raises:
        TrainingError: There is a folder of that name already.
        OSError: It cannot be made.
    """
    if folder.exists():
        raise TrainingError(
            f"{folder} exists already and is never written again; remove it, or choose "
            f"another run"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(".*.part"):
        if _ABANDONED.fullmatch(abandoned.name):  # else it is somebody's
            shutil.rmtree(abandoned)
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir()
    yield part
    part.rename(folder)
