# SPDX-License-Identifier: Apache-2.0
"""Round folders from your own training loop, without a recipe.

:func:`start_run` once; then train however you like, and :func:`publish_round` after
each training that devices should get. ``dpu-pack`` does the rest.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from edge_runtime.errors import TrainingError
from edge_runtime.formats.contract import RawInputs
from edge_runtime.formats.contract_file import parse_contract
from edge_runtime.formats.init_weights import read_init_spec
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    MODEL_NAME,
    Outcome,
    list_rounds,
    round_name,
)
from edge_runtime.formats.subspace import Term
from edge_runtime.formats.subspace_moves import move_weights
from edge_runtime.formats.weights import Weights
from edge_runtime.update.golden import read_golden
from edge_runtime.update.metrics import METRICS
from trainer.export.deployed_check import check_deployed
from trainer.export.graph import export_graph
from trainer.export.init_recipe import build_network, make_init_spec
from trainer.export.label_check import check_labels, check_rows
from trainer.export.network import find_network, network_masks, network_weights
from trainer.export.tensors import load_weights
from trainer.folder.changes import check_changes, check_masks, way_back
from trainer.folder.contract import GivenContract, as_contract
from trainer.folder.golden import golden_of
from trainer.folder.once import only_writer
from trainer.folder.record import RoundRecord, read_deployed, read_round_record
from trainer.folder.write import write_model, write_round
from trainer.method.movement import Movement
from trainer.parallel import told_by_first


def start_run(  # noqa: PLR0913 - all but two by name
    run_dir: str | PathLike[str],
    build: Callable[[], nn.Module],
    *,
    contract: GivenContract,
    golden_inputs: RawInputs,
    golden_labels: ArrayLike | None = None,
    seed: int = 0,
    pretrained: bool = False,
    run_id: str = "",
) -> nn.Module:
    """Write a run's ``model`` folder, and return the network to be trained.

    Of several processes the first one writes; all of them get the network.

    Args:
        run_dir: The run's folder, for example ``"runs/mine"``.
        build: Builds the network; called several times.
        contract: What goes in and comes out: :func:`make_contract`; or its fields, as
            a mapping or a JSON file has them. Its inputs are those of ``forward``, in
            that order; their names become the graph's.
        golden_inputs: Raw samples to try new weights on, shape (samples, ...); of
            several inputs the arrays by name, or a tuple.
        golden_labels: Their labels, as :func:`write_model` takes them.
        seed: Of the init weights, which a device regenerates.
        pretrained: Keep the weights that ``build`` gives; they travel with the bundle.
        run_id: Tells this run from others of the same network: devices of one refuse
            the patches of another. By default it is drawn at random; give one, any
            text, where two machines must write the same bytes.

    Returns:
        The network, with the init weights that devices have too.

    Raises:
        ExportError: The network cannot be deployed weight for weight.
        TrainingError: The run exists already, ``build`` builds no network, or the
            golden samples do not fit.
        ConfigError: Another process is training or publishing it.
        OSError: The files cannot be written.
    """
    contract = as_contract(contract)
    model = build_network(build)
    folder = Path(run_dir, MODEL_NAME).absolute()

    def write() -> str:
        _insist_on_new(folder)
        golden = golden_of(contract, golden_inputs, golden_labels)
        # Not zeros: they hide what is multiplied with, such as random numbers.
        feed = contract.prepare(golden.by_name(contract))
        example = tuple(torch.tensor(array) for array in feed.values())
        graph = export_graph(
            model,
            example,
            contract.is_random,
            contract.inputs,
            contract.output_tolerance,
        )
        check_labels(model, contract, golden, reach=False)
        check_rows(model, contract, golden)
        write_model(
            run_dir,
            graph=graph,
            recipe=make_init_spec(build, seed, keep=pretrained),
            contract=contract,
            golden_inputs=golden_inputs,
            golden_labels=golden_labels,
            run_id=run_id,
        )
        return str(folder)

    told_by_first(f"start_run {folder}", partial(_alone, folder.parent, write))
    load_weights(model, read_init_spec(folder).generate())
    return model


def publish_round(
    run_dir: str | PathLike[str],
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    from_init: bool = False,
    dense: Collection[str] = (),
    samples: int = 0,
    metrics: Mapping[str, float] | None = None,
) -> RoundRecord:
    """Write the network's weights as the run's next round.

    What a device will compute is proved first: nothing outside of the masks differs
    from the round before, and the run's graph with the new weights answers as the
    model does. Of several processes the first one proves and writes; the others may
    call this as well, and get the same record.

    Args:
        run_dir: The run's folder.
        model: The network with the weights that devices should get, or a module that
            holds it whole (a LightningModule, averaged weights, what torch.compile or
            DataParallel made of it).
        masks: What was allowed to change, as :meth:`PartialUpdater.finish` returns it,
            or how the weights moved, as :meth:`SubspaceUpdater.finish` does; those of
            parts beside the network count for nothing.
        dense: Names of further tensors, of several axes, that are sent whole where
            they changed.
        from_init: This training started from the init weights, not from the last round.
        samples: How many samples it used, for the record.
        metrics: Whatever you measured, for the record: numbers, also as tensors.

    Returns:
        The record of the round.

    Raises:
        TrainingError: Nobody started the run, weights or masks do not fit it, or a
            metric is no number.
        RoundError: The last round's folder is damaged.
        ConfigError: Another process is training or publishing the run.
        FrozenWeightChangedError: Something changed that was not selected.
        ExportError: The device would answer otherwise than the model.
        OSError: The files cannot be written.
    """

    def write() -> str:
        numbers = {n: _number(f"metric {n!r}", v) for n, v in (metrics or {}).items()}
        count_of_samples = int(_number("samples", samples))
        done = list_rounds(run_dir)
        parent, weights, selected, terms = _proved(
            run_dir, model, masks, from_init=from_init or not done, dense=dense
        )
        total = sum(mask.numel() for mask in selected.values())
        count = sum(int(mask.sum()) for mask in selected.values())
        kept = weights.fingerprint == parent
        contract = parse_contract(Path(run_dir, MODEL_NAME, CONTRACT_NAME).read_bytes())
        metric = METRICS[contract.label_metric or "top1"]
        record = RoundRecord(
            run=Path(run_dir).name,
            round=len(done),
            counter=len(done),
            outcome=Outcome.KEPT_BASE if kept else Outcome.UPDATED,
            parent=parent,
            method="own",
            ratio=count / total if total else None,
            reinitialised=from_init and bool(done),
            packable=True,
            samples=count_of_samples,
            metrics=numbers,
            metric=metric.title,
            better=metric.better,
            seeds={},
            config={},
        )
        write_round(run_dir, record, weights, selected, [], terms=terms)
        return round_name(record.round)

    run = Path(run_dir).absolute()
    written = told_by_first(f"publish_round {run}", partial(_alone, run, write))
    return read_round_record(Path(run_dir, written))


def _alone(run: Path, write: Callable[[], str]) -> str:
    """Write while no other process writes the run."""
    with only_writer(run):
        return write()


def _insist_on_new(folder: Path) -> None:
    """Refuse to start a run again; say how it goes on."""
    if folder.exists():
        last = [folder, *list_rounds(folder.parent)][-1]
        raise TrainingError(
            f"{folder} exists already: the run was started before. To go on with it "
            "after its last round, build the network and put that round's weights into "
            f"it in place of start_run: {way_back(last)}. To begin anew, choose "
            "another folder"
        )


def _number(what: str, value: Any) -> float:
    """Return a number to be recorded, whatever holds it: a tensor, one of NumPy's."""
    try:
        found = value.item() if hasattr(value, "item") else value
        if math.isfinite(found):
            return found if isinstance(found, int | float) else float(found)
        reason = "it is not finite"
    except (TypeError, ValueError, OverflowError, RuntimeError) as err:
        reason = str(err)
    raise TrainingError(
        f"{what} is {value!r}, expected one finite number ({reason}); nothing was "
        "written: call publish_round again without it, or with its mean"
    )


