# SPDX-License-Identifier: Apache-2.0
"""Which optimizer is measured, and what of its state is rewound with the weights."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from edge_runtime.errors import TrainingError

# Wrappers whose step is the inner optimizer's, though they are optimizers themselves.
_DELEGATING = frozenset({"accelerate"})
# State that is a second set of weights: schedule-free optimizers step from it.
SECOND_WEIGHTS = "z"
# Their step moves each element by its own gradient, state and value alone.
ELEMENTWISE = frozenset(
    {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta"}
    | {"RMSprop", "Rprop", "Lion"}
)


def unwrap(optimizer: Any) -> Optimizer:
    """Return the torch optimizer whose steps are to be measured.

    What is an optimizer itself is measured as a whole, also where it wraps another
    one (Lookahead): only its own step is the step that the loop takes.

    Raises:
        TrainingError: It is none, runs no step hooks, or maximises.
    """
    found = optimizer
    if type(found).__module__.partition(".")[0] in _DELEGATING:
        found = getattr(found, "optimizer", found)
    if not isinstance(found, Optimizer):
        found = getattr(found, "optimizer", found)
    if not isinstance(found, Optimizer):
        raise TrainingError(
            f"expected a torch.optim.Optimizer, found {type(optimizer).__name__}"
        )
    if not hasattr(found, "_optimizer_step_pre_hooks"):
        raise TrainingError(
            f"{type(found).__name__} is a torch optimizer that runs no step hooks (its "
            "constructor does not call that of torch.optim.Optimizer), so its steps "
            "cannot be measured; use one that does, or the optimizer inside of it alone"
        )
    if any(group.get("maximize") for group in found.param_groups):
        raise TrainingError(
            "expected an optimizer that minimises, found maximize=True: the local "
            "contribution is a drop of the loss; minimise the negative instead"
        )
    return found


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer steps."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def to_evaluation(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Put the weights of evaluation into the model; return what was at training."""
    training = [
        optimizer
        for optimizer in optimizers
        if any(group.get("train_mode") for group in optimizer.param_groups)
    ]
    for optimizer in training:
        optimizer.eval()  # type: ignore[attr-defined]
    return training


@contextmanager
def at_evaluation(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Put the weights at which a model is evaluated into it, and back afterwards.

    A schedule-free optimizer trains at other points than it evaluates at; its
    ``eval()`` and ``train()`` go from one to the other. Others are left alone.
    """
    training = to_evaluation(optimizers)
    try:
        yield
    finally:
        for optimizer in training:
            optimizer.train()  # type: ignore[attr-defined]


def has_two_sets(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer trains at other weights than it evaluates at."""
    return any("train_mode" in group for group in optimizer.param_groups)


def second_weights(
    optimizer: Optimizer, parameter: torch.Tensor
) -> torch.Tensor | None:
    """Return the second set of weights that an optimizer keeps, if it does."""
    if not has_two_sets(optimizer):
        return None
    found = optimizer.state.get(parameter, {}).get(SECOND_WEIGHTS)
    return found if isinstance(found, torch.Tensor) else None


def is_coupled(optimizer: Optimizer) -> bool:
    """Tell whether what an optimizer remembers of one weight moves the others."""
    return isinstance(optimizer, torch.optim.LBFGS)


def with_closure(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: Callable[[int], None],
    after: Callable[[], None],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return a step's arguments with calls around each evaluation of its closure.

    Args:
        args: The optimizer, and its closure if that was given by position.
        kwargs: The closure if it was given by name.
        before: Called with the number of evaluations that went before.
        after: Called when the gradients are there.

    Returns:
        The new arguments; None where there is no closure.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        return None
    counts = itertools.count()

    def wrapped() -> Any:
        with torch.no_grad():
            before(next(counts))
        loss = closure()
        with torch.no_grad():
            after()
        return loss

    if len(args) > 1:
        return (args[0], wrapped, *args[2:]), kwargs
    return args, kwargs | {"closure": wrapped}


def check_elementwise(optimizer: Optimizer, *, elementwise: bool) -> None:
    """Insist that an optimizer steps each of its elements by that element alone.

    Args:
        optimizer: The optimizer.
        elementwise: The user knows that it does.

    Raises:
        TrainingError: It may not.
    """
    name = type(optimizer).__name__
    if not (elementwise or name in ELEMENTWISE) or has_two_sets(optimizer):
        way = ". If it steps every element by itself, pass elementwise=True to attach()"
        raise TrainingError(
            f"{name} may step an element by what others do, or keeps weights of its "
            "own, and coefficients are not weights; known to be right are "
            f"{', '.join(sorted(ELEMENTWISE))}{'' if has_two_sets(optimizer) else way}"
        )


def check_groups(optimizer: Optimizer, wanted: Collection[int]) -> None:
    """Insist that some parameters are in groups of the same options.

    Args:
        optimizer: The optimizer.
        wanted: Ids of the parameters.

    Raises:
        TrainingError: They are not.
    """
    groups = [
        # What else lies in a group, but for a scheduler's numbers, is a name for it.
        {k: v for k, v in group.items() if k in optimizer.defaults or type(v) is float}
        for group in optimizer.param_groups
        if any(id(p) in wanted for p in group["params"])
    ]
    for group in groups[1:]:
        for key in sorted(group.keys() | groups[0].keys()):
            if group.get(key) != groups[0].get(key):
                raise TrainingError(
                    f"the weights that move are in groups of different {key!r}, and "
                    "share their coefficients: put them into one group of the optimizer"
                )


def forget(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Let an optimizer know as little of parameters as when it was made.

    Adagrad keeps its state, reset: many versions of torch make it when the optimizer
    is made, and never again.
    """
    for parameter in parameters:
        state = optimizer.state.pop(parameter, None)
        if state and isinstance(optimizer, torch.optim.Adagrad):
            state["step"].zero_()
            state["sum"].fill_(optimizer.defaults["initial_accumulator_value"])
            optimizer.state[parameter] = state
