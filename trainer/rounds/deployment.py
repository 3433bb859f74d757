# SPDX-License-Identifier: Apache-2.0
"""What a run deploys once: the network's graph, its init weights, its contract."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edge_runtime.errors import ConfigError
from edge_runtime.formats import identity
from edge_runtime.formats.contract import parse_contract
from edge_runtime.formats.init_weights import InitSpec, read_init_spec
from edge_runtime.formats.model_folder import CONTRACT_NAME, GRAPH_NAME, MODEL_NAME
from edge_runtime.formats.weights import Weights
from trainer.data.samples import DataSource, Samples
from trainer.export.graph import export_graph
from trainer.export.init_recipe import make_init_spec
from trainer.folder.write import make_contract, write_model
from trainer.parallel import by_first

GOLDEN_SAMPLES = 64


@dataclass(frozen=True)
class Deployment:
    """The graph and the init weights of one network.

    Attributes:
        recipe: What regenerates the init weights.
        graph: The bytes of ``graph.onnx``.
        init: The init weights.
    """

    recipe: InitSpec
    graph: bytes
    init: Weights


def make_deployment(
    build: Callable[[], nn.Module], input_shape: tuple[int, ...], *, seed: int
) -> Deployment:
    """Draw the init weights and export the graph.

    Raises:
        ExportError: The network cannot be deployed weight for weight.
    """
    recipe, graph = by_first(
        lambda: (
            make_init_spec(build, seed),
            export_graph(build(), torch.zeros(1, *input_shape)),
        )
    )
    return Deployment(recipe, graph, recipe.generate())


def read_deployment(run_dir: Path) -> Deployment:
    """Read what a run deploys from its model folder.

    Raises:
        OSError: The folder is incomplete.
        WeightsError: The init recipe is malformed.
    """
    folder = run_dir / MODEL_NAME
    recipe = read_init_spec(folder)
    return Deployment(recipe, (folder / GRAPH_NAME).read_bytes(), recipe.generate())


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


def write_deployment(
    run_dir: Path,
    deployment: Deployment,
    source: DataSource,
    golden: Samples,
    accuracy_floor: float,
    run_id: str = "",
) -> None:
    """Write the run's model folder, or check the one that is there.

    A run that was interrupted in round_00 may have written it already.

    Args:
        run_dir: The run's folder.
        deployment: Graph and init weights.
        source: Says how raw samples become inputs.
        golden: Raw samples that travel with the model.
        accuracy_floor: Share of ``golden`` that a device must get right, 0 to 1.
        run_id: As for :func:`trainer.folder.write_model`.

    Raises:
        ConfigError: The folder holds another network's files.
        OSError: The files cannot be written.
    """
    contract = make_contract(
        source.input_shape,
        source.classes,
        scale=source.scale,
        mean=source.mean,
        std=source.std,
        accuracy_floor=accuracy_floor,
    )
    folder = run_dir / MODEL_NAME
    if not folder.exists():
        write_model(
            run_dir,
            graph=deployment.graph,
            recipe=deployment.recipe,
            contract=contract,
            golden_inputs=golden.read().numpy(),
            golden_labels=golden.labels.numpy(),
            run_id=run_id,
        )
        return
    check_run_id(run_dir, run_id)
    found = read_deployment(run_dir)
    same = found.graph == deployment.graph
    same &= found.init.fingerprint == deployment.init.fingerprint
    if not same or parse_contract((folder / CONTRACT_NAME).read_bytes()) != contract:
        raise ConfigError(
            f"{folder} was written for another recipe; choose another run.name, or "
            f"remove {run_dir}"
        )
