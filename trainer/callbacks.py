# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ARG002 - the arguments are those that the libraries pass
"""Partial updating in Lightning and in the Hugging Face Trainer, as a callback.

One ``fit`` or ``train`` is one round: the first epochs are the full phase, the others
fine-tune what was selected. Nothing else in your code changes::

    update = lightning_callback(full_epochs=10, ratio=0.01)
    Trainer(max_epochs=20, callbacks=[update]).fit(module, loader)
    publish_round("runs/mine", module, update.masks)

    update = transformers_callback(full_epochs=10, ratio=0.01)
    Trainer(model, TrainingArguments(..., num_train_epochs=20), ..., callbacks=[update])

Neither library is needed to import this module. Both clip gradients and scale losses
before the step; the updater sees the step as it was made.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from edge_runtime.errors import TrainingError
from trainer.method.phase import Phase
from trainer.method.updater import PartialUpdater

_log = logging.getLogger(__name__)


class _Round:
    """One round of partial updating, as both callbacks drive it.

    Attributes:
        masks: What was selected, by parameter name, once training has ended.
        updater: The updater at work.
    """

    def __init__(self, full_epochs: int, options: Mapping[str, Any]) -> None:
        self.masks: Mapping[str, Tensor] = {}
        self.updater: PartialUpdater | None = None
        self._full_epochs, self._options = full_epochs, options

    def start(self, model: nn.Module, optimizers: Iterable[Any]) -> PartialUpdater:
        """Begin the full phase.

        Raises:
            TrainingError: The model writes weights outside of its optimizers' steps.
        """
        _check_modules(model)
        self.updater = PartialUpdater(model.named_parameters(), **self._options)
        return self.updater.attach(*optimizers)

    def start_epoch(self, epoch: float) -> bool:
        """Select when the full phase is over; tell whether that was now."""
        if epoch < self._full_epochs or self.updater is None:
            return False
        if self.updater.phase is not Phase.FULL:
            return False
        self.updater.select()
        return True

    def rewind_averages(self, callbacks: Iterable[Any], model: nn.Module) -> None:
        """Put the base back into averages, which round it in its last bits."""
        if self.updater is None or self.updater.phase is Phase.FULL:
            return
        for average, _ in _averages(callbacks):
            # Their callback moves it into the model, before this one or after it.
            for one in (average, model):
                self.updater.rewind(one.named_parameters())

    def end(self) -> None:
        """Check that frozen weights are unchanged, and keep the masks.

        Raises:
            FrozenWeightChangedError: Something else wrote weights.
            TrainingError: Training ended before the full phase did.
        """
        if self.updater is None or self.updater.phase is Phase.FULL:
            raise TrainingError(
                f"training ended within the full phase of {self._full_epochs} epochs: "
                "nothing was selected; train for more epochs, or lower full_epochs"
            )
        self.masks = self.updater.finish()


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None:
            raise TrainingError(
                f"{name!r} has max_norm, so that its forward pass writes weights, also "
                "those that are not selected; build it without max_norm, and limit the "
                "norms in your loop before select()"
            )


def _averages(callbacks: Iterable[Any]) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield each average of Lightning's callbacks, and how many models it is of."""
    for callback in callbacks:
        average = getattr(callback, "_average_model", None)
        count = getattr(average, "n_averaged", getattr(callback, "n_averaged", None))
        if average is not None and count is not None:  # else it has not begun
            yield getattr(average, "module", average), count


@torch.no_grad()
def _restart_averages(callbacks: Iterable[Any], model: nn.Module) -> None:
    """Let averages of weights begin with the sparse phase.

    Those of the full phase hold changes in every weight, which no patch carries.
    """
    for average, count in _averages(callbacks):
        for mine, weight in zip(average.parameters(), model.parameters(), strict=True):
            mine.copy_(weight)
        count.zero_()  # the next average is the next weights


