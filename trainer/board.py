# SPDX-License-Identifier: Apache-2.0
"""A run in TensorBoard, through the callbacks of ``run_rounds``.

::

    with BoardLog("logs/digits") as log:
        run_rounds(config, "runs", on_epoch=log.epoch, on_round=log.round)

Needs the package ``tensorboard``, of the extra of that name (docs/installing.md).
"""

from os import PathLike
from types import TracebackType

from trainer.folder.record import RoundRecord
from trainer.rounds.round import Progress

EPOCH = ("loss", "lr")
ROUND = ("changed", "selected", "patch_bytes")


class BoardLog:
    """Logs a run to TensorBoard: one curve for each phase, one point for each round.

    A run that goes on is appended to what is there; a round that was cut off and is
    trained again is drawn over.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        # Late: a standard package, but not one that every trainer needs.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def epoch(self, progress: Progress) -> None:
        """Write an epoch: ``loss/full``, ``loss/sparse`` and so on."""
        step = progress.round * progress.epochs + progress.epoch
        for name, value in progress.metrics.items():
            if name in EPOCH or name.startswith("val_"):
                self._add(f"{name}/{progress.phase}", value, step)

    def round(self, record: RoundRecord) -> None:
        """Write a round, and all that came before it, to the disk."""
        halves = (f"{half}_{record.metric}" for half in ("val", "test"))
        for name in (*halves, *ROUND):
            if (value := record.metrics.get(name)) is not None:
                self._add(f"round/{name}", value, record.round)
        self._writer.flush()

    def _add(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(tag, value, step)

    def __enter__(self) -> "BoardLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()
