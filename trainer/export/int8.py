# SPDX-License-Identifier: Apache-2.0
"""Networks whose weights are int8 on the device, and float32 where they train.

The scales are settled once in a run, from a network that was trained; what they leave
free is for the rounds to come. A scale has 8 significant bits, so that a weight on the
grid is an exact product, and int8 to float32 and back is the same int8.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_runtime.formats.init_weights import InitSpec, TensorInit
from edge_runtime.formats.int8_grid import (
    MOST,
    SMALLEST,
    by_slice,
    check_scales,
    to_float32,
    to_int8,
)
from edge_runtime.formats.weights import Weights, pack_weights
from trainer.export.graph_check import GraphSession
from trainer.export.int8_graph import (
    activation_ranges,
    quantised_graph,
    range_names,
)

HEADROOM = 2.0  # times how far weights moved in the training that said the scales
SCALE_BITS = 8  # significant ones; the product with 7 bits of int8 is exact

Scales = Mapping[str, NDArray[np.float32]]  # by tensor: one for each slice of axis 0
_Arrays = tuple[dict[str, NDArray[Any]], Mapping[str, str]]  # and their types
_NONE: Scales = MappingProxyType({})
_REMEMBERED = 8  # weight files


class DeviceForm:
    """Converts weights between their form in training (float32) and on the device.

    There they are int8, or as they train.

    In int8 the file holds steps in place of weights, and the ranges of activations,
    measured with these weights on samples that stay the same: what the network computes
    may outgrow any range that was settled once.

    Attributes:
        scales: Of the tensors that are int8 there; all others are as they train.
    """

    def __init__(
        self, scales: Scales = _NONE, plain: bytes = b"", inputs: Tensor | None = None
    ) -> None:
        """Take what decides the form.

        Args:
            scales: Of the tensors that are int8 on the device.
            plain: The network's graph in float32, of one input; without it there are
                no ranges.
            inputs: Prepared samples to measure activations on.
        """
        self.scales = scales
        self._plain, self._inputs = plain, inputs
        # What came from a device goes back as it was; by fingerprint of the floats.
        self._known: dict[str, Weights] = {}

    @property
    def is_int8(self) -> bool:
        """Whether a device computes in int8."""
        return bool(self.scales)

    def on_grid(self, weights: Weights) -> Weights:
        """Return the nearest weights that a device can have, in float32."""
        return self._steps_as_weights(self._as_steps(weights))

    def encode(self, weights: Weights) -> Weights:
        """Return the weight file of a device, of weights on the grid.

        Raises:
            ExportError: Activations are not finite.
        """
        if not self.scales:
            return weights
        found = self._known.get(weights.fingerprint)
        if found is None:
            arrays, types = self._as_steps(weights)
            found = pack_weights(arrays | self._ranges(weights), types)
        self._remember(weights, found)
        return found

    def decode(self, device: Weights) -> Weights:
        """Return the float32 weights that a device's weight file stands for."""
        if not self.scales:
            return device
        weights = self._steps_as_weights((dict(device), device.layout.types))
        self._remember(weights, device)
        return weights

    def graph(self, weights: Weights) -> bytes:
        """Return the graph of the device, with canonical bytes.

        Args:
            weights: On the grid; the ranges of inputs are measured with them.

        Raises:
            ExportError: The network cannot be quantised.
        """
        graph = self._network()
        found = quantised_graph(
            graph, weights, self.scales, self._feed(graph), deploy_ranges=True
        )
        return bytes(found.SerializeToString(deterministic=True))

    def _as_steps(self, weights: Weights) -> _Arrays:
        arrays = dict(weights)
        for name, scales in self.scales.items():
            array = arrays[name]
            arrays[name] = to_int8(array, by_slice(scales, array.ndim))
        return arrays, {**weights.layout.types, **dict.fromkeys(self.scales, "I8")}

    def _steps_as_weights(self, device: _Arrays) -> Weights:
        arrays, types = device
        for name in range_names(self._network(), self.scales) if self._plain else ():
            arrays.pop(name, None)
        for name, scales in self.scales.items():
            array = arrays[name]
            arrays[name] = to_float32(array, by_slice(scales, array.ndim))
        return pack_weights(arrays, {**types, **dict.fromkeys(self.scales, "F32")})

    def _network(self) -> Any:
        import onnx

        return onnx.load_model_from_string(self._plain)

    def _feed(self, graph: Any) -> dict[str, NDArray[Any]]:
        name = graph.graph.input[0].name
        return {} if self._inputs is None else {name: self._inputs.numpy()}

    def _ranges(self, weights: Weights) -> dict[str, NDArray[Any]]:
        if not self._plain:
            return {}
        graph = self._network()
        return activation_ranges(graph, weights, self.scales, self._feed(graph))

    def _remember(self, weights: Weights, device: Weights) -> None:
        self._known.pop(weights.fingerprint, None)
        while len(self._known) >= _REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[weights.fingerprint] = device


