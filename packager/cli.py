"""``dpu-pack`` makes patches and bundles, ``dpu-patch`` looks at them and signs them.

Everything heavy is imported inside the commands, so that ``--help`` and completion
answer at once.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.command import (
    CONTEXT,
    EXIT_CODE_HELP,
    Command,
    Group,
    emit,
    json_option,
    say,
)
from packager.keys import keygen, read_signers, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from edge_runtime.patch import Patch
    from edge_runtime.signing import Trust
    from packager.build import PackedPatch
    from packager.rounds import Parent, RoundFolder

    Made = tuple[PackedPatch | None, bytes]  # the patch, and the file to write

INIT = "init"  # for --parent: the init weights
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "KIB": 2**10, "MIB": 2**20}

_folder = click.Path(file_okay=False, path_type=Path)
_file = click.Path(exists=True, dir_okay=False, path_type=Path)


def parse_size(text: str) -> int:
    """Turn ``200KB`` (1000 each), ``200KiB`` (1024 each) or ``200000`` into bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Z]*)", text.strip().upper())
    if not match or match[2] not in UNITS:
        raise click.BadParameter(f"{text!r} is not a size such as 200KB or 1.5MiB")
    return int(float(match[1]) * UNITS[match[2]])


def complete_round(ctx: click.Context, _: click.Parameter, start: str) -> list[str]:
    """Complete the names of rounds, bare and with their run."""
    from packager.rounds import list_runs

    found = list_runs(Path(ctx.params.get("runs") or "runs"))
    names = [f"{r.parent.name}/{r.name}" for r in found] + [r.name for r in found]
    return [name for name in dict.fromkeys(names) if name.startswith(start)]


