# SPDX-License-Identifier: Apache-2.0
"""``dpu-edge repair``: a store with damaged files is made whole again."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.cli.network import BundleOrChannel, bundle_file, network_options
from edge_runtime.commandline import Answer, on_device
from edge_runtime.text import printable

if TYPE_CHECKING:
    from edge_runtime.update.device import Device


@click.command()
@click.argument("source", metavar="BUNDLE|URL", type=BundleOrChannel())
@click.option(
    "--newer",
    is_flag=True,
    help="Where the weights are lost and the bundle is of another round: take it.",
)
@network_options
@on_device
def repair(
    device: "Device", source: Path | str, *, newer: bool, channel: str, **network: str
) -> Answer:
    """Make damaged files of the store whole again, with a bundle of its own run.

    Weights are brought back to the very ones that ran. Release floor, keys, pin and
    history stay; key lists that a channel has are taken first. Whole files are not
    touched, and nothing is fetched for them but, once, for a store of an older runtime.
    """
    from edge_runtime.update.repair import Repaired, find_damage
    from edge_runtime.update.repair import repair as mend

    store, spent = device.store, 0
    with store.lock():  # mends a damaged state.json from its copy
        damage = find_damage(store)
    done = Repaired(())
    if damage or not store.state.contract:  # whose contract the bundle has to prove
        given = bundle_file(source, store.root, channel, store.state, **network)
        with given as (path, place, lists):
            for data in lists:
                device.add_list(data)
            done = mend(device, path, newer=newer)
        spent = place.spent if place else 0
    slot = store.state.active_slot
    record = {
        "damage": damage,
        "mended": list(done.mended),
        "dropped": list(done.dropped),
        "moved": done.moved,
        "bytes": spent,
    } | store.summary()
    lines = [
        *(f"mended   {printable(words)}" for words in done.mended),
        *(f"given up {printable(words)}" for words in done.dropped),
        *(["moved on to the bundle's round"] if done.moved else []),
    ]
    lines = lines or ["nothing is damaged"]
    return record, "\n".join([*lines, f"{slot.target}  round {slot.round}  verified"])
