# SPDX-License-Identifier: Apache-2.0
"""Trace a module without its values, and say why where that fails."""

import inspect
import re
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_runtime.errors import ExportError
from trainer.export.graph_check import resized

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# torch's name for an axis other than the batch, which is one for all inputs.
_FIXED = re.compile(
    r"Constraints violated \(.*?L\['(\w+)'\]((?:\[\d+\])?)\.size\(\)\[(\d+)\]"
)
_OPERATOR = re.compile(r"<OpOverload\(op='([^']+)'")
_INSTALLED = {"site-packages", "dist-packages"}
_OURS = Path(__file__).parents[1]
_STDLIB = Path(sysconfig.get_path("stdlib"))


def trace(
    fake: nn.Module, batch: Sequence[Tensor], axes: Sequence[tuple[int, ...]]
) -> tuple[Any, set[str]]:
    """Export a module without its values.

    Args:
        fake: In eval mode, with fake tensors: types and shapes, no values.
        batch: Inputs of two rows or more, as torch takes a batch of one for a constant.
        axes: Of each input, the axes of any size.

    Returns:
        torch's ONNX program, and the names of the tensors that forward reads.

    Raises:
        ExportError: It cannot be traced; the message gives the cause.
    """
    try:
        shapes = _dynamic_shapes(fake, batch, axes)
        # Without gradients always: names of inner values differ with and without.
        with torch.no_grad(), _known_warnings_ignored():
            program = torch.export.export(
                fake, tuple(batch), dynamic_shapes=shapes, strict=False
            )
            read = _names_read(program)
            onnx = torch.onnx.export(
                program, (), dynamo=True, optimize=False, verbose=False
            )
    except Exception as err:
        # torch's tracer raises what the model's own code raises, so: anything.
        raise ExportError(f"torch cannot trace this model: {_cause(err)}") from err
    return onnx, read


def insist_on_answers(
    model: nn.Module,
    inputs: Sequence[Tensor],
    axes: Sequence[tuple[int, ...]],
    names: Sequence[str] = (),
) -> tuple[Tensor, ...]:
    """Insist that ``forward`` takes any number of rows, and other sizes of open axes.

    Args:
        model: In eval mode.
        inputs: The example.
        axes: Of each input, the axes of any size.
        names: Of the inputs, where axes other than the first are open.

    Returns:
        Inputs that it takes, of other sizes than those of the example.

    Raises:
        ExportError: It does not; the message gives what it raised, and where.
    """
    _insist(
        model,
        resized(inputs, axes, 2),
        "what goes in (the contract's inputs, or the recipe's data) must be what "
        "forward takes: this many inputs, of these types and shapes",
    )
    three = _insist(
        model,
        resized(inputs, axes, 3),
        "with 2 rows it works: forward must take any batch size, so take it from "
        "x.shape[0]",
    )
    pairs = zip(names, axes, strict=False)
    free = [f"axis {axis} of {name!r}" for name, each in pairs for axis in each if axis]
    if not free:
        return three
    advice = (
        "with the example's sizes it works, with twice those not: give the contract "
        f"the size of {', '.join(free)}, or let forward take any"
    )
    try:
        # The stricter proof: a size that few strides divide.
        less = resized(inputs, axes, 3, lambda n: n - 1 if n > 2 else n + 1)
        return _insist(model, less, advice)
    except ExportError:
        with suppress(ExportError):  # what halves an image takes that
            return _insist(model, resized(inputs, axes, 3, lambda n: 2 * n), advice)
        raise


def _insist(
    model: nn.Module, batch: tuple[Tensor, ...], advice: str
) -> tuple[Tensor, ...]:
    try:
        with torch.no_grad():
            model(*batch)
    except Exception as err:
        # A forward of somebody's: it may raise anything.
        found = ", ".join(f"{_type(x)} {list(x.shape)}" for x in batch)
        raise ExportError(
            f"forward fails with an input of {found}: {_first_line(err)}; {advice}"
            f"{_place(err)}"
        ) from err
    return batch


def _dynamic_shapes(
    module: nn.Module, batch: Sequence[Tensor], axes: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """Return which axes are free, in the form in which ``forward`` names its inputs."""
    rows = torch.export.Dim("batch")
    # Sizes of other axes may have to be equal, which torch finds out.
    free = iter(
        [{a: torch.export.Dim.DYNAMIC if a else rows for a in each} for each in axes]
    )
    named = inspect.signature(module.forward).bind(*batch).arguments
    return {
        # What goes into *args is one tuple.
        name: tuple(next(free) for _ in value)
        if isinstance(value, tuple)
        else next(free)
        for name, value in named.items()
    }


def _names_read(program: Any) -> set[str]:
    """Return the state-dict names of the tensors that an exported program uses."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {
        names[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names and node.users
    }


def _cause(err: Exception) -> str:
    """Say what torch found, without its advice to the people who write torch."""
    chain = [err, *_causes(err)]
    for text in map(str, chain):
        if found := _FIXED.search(text):
            size = f"{found[1]}{found[2]}.shape[{found[3]}]"
            return (
                f"forward fixes {size}, so it cannot be open: give this size in the "
                "contract. Recurrent layers, and loops over an axis, are unrolled to "
                "the length that is traced"
            )
        if "Constraints violated" in text:
            return (
                "forward fixes the batch size: take it from x.shape[0], not from "
                "len(x) or a number; the batch is axis 0 of recurrent layers too "
                f"(batch_first=True){_place(err)}"
            )
        if "data-dependent" in text:
            return (
                "forward branches on a value that only a run knows, such as an if on a "
                "weight or an input, or .item(): use torch.where, or decide in "
                f"__init__{_place(err)}"
            )
    for text in map(str, reversed(chain)):
        if found := _OPERATOR.search(text):
            return (
                f"torch's exporter has no ONNX form for the operator "
                f"{found[1]!r}: use other operators in forward"
            )
    return _first_line(err) + _place(err)


def _causes(err: BaseException) -> Iterator[BaseException]:
    while (inner := err.__cause__ or err.__context__) is not None:
        yield inner
        err = inner


def _first_line(err: Exception) -> str:
    lines = _COLOURS.sub("", str(err)).strip().splitlines()
    return f"{type(err).__name__}: {lines[0] if lines else 'without a message'}"


def _place(err: BaseException) -> str:
    """Name the innermost line of somebody's own code that an error went through."""
    for frame, line in reversed([*traceback.walk_tb(err.__traceback__)]):
        path = Path(frame.f_code.co_filename)
        libraries = any(path.is_relative_to(home) for home in (_OURS, _STDLIB))
        if path.is_file() and not libraries and _INSTALLED.isdisjoint(path.parts):
            return f" ({path}, line {line})"
    return ""


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def _known_warnings_ignored() -> Iterator[None]:
    """Ignore two warnings of torch's exporter, in all threads of this process."""
    with warnings.catch_warnings():
        # torch 2.13 copies tree specs of its own, of a type that it deprecates.
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        # nn.LSTM and nn.GRU keep a list of their weights, which tracing swaps.
        warnings.filterwarnings("ignore", ".*_flat_weights", UserWarning)
        yield
