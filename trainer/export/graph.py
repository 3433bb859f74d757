# SPDX-License-Identifier: Apache-2.0
"""Deploy a torch model weight for weight: an ONNX graph that holds no weights.

The graph is exported once and reused in every round, so it must not depend on any
weight's value, and every deployed tensor must be an initializer under its own
state-dict name. The usual exports fold BatchNorm into convolutions and transposes
into matrices; then a 1 % update becomes a 100 % change.

:func:`export_graph` proves both. The model that is traced holds fake tensors (type and
shape, no values), and while constants are folded the weights are unknown: the graph
cannot depend on what the exporter never saw. This says more than exporting twice with
different weights and comparing the bytes, at half the time. :func:`check_graph` then
reads the finished bytes back, looks for every tensor, and compares ONNX Runtime's
outputs with torch's.

The tensors themselves are in :mod:`trainer.export.tensors`. onnx, onnxscript and
onnxruntime are imported where they are used: every round needs the tensors, a run needs
one graph.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edge_runtime.errors import ExportError
from edge_runtime.formats.contract import InputSpec
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from trainer.export.graph_check import (
    as_tuple,
    check_graph,
    never,
    open_axes,
    resized,
)
from trainer.export.tensors import layout_of, owners, state_tensors
from trainer.export.tracing import insist_on_answers, trace


def export_graph(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    is_random: Callable[[int], bool] = never,
    takes: Sequence[InputSpec] = (),
    tolerance: float | None = None,
) -> bytes:
    """Return the bytes of ``graph.onnx``: the network without its weights.

    The first axis of every input is a batch of any size, and an input is called
    ``input``, several ``input_0``, ``input_1``, ... in the order of ``forward``, unless
    ``takes`` says otherwise; outputs likewise. Equal architectures give equal bytes.
    Non-persistent buffers and plain tensor attributes become constants of the graph.
    Takes 1 to 10 seconds.

    Args:
        model: Any module whose ``forward`` takes and returns tensors; left as it is,
            in its training mode and on its device.
        example: One input, or all of them, with at least one row; real samples say
            more than zeros.
        is_random: Says which outputs, counted from 0, are random by design.
        takes: The inputs as a contract has them: their names, and None for a size
            that is open.
        tolerance: By how much ONNX Runtime's outputs may differ from torch's, as a
            share of the largest; by default as much as those of two CPUs.

    Raises:
        ExportError: The model cannot be deployed weight for weight; the message names
            the tensor and says what to do.
    """
    tensors = state_tensors(model)
    groups = owners(tensors)
    _refuse_hidden_weights(model, tensors)
    _refuse_wrappers(model)
    twin = _copy_with(model, groups, copy.deepcopy).cpu()
    inputs = tuple(x.detach().cpu() for x in as_tuple(example, "the example"))
    if takes and len(takes) != len(inputs):
        raise ExportError(
            f"the contract has {len(takes)} inputs, the example {len(inputs)}"
        )
    axes = open_axes(inputs, takes)
    pairs = zip(inputs, axes, strict=True)
    if not all(x.numel() and x.dim() > max(a, default=-1) for x, a in pairs):
        raise ExportError("the example needs a batch axis with at least one row")
    names = [spec.name for spec in takes]
    # A copy that shares the weights: what forward keeps to itself is not traced.
    taster = _copy_with(twin, groups, lambda tensor: tensor)
    versions = {name: t._version for name, t in state_tensors(taster).items()}
    others = insist_on_answers(taster, inputs, axes, names)
    for name, tensor in state_tensors(taster).items():
        if tensor._version != versions[name]:
            raise _changes(name)
    fake, pair = _copy_without_values(twin, groups), resized(inputs, axes, 2)
    exported, read = trace(fake, pair, axes)
    for name in exported.exported_program.graph_signature.buffers_to_mutate.values():
        raise _changes(name)
    _simplify(exported.model, groups, names)
    _refuse_lost(exported.model, {groups[name] for name in read if name in groups})
    graph = _serialise(exported.model, layout_of(twin), axes)
    one = resized(inputs, axes, 1)
    check_graph(graph, twin, [one, others], is_random, tolerance)
    return graph


def _changes(name: str) -> ExportError:
    return ExportError(
        f"forward changes {name!r} in eval mode, but inference never changes a "
        "device's weights; change it in training mode only"
    )


def _refuse_wrappers(model: nn.Module) -> None:
    """Refuse what cannot be traced, or would be traced as something else."""
    for path, module in model.named_modules():
        where = f"module {path!r}" if path else "the network"
        if isinstance(module, torch.jit.ScriptModule):
            raise ExportError(
                f"{where} is a ScriptModule (torch.jit), which torch cannot export: "
                "use the module that it was made from"
            )
        if hasattr(module, "_orig_mod"):
            raise ExportError(
                f"{where} is compiled (torch.compile), and a run's graph and names are "
                "those of the plain network: build it without, and compile what "
                "start_run() returns; publish_round() finds the network in that"
            )
        if getattr(module, "max_norm", None) is not None:
            raise ExportError(
                f"{where} has max_norm, so that forward changes its weights also in "
                "eval mode, and inference never changes a device's: build it without "
                "max_norm, and limit the norms in your loop before select()"
            )


def _refuse_lost(graph_model: Any, read: set[str]) -> None:
    """Refuse a graph without a tensor that forward reads: the exporter dropped it."""
    graph = graph_model.graph
    outside = {value.name for value in [*graph.inputs, *graph.outputs]}
    for name in sorted(read - outside):  # check_graph() has words for those
        if name not in graph.initializers:
            raise ExportError(
                f"forward reads tensor {name!r}, and torch's exporter leaves it out of "
                "the graph (an LSTM's proj_size is such a case: use nn.Linear behind "
                "an LSTM without it); use other operators in forward"
            )


def _refuse_hidden_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse trained values outside the state dict: the graph would hold them."""
    known = {id(t) for t in tensors.values()}
    storages = {t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}
    for path, module in model.named_modules():
        for name, value in [*vars(module).items(), *module.named_buffers("", False)]:
            if not isinstance(value, Tensor) or id(value) in known:
                continue
            shared = value.untyped_storage().data_ptr() in storages
            if value.requires_grad or (value.numel() and shared):
                raise ExportError(
                    f"tensor {f'{path}.{name}'.strip('.')!r} holds trained values but "
                    f"is not in the state dict: make it a Parameter, compute it in "
                    f"forward, or use torch.nn.utils.parametrizations in place of "
                    f"torch.nn.utils.weight_norm and its like"
                )