@click.command(cls=Command, context_settings=CONTEXT, epilog=EXIT_CODE_HELP)
@click.argument(
    "rounds", nargs=-1, required=True, metavar="ROUND...", shell_complete=complete_round
)
@click.option(
    "-o",
    "--output",
    metavar="FILE|DIR",
    help="Where to write.  [default: beside the round folder]",
)
@click.option(
    "--runs",
    type=_folder,
    envvar="DPU_RUNS",
    show_envvar=True,
    default=Path("runs"),
    show_default=True,
    is_eager=True,  # known when ROUND is completed
    help="Where names of rounds are looked up.",
)
@click.option(
    "--parent",
    metavar="ROUND",
    shell_complete=complete_round,
    help="Lead from this round, or from 'init', instead of the recorded parent.",
)
@click.option(
    "--bundle",
    is_flag=True,
    help="Write what a new device is installed from; it holds the patch.",
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
    type=_file,
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
    bundle: bool,
    max_size: int | None,
    level: int,
    keys: tuple[Path, ...],
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Pack rounds into patch files.

    ROUND is a folder, RUN/round_05, or round_05 where only one run has it. Each patch
    is applied to its parent and compared with its target before it is written.
    """
    from packager.build import write_file
    from packager.report import pack_record, pack_text
    from packager.rounds import find_round, read_round

    if bundle and parent:
        raise click.UsageError("a bundle leads from the init weights: no --parent")
    folders = [find_round(name, runs) for name in rounds]
    paths = _places(folders, output, ".bundle.zip" if bundle else ".dpu")
    signers, names = read_signers(keys)
    records = []
    for folder, path in zip(folders, paths, strict=True):
        round_ = read_round(folder)
        base = _parent(round_, parent, runs)
        make = _bundle if bundle else _patch
        packed, data = make(round_, base, level, max_size, signers)
        record = pack_record(round_, packed, path, len(data), names)
        record["written"] = packed is not None and not dry_run
        if record["written"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(data, path)
        records.append(record)
        if not (as_json or quiet):
            print(pack_text(record))
            if packed:
                say(f"dry run: {path} not written" if dry_run else f"wrote {path}")
    if as_json:
        emit({"packed": records}, as_json=True, text="")


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
    from packager.rounds import find_round, parent_from, read_init, read_round

    if name is None:
        return None
    if name == INIT:
        return read_init(round_)
    return parent_from(read_round(find_round(name, runs)))


def _patch(
    round_: "RoundFolder",
    parent: "Parent | None",
    level: int,
    max_size: int | None,
    signers: Sequence["Ed25519PrivateKey"],
) -> "Made":
    from packager.build import pack_round

    packed = pack_round(round_, parent, level=level, max_size=max_size, signers=signers)
    return packed, packed.data if packed else b""


def _bundle(
    round_: "RoundFolder",
    _: "Parent | None",
    level: int,
    max_size: int | None,
    signers: Sequence["Ed25519PrivateKey"],
) -> "Made":
    try:
        from packager.bundle import build_bundle
    except ModuleNotFoundError as err:
        raise click.ClickException(
            f"--bundle needs {err.name}: pip install 'dpu-edge[pack]'"
        ) from err
    bundle = build_bundle(round_, level=level, max_size=max_size, signers=signers)
    return bundle.patch, bundle.data


@click.group(cls=Group, context_settings=CONTEXT, epilog=EXIT_CODE_HELP)
@click.version_option(package_name="dpu-edge")
def patch() -> None:
    """Look at patches and weight files, sign patches and bundles."""


@patch.command()
@click.argument("path", metavar="PATCH", type=_file)
@click.option(
    "--base", type=_file, help="A weight file of the network: gives the tensors names."
)
@json_option
def info(path: Path, *, base: Path | None, as_json: bool) -> None:
    """Say what a patch is for and where its bytes go."""
    from edge_runtime.patch import open_patch
    from edge_runtime.weights import read_layout
    from packager.report import patch_record, patch_text

    with open_patch(path) as opened:
        layout = None
        if base is not None:
            with base.open("rb") as file:
                layout = read_layout(file)
            opened.check(layout)
        record = patch_record(path, opened, layout)
    emit(record, as_json=as_json, text=patch_text(record))


@patch.command()
@click.argument("path", metavar="PATCH", type=_file)
@click.option("--base", type=_file, help="The parent weights: apply, prove the target.")
@click.option(
    "--key",
    "keys",
    metavar="KEY.pub.pem",
    multiple=True,
    type=_file,
    help="Insist on the signature of this public key (repeatable).",
)
@json_option
def verify(
    path: Path, *, base: Path | None, keys: tuple[Path, ...], as_json: bool
) -> None:
    """Check that a patch or bundle is whole; with --key, who signed it.

    With --base the patch is applied and its target proved.
    """
    from edge_runtime.apply import apply_patch
    from edge_runtime.signing import trust_keys
    from edge_runtime.weights import read_weights

    trust = trust_keys({str(key): key.read_bytes() for key in keys})
    trust = replace(trust, threshold=len(trust.keys) or 1)  # every one of them
    with _open_trusted(path, trust) as opened:
        if base is not None:
            apply_patch(read_weights(base), opened)
        header = opened.header
    record = {
        "path": str(path),
        "bytes": path.stat().st_size,
        "parent": header.parent,
        "target": header.target,
        "applied": base is not None,
        "verified_keys": list(trust.ids),
    }
    text = f"{path}: whole, every checksum right"
    if keys:
        text += f"\n  signed by {', '.join(trust.ids)}"
    else:
        text += "\n  signatures not checked: give the public key with --key"
    if base is None:
        text += (
            "\n  not applied: give the parent weights with --base to prove the target"
        )
    else:
        text += f"\n  applied to {base}: result is {header.target}, as promised"
    emit(record, as_json=as_json, text=text)


def _open_trusted(path: Path, trust: "Trust") -> "Patch":
    from edge_runtime.bundle import PATCH_NAME, read_bundle
    from edge_runtime.patch import open_patch
    from packager.signing import is_bundle

    with path.open("rb") as file:
        bundle = is_bundle(file.read(4))
    if bundle:
        # What is signed is the bundle; the patch in it needs no signature.
        return open_patch(read_bundle(path, trust).files[PATCH_NAME])
    return open_patch(path, trust=trust)


@patch.command()
@click.argument("base", metavar="A", type=_file)
@click.argument("target", metavar="B", type=_file)
@json_option
def diff(base: Path, target: Path, *, as_json: bool) -> None:
    """Count, tensor by tensor, which elements differ between two weight files."""
    from edge_runtime.weights import read_weights
    from packager.diff import diff as compare
    from packager.report import diff_record, diff_text

    a, b = read_weights(base), read_weights(target)
    record = diff_record(a, b, compare(a, b))
    emit(record, as_json=as_json, text=diff_text(record))


patch.add_command(keygen)
patch.add_command(sign)
