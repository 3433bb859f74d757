"""Round folders from your own training loop, without a recipe.

:func:`start_run` once; then train however you like, and :func:`publish_round` after
each training that devices should get. ``dpu-pack`` does the rest.
"""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_runtime.formats.contract import Contract
from edge_runtime.formats.init_weights import read_init_spec
from edge_runtime.formats.model_folder import MODEL_NAME, Outcome, list_rounds
from trainer.export.graph import export_graph
from trainer.export.init_recipe import make_init_spec
from trainer.export.tensors import load_weights, weights_of
from trainer.folder.record import RoundRecord, read_round_record
from trainer.folder.write import write_model, write_round


def start_run(  # noqa: PLR0913 - all but two by name
    run_dir: str | PathLike[str],
    build: Callable[[], nn.Module],
    *,
    contract: Contract,
    golden_inputs: NDArray[Any],
    golden_labels: NDArray[Any],
    seed: int = 0,
    pretrained: bool = False,
    run_id: str = "",
) -> nn.Module:
    """Write a run's ``model`` folder, and return the network to be trained.

    Args:
        run_dir: The run's folder, for example ``"runs/mine"``.
        build: Builds the network; called several times.
        contract: What goes in and comes out: :func:`make_contract`.
        golden_inputs: Raw samples to try new weights on, shape (samples, ...).
        golden_labels: Their labels, shape (samples,), integers.
        seed: Of the init weights, which a device regenerates.
        pretrained: Keep the weights that ``build`` gives; they travel with the bundle.
        run_id: Tells this run from others of the same network: devices of one refuse
            the patches of another. By default it is drawn at random; give one, any
            text, where two machines must write the same bytes.

    Returns:
        The network, with the init weights that devices have too.

    Raises:
        ExportError: The network cannot be deployed weight for weight.
        TrainingError: The run exists already, or the golden samples do not fit.
        OSError: The files cannot be written.
    """
    model = build()
    recipe = make_init_spec(build, seed, keep=pretrained)
    shape = [size or 1 for size in contract.inputs[0].shape]
    write_model(
        run_dir,
        graph=export_graph(model, torch.zeros(*shape)),
        recipe=recipe,
        contract=contract,
        golden_inputs=golden_inputs,
        golden_labels=golden_labels,
        run_id=run_id,
    )
    load_weights(model, recipe.generate())
    return model


def publish_round(
    run_dir: str | PathLike[str],
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    from_init: bool = False,
    samples: int = 0,
    metrics: Mapping[str, float] | None = None,
) -> RoundRecord:
    """Write the network's weights as the run's next round.

    Args:
        run_dir: The run's folder.
        model: With the weights that devices should get.
        masks: What was allowed to change, as :meth:`PartialUpdater.finish` returns it.
        from_init: This training started from the init weights, not from the last round.
        samples: How many samples it used, for the record.
        metrics: Whatever you measured, for the record.

    Returns:
        The record of the round.

    Raises:
        TrainingError: Weights or masks do not fit the run.
        OSError: The files cannot be written.
    """
    done = [read_round_record(folder) for folder in list_rounds(run_dir)]
    init = read_init_spec(Path(run_dir, MODEL_NAME)).generate().fingerprint
    parent = init if from_init or not done else done[-1].target
    weights = weights_of(model)
    kept = weights.fingerprint == parent
    total = sum(mask.numel() for mask in masks.values())
    selected = sum(int(mask.sum()) for mask in masks.values())
    record = RoundRecord(
        run=Path(run_dir).name,
        round=len(done),
        counter=len(done),
        outcome=Outcome.KEPT_BASE if kept else Outcome.UPDATED,
        parent=parent,
        method="own",
        ratio=selected / total if total else None,
        reinitialised=from_init and bool(done),
        packable=True,
        samples=samples,
        metrics=metrics or {},
        seeds={},
        config={},
    )
    return write_round(run_dir, record, weights, masks, [])
