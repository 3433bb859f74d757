# SPDX-License-Identifier: Apache-2.0
"""``dpu-fleet check``: read a channel back as a device would."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.commandline import emit, json_option
from edge_runtime.exit_codes import DIFFERENT, OK, UNTRUSTED
from edge_runtime.formats.kinds import Kind
from edge_runtime.parameters import FileOf, trust_options
from edge_runtime.text import printable
from packager.cli.fleet_options import Name

if TYPE_CHECKING:
    from packager.fleet.check import Finding


@click.command()
@click.argument("url", metavar="URL|DIR")
@click.option(
    "--channel",
    "names",
    type=Name(),
    multiple=True,
    help="This channel alone (repeatable).  [default: all; over HTTP: stable]",
)
@trust_options(
    "What devices trust: public keys, or a key list; else no signature is judged."
)
@click.option(
    "--tuf-root",
    metavar="N.root.json",
    type=FileOf(Kind.KEY_LIST),
    help="Ask the TUF repository too, as a device that was given this root.",
)
@json_option
def check(
    url: str,
    *,
    names: tuple[str, ...],
    keys: tuple[Path, ...],
    threshold: int,
    tuf_root: Path | None,
    as_json: bool,
) -> int:
    """Read a channel back as a device would: head, patches, bundle, key lists, ways.

    URL is the place, or http(s):// as devices see it. Exit code 0: all is well, notes
    included. 5: something is missing, damaged or over. 8: not signed as devices ask.
    """
    from edge_runtime.cli.trust import read_trust
    from packager.fleet.check import State, check_channel
    from packager.fleet.reader import open_reader

    trust, now = read_trust(keys, threshold), int(time.time())
    reader = open_reader(url)
    found = {}
    for name in names or reader.channels or ("stable",):
        signed, looks = check_channel(reader.read, name, trust, now=now)
        if tuf_root:
            from packager.fleet.check_tuf import check_tuf

            looks.append(check_tuf(reader.read, name, signed, tuf_root, now=now))
        found[name] = signed, looks
    states = {finding.state for _, looks in found.values() for finding in looks}
    record = {
        "url": reader.name,
        "channels": [
            {
                "channel": name,
                "version": signed.head.version if signed else None,
                "target": signed.head.target if signed else None,
                "expires": signed.head.expires if signed else None,
                "findings": [asdict(finding) for finding in looks],
            }
            for name, (signed, looks) in found.items()
        ],
    }
    text = "\n\n".join(_table(name, looks) for name, (_, looks) in found.items())
    emit(record, as_json=as_json, text=text)
    if State.UNTRUSTED in states:
        return UNTRUSTED
    return DIFFERENT if State.WRONG in states else OK


def _table(channel: str, findings: "Sequence[Finding]") -> str:
    width = max(len(finding.what) for finding in findings)
    return "\n".join(
        [
            channel,
            *(
                f"  {finding.what:<{width}}  {finding.state:<9}  "
                f"{printable(finding.words)}"
                for finding in findings
            ),
        ]
    )
