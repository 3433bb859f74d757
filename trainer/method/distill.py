# SPDX-License-Identifier: Apache-2.0
"""A teacher for the sparse phase: the few weights learn what a whole network answers.

Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015.
"""

from torch import Tensor
from torch.nn import functional

WEIGHT, TEMPERATURE = 0.7, 3.0


def distill_loss(
    outputs: Tensor,
    labels: Tensor,
    teacher: Tensor,
    *,
    weight: float = WEIGHT,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Return the distillation loss: cross entropy, and divergence from a teacher.

    Cross entropy with the labels, and the divergence from the teacher's probabilities,
    both softened by the temperature; times its square, which keeps the gradients of
    the two alike.

    Args:
        outputs: Logits of the network that trains, (B, classes, ...).
        labels: Classes, (B, ...) int64.
        teacher: The teacher's logits for the same inputs; no gradient goes there.
        weight: Of the teacher's part, 0 to 1.
        temperature: 1 leaves the probabilities as they are.
    """
    hard = functional.cross_entropy(outputs, labels)
    mine = functional.log_softmax(outputs / temperature, 1)
    wanted = functional.softmax(teacher.detach() / temperature, 1)
    # A mean over everything but the classes, as cross_entropy takes it.
    soft = functional.kl_div(mine, wanted, reduction="none").sum(1).mean()
    return (1 - weight) * hard + weight * temperature**2 * soft
