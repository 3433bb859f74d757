# SPDX-License-Identifier: Apache-2.0
"""``dpu-pack`` makes patches and bundles, ``dpu-patch`` looks at them and signs them.

Everything heavy is imported inside the commands, so that ``--help`` and completion
answer at once.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import (
    CONTEXT,
    EXIT_CODE_HELP,
    Command,
    Group,
    emit,
    json_option,
    progress,
    say,
)
from packager.cli.check_proof import check_proof
from packager.cli.compose import compose
from packager.cli.files import file_options
from packager.cli.inspect import diff, extract, info, report, verify
from packager.cli.keys import keygen, read_signers, sign
from packager.cli.options import FILE, Size, runs_option
from packager.cli.provenance import provenance
from packager.cli.releases import releases
from packager.cli.trust import trust

if TYPE_CHECKING:
    from packager.build import PackedPatch
    from packager.ledger import Ledger
    from packager.report.packed import Made
    from packager.report.records import FilesRecord, PackRecord
    from packager.rounds.folder import Parent, RoundFolder

OUTPUTS = 8  # golden inputs: more cost bytes, and a wrong weight shows in any

_folder = click.Path(file_okay=False, path_type=Path)


def complete_round(ctx: click.Context, _: click.Parameter, start: str) -> list[str]:
    """Complete the names of rounds, bare and with their run."""
    from packager.rounds.folder import list_runs

    found = list_runs(Path(ctx.params.get("runs") or "runs"))
    names = [f"{r.parent.name}/{r.name}" for r in found] + [r.name for r in found]
    return [name for name in dict.fromkeys(names) if name.startswith(start)]


@click.command(cls=Command, context_settings=CONTEXT, epilog=EXIT_CODE_HELP)
@click.argument("rounds", nargs=-1, metavar="[ROUND]...", shell_complete=complete_round)
@click.option(
    "-o",
    "--output",
    metavar="FILE|DIR",
    help="Where to write.  [default: beside the round folder]",
)
@runs_option
@click.option(
    "--from",
    "parent",
    metavar="ROUND",
    shell_complete=complete_round,
    help="Lead from this round of ROUND's run (RUN/round_02: of another one), or from "
    "'init', instead of the recorded parent.",
)
@click.option(
    "--counter",
    metavar="N",
    type=click.IntRange(0, 2**64 - 1),
    help="Release counter of the target, to send an older round as a newer release; "
    "by default the ledger of releases knows the next one.",
)
@click.option(
    "--bundle",
    is_flag=True,
    help="Write what a new device is installed from; it holds the patch.",
)
@file_options
@click.option(
    "--expect-outputs",
    metavar="[N]",
    type=click.IntRange(1),
    is_flag=False,
    flag_value=OUTPUTS,
    default=None,
    help="Add what the first N golden inputs must give on the device (after ROUND; "
    f"N is {OUTPUTS} where left out).",
)
@click.option(
    "--max-size",
    metavar="SIZE",
    type=Size(),
    help="Write nothing larger, for example 200KB (1000 bytes each) or 1.5MiB (1024).",
)
@click.option(
    "--level",
    type=click.IntRange(1, 22),
    default=19,
    show_default=True,
    help="zstd level.",
)
@click.option(
    "--sign",
    "keys",
    metavar="KEY.pem",
    multiple=True,
    type=FILE,
    help="Sign with this private key (repeatable).",
)
@click.option(
    "--force",
    is_flag=True,
    help="Take --counter though it is far ahead or another round's; replace a signed "
    "file by an unsigned one.",
)
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.version_option(package_name="dpu-edge")
def pack(  # noqa: PLR0913 - one argument for each option
    rounds: tuple[str, ...],
    *,
    output: str | None,
    runs: Path,
    parent: str | None,
    counter: int | None,
    bundle: bool,
    expect_outputs: int | None,
    max_size: int | None,
    level: int,
    keys: tuple[Path, ...],
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **files: Any,  # of file_options
) -> None:
    """Pack rounds into patch files.

    ROUND is a folder, RUN/round_05, or round_05 where only one run has it; a run's name
    stands for all of its rounds that were not released yet. Each patch is applied to
    its parent and compared with its target before it is written.

    Without rounds: --base and --target pack two ONNX or safetensors files of one
    network, and --base with --bundle installs one.
    """
    signers, names = read_signers(keys)
    options = {
        "level": level,
        "max_size": max_size,
        "counter": counter,
        "signers": signers,
    }
    if any(files.values()):
        from packager.cli.files import pack_files

        if rounds or parent or expect_outputs:
            raise click.UsageError(
                "give either rounds or --base, not both; --from and --expect-outputs "
                "are for rounds"
            )
        made = pack_files(
            files, output, names, bundle=bundle, force=force, options=options
        )
    else:
        if not rounds:
            raise click.UsageError("give rounds, or --base and --target")
        folders = [folder for name in rounds for folder in _find(name, runs, bundle)]
        # Beside the round's own patch, which must not be overwritten by this one.
        name = f"_from_{Path(parent).resolve().name}" if parent else ""
        suffix = ".bundle.zip" if bundle else f"{name}.dpu"
        paths = _places(folders, output, suffix)
        places = list(zip(folders, paths, strict=True))
        if expect_outputs:
            options["expect_outputs"] = expect_outputs
        opened = _ledger_to_read if dry_run else _ledger_to_write
        made = _pack_rounds(
            places,
            _Plan(runs, parent, opened, names, force=force, bundle=bundle),
            options,
        )
    # Closed also after an error: then it lets go of the ledger.
    with closing(made):
        records = _write_all(made, dry_run=dry_run, silent=as_json or quiet)
    if as_json:
        emit({"packed": records}, as_json=True, text="")


def _write_all(
    made: "Iterable[Made]", *, dry_run: bool, silent: bool
) -> "list[PackRecord | FilesRecord]":
    records = []
    for path, data, record, text, write in made:
        if not silent:
            progress(text)
        record["written"] = bool(data) and not dry_run and write(data, path)
        records.append(record)
        if record["written"] and not silent:
            say(f"wrote {path}")
        elif data and dry_run and not silent:
            say(f"dry run: {path} not written")
    return records


@dataclass(frozen=True, slots=True)
class _Plan:
    """How rounds are packed.

    Attributes:
        runs: The folder with the runs.
        parent: What ``--from`` names, if anything.
        opened: Opens the ledger of a run.
        names: Ids of the keys that sign.
        force: Whether somebody insists.
        bundle: Whether bundles are asked for.
    """

    runs: Path
    parent: str | None
    opened: "Callable[[Path], AbstractContextManager[Ledger]]"
    names: Sequence[str]
    force: bool
    bundle: bool


def _ledger_to_read(run: Path) -> "AbstractContextManager[Ledger]":
    from packager.ledger import read_ledger

    return nullcontext(read_ledger(run))


def _ledger_to_write(run: Path) -> "AbstractContextManager[Ledger]":
    from packager.ledger import open_ledger

    return open_ledger(run, waiting=say)


def _find(name: str, runs: Path, bundle: bool) -> list[Path]:
    """Return the round of a name, or the rounds of a run that are to be released."""
    from packager.ledger import read_ledger
    from packager.rounds.folder import find_round, find_run, new_rounds

    run = find_run(name, runs)
    if run is None:
        return [find_round(name, runs)]
    if bundle:
        raise click.UsageError(
            f"{name} is a run, and a bundle is of one round: give {name}/round_00"
        )
    ledger = read_ledger(run)
    released = {(r.model, r.target) for r in ledger.releases}
    found = new_rounds(run, released)
    if not found:
        say(f"{name}: every round is released already ('dpu-patch releases {name}')")
    return found


def _pack_rounds(
    rounds: Sequence[tuple[Path, Path]], plan: _Plan, options: dict[str, Any]
) -> "Generator[Made]":
    """Pack round folders, each with the file that it is for."""
    from packager.report.packed import Made, pack_record, pack_text
    from packager.rounds.folder import read_round

    if plan.bundle and plan.parent:
        raise click.UsageError("a bundle leads from the init weights: no --from")
    if plan.bundle and "expect_outputs" in options:
        raise click.UsageError("a bundle holds all outputs: no --expect-outputs")
    if options["counter"] is not None and len(rounds) > 1:
        raise click.UsageError("--counter is for one round at a time")
    make = _bundle if plan.bundle else _patch
    for folder, path in rounds:
        round_ = read_round(folder)
        base = _parent(round_, plan.parent, plan.runs)
        # Until the file is written: two packers must not give out one counter.
        with plan.opened(folder.absolute().parent) as ledger:
            packed, data = make(round_, base, ledger, options, force=plan.force)
            record = pack_record(round_, packed, path, len(data), plan.names)
            write = partial(ledger.publish, force=plan.force)
            yield Made(path, data, record, pack_text(record), write)
            for note in ledger.notes:
                say(note)


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


def _parent(round_: "RoundFolder", name: str | None, runs: Path) -> "Parent | None":
    from packager.rounds.folder import named_parent

    return named_parent(round_, name, runs) if name is not None else None


def _patch(
    round_: "RoundFolder",
    parent: "Parent | None",
    ledger: "Ledger",
    options: dict[str, Any],
    *,
    force: bool,
) -> "tuple[PackedPatch | None, bytes]":
    from packager.build import pack_round
    from packager.rounds.folder import find_parent

    stated = round_.record
    if stated.outcome == "updated":
        counter = ledger.next_counter(stated, options["counter"], force=force)
        options = options | {"counter": counter}
        parent = parent or find_parent(round_)
        # Devices at the parent have seen its newest release, whatever its round says.
        seen = ledger.counter_of(stated.model, parent.weights.fingerprint)
        if seen is not None and parent.counter is not None:
            parent = replace(parent, counter=max(seen, parent.counter))
    packed = pack_round(round_, parent, **options)
    return packed, packed.data if packed else b""


def _bundle(
    round_: "RoundFolder",
    _: "Parent | None",
    ledger: "Ledger",
    options: dict[str, Any],
    *,
    force: bool,
) -> "tuple[PackedPatch | None, bytes]":
    from packager.bundles.from_round import build_bundle

    counter = ledger.next_counter(round_.record, options["counter"], force=force)
    bundle = build_bundle(round_, **options | {"counter": counter})
    return bundle.patch, bundle.data


@click.group(cls=Group, context_settings=CONTEXT, epilog=EXIT_CODE_HELP)
@click.version_option(package_name="dpu-edge")
def patch() -> None:
    """Look at patches and weight files, sign patches and bundles."""


for command in (
    *(info, diff, report, verify, compose, extract, keygen, sign, releases),
    *(check_proof, provenance, trust),
):
    patch.add_command(command)