def _schedule_each_phase(scheduler: Any, first: int, steps: int) -> None:
    """Let a schedule over all steps run once in each phase.

    Args:
        scheduler: torch's, or what Accelerate made of it.
        first: Steps of the full phase.
        steps: Steps of both.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if not 0 < first < steps or not isinstance(scheduler, LambdaLR):
        _log.warning(
            "the learning rate follows one schedule over both phases: the weights that "
            "were selected are fine-tuned at its end"
        )
        return

    def twice(rate: Callable[[int], float]) -> Callable[[int], float]:
        def at(step: int) -> float:
            if step < first:
                return rate(step * steps // first)
            return rate((step - first) * steps // (steps - first))

        return at

    scheduler.lr_lambdas = [twice(rate) for rate in scheduler.lr_lambdas]


def lightning_callback(*, full_epochs: int, **options: Any) -> Any:
    """Return a Lightning callback; after ``fit`` its ``masks`` are what was selected.

    Parameter names are those of your LightningModule. Its optimizers, schedulers and
    precision stay yours; a checkpoint holds the state of the round, so that ``fit``
    with ``ckpt_path`` goes on within it. Averages of weights (``WeightAveraging``,
    ``EMAWeightAveraging``, ``StochasticWeightAveraging``) begin anew where the full
    phase ends, and are what ``fit`` leaves in the module.

    Args:
        full_epochs: Epochs in which every weight trains; the others fine-tune.
        **options: As for :class:`PartialUpdater`: ``ratio``, ``score``, ``selectable``.
    """
    from trainer.data import vision  # noqa: F401 - first: Lightning imports torchvision

    from lightning.pytorch.callbacks import Callback  # isort: skip

    class PartialUpdate(_Round, Callback):
        def __init__(self) -> None:
            super().__init__(full_epochs, options)
            self._resumed: Mapping[str, Any] | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            updater = self.start(pl_module, trainer.optimizers)
            # The next fit is another round.
            resumed, self._resumed = self._resumed, None
            if resumed is not None:
                updater.load_state_dict(resumed)

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if self.start_epoch(trainer.current_epoch):
                _restart_averages(trainer.callbacks, pl_module)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.rewind_averages(trainer.callbacks, pl_module)
            self.end()

        def state_dict(self) -> dict[str, Any]:
            updater = self.updater
            if updater is None or updater.phase is Phase.DONE:
                return {}
            return updater.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._resumed = state_dict or None

    return PartialUpdate()


def transformers_callback(
    *, full_epochs: int, one_schedule: bool = False, **options: Any
) -> Any:
    """Return a callback for the Hugging Face Trainer; after ``train`` it has ``masks``.

    With ``load_best_model_at_end``, the best is looked for among the checkpoints of the
    fine-tuning: those of the full phase hold weights that no patch could carry.

    Args:
        full_epochs: Epochs in which every weight trains; the others fine-tune.
        one_schedule: Let the learning rate follow the Trainer's schedule once over both
            phases, instead of once in each: it then fine-tunes at the schedule's end.
        **options: As for :class:`PartialUpdater`: ``ratio``, ``score``, ``selectable``.
    """
    from trainer.data import vision  # noqa: F401 - first: transformers may import torchvision

    from transformers import TrainerCallback  # isort: skip

    class PartialUpdate(_Round, TrainerCallback):
        def __init__(self) -> None:
            super().__init__(full_epochs, options)

        def on_train_begin(
            self, args: Any, state: Any, control: Any, **kw: Any
        ) -> None:
            if state.global_step:
                raise TrainingError(
                    "the Hugging Face Trainer keeps no state of this callback, so a "
                    "round cannot go on from its checkpoint; start the round again"
                )
            self.start(kw["model"], [kw["optimizer"]])
            if not one_schedule:
                first = round(state.max_steps * full_epochs / state.num_train_epochs)
                _schedule_each_phase(kw.get("lr_scheduler"), first, state.max_steps)

        def on_epoch_begin(
            self, args: Any, state: Any, control: Any, **kw: Any
        ) -> None:
            if self.start_epoch(state.epoch):
                state.best_metric = state.best_model_checkpoint = None
                state.best_global_step = None

        def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            self.end()

    return PartialUpdate()
