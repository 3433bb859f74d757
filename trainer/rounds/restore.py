# SPDX-License-Identifier: Apache-2.0
"""Rebuild the folder of a run from its records and weights, without training.

What a run needs to go on is little: its recipe, the record of every round, the weights
that are deployed and those that are trained on unseen. Patches carry the weights.
"""

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from edge_runtime.errors import ConfigError, TrainingError
from edge_runtime.formats.model_folder import list_rounds
from edge_runtime.formats.weights import Weights
from trainer.data.samples import DataSource
from trainer.folder.once import run_lock
from trainer.folder.record import RoundRecord
from trainer.folder.write import write_round
from trainer.recipe.schema import Config
from trainer.rounds.setup import Setup


class RestoredRun:
    """A run folder that grows by rounds that were trained elsewhere."""

    def __init__(
        self,
        config: Config,
        runs_dir: str | PathLike[str],
        source: DataSource,
        model: Path | None = None,
    ) -> None:
        """Load the data, draw the init weights and export the graph.

        Args:
            config: The run's recipe, with its ``run.id``.
            runs_dir: Folder of the runs.
            source: The recipe's data set.
            model: Folder with the graph and the init recipe, of a run whose training
                decided them (int8); by default they follow from the recipe.

        Raises:
            ConfigError: The data set is too small for the recipe.
            ExportError: The network cannot be deployed weight for weight.
        """
        self.path = Path(runs_dir) / config.run.name
        self._setup = Setup(config, source, model)

    @property
    def init(self) -> Weights:
        """The init weights as devices have them, where chains of patches begin."""
        return self._setup.form.encode(self._setup.init)

    def write(
        self, rounds: Iterator[tuple[RoundRecord, Weights, Weights | None]]
    ) -> None:
        """Write the folders of all rounds, in order.

        What was selected is not known any more: all weights count as the dense part.

        Args:
            rounds: For each its record, the deployed weights, and those that are
                trained on unseen, if any; as devices have them.

        Raises:
            ConfigError: The folder has rounds already.
            TrainingError: Records and weights contradict each other, or this machine
                exports another graph than the run had.
            OSError: The files cannot be written.
        """
        with run_lock(self.path):
            if list_rounds(self.path):
                raise ConfigError(
                    f"{self.path} has rounds already; restore into an empty folder"
                )
            for record, weights, shadow in rounds:
                if shadow and record.method == "subspace":
                    raise TrainingError(
                        f"round {record.round} trained a subspace unseen, and how that "
                        "moved cannot be restored; restore up to the round before it"
                    )
                if not record.round:
                    target = self._setup.form.decode(weights)
                    self._setup.write(self.path, target)
                write_round(self.path, record, weights, {}, [], shadow)
