# SPDX-License-Identifier: Apache-2.0
"""A teacher's answers beside the labels of batches, and the loss for them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.method.distill import distill_loss
from trainer.recipe.schema import TrainConfig

MOST_BYTES = 1 << 28  # of answers that are kept: 6 million of ten classes


class Teacher:
    """A network whose answers are learnt, and asked for once where they stay the same.

    Answers of unchanged samples are kept over the epochs: they are the same, as bits,
    while batches have one size. Those of a smaller last batch are asked for anew.

    Of mixtures of samples there is no end: what knows its samples by heart still learns
    from the teacher's answers between them (mixup, Zhang et al., 2018; as function
    matching, Beyer et al., 2022).
    """

    def __init__(self, model: nn.Module, count: int, mix: float = 0.0) -> None:
        """Know nothing yet.

        Args:
            model: The network; comes to be in eval mode.
            count: How many samples there are.
            mix: Shares of the two samples of a mixture are of Beta(mix, mix); 0: no
                mixtures.
        """
        self._mix = mix
        self._model = model.eval()
        self._known = np.zeros(count, bool)
        self._answers: Tensor | None = None
        self._size = 0  # of a whole batch

    def beside(
        self,
        epoch: Iterable[tuple[Tensor, Any]],
        order: Tensor | None,
        random: np.random.Generator,
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yield inputs, with labels and the teacher's outputs in place of labels.

        Args:
            epoch: Batches.
            order: Which samples they are, one batch after the other; None where they
                are augmented, and so are others every time.
            random: Draws mixtures.
        """
        if self._mix:
            for inputs, labels in epoch:
                mixed = self._mixed(inputs, random)
                yield mixed, (labels, self._ask(mixed))
            return
        places = None if order is None else order.cpu().numpy()
        stop = 0
        for inputs, labels in epoch:
            start, stop = stop, stop + len(inputs)
            if order is None or places is None:
                yield inputs, (labels, self._ask(inputs))
                continue
            answers = self._recall(order[start:stop], places[start:stop])
            if answers is None:
                answers = self._ask(inputs)
                self._keep(answers, order[start:stop], places[start:stop])
            yield inputs, (labels, answers)

    def _mixed(self, inputs: Tensor, random: np.random.Generator) -> Tensor:
        count = len(inputs)
        drawn = random.beta(self._mix, self._mix, count).astype(np.float32)
        shares = torch.from_numpy(drawn).to(inputs).view(-1, *[1] * (inputs.dim() - 1))
        others = torch.from_numpy(random.permutation(count)).to(inputs.device)
        return torch.lerp(inputs[others], inputs, shares)

    @torch.no_grad()
    def _ask(self, inputs: Tensor) -> Any:
        return self._model(inputs)

    def _recall(self, which: Tensor, places: NDArray[np.int64]) -> Tensor | None:
        whole = len(places) == self._size and self._known[places].all()
        if self._answers is None or not whole:
            return None
        return self._answers.index_select(0, which)

    def _keep(self, answers: Any, which: Tensor, places: NDArray[np.int64]) -> None:
        self._size = self._size or len(places)
        rows = len(answers) if isinstance(answers, Tensor) else 0
        if not len(places) == rows == self._size:
            return
        if self._answers is None:
            size = answers[:1].numel() * answers.element_size() * len(self._known)
            if size > MOST_BYTES:
                return
            self._answers = answers.new_empty(len(self._known), *answers.shape[1:])
        self._answers.index_copy_(0, which, answers)
        self._known[places] = True


def taught_loss(
    train: TrainConfig,
) -> Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]:
    """Return a recipe's loss for what :class:`Teacher` gives."""
    weight, temperature = train.teacher_weight, train.teacher_temperature

    def loss(outputs: Tensor, wanted: tuple[Tensor, Tensor]) -> Tensor:
        return distill_loss(outputs, *wanted, weight=weight, temperature=temperature)

    return loss
