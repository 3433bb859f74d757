# SPDX-License-Identifier: Apache-2.0
"""``dpu-pack`` makes patches and bundles, ``dpu-patch`` looks at them and signs them.

Everything heavy is imported inside the commands, so that ``--help`` and completion
answer at once.
"""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import (
    CONTEXT,
    Command,
    Group,
    emit,
    json_option,
    progress,
    say,
)
from edge_runtime.exit_codes import EXIT_CODE_HELP
from packager.cli.apply import apply
from packager.cli.check_proof import check_proof
from packager.cli.compose import compose
from packager.cli.files import FileOptions, file_options, pack_files
from packager.cli.inspect import diff, extract, info, report, verify
from packager.cli.keys import keygen, read_signers, sign
from packager.cli.options import (
    PRIVATE_KEY,
    PackOptions,
    Size,
    level_option,
    runs_option,
)
from packager.cli.provenance import provenance
from packager.cli.releases import releases
from packager.cli.rounds import RoundOptions, pack_rounds
from packager.cli.trust import trust

if TYPE_CHECKING:
    from packager.report.packed import Made
    from packager.report.records import FilesRecord, PackRecord

OUTPUTS = 8  # golden inputs: more cost bytes, and a wrong weight shows in any

_folder = click.Path(file_okay=False, path_type=Path)


def complete_round(ctx: click.Context, _: click.Parameter, start: str) -> list[str]:
    """Complete the names of rounds, bare and with their run."""
    from packager.rounds.names import full_name, list_runs

    found = list_runs(Path(ctx.params.get("runs") or "runs"))
    names = [full_name(r) for r in found] + [r.name for r in found]
    return [name for name in dict.fromkeys(names) if name.startswith(start)]


@click.command(cls=Command, context_settings=CONTEXT, epilog=EXIT_CODE_HELP)
@click.argument("rounds", nargs=-1, metavar="[ROUND]...", shell_complete=complete_round)
@click.option(
    "-o",
    "--output",
    metavar="FILE|DIR",
    help="Where to write: one round to this file, unless it is a folder or ends with "
    "/; several into this folder.  [default: beside the round folder]",
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
@level_option
@click.option(
    "--sign",
    "keys",
    metavar="KEY.pem",
    multiple=True,
    type=PRIVATE_KEY,
    help="Sign with this private key (repeatable).",
)
@click.option(
    "--force",
    is_flag=True,
    help="Take --counter though it is far ahead or another round's; replace a file "
    "that is signed, or of another kind.",
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

    Without rounds: --base and --target pack two ONNX files or checkpoints of one
    network, and --base with --bundle installs one.
    """
    signers, names = read_signers(keys)
    options = PackOptions(
        level=level,
        max_size=max_size,
        counter=counter,
        signers=signers,
        signed_by=names,
        keys=keys,
        expect_outputs=expect_outputs or 0,
        bundle=bundle,
        force=force,
    )
    asked = FileOptions(**files)
    if asked.is_given:
        if rounds or parent or expect_outputs:
            raise click.UsageError(
                "give either rounds or --base, not both; --from and --expect-outputs "
                "are for rounds"
            )
        made = pack_files(asked, output, options)
    else:
        if not rounds:
            raise click.UsageError("give rounds, or --base and --target")
        made = pack_rounds(RoundOptions(rounds, runs, parent, dry_run), output, options)
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


@click.group(cls=Group, context_settings=CONTEXT, epilog=EXIT_CODE_HELP)
@click.version_option(package_name="dpu-edge")
def patch() -> None:
    """Look at patches and weight files, sign patches and bundles."""


for command in (
    *(info, diff, report, verify, apply, compose, extract, keygen, sign, releases),
    *(check_proof, provenance, trust),
):
    patch.add_command(command)
