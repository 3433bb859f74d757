"""Fisher information as a score (FISH masks; Sung, Nair, Raffel, NeurIPS 2021)."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional


def fisher_scores(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    names: Iterable[str],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
) -> dict[str, Tensor]:
    """Return each weight's squared gradient, summed over batches, as its score.

    With batches of one sample this is the diagonal of the empirical Fisher information;
    larger ones are faster and average within a batch before they square. The model is
    left as it was, gradients included, but in eval mode.

    Args:
        model: At the weights to be scored; returns what ``loss`` takes.
        batches: Inputs and labels.
        names: Of the parameters to score, such as ``updater.base``.
        loss: From outputs and labels to the mean loss.
    """
    model.eval()
    known = dict(model.named_parameters())
    chosen = {name: known[name] for name in names}
    scores = {name: torch.zeros_like(p) for name, p in chosen.items()}
    for inputs, labels in batches:
        gradients = torch.autograd.grad(
            loss(model(inputs), labels), list(chosen.values())
        )
        for name, gradient in zip(chosen, gradients, strict=True):
            scores[name].addcmul_(gradient, gradient)
    return scores
