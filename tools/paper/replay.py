# SPDX-License-Identifier: Apache-2.0
"""Replay a run on a device: every committed patch, applied by the runtime itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime import Device
from edge_runtime.formats.model_folder import Outcome, round_name
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round
from tools.paper.checkpoints import patch_name, restore
from trainer.data.samples import DataSource, split_source
from trainer.recipe.schema import Config

BATCH = 500


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a device came to in one round.

    Attributes:
        round: Number of the round.
        size: Bytes of the patch; 0 where the round kept its base, or is installed.
        equal: Whether the device's weights have the fingerprint of the server's.
        test: Accuracy that the trainer measured, per cent.
        device: Accuracy that the device gives for the same samples, per cent.
    """

    round: int
    size: int
    equal: bool
    test: float
    device: float


def replay(
    folder: Path, config: Config, source: DataSource, work: Path
) -> Iterator[Replayed]:
    """Install a run's first release on a device, and give it every patch after it.

    Args:
        folder: The run's checkpoints.
        config: Its recipe.
        source: The recipe's data set.
        work: An empty folder for run and device.

    Yields:
        What each round came to.

    Raises:
        DpuError: A patch is damaged, leads elsewhere, or fails its trial.
        OSError: Files cannot be read or written.
    """
    records = restore(folder, config, work, source)
    split = split_source(
        source, config.data, seed=config.run.seed, rounds=config.run.rounds
    )
    raw, labels = split.test.read().numpy(), split.test.labels.numpy()
    device: Device | None = None
    for record in records:
        size = 0
        if record.outcome is Outcome.UPDATED:
            if device is None:
                first = read_round(work / config.run.name / round_name(record.round))
                (work / "bundle.zip").write_bytes(build_bundle(first).data)
                device = Device.install(work / "device", work / "bundle.zip")
            else:
                patch = folder / patch_name(record.round)
                size = patch.stat().st_size
                device.update(patch)
        if device is None:
            continue  # nothing was good enough to be deployed yet
        yield Replayed(
            record.round,
            size,
            device.verify() == record.target,
            100 * record.metrics["test_accuracy"],
            100 * _accuracy(device.predictor(), raw, labels),
        )


def _accuracy(predictor: Any, raw: Any, labels: Any) -> float:
    right = 0
    for begin in range(0, len(raw), BATCH):
        scores = predictor.predict(raw[begin : begin + BATCH])
        right += int((np.argmax(scores, 1) == labels[begin : begin + BATCH]).sum())
    return right / len(raw)
