# SPDX-License-Identifier: Apache-2.0
"""Train networks whose updates are small: Deep Partial Updating.

From a recipe to round folders (this is what ``dpu-train run digits`` does)::

    from trainer import load_config, run_rounds

    run_rounds(load_config("my_recipe.toml"), "runs")

Around your own model, optimizer and loop, with three added lines::

    from trainer import PartialUpdater

    updater = PartialUpdater(model.named_parameters(), ratio=0.01).attach(optimizer)
    train(model, optimizer)      # your loop, unchanged: every weight trains
    updater.select()             # keep the best 1 %, rewind the rest
    train(model, optimizer)      # your loop again: only those weights move
    masks = updater.finish()     # raises if any other weight changed

For ``dpu-pack``, :func:`start_run` and :func:`publish_round` write the folders.

Of this project, this package imports ``edge_runtime`` alone, and nothing of
``packager``. Names below are imported when first used, so that ``dpu-train --help``
need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

# For type checkers alone; the same names as below.
if TYPE_CHECKING:
    from trainer.callbacks import lightning_callback as lightning_callback
    from trainer.callbacks import transformers_callback as transformers_callback
    from trainer.config import load_config as load_config
    from trainer.data.samples import DataSource as DataSource
    from trainer.export.graph import export_graph as export_graph
    from trainer.export.init_recipe import make_init_spec as make_init_spec
    from trainer.export.subspace_size import coefficients_within as coefficients_within
    from trainer.export.tensors import load_weights as load_weights
    from trainer.export.tensors import weights_of as weights_of
    from trainer.folder.contract import make_contract as make_contract
    from trainer.folder.record import RoundRecord as RoundRecord
    from trainer.folder.write import write_model as write_model
    from trainer.folder.write import write_round as write_round
    from trainer.method.batchnorm import FoldedBatchNorm as FoldedBatchNorm
    from trainer.method.distill import distill_loss as distill_loss
    from trainer.method.scores import DPUScore as DPUScore
    from trainer.method.scores import Evidence as Evidence
    from trainer.method.scores import fisher_scores as fisher_scores
    from trainer.method.scores import magnitude_scores as magnitude_scores
    from trainer.method.selection import random_masks as random_masks
    from trainer.method.selection import select_top_k as select_top_k
    from trainer.method.subspace import SubspaceUpdater as SubspaceUpdater
    from trainer.method.updater import PartialUpdater as PartialUpdater
    from trainer.publish import publish_round as publish_round
    from trainer.publish import start_run as start_run
    from trainer.rounds.schedule import run_rounds as run_rounds

_HOMES = {
    "DPUScore": "method.scores",
    "DataSource": "data.samples",
    "Evidence": "method.scores",
    "FoldedBatchNorm": "method.batchnorm",
    "PartialUpdater": "method.updater",
    "RoundRecord": "folder.record",
    "SubspaceUpdater": "method.subspace",
    "coefficients_within": "export.subspace_size",
    "distill_loss": "method.distill",
    "export_graph": "export.graph",
    "fisher_scores": "method.scores",
    "lightning_callback": "callbacks",
    "load_config": "config",
    "load_weights": "export.tensors",
    "magnitude_scores": "method.scores",
    "make_contract": "folder.contract",
    "make_init_spec": "export.init_recipe",
    "publish_round": "publish",
    "random_masks": "method.selection",
    "run_rounds": "rounds.schedule",
    "select_top_k": "method.selection",
    "start_run": "publish",
    "transformers_callback": "callbacks",
    "weights_of": "export.tensors",
    "write_model": "folder.write",
    "write_round": "folder.write",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"trainer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