def _proved(
    run_dir: str | PathLike[str],
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    from_init: bool,
    dense: Collection[str],
) -> tuple[str, Weights, Mapping[str, Tensor], Sequence[Term]]:
    """Return, proved: the parent's fingerprint, the weights, their masks, and terms."""
    folder = Path(run_dir, MODEL_NAME)
    if not folder.exists():
        raise TrainingError(
            f"{folder} is not there: no run was started in {run_dir}; call start_run "
            "before the first round, and give both the folder of the run"
        )
    init = read_init_spec(folder)
    prefix, network = find_network(model, init.layout(), masks)
    movement = masks if isinstance(masks, Movement) else None
    known = init.layout().by_name
    masks = network_masks(model, masks, prefix, known)
    weights = network_weights(network)
    base, source = init.generate(), folder
    if not from_init:
        source = list_rounds(run_dir)[-1]
        base = read_deployed(source)
    check_masks(weights.layout, masks)
    terms: list[Term] = []
    is_new = weights.fingerprint != base.fingerprint
    if movement and is_new:
        scales = network_masks(model, movement.scales, prefix, known)
        first = dict(islice(movement.scales.items(), len(scales)))
        if network_masks(model, first, prefix, known) != scales:
            raise TrainingError(
                "the subspace moved tensors beside the network too, ahead of its own, "
                "and a device counts signs through the network's alone: give "
                "SubspaceUpdater the named_parameters() of the network"
            )
        terms = [movement.term(weights.layout, scales)]
    moved = move_weights(base, terms)
    check_changes(moved, weights, masks, source=source, dense=dense)
    if is_new:
        contract = parse_contract((folder / CONTRACT_NAME).read_bytes())
        check_deployed(network, weights, folder)
        golden = read_golden((folder / GOLDEN_NAME).read_bytes())
        check_labels(network, contract, golden, reach=True)
    return base.fingerprint, weights, masks, terms
