# SPDX-License-Identifier: Apache-2.0
"""Full updating in 8 bits a weight: a baseline that needs no training of its own.

The rounds of full updating are rounded: the weights of each tensor to 8 bits of one
power of two, what else there is to 7 mantissa bits. A patch leads from one of them to
the next, made by the real packer.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.formats.model_folder import WEIGHTS_NAME, round_name
from edge_runtime.formats.weights import Weights, read_weights
from packager.rounds.folder import read_init, read_round
from packager.size import patch_size
from trainer.data.samples import DataSource, split_source
from trainer.export.tensors import changed_elements, load_weights
from trainer.folder.record import RoundRecord
from trainer.networks.models import build_model
from trainer.recipe.schema import Config
from trainer.rounds.loop import choose_device, cpu_settings, evaluate
from trainer.rounds.rounding import FALLBACK_BITS, Rounding

LARGEST = 127  # of a signed byte


def eight_bits(weights: Weights, init: Weights) -> Weights:
    """Round the weights of every layer to 8 bits; init's own values stay."""
    steps = {}
    for tensor in weights.layout.tensors:
        largest = float(np.abs(weights[tensor.name]).max())
        if len(tensor.shape) > 1 and tensor.dtype == "F32" and largest:
            steps[tensor.name] = 2.0 ** math.ceil(math.log2(largest / LARGEST))
    return Rounding(FALLBACK_BITS, steps).round(weights, init)


def eight_bit_rows(
    config: Config, run_dir: Path, records: Sequence[RoundRecord], source: DataSource
) -> Iterator[dict[str, Any]]:
    """Yield what rounds of full updating come to in 8 bits.

    Args:
        config: Its recipe.
        run_dir: Its round folders.
        records: Of these rounds.
        source: The recipe's data set.

    Raises:
        OSError: A round folder is incomplete.
        DpuError: It is damaged.
    """
    split = split_source(source, config.data, seed=config.run.seed, rounds=len(records))
    init = read_init(read_round(run_dir / round_name(0))).weights
    model = build_model(config.model, source.input_shape, len(source.classes))
    device = choose_device(config.train.device)
    parts = [source.prepared(s, device) for s in (split.validation, split.test)]
    deployed, shown = init, (0.0, 0.0)
    for record in records:
        folder = run_dir / round_name(record.round)
        target = eight_bits(read_weights(folder / WEIGHTS_NAME), init)
        load_weights(model, target)
        with cpu_settings(config.train.threads):
            tried = [round(100 * evaluate(model, part), 4) for part in parts]
        better = tried[0] >= shown[0] and target.fingerprint != deployed.fingerprint
        size = patch_size(deployed, target) if better else 0
        changed = sum(
            int(changed_elements(deployed, target, tensor.name).sum())
            for tensor in target.layout.tensors
            if len(tensor.shape) > 1
        )
        if better:
            deployed, shown = target, (tried[0], tried[1])
        yield {
            "round": record.round,
            "outcome": "updated" if better else "kept_base",
            "tried_reinit": record.tried_reinit,
            "val_tried": tried[0],
            "test_tried": tried[1],
            "val": shown[0],
            "test": shown[1],
            "changed": changed if better else 0,
            "bytes": size,
            "target": deployed.fingerprint,
        }
