# SPDX-License-Identifier: Apache-2.0
"""Find runs, rounds and parents by the names that people give them."""

import difflib
import re
from collections.abc import Collection
from os import PathLike
from pathlib import Path

from edge_runtime.errors import RoundNotFoundError
from edge_runtime.formats.kinds import Kind, kind_of, refuse_others
from edge_runtime.formats.model_folder import Outcome, list_rounds
from packager.rounds.folder import (
    INIT,
    Parent,
    RoundFolder,
    parent_from,
    read_init,
    read_round,
    real_name,
)
from packager.rounds.record import read_record


def list_runs(runs: Path) -> list[Path]:
    """Return the round folders of all runs below a folder; of a linked run once."""
    found: dict[Path, Path] = {}
    for run in sorted(_folders(runs), key=Path.is_symlink):
        found.setdefault(run.resolve(), run)
    return [folder for run in sorted(found.values()) for folder in list_rounds(run)]


def find_run(
    name_or_path: str | PathLike[str], runs: str | PathLike[str]
) -> Path | None:
    """Find a run's folder: a path, or a name below the runs; None if it is no run."""
    for folder in (Path(name_or_path), Path(runs, name_or_path)):
        if kind_of(folder) is Kind.RUN:
            return folder
    return None


def named_run(name_or_path: str | PathLike[str], runs: str | PathLike[str]) -> Path:
    """Find a run's folder, as :func:`find_run` does.

    Raises:
        RoundNotFoundError: There is none.
    """
    if (run := find_run(name_or_path, runs)) is None:
        raise RoundNotFoundError(
            f"no run {name_or_path}, neither here nor in {runs}; give its folder, or "
            "another --runs"
        )
    return run


def new_rounds(run: Path, released: Collection[tuple[str, str, str]]) -> list[Path]:
    """Return a run's rounds that devices should have and that were not released yet.

    Args:
        run: The run's folder.
        released: Model, parent and target of what was released: a patch from another
            parent leads no device on that has the recorded one.

    Raises:
        RoundError: A round's record is malformed.
    """
    found = []
    for folder in list_rounds(run):
        stated = read_record(folder)
        way = stated.model, stated.parent, stated.target
        is_new = way not in released
        if is_new and stated.packable and stated.outcome is Outcome.UPDATED:
            found.append(folder)
    return found


def find_round(name_or_path: str | PathLike[str], runs: str | PathLike[str]) -> Path:
    """Find a round folder: a path, ``RUN/round_05``, or a bare ``round_05``.

    Args:
        name_or_path: What the user typed.
        runs: The folder with the runs.

    Raises:
        RoundNotFoundError: No round of that name, or more than one; the candidates
            or the nearest names are listed.
    """
    path, runs = Path(name_or_path), Path(runs)
    refuse_others(path, (Kind.ROUND, Kind.RUN))
    for folder in (path, runs / path):
        if folder.is_dir():
            return real_name(folder)
    known = list_runs(runs)
    matches = [folder for folder in known if folder.name == str(path)]
    if len(matches) == 1:
        return matches[0]
    names = [full_name(folder) for folder in known]
    if matches:
        several = [full_name(folder) for folder in matches]
        raise RoundNotFoundError(
            f"{name_or_path} is in more than one run: {', '.join(several)}; say which"
        )
    # A bare name is compared with bare names, or the run's name would decide.
    keys = names if len(path.parts) > 1 else [folder.name for folder in known]
    near = difflib.get_close_matches(str(path), dict.fromkeys(keys), n=3)
    hint = ", ".join(n for n, key in zip(names, keys, strict=True) if key in near)
    raise RoundNotFoundError(
        f"no round {name_or_path} in {runs} ("
        + (f"{len(known)} rounds" if runs.is_dir() else "no such folder")
        + "); "
        + (f"nearest: {hint}" if hint else "give a path, or another --runs")
    )


def full_name(folder: Path) -> str:
    """Return the name of a round's folder with its run: ``RUN/round_05``."""
    return f"{folder.parent.name}/{folder.name}"


def _folders(parent: Path) -> list[Path]:
    return sorted(p for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []


def named_parent(round_: RoundFolder, name: str, runs: str | PathLike[str]) -> Parent:
    """Return the weights that somebody wants an update to lead from.

    Args:
        round_: The round that it leads to.
        name: ``init``, or a round: a bare ``round_02`` is one of the same run.
        runs: Where the names of other runs are looked up.

    Raises:
        RoundNotFoundError: There is none of that name.
        RoundError: It is not what it should be.
    """
    if name == INIT:
        return read_init(round_)
    if not re.fullmatch(r"round_\d+", name, re.ASCII):
        return parent_from(read_round(find_round(name, runs)))
    run = round_.path.absolute().parent
    if not (run / name).is_dir():
        known = ", ".join(folder.name for folder in list_rounds(run))
        raise RoundNotFoundError(
            f"no {name} in {run.name}, the run of {round_.name}; it has {known}; a "
            "round of another run is given as RUN/round_02"
        )
    return parent_from(read_round(run / name))
