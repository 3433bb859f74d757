# SPDX-License-Identifier: Apache-2.0
"""Trace a module without its values, and say why where that fails."""

import inspect
import re
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_runtime.errors import ExportError

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
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


def insist_on_answers(model: nn.Module, batches: Sequence[Sequence[Tensor]]) -> None:
    """Insist that ``forward`` takes each of these batches, which differ in their rows.

    Raises:
        ExportError: It does not; the message gives what it raised, and where.
    """
    for number, batch in enumerate(batches):
        try:
            with torch.no_grad():
                model(*batch)
        except Exception as err:
            # A forward of somebody's: it may raise anything.
            found = ", ".join(f"{_type(x)} {list(x.shape)}" for x in batch)
            why = _first_line(err)
            if number:
                why += (
                    f"; with {len(batches[0][0])} rows it works: forward must take "
                    "any batch size, so take it from x.shape[0]"
                )
            else:
                why += (
                    "; what goes in (the contract's inputs, or the recipe's data) must "
                    "be what forward takes: this many inputs, of these types and shapes"
                )
            raise ExportError(
                f"forward fails with an input of {found}: {why}{_place(err)}"
            ) from err


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
        if "Constraints violated" in text:
            return (
                "forward fixes the batch size: take it from x.shape[0], not from "
                f"len(x) or a number{_place(err)}"
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