def _copy_with(
    model: nn.Module, groups: Mapping[str, str], make: Callable[[Tensor], Tensor]
) -> nn.Module:
    """Copy a module in eval mode, with ``make(tensor)`` for every tied group."""
    tensors = state_tensors(model)
    made = {name: make(tensors[name]) for name in dict.fromkeys(groups.values())}
    # deepcopy takes what its memo holds for an object instead of copying the object.
    memo = {id(tensor): made[groups[name]] for name, tensor in tensors.items()}
    return copy.deepcopy(model, memo).eval()


def _copy_without_values(twin: nn.Module, groups: Mapping[str, str]) -> nn.Module:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return _copy_with(twin, groups, FakeTensorMode().from_tensor)


def _simplify(
    model: Any, groups: Mapping[str, str], inputs: Sequence[str] = ()
) -> None:
    """Fold what does not depend on weights, in place, and settle all names.

    Without the folding, chains of shape arithmetic keep ONNX Runtime from fusing
    convolution and BatchNorm: MobileNetV2 then takes 64 ms instead of 23.
    """
    from onnx_ir.passes.common import NameFixPass
    from onnxscript import optimizer

    for name, value in list(model.graph.initializers.items()):
        if name in groups:
            value.const_value = None  # unknown, so that nothing is folded into it
            value.name = groups[name]
    for values, stem, names in (
        (model.graph.inputs, "input", inputs),
        (model.graph.outputs, "output", ()),
    ):
        counted = [f"{stem}_{n}" for n in range(len(values))]
        usual = [stem] if len(values) == 1 else counted
        for value, name in zip(values, names or usual, strict=True):
            value.name = name
    NameFixPass()(model)  # inner values give way: F.linear(x, self.linear)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    NameFixPass()(model)  # and those that folding made


def _serialise(model: Any, layout: Layout, axes: Sequence[tuple[int, ...]]) -> bytes:
    """Point the deployed tensors into the weight file and return canonical bytes."""
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        if place := layout.by_name.get(name):
            length = place.stop - place.start
            shape = ir.Shape(place.shape)
            value.const_value = ir.ExternalTensor(
                WEIGHTS_NAME, place.start, length, value.dtype, shape=shape, name=name
            )
    proto = ir.serde.serialize_model(model)
    _strip(proto)
    proto.producer_version = ""
    proto.graph.ClearField("value_info")  # ONNX Runtime infers inner shapes itself
    names: dict[str, str] = {}
    for value, free in zip(proto.graph.input, axes, strict=True):
        for axis in free:
            size = value.type.tensor_type.shape.dim[axis].dim_param
            names.setdefault(size, f"size_{len(names)}" if axis else "batch")
    for value in [*proto.graph.input, *proto.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    r"\w+", lambda m: names.get(m[0], m[0]), dim.dim_param
                )
    return bytes(proto.SerializeToString(deterministic=True))


def _strip(message: Any) -> None:
    """Remove what tells of the exporting machine (source paths, stack traces)."""
    for field, value in message.ListFields():
        if field.name in {"doc_string", "metadata_props"}:
            message.ClearField(field.name)
        elif field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                _strip(item)
