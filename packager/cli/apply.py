# SPDX-License-Identifier: Apache-2.0
"""``dpu-patch apply``: a patch is applied to files, without a device."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.commandline import emit, json_option, say
from edge_runtime.formats.kinds import Kind
from edge_runtime.parameters import FileOf, trust_options
from edge_runtime.text import printable
from packager.cli.options import PATCH, insist_apart

if TYPE_CHECKING:
    from edge_runtime.formats.patch import Patch
    from edge_runtime.trust import Root


@click.command()
@click.argument(
    "base", type=FileOf(Kind.WEIGHTS, Kind.SHARDS, Kind.INDEX, dir_okay=True)
)
@click.argument("path", metavar="PATCH", type=PATCH)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE|DIR",
    type=click.Path(),
    help="Where to write; for shards a folder, as is what ends with /.",
)
@trust_options("Apply only what this key signed (repeatable), or what a key list says.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace what is there; never a folder with other files in it.",
)
@json_option
def apply(
    base: Path,
    path: Path,
    *,
    output: str,
    keys: tuple[Path, ...],
    threshold: int,
    force: bool,
    as_json: bool,
) -> None:
    """Apply a patch to a safetensors file, or to a folder of shards.

    Every file keeps its name, order and metadata. BASE must hold what the patch leads
    from; the result is hashed before it gets its name, and an error leaves nothing
    behind.
    """
    from edge_runtime.cli.trust import read_trust
    from edge_runtime.errors import prefix_errors
    from edge_runtime.formats.patch import open_patch
    from edge_runtime.trust import Root
    from packager.models.apply import apply_to_files

    insist_apart(Path(output), path, *keys)
    trusted = read_trust(keys, threshold)
    root = trusted if isinstance(trusted, Root) else None
    trust = trusted.releases if isinstance(trusted, Root) else trusted
    with prefix_errors(path):
        opened = open_patch(path, trust=trust)
    with opened as patch:
        if root is not None:
            _check_expiry(root, patch)
        done = apply_to_files(base, patch, output, force=force)
        header = patch.header
    record = {
        "base": str(base),
        "patch": str(path),
        "output": str(done.path),
        "files": list(done.files),
        "bytes": done.size,
        "parent": header.parent,
        "target": header.target,
        "canonical": done.canonical,
        "trusted_keys": list(trust.ids),
    }
    lines = [f"{header.target}  {printable(done.path)}"]
    if not done.canonical:
        what = "files, whose" if len(done.files) > 1 else "file, whose"
        lines[0] += f": in {len(done.files)} {what} own SHA-256 is another"
    emit(record, as_json=as_json, text=lines[0])
    if not trust.keys:
        say("signatures not checked: give the public key with --trust")


def _check_expiry(root: "Root", patch: "Patch") -> None:
    from edge_runtime.errors import ListExpiredError
    from edge_runtime.times import utc

    at = patch.header.signed_at
    signed = utc() if at is None else utc(at)
    if signed >= root.expires:
        raise ListExpiredError(
            f"key list {root.version} expired {root.expires}, and the patch was signed "
            f"{'at an unknown time' if at is None else signed}; give --trust "
            f"{root.version + 1}.root.json"
        )
