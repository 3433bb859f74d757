# SPDX-License-Identifier: Apache-2.0
"""``dpu-pack ROUND``: rounds become patches, or bundles for new devices."""

import shlex
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.commandline import say
from packager.cli.options import PackOptions, insist_apart

if TYPE_CHECKING:
    from packager.build import PackedPatch
    from packager.ledger import Ledger
    from packager.report.packed import Made
    from packager.rounds.folder import Parent, RoundFolder
    from packager.rounds.record import RoundRecord


@dataclass(frozen=True, slots=True)
class RoundOptions:
    """Which rounds to pack.

    Attributes:
        names: Of rounds and runs.
        runs: The folder with the runs.
        parent: What ``--from`` names, if anything.
        dry_run: Only read the ledger of releases.
    """

    names: Sequence[str]
    runs: Path
    parent: str | None
    dry_run: bool


def pack_rounds(
    asked: RoundOptions, output: str | None, options: PackOptions
) -> "Generator[Made]":
    """Pack round folders.

    Args:
        asked: Which.
        output: File or folder to write to; by default beside the round folder.
        options: How to pack.

    Yields:
        What is to be written.
    """
    from packager.report.packed import Made, pack_record, pack_text
    from packager.rounds.folder import read_round

    bundle = options.bundle
    found = [_find(name, asked.runs, bundle) for name in asked.names]
    folders = [folder for some in found for folder in some]
    paths = _places(folders, output, _suffix(asked.parent, bundle=bundle))
    _check_usage(asked, options, len(folders))
    opened = _ledger_to_read if asked.dry_run else _ledger_to_write
    make = _bundle if bundle else _patch
    for folder, path in zip(folders, paths, strict=True):
        round_ = read_round(folder)
        insist_apart(path, *options.keys)
        base = _parent(round_, asked.parent, asked.runs)
        # Until the file is written: two packers must not give out one counter.
        with opened(folder.absolute().parent) as ledger:
            packed, data = make(round_, base, ledger, options)
            record = pack_record(round_, packed, path, len(data), options.signed_by)
            write = partial(ledger.publish, force=options.force)
            yield Made(path, data, record, pack_text(record), write)
            for note in ledger.notes:
                say(note)


def _check_usage(asked: RoundOptions, options: PackOptions, count: int) -> None:
    if options.bundle and asked.parent:
        raise click.UsageError("a bundle leads from the init weights: no --from")
    if options.bundle and options.expect_outputs:
        raise click.UsageError("a bundle holds all outputs: no --expect-outputs")
    if options.counter is not None and count > 1:
        raise click.UsageError("--counter is for one round at a time")


def _find(name: str, runs: Path, bundle: bool) -> list[Path]:
    """Return the round of a name, or the rounds of a run that are to be released."""
    from packager.ledger import read_ledger
    from packager.rounds.names import find_round, find_run, new_rounds

    run = find_run(name, runs)
    if run is None:
        return [find_round(name, runs)]
    if bundle:
        raise click.UsageError(
            f"{name} is a run, and a bundle is of one round: give {name}/round_00"
        )
    ledger = read_ledger(run)
    kept = [r for r in ledger.releases if not ledger.is_cut(r)]
    released = {(r.model, r.parent, r.target) for r in kept}
    found = new_rounds(run, released)
    if not found:
        shown = f"dpu-patch releases {shlex.quote(name)}"
        say(f"{name}: every round is released already ('{shown}')")
    return found


def _suffix(parent: str | None, *, bundle: bool) -> str:
    # Beside the round's own patch, which must not be overwritten by this one.
    name = f"_from_{Path(parent).resolve().name}" if parent else ""
    return ".bundle.zip" if bundle else f"{name}.dpu"


def _places(folders: Sequence[Path], output: str | None, suffix: str) -> list[Path]:
    """Say which file each round is written to."""
    if output is None:
        return [folder.with_name(folder.name + suffix) for folder in folders]
    if len(folders) == 1 and not output.endswith("/") and not Path(output).is_dir():
        return [Path(output)]
    places = [Path(output) / (folder.name + suffix) for folder in folders]
    if len(set(places)) < len(places):
        raise click.UsageError(
            "two of these rounds have the same name and would be one file in "
            f"{output}: pack them one by one, each with its own -o"
        )
    return places


def _ledger_to_read(run: Path) -> "AbstractContextManager[Ledger]":
    from packager.ledger import read_ledger

    return nullcontext(read_ledger(run))


def _ledger_to_write(run: Path) -> "AbstractContextManager[Ledger]":
    from packager.ledger import open_ledger

    return open_ledger(run, waiting=say)


def _parent(round_: "RoundFolder", name: str | None, runs: Path) -> "Parent | None":
    from packager.rounds.names import named_parent

    return named_parent(round_, name, runs) if name is not None else None


def _patch(
    round_: "RoundFolder",
    parent: "Parent | None",
    ledger: "Ledger",
    options: PackOptions,
) -> "tuple[PackedPatch | None, bytes]":
    from packager.build import pack_round
    from packager.rounds.folder import find_parent
    from packager.rounds.golden import try_round  # with ONNX Runtime

    stated, counter = round_.record, options.counter
    if stated.outcome == "updated":
        counter = _counter(stated, ledger, options)
        parent = parent or find_parent(round_)
        # Devices at the parent have seen its newest release, whatever its round says.
        seen = ledger.counter_of(stated.model, parent.weights.fingerprint)
        if seen is not None and parent.counter is not None:
            parent = replace(parent, counter=max(seen, parent.counter))
    packed = pack_round(
        round_,
        parent,
        level=options.level,
        max_size=options.max_size,
        counter=counter,
        signers=options.signers,
        expect_outputs=options.expect_outputs,
    )
    if packed is None:
        return None, b""
    if lacking := try_round(round_):
        say(f"{round_.name}: not run here, the run lacks {', '.join(lacking)}")
    return packed, packed.data


def _counter(record: "RoundRecord", ledger: "Ledger", options: PackOptions) -> int:
    from packager.release_counter import next_counter

    return next_counter(
        ledger.released(record.model),
        record,
        options.counter,
        force=options.force,
        say=ledger.notes.append,
    )


def _bundle(
    round_: "RoundFolder", _: "Parent | None", ledger: "Ledger", options: PackOptions
) -> "tuple[PackedPatch | None, bytes]":
    from packager.bundles.from_round import build_bundle

    counter = _counter(round_.record, ledger, options)
    bundle = build_bundle(
        round_,
        level=options.level,
        max_size=options.max_size,
        counter=counter,
        signers=options.signers,
    )
    return bundle.patch, bundle.data
