# SPDX-License-Identifier: Apache-2.0
"""What a run deploys once: the network's graph, its init weights, its contract."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_runtime.errors import ConfigError
from edge_runtime.formats import identity
from edge_runtime.formats.contract import TASKS, Contract, tolerance_between_cpus
from edge_runtime.formats.contract_file import parse_contract
from edge_runtime.formats.init_weights import InitSpec, read_init_spec
from edge_runtime.formats.model_folder import (
    CONTRACT_NAME,
    GOLDEN_NAME,
    GRAPH_NAME,
    MODEL_NAME,
)
from edge_runtime.formats.weights import Weights
from edge_runtime.update.golden import read_golden
from edge_runtime.update.metrics import Metric
from trainer.data.samples import DataSource, Samples
from trainer.export.graph import export_graph
from trainer.export.graph_check import graph_outputs
from trainer.export.init_recipe import make_init_spec
from trainer.export.int8 import (
    DeviceForm,
    quantised_init,
    weight_scales,
)
from trainer.export.int8_graph import graph_scales
from trainer.folder.contract import make_contract
from trainer.folder.write import write_model
from trainer.parallel import by_first
from trainer.recipe.schema import Config
from trainer.recipe.task import device_metric

GOLDEN_SAMPLES = 64
DECODED_APART = 0.02  # of how far samples differ: two of the 64 may not be others


@dataclass(frozen=True)
class Deployment:
    """The graph and the init weights of one network.

    Attributes:
        recipe: What regenerates the init weights.
        graph: The bytes of ``graph.onnx``.
        init: The init weights, as they train.
        plain: The same network's graph in float32; ``graph``, where devices have that.
        form: How weights lie on a device.
    """

    recipe: InitSpec
    graph: bytes
    init: Weights
    plain: bytes
    form: DeviceForm = field(default_factory=DeviceForm)


def make_deployment(
    build: Callable[[], nn.Module], example: Tensor, *, seed: int
) -> Deployment:
    """Draw the init weights and export the graph, for inputs such as the example.

    Raises:
        ExportError: The network cannot be deployed weight for weight.
    """
    recipe, graph = by_first(
        lambda: (
            make_init_spec(build, seed),
            export_graph(build(), example),
        )
    )
    return Deployment(recipe, graph, recipe.generate(), graph)


def in_int8(
    plain: Deployment, names: Iterable[str], trained: Weights, inputs: Tensor
) -> Deployment:
    """Return what is deployed of the same network where its weights are int8.

    Args:
        plain: The network in float32.
        names: Of the tensors that are int8.
        trained: Weights as training makes them: what they reach says the scales.
        inputs: Prepared samples, the same in all rounds: activations are measured on
            them.

    Raises:
        ExportError: The network cannot be quantised.
    """
    scales = weight_scales(names, plain.init, trained)
    form = DeviceForm(scales, plain.graph, inputs)
    recipe = by_first(lambda: quantised_init(plain.recipe, form))
    graph = by_first(lambda: form.graph(form.on_grid(trained)))
    return Deployment(recipe, graph, form.decode(recipe.generate()), plain.graph, form)


def read_deployment(
    folder: Path, build: Callable[[], nn.Module], example: Tensor, inputs: Tensor
) -> Deployment:
    """Read what a run deploys from its model folder.

    Args:
        folder: The folder.
        build: Builds the network; exported again where devices have it in int8.
        example: As for :func:`make_deployment`.
        inputs: As for :func:`in_int8`.

    Raises:
        OSError: The folder is incomplete.
        WeightsError: The init recipe is malformed.
        ExportError: The network cannot be deployed weight for weight.
    """
    recipe, graph = read_init_spec(folder), (folder / GRAPH_NAME).read_bytes()
    form, plain = DeviceForm(), graph
    if scales := graph_scales(graph):
        plain = by_first(lambda: export_graph(build(), example))
        form = DeviceForm(scales, plain, inputs)
    return Deployment(recipe, graph, form.decode(recipe.generate()), plain, form)


def check_run_id(run_dir: Path, wanted: str) -> None:
    """Insist that a run that goes on keeps its id.

    Args:
        run_dir: The run's folder.
        wanted: What the recipe gives as ``run.id``; empty where it says nothing.

    Raises:
        ConfigError: The run has another id, or none.
        WeightsError: ``run.json`` is malformed.
        OSError: It cannot be read.
    """
    found = identity.read_run(run_dir / MODEL_NAME)
    if wanted and (found is None or found.id != identity.run_id(wanted)):
        raise ConfigError(
            f"{run_dir} has the run id {found.id if found else 'of older runs: none'}, "
            f"the recipe gives run.id {wanted!r}; leave it out, or choose another "
            "run.name"
        )


def check_golden(folder: Path, golden: Samples) -> None:
    """Insist that a run goes on with the samples that it was started with.

    Args:
        folder: Its model folder.
        golden: Raw samples that would travel with the model now.

    Raises:
        ConfigError: Those in the folder are others.
        ContractError: ``golden.npz`` is malformed.
        OSError: It cannot be read.
    """
    found = read_golden((folder / GOLDEN_NAME).read_bytes())
    same = _are_alike(found.inputs[0], golden.read().numpy())
    if found.labels is not None:
        same &= np.array_equal(found.labels, golden.labels.numpy())
    if not same:
        raise ConfigError(
            f"the data set is not the one that {folder.parent} was started with: its "
            f"validation samples are others than those in {folder / GOLDEN_NAME}, and "
            "some would be samples that trained; give the run its own data (data.root, "
            "or what your data function reads, without chance), or choose another "
            "run.name (--name)"
        )


def _are_alike(found: NDArray[Any], wanted: NDArray[Any]) -> bool:
    """Tell whether inputs are the same, but for what another image decoder makes."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if found.tobytes() == wanted.tobytes():
        return True
    if found.dtype.kind not in "fu":
        return False
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    spread = np.abs(wanted - wanted.mean()).mean()
    return bool(np.abs(found - wanted).mean() <= DECODED_APART * spread)


