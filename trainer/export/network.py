# SPDX-License-Identifier: Apache-2.0
"""Finds a run's network inside a wrapper (Lightning, DataParallel, torch.compile).

A LightningModule keeps it as ``self.net``, ``torch.compile`` as ``_orig_mod``,
DataParallel as ``module``. The state-dict names differ by a common prefix then.
"""

from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

from edge_runtime.errors import ExportError, TrainingError
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.weights import Weights, pack_weights
from trainer.export.tensors import check_fit, layout_of, weights_of

COMPILED = "_orig_mod."  # torch.compile's, also around a part of a network
ADAPTED = ".base_layer."  # PEFT's, where an adapter stands beside a layer
Value = TypeVar("Value")


def find_network(
    model: nn.Module, layout: Layout, masks: Collection[str] = ()
) -> tuple[str, nn.Module]:
    """Return the network that a weight file's layout describes, and its prefix.

    Args:
        model: The network, or a module around it.
        layout: Of the run's weight file.
        masks: Names of the masks; they decide where two networks would fit, such as a
            student and its teacher.

    Raises:
        TrainingError: None fits, or several do.
    """
    fitting = {
        prefix: module
        for prefix, module in model.named_modules()
        if _fits(module, layout)
    }
    # The innermost: around it is what torch.compile made of it.
    found = {
        prefix: module
        for prefix, module in fitting.items()
        if not any(prefix != p and _inside(p, prefix) for p in fitting)
    }
    if len(found) > 1:
        named = {p: m for p, m in found.items() if all(_inside(n, p) for n in masks)}
        found = named if masks and named else found
    if len(found) == 1:
        ((prefix, module),) = found.items()
        return prefix, module
    if found:
        raise TrainingError(
            f"the run's network fits several parts of the model: {', '.join(found)}; "
            "pass the one that devices should get"
        )
    raise _no_fit(model, layout)


def network_masks(
    model: nn.Module,
    masks: Mapping[str, Value],
    prefix: str,
    known: Collection[str],
) -> dict[str, Value]:
    """Return a network's masks under the names that the run's weight file has.

    They may be named as in the network, or as in any module around it.

    Args:
        model: What was published; parts of it beside the network have no say.
        masks: By the names that the updater saw.
        prefix: Of the network in the model.
        known: The names in the weight file.
    """
    beside = {n for n, _ in model.named_parameters() if not _inside(n, prefix)}
    plain = {_plain(n): mask for n, mask in masks.items() if n not in beside}
    for first in list(plain)[:1]:
        # The longest name that it ends with, for the shortest start to be left out.
        for name in sorted(known, key=len, reverse=True):
            start = first.removesuffix(name)
            if start == first or (start and not start.endswith(".")):
                continue
            rest = {n.removeprefix(start): mask for n, mask in plain.items()}
            if all(n.startswith(start) for n in plain) and rest.keys() <= set(known):
                return rest
    return plain


def network_weights(network: nn.Module) -> Weights:
    """Return a network's weights under the names that the run has for them.

    Raises:
        ExportError: As :func:`deployed_tensors`.
    """
    weights = weights_of(network)
    if not any(COMPILED in name for name in weights):
        return weights
    types = {_plain(t.name): t.dtype for t in weights.layout.tensors}
    return pack_weights({_plain(n): array for n, array in weights.items()}, types)


def _plain(name: str) -> str:
    return name.replace(COMPILED, "")


def _inside(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _fits(module: nn.Module, layout: Layout) -> bool:
    try:
        found = layout_of(module)
    except ExportError:
        return False
    return _table(found) == _table(layout)


def _table(layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {_plain(t.name): (t.dtype, t.shape) for t in layout.tensors}


def _no_fit(model: nn.Module, layout: Layout) -> TrainingError:
    names = {_plain(name) for name in model.state_dict()}
    if any(ADAPTED in name for name in names - layout.by_name.keys()):
        return TrainingError(
            "the model has adapters (PEFT, such as LoRA) that the run's network does "
            "not have. Start the run with build() returning what get_peft_model() "
            "returns: base and adapters are deployed as they are, and only adapters "
            "change. Or publish what merge_and_unload() returns, with dense=[...] "
            "naming its matrices: they are sent whole"
        )
    lacking = []
    for _, part in model.named_modules():
        known = {_plain(name) for name in part.state_dict()}
        lost = [name for name in layout.by_name if name not in known]
        if not lost:
            check_fit(layout_of(part), layout)  # names the type or shape
        lacking.append(lost)
    lost = min(lacking, key=len)
    return TrainingError(
        "the model is not the one that this run was started with, and has no part "
        f"that is: of the run's {len(layout.tensors)} tensors it lacks {len(lost)}, "
        f"such as {lost[:1]}; pass the module that start_run() returned, or one that "
        "holds it whole"
    )
