# SPDX-License-Identifier: Apache-2.0
"""What goes into a model and what comes out. No I/O.

The file of it is of :mod:`edge_runtime.formats.contract_file`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_runtime.errors import ContractError
from edge_runtime.formats.layout import DTYPES, Layout

# What NumPy calls the types that a graph may take.
NUMBER_TYPES = (
    *("float16", "float32", "float64", "bool"),
    *(f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u")),
)

# What a model is for, and how its answers are compared with golden labels by default.
TASKS = {
    "classification": "top1",
    "multilabel": "element_accuracy",
    "regression": "mae",
    "segmentation": "iou",
    "free": "",  # no labels: outputs alone are compared
}
# By name, whether more is better.
METRICS = {
    "top1": True,
    "element_accuracy": True,
    "iou": True,
    "cosine": True,
    "mae": False,
}
# Their least and largest values, where those are not 0 and 1.
RANGES = {"cosine": (-1.0, 1.0), "mae": (0.0, math.inf)}

ZERO = 2.0**-150  # and less is 0 as float32, in which devices compute
EXACT_TOLERANCE, COARSE_TOLERANCE = 1e-4, 2e-2
COARSE_TYPES = {"F16", "BF16", "I8", "U8"} | {
    code for code in DTYPES if code.startswith(("F4", "F6_", "F8_"))
}

# Axis of the channels: the second, or the last.
LAYOUTS = {"NCHW": 1, "NHWC": -1}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of the graph.

    Attributes:
        name: The graph's name for it.
        dtype: NumPy name of the type that the graph takes.
        shape: Its shape; None where any size goes: of the first axis, the batch.
        scale: Factor on the raw values, for example 1/255 for 8-bit images.
        mean: Per channel, or one value, subtracted after scaling; empty for none.
        std: Likewise, divided by; empty for none.
        layout: Where the channels are, one of :data:`LAYOUTS`.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: str = "NCHW"

    def __post_init__(self) -> None:
        """Insist on values for each channel, where their number is known.

        Raises:
            ContractError: There are more or fewer, or a std is 0.
        """
        if any(abs(value) <= ZERO for value in self.std):
            raise ContractError(
                f"input {self.name!r} has a std of 0, by which nothing can be divided; "
                "give 1 for a channel that is to stay as it is"
            )
        axis = self.channel_axis
        self._check_channels(self.shape[axis] if len(self.shape) > 1 else 1)

    @property
    def channel_axis(self) -> int:
        """The axis of the channels."""
        return LAYOUTS[self.layout]

    def _check_channels(self, channels: int | None) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if channels is not None and len(values) not in {0, 1, channels}:
                other = next(name for name in LAYOUTS if name != self.layout)
                raise ContractError(
                    f"input {self.name!r} has {len(values)} values of {name}, expected "
                    f"1, or one for each of the {channels} channels that the layout "
                    f"{self.layout} finds in the shape {_show(self.shape)}; give as "
                    f"many, or the layout {other}"
                )

    @property
    def has_batch(self) -> bool:
        """Whether its first axis takes any number of samples."""
        return bool(self.shape) and self.shape[0] is None

    def batch(self, raw: ArrayLike) -> NDArray[Any]:
        """Return raw values with their batch axis, as they are.

        Args:
            raw: Values as the device gets them, any numeric type, shape as
                :attr:`shape`; a single sample without the batch axis is welcome.

        Raises:
            ContractError: The shape or type does not fit.
        """
        try:
            values = np.asarray(raw)
        except ValueError as err:  # rows of different lengths
            raise ContractError(f"input {self.name!r} is no array: {err}") from err
        if values.ndim == len(self.shape) - 1:
            values = values[np.newaxis]
        # A plain loop: after a large network's run all of this is cold in the caches.
        fits = values.ndim == len(self.shape)
        for want, found in zip(self.shape, values.shape, strict=False):
            if want is not None and want != found:
                fits = False
        if not fits or values.dtype.kind not in "biuf":
            raise ContractError(
                f"input {self.name!r} takes numbers of shape {_show(self.shape)}, "
                f"got {values.dtype} of shape {list(np.shape(raw))}"
            )
        return values

    def prepare(self, raw: ArrayLike) -> NDArray[Any]:
        """Turn raw values, as :meth:`batch` takes them, into what the graph takes.

        Scaled in float32; in float64 where that does not hold the raw type exactly, as
        of times and positions (int32, int64, float64), or the graph takes more.

        Raises:
            ContractError: The shape or type does not fit, or a scaled value lies
                outside of the graph's whole numbers, to which it is rounded.
        """
        values = self.batch(raw)
        if self.scale == 1.0 and not self.mean and not self.std:
            return self._cast(values)
        is_coarse = self.dtype in ("float16", "float32")
        is_coarse &= np.can_cast(values.dtype, np.float32)
        number = np.float32 if is_coarse else np.float64
        out: NDArray[Any] = values.astype(number)  # one copy, then in place
        out *= number(self.scale)
        channels: tuple[int, ...] = (-1,) if out.ndim else ()
        if out.ndim > 1:
            self._check_channels(out.shape[self.channel_axis])
            if self.channel_axis == 1:
                channels = (-1, *[1] * (out.ndim - 2))
        if self.mean:
            out -= np.asarray(self.mean, number).reshape(channels)
        if self.std:
            out /= np.asarray(self.std, number).reshape(channels)
        if not self.dtype.startswith("float"):
            np.rint(out, out=out)
        return self._cast(out)

    def _cast(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return values in the graph's type; whole numbers stay what they are."""
        if values.dtype == self.dtype or self.dtype.startswith("float"):
            return values.astype(self.dtype, copy=False)
        with np.errstate(invalid="ignore"):  # NaN, which is caught below
            out = values.astype(self.dtype)
        if not np.array_equal(out, values):
            odd = values[out != values].ravel()[0]
            raise ContractError(
                f"input {self.name!r} takes {self.dtype}, which cannot hold {odd}: "
                "give whole numbers in its range, of bool 0 and 1"
            )
        return out


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """One output of the graph.

    Attributes:
        name: The graph's name for it.
        dtype: NumPy name of its type.
        shape: Its shape; None where any size comes (the batch), or for all of it where
            the graph does not say.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None


RawInputs = ArrayLike | Mapping[str, ArrayLike] | tuple[ArrayLike, ...]


@dataclass(frozen=True, slots=True)
class Contract:
    """What a model takes, what it gives, and how good it must be.

    Attributes:
        inputs: In the graph's order.
        classes: Names of the classes; empty if the model is no classifier.
        accuracy_floor: Share of golden labels that must be right in a trial.
        output_tolerance: Allowed difference to expected outputs, relative to the
            largest absolute output: CPUs differ by up to 1e-6 of it.
        outputs: In the graph's order; empty where the contract does not say.
        task: What the model is for, one of :data:`TASKS`.
        metric: How golden labels are compared, one of :data:`METRICS`; empty for the
            task's own way (:attr:`label_metric`).
        bound: What a trial asks of the metric: at least, or at most for errors; None
            for nothing, or for ``accuracy_floor`` (:attr:`label_bound`).
        threshold: Above it, an output that is yes or no means yes: 0 for logits, 0.5
            for probabilities.
        random_outputs: Names of outputs that are random by design: nobody compares
            them, they must only be finite.
        probabilities: Whether a classifier's outputs are probabilities already, and no
            logits. Runtimes that do not know the field take them for logits.
    """

    inputs: tuple[InputSpec, ...]
    classes: tuple[str, ...] = ()
    accuracy_floor: float = 0.0
    output_tolerance: float = EXACT_TOLERANCE
    outputs: tuple[OutputSpec, ...] = ()
    task: str = "classification"
    metric: str = ""
    bound: float | None = None
    threshold: float = 0.0
    random_outputs: tuple[str, ...] = ()
    probabilities: bool = False

    def __post_init__(self) -> None:
        if self.bound is not None:
            check_bound(self.label_metric, self.bound)

    @property
    def label_metric(self) -> str:
        """How golden labels are compared; empty where they are not."""
        return self.metric or TASKS[self.task]

    @property
    def label_bound(self) -> float | None:
        """What a trial asks of :attr:`label_metric`; None for nothing."""
        if self.bound is None and self.label_metric == "top1":
            return self.accuracy_floor
        return self.bound

    @property
    def asks_for_labels(self) -> bool:
        """Whether golden labels decide; any answer has a top1 of 0."""
        bound = self.label_bound
        return bound is not None and (self.label_metric != "top1" or bound > 0)

    @property
    def by_rows(self) -> bool:
        """Whether the outputs have a row for each sample; else a call is one whole."""
        return self.task != "free"

    def class_count(self, shape: tuple[int, ...]) -> int:
        """Return how many classes a first output of a shape tells apart."""
        axis = 1 if self.task == "segmentation" else -1
        return shape[axis] if len(shape) > 1 else 1

    def is_random(self, number: int) -> bool:
        """Return whether an output, counted from 0, is random by design."""
        known = self.outputs[number : number + 1]
        return any(spec.name in self.random_outputs for spec in known)

    def output_title(self, number: int) -> str:
        """Return what an output, counted from 0, is called in a message."""
        known = self.outputs[number : number + 1]
        return " ".join([f"output {number + 1}", *(repr(spec.name) for spec in known)])

    def by_name(self, raw: RawInputs) -> dict[str, ArrayLike]:
        """Return raw values by the names of the inputs, in the contract's order.

        Args:
            raw: An array for the only input; arrays by input name; or a tuple of
                several arrays, in the contract's order.

        Raises:
            ContractError: An input is missing or unknown.
        """
        names = [spec.name for spec in self.inputs]
        given: Mapping[str, Any]
        if isinstance(raw, Mapping):
            given = raw
        elif isinstance(raw, tuple) and len(raw) == len(names) > 1:
            given = dict(zip(names, raw, strict=True))
        else:
            given = {names[0] if len(names) == 1 else "one array": raw}
        if set(given) != set(names):
            raise ContractError(
                f"the model takes its inputs by name, {', '.join(names)}; got "
                f"{', '.join(map(str, given)) or 'nothing'}"
            )
        return {name: given[name] for name in names}

    def prepare(self, raw: RawInputs) -> dict[str, Any]:
        """Turn raw values, as :meth:`by_name` takes them, into the feed of a session.

        Raises:
            ContractError: An input is missing, unknown, or does not fit.
        """
        if isinstance(raw, np.ndarray) and len(self.inputs) == 1:
            (spec,) = self.inputs  # the usual case, without a detour
            return {spec.name: spec.prepare(raw)}
        given = self.by_name(raw)
        return {spec.name: spec.prepare(given[spec.name]) for spec in self.inputs}


def tolerance_between_cpus(layout: Layout) -> float:
    """Return by how much outputs may differ between CPUs, relative to the largest.

    Kernels for half precision round in other places from CPU to CPU; of 8-bit values
    one in thousands lies on the edge between two steps, and falls to either side.

    Args:
        layout: Of the weight file.
    """
    coarse = any(tensor.dtype in COARSE_TYPES for tensor in layout.tensors)
    return COARSE_TOLERANCE if coarse else EXACT_TOLERANCE


def check_bound(metric: str, bound: float) -> None:
    """Insist on a bound that a metric can have.

    Raises:
        ContractError: It is outside of the metric's range, or there is no metric.
    """
    if not metric:
        raise ContractError(
            f"the contract has a bound, {bound:g}, and no metric for it; give one of "
            f"{', '.join(METRICS)}"
        )
    low, high = RANGES.get(metric, (0.0, 1.0))
    if not (math.isfinite(bound) and low <= bound <= high):
        span = f"from {low:g}" + (f" to {high:g}" if math.isfinite(high) else " on")
        raise ContractError(f"{metric} has values {span}; the bound is {bound:g}")


def _show(shape: tuple[int | None, ...]) -> str:
    free = ["batch", *["any"] * len(shape)]
    sizes = [free[axis] if n is None else str(n) for axis, n in enumerate(shape)]
    return f"[{', '.join(sizes)}]"
