# SPDX-License-Identifier: Apache-2.0
"""Debian packages of the runtime, for 64-bit Arm and PCs.

    make deb

fills ``dist/wheelhouse-*`` (:mod:`tools.wheels`) and makes
``dist/dpu-edge_VERSION_ARCH.deb`` of each (:mod:`tools.deb.package`), dated as
``SOURCE_DATE_EPOCH`` or the commit says.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import click

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from tools.deb.package import (
    MACHINES,
    VERSION_FORM,
    build,
    check_host,
    our_version,
    source_date,
)
from tools.wheels import CHECKOUT, fill, replacing


def _version(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> str | None:
    if value and not re.fullmatch(VERSION_FORM, value):
        raise click.BadParameter(f"found {value!r}, expected 0.1.0 or 0.1.0+1")
    return value


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--arch",
    "arches",
    type=click.Choice(list(MACHINES)),
    multiple=True,
    default=list(MACHINES),
    show_default=True,
    help="For which machines (repeatable).",
)
@click.option(
    "--version", callback=_version, help="Of the package.  [default: that of our wheel]"
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=CHECKOUT / "dist",
    help="Where to.  [default: dist]",
)
@click.option("--keep-wheels", is_flag=True, help="Take dist/wheelhouse-* as they are.")
@json_option
def main(
    arches: tuple[str, ...],
    version: str | None,
    folder: Path,
    *,
    keep_wheels: bool,
    as_json: bool,
) -> None:
    """Make the Debian packages that install dpu-edge on a device."""
    check_host()
    seconds = source_date()
    records: list[dict[str, Any]] = []
    for arch in arches:
        wheels = CHECKOUT / "dist" / f"wheelhouse-{MACHINES[arch]}"
        if not keep_wheels:
            fill(wheels, MACHINES[arch])
        say(f"building the package for {arch} ...")
        with replacing(folder, f"dpu-edge_*_{arch}.deb") as apart:
            made = build(wheels, arch, version or our_version(wheels), apart, seconds)
            digest = hashlib.sha256(made.path.read_bytes()).hexdigest()
        records.append(
            {
                "path": str(folder / made.path.name),
                "bytes": made.size,
                "installed_bytes": made.installed,
                "shared_bytes": made.shared,
                "sha256": digest,
            }
        )
    text = "\n".join(
        f"{r['path']}  {r['bytes'] / 1e6:.1f} MB, installed "
        f"{r['installed_bytes'] / 1e6:.0f} MB\n  sha256 {r['sha256']}"
        for r in records
    )
    text += "\non the device:\n  sudo apt install ./dpu-edge_*.deb"
    emit({"packages": records}, as_json=as_json, text=text)


if __name__ == "__main__":
    main()
