# SPDX-License-Identifier: Apache-2.0
"""A real run on the server's side: trained rounds, and the patches between them."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from edge_runtime import PatchHeader, pack_weights
from edge_runtime.formats.model_folder import list_rounds
from packager.build import build_patch, pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round

ROOT = Path(__file__).parents[2]


def train(folder):
    """Train the digits example: six updates of 166,400 weights, half a minute."""
    command = [sys.executable, "-m", "trainer", "run", "digits", "--quiet"]
    where = {"check": True, "cwd": ROOT, "stdout": subprocess.DEVNULL}
    subprocess.run([*command, "--runs", str(folder)], **where)
    return folder / "digits"


class Server:
    """Has a patch for a device in whatever state, made before anybody waits for it.

    From one round to the next it is the very patch that ``dpu-pack`` makes.

    Attributes:
        bundle: What installs the first round.
        rounds: The numbers of all rounds that were updated.
        patches: By the rounds that they lead from and to.
        bad: By round, patches to weights that are not finite; nothing else is wrong.
    """

    def __init__(self, run):
        read = [read_round(path) for path in list_rounds(run)]
        known = {r.record.round: r for r in read if r.record.outcome == "updated"}
        self.rounds = list(known)
        self.bundle = build_bundle(known[self.rounds[0]]).data
        self.patches, self.bad = {}, {}
        for place, start in enumerate(self.rounds):
            for end in self.rounds[place + 1 :]:
                self.patches[start, end] = (
                    pack_round(known[end]).data
                    if end == self.rounds[place + 1]
                    else self._patch(known[start], known[end].weights, end)
                )
            arrays = {n: a.copy() for n, a in known[start].weights.items()}
            for array in arrays.values():
                array[array.ndim * (0,)] = np.nan
            self.bad[start] = self._patch(known[start], pack_weights(arrays), 99)

    def _patch(self, base, target, number):
        header = PatchHeader(
            base.record.model,
            *(base.weights.fingerprint, target.fingerprint, number, number),
            base.weights.layout.file_size,
        )
        return build_patch(base.weights, target, header, level=3)

    def next_patch(self, state):
        """What the server would send; None to a device that has everything."""
        here, later = state.active_slot.round, [*self.rounds, None]
        if here < state.floor:  # it rolled back
            return self.patches[here, state.floor]
        return self.patches.get((here, later[later.index(here) + 1]))