def contract_of(
    config: Config,
    source: DataSource,
    golden: Samples,
    measure: Callable[[Metric], float],
) -> Contract:
    """Return a run's contract; where the recipe has no bound, round_00 decides it.

    Args:
        config: The recipe.
        source: Says how raw samples become inputs.
        golden: Raw samples that travel with the model.
        measure: Returns what round_00's weights give for them.
    """
    task, metric = config.data.task, device_metric(config.data, config.train)
    bound = config.run.bound
    if bound is None:
        bound = config.run.accuracy_floor
    if bound is None and metric:
        labels = golden.labels.numpy()
        constant = constant_value(metric, labels, len(source.classes))
        bound = default_bound(metric, measure(metric), constant)
    is_top1 = metric is not None and metric.name == "top1"
    return make_contract(
        source.input_shape,
        source.classes,
        scale=source.scale,
        mean=source.mean,
        std=source.std,
        dtype=source.dtype,
        accuracy_floor=(bound or 0.0) if is_top1 else 0.0,
        task=task,
        metric=metric.name if metric and metric.name != TASKS[task] else "",
        bound=None if is_top1 else bound,
    )


def default_bound(metric: Metric, value: float, constant: float) -> float:
    """Return a bound between what weights reach and what a constant answer does.

    Where they fall short of that, it is as far away on the other side: devices take at
    least the weights that they are installed with.
    """
    middle = (constant + value) / 2
    if metric.reaches(value, middle):
        return middle
    low, high = metric.range
    return min(max(2 * value - middle, low), high)


def constant_value(metric: Metric, labels: NDArray[Any], classes: int) -> float:
    """Return what the best answer that is the same for every sample would give.

    Args:
        metric: Of the devices.
        labels: Golden labels.
        classes: How many there are, where labels are classes.
    """
    if metric.name == "top1":
        return 1 / classes
    if labels.dtype.kind in "iu":
        often = np.bincount(labels[labels >= 0], minlength=classes).argmax()
        answer = np.zeros((len(labels), classes, *labels.shape[1:]))
        answer[:, often] = 1.0
    elif metric.name == "mae":
        answer = np.broadcast_to(np.median(labels, axis=0), labels.shape)
    elif metric.name == "cosine":
        answer = np.broadcast_to(labels.mean(axis=0), labels.shape)
    else:
        answer = np.broadcast_to(labels.mean(axis=0) > 1 / 2, labels.shape)
    return metric.score(answer, labels)


def bound_of(config: Config, run_dir: Path) -> float | None:
    """Return what devices ask of their metric; None for nothing, or not yet.

    Raises:
        OSError: The contract cannot be read.
        ContractError: It is malformed.
    """
    for bound in (config.run.bound, config.run.accuracy_floor):
        if bound is not None:
            return bound
    path = run_dir / MODEL_NAME / CONTRACT_NAME
    return parse_contract(path.read_bytes()).label_bound if path.exists() else None


def write_deployment(
    run_dir: Path,
    deployment: Deployment,
    contract: Contract,
    golden: Samples,
    run_id: str = "",
) -> None:
    """Write the run's model folder, or check the one that is there.

    A run that was interrupted in round_00 may have written it already.

    Args:
        run_dir: The run's folder.
        deployment: Graph and init weights.
        contract: What goes in and comes out, and how good it must be.
        golden: Raw samples that travel with the model.
        run_id: As for :func:`trainer.folder.write.write_model`.

    Raises:
        ConfigError: The folder holds another network's files.
        OSError: The files cannot be written.
    """
    folder = run_dir / MODEL_NAME
    tolerance = tolerance_between_cpus(deployment.recipe.layout())
    outputs = contract.outputs or graph_outputs(deployment.graph)
    contract = replace(contract, output_tolerance=tolerance, outputs=outputs)
    if not folder.exists():
        write_model(
            run_dir,
            graph=deployment.graph,
            recipe=deployment.recipe,
            contract=contract,
            golden_inputs=golden.read().numpy(),
            golden_labels=golden.labels.numpy() if contract.label_metric else None,
            run_id=run_id,
        )
        return
    check_run_id(run_dir, run_id)
    found = read_init_spec(folder).generate()
    same = (folder / GRAPH_NAME).read_bytes() == deployment.graph
    same &= found.fingerprint == deployment.recipe.generate().fingerprint
    if not same or parse_contract((folder / CONTRACT_NAME).read_bytes()) != contract:
        raise ConfigError(
            f"{folder} was written for another recipe; choose another run.name "
            f"(--name), or remove {run_dir}"
        )
    check_golden(folder, golden)
