"""What a run deploys once: the network's graph, its init weights, its contract."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edge_runtime.errors import ConfigError
from edge_runtime.formats.init_weights import InitSpec, read_init_spec
from edge_runtime.formats.model_folder import CONTRACT_NAME, GRAPH_NAME, MODEL_NAME
from edge_runtime.formats.weights import Weights, model_id
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

    @property
    def model(self) -> str:
        """The network's identity, hexadecimal."""
        return model_id(self.init.layout.header, self.graph)


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


def write_deployment(
    run_dir: Path,
    deployment: Deployment,
    source: DataSource,
    golden: Samples,
    accuracy_floor: float,
) -> None:
    """Write the run's model folder, or check the one that is there.

    A run that was interrupted in round_00 may have written it already.

    Args:
        run_dir: The run's folder.
        deployment: Graph and init weights.
        source: Says how raw samples become inputs.
        golden: Raw samples that travel with the model.
        accuracy_floor: Share of ``golden`` that a device must get right, 0 to 1.

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
        )
        return
    found = read_deployment(run_dir)
    same = found.graph == deployment.graph
    same &= found.init.fingerprint == deployment.init.fingerprint
    if not same or json.loads((folder / CONTRACT_NAME).read_text()) != contract:
        raise ConfigError(
            f"{folder} was written for another recipe; choose another run.name, or "
            f"remove {run_dir}"
        )