def weight_scales(names: Iterable[str], start: Weights, trained: Weights) -> Scales:
    """Return the scales of tensors, with room for the rounds to come.

    127 steps are as far as a channel's start weights go, and twice as far again as
    training moved any weight of the tensor: where few weights train, the next round
    may choose any channel.

    Args:
        names: Of the tensors, in the order that counts.
        start: The weights that training began with.
        trained: What it came to.
    """
    scales = {}
    for name in names:
        farthest = _largest(trained[name] - start[name]).max(initial=0.0)
        reach = _largest(start[name]) + np.float32(HEADROOM * farthest)
        reach[reach < SMALLEST * MOST] = 1.0  # zeros that did not move say nothing
        scales[name] = _short(reach / MOST)
        check_scales(name, scales[name])
    return scales


def _largest(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the largest magnitude in each slice of the first axis."""
    found: NDArray[np.float32] = np.abs(values).reshape(len(values), -1).max(axis=1)
    return found


def _short(values: NDArray[np.float64 | np.float32]) -> NDArray[np.float32]:
    """Round positive values up to few significant bits."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    rounded = np.ldexp(np.ceil(np.ldexp(mantissa, SCALE_BITS)), exponent - SCALE_BITS)
    found: NDArray[np.float32] = rounded.astype(np.float32)
    return found


def quantised_init(recipe: InitSpec, form: DeviceForm) -> InitSpec:
    """Return the recipe of the same init weights, as a device has them.

    What is drawn is still drawn there: its scales travel, four bytes a channel.
    """
    encoded = form.encode(form.on_grid(recipe.generate()))
    tensors, stored = dict(recipe.tensors), dict(recipe.stored)
    for place in encoded.layout.tensors:
        name, init = place.name, recipe.tensors.get(place.name)
        if init is not None and name not in form.scales:
            continue
        if init is not None and init.kind == "uniform":
            tensors[name] = replace(init, dtype="I8", kind="quantised")
            stored[name] = form.scales[name]
            continue
        values = encoded[name]
        stored.pop(name, None)
        if (values == values.flat[0]).all():
            kind, value = "constant", float(values.flat[0])
        else:
            kind, value, stored[name] = "file", 0.0, values
        tensors[name] = TensorInit(place.dtype, place.shape, kind, value)
    return InitSpec(recipe.seed, tensors, stored)


class DeviceNetwork(nn.Module):
    """A network that answers as a device does: its graph, in ONNX Runtime."""

    def __init__(self, graph: bytes, weights: Weights) -> None:
        """Load the graph.

        Args:
            graph: The bytes of ``graph.onnx``.
            weights: As a device holds them.

        Raises:
            ExportError: ONNX Runtime refuses it.
        """
        super().__init__()
        self._session = GraphSession(graph, weights)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what the graph answers, on the CPU."""
        found = self._session.run([x.cpu() for x in inputs])
        answers = tuple(torch.from_numpy(np.asarray(array)) for array in found)
        return answers[0] if len(answers) == 1 else answers
