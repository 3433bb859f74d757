"""``dpu-pack`` makes patches and bundles, ``dpu-patch`` looks at them and signs them.

Everything heavy is imported inside the commands, so that ``--help`` and completion
answer at once.
"""

import re
from collections.abc import Iterator, Sequence
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
from packager.cli.options import FILE, runs_option
from packager.cli.trust import trust

if TYPE_CHECKING:
    from packager.build import PackedPatch
    from packager.report.packed import Made
    from packager.rounds.folder import Parent, RoundFolder

INIT = "init"  # for --from: the init weights
OUTPUTS = 8  # golden inputs: more cost bytes, and a wrong weight shows in any
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "KIB": 2**10, "MIB": 2**20}

_folder = click.Path(file_okay=False, path_type=Path)


def parse_size(text: str) -> int:
    """Turn ``200KB`` (1000 each), ``200KiB`` (1024 each) or ``200000`` into bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Z]*)", text.strip().upper())
    if not match or match[2] not in UNITS:
        raise click.BadParameter(f"{text!r} is not a size such as 200KB or 1.5MiB")
    return int(float(match[1]) * UNITS[match[2]])


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
    help="Lead from this round, or from 'init', instead of the recorded parent.",
)
@click.option(
    "--counter",
    metavar="N",
    type=click.IntRange(0, 2**64 - 1),
    help="Release counter of the target, to send an older round as a newer release.",
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
    type=parse_size,
    help="Write nothing larger, for example 200KB.",
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
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **files: Any,  # of file_options
) -> None:
    """Pack rounds into patch files.

    ROUND is a folder, RUN/round_05, or round_05 where only one run has it. Each patch
    is applied to its parent and compared with its target before it is written.

    Without rounds: --base and --target pack two ONNX or safetensors files of one
    network, and --base with --bundle installs one.
    """
    from packager.build import write_file

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
        made = pack_files(files, output, names, bundle=bundle, options=options)
    else:
        if not rounds:
            raise click.UsageError("give rounds, or --base and --target")
        from packager.rounds.folder import find_round

        folders = [find_round(name, runs) for name in rounds]
        # Beside the round's own patch, which must not be overwritten by this one.
        name = f"_from_{Path(parent).resolve().name}" if parent else ""
        suffix = ".bundle.zip" if bundle else f"{name}.dpu"
        paths = _places(folders, output, suffix)
        places = list(zip(folders, paths, strict=True))
        if expect_outputs:
            options["expect_outputs"] = expect_outputs
        made = _pack_rounds(places, runs, parent, names, bundle=bundle, options=options)
    records = []
    for path, data, record, text in made:
        record["written"] = bool(data) and not dry_run
        if record["written"]:
            write_file(data, path)
        records.append(record)
        if not (as_json or quiet):
            progress(text)
            if data:
                say(f"dry run: {path} not written" if dry_run else f"wrote {path}")
    if as_json:
        emit({"packed": records}, as_json=True, text="")


def _pack_rounds(
    rounds: Sequence[tuple[Path, Path]],
    runs: Path,
    parent: str | None,
    names: Sequence[str],
    *,
    bundle: bool,
    options: dict[str, Any],
) -> "Iterator[Made]":
    """Pack round folders, each with the file that it is for."""
    from packager.report.packed import Made, pack_record, pack_text
    from packager.rounds.folder import read_round

    if bundle and parent:
        raise click.UsageError("a bundle leads from the init weights: no --from")
    if bundle and "expect_outputs" in options:
        raise click.UsageError("a bundle holds all outputs: no --expect-outputs")
    if options["counter"] is not None and len(rounds) > 1:
        raise click.UsageError("--counter is for one round at a time")
    for folder, path in rounds:
        round_ = read_round(folder)
        base = _parent(round_, parent, runs)
        packed, data = (_bundle if bundle else _patch)(round_, base, options)
        record = pack_record(round_, packed, path, len(data), names)
        yield Made(path, data, record, pack_text(record))


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
    from packager.rounds.folder import find_round, parent_from, read_init, read_round

    if name is None:
        return None
    if name == INIT:
        return read_init(round_)
    return parent_from(read_round(find_round(name, runs)))


def _patch(
    round_: "RoundFolder", parent: "Parent | None", options: dict[str, Any]
) -> "tuple[PackedPatch | None, bytes]":
    from packager.build import pack_round

    packed = pack_round(round_, parent, **options)
    return packed, packed.data if packed else b""


def _bundle(
    round_: "RoundFolder", _: "Parent | None", options: dict[str, Any]
) -> "tuple[PackedPatch | None, bytes]":
    from packager.bundles.from_round import build_bundle

    bundle = build_bundle(round_, **options)
    return bundle.patch, bundle.data


@click.group(cls=Group, context_settings=CONTEXT, epilog=EXIT_CODE_HELP)
@click.version_option(package_name="dpu-edge")
def patch() -> None:
    """Look at patches and weight files, sign patches and bundles."""


for command in (
    *(info, diff, report, verify, compose, extract, keygen, sign),
    *(check_proof, trust),
):
    patch.add_command(command)
