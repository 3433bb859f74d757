# SPDX-License-Identifier: Apache-2.0
"""Sessions: what runs the graph of one slot, by ONNX Runtime or NumPy.

``onnxruntime`` is imported when the first session is made, not before. Where it cannot
be imported, :mod:`edge_runtime.inference.numpy_backend` answers.
"""

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from edge_runtime.errors import (
    BackendError,
    BlockedError,
    DpuError,
    StoreError,
    tells_of_the_system,
)
from edge_runtime.formats.model_folder import GRAPH_NAME
from edge_runtime.streams import utf8_path

# What ONNX Runtime says of graphs that are newer than it, or need an operator that it
# has not: the runtime is at fault then, and no file of the device.
_LACKS = {
    r"Unsupported model IR version: (\d+), max supported IR version: (\d+)": (
        "it has IR version {0}, the runtime reads up to {1}"
    ),
    r"Opset (\d+) is under development[^\0]*domain (\S+) is till opset (\d+)": (
        "it is of opset {0} of {1}, the runtime knows up to {2}"
    ),
    r"No Op registered for (\S+) with domain_version of (\d+)": (
        "it needs the operator {0} of opset {1}, which the runtime lacks"
    ),
    r"(?<!\S)(\S+?)(?:\(-?\d+\))? is not a registered function/op": (
        "it needs the operator {0}, which the runtime lacks"
    ),
    r"Could not find an implementation for (\S+) node": (
        "it needs the operator {0} for types for which the runtime lacks it"
    ),
}
_EXACT = "session.x64quantprecision"  # exact sums of int8 products on every x86
_SEARCHED = 1 << 14  # characters of what it says: a name in it may have megabytes
_SHARED = "Attempt to replace the existing tensor"  # what it says where it cannot


class Backend(StrEnum):
    """The library that runs a model."""

    AUTO = "auto"  # ONNX Runtime where it can be imported
    ONNXRUNTIME = "onnxruntime"
    NUMPY = "numpy"


class SwapPolicy(StrEnum):
    """In which order a swap makes the new session and drops the old one."""

    AVAILABILITY = "availability"  # new first: no call waits, both are in memory
    FRUGAL = "frugal"  # old first: calls wait; the old returns if the new one fails
    AUTO = "auto"  # frugal where the memory for a second session is not free


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a model.

    Attributes:
        threads: CPU threads of one call. ONNX Runtime's alone: NumPy's follow the
            environment variable of its BLAS, OPENBLAS_NUM_THREADS for the usual one.
        spinning: Whether idle threads spin, to be quicker for the next call. On a
            shared board they burn the other processes' time.
        backend: What runs the model.
        policy: How a swap treats the old session.
        prepack: Whether ONNX Runtime copies weights into its kernels' own layout: calls
            are quicker, and the copies are as large as the weights.
    """

    threads: int = 1
    spinning: bool = False
    backend: Backend = Backend.AUTO
    policy: SwapPolicy = SwapPolicy.AUTO
    prepack: bool = True


def choose_backend(wanted: Backend) -> Backend:
    """Settle what runs a model; ``AUTO`` is ONNX Runtime where it can be imported."""
    if wanted != Backend.AUTO:
        return Backend(wanted)
    try:
        _import_onnxruntime()
    except BackendError:
        return Backend.NUMPY
    return Backend.ONNXRUNTIME


def _disable_telemetry() -> None:
    """Keep ONNX Runtime from collecting events, in this process and its children.

    Its wheel else writes an id of the device and a database of events for Microsoft
    into the home folder: nothing that a device should do unasked.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def _import_onnxruntime() -> Any:
    _disable_telemetry()
    try:
        # Imported late: looking at patches and stores must not need a runtime.
        import onnxruntime
    except Exception as err:  # a broken installation raises anything
        raise BackendError(
            f"onnxruntime cannot be imported ({err}): pip install onnxruntime, or "
            "choose the numpy backend"
        ) from err
    return onnxruntime


def open_session(
    folder: Path,
    backend: Backend,
    options: RunOptions,
    use: Callable[[Any], Any] = lambda session: session,
) -> Any:
    """Load a slot as :func:`make_session` does; every failure is one of ours.

    Args:
        folder: Holds ``graph.onnx`` and ``weights.safetensors``.
        backend: NumPy or ONNX Runtime.
        options: How to run it.
        use: What to do with the session before it is returned.

    Raises:
        StoreError: The slot cannot be loaded.
        BackendError: The backend is not installed, or cannot run this graph.
        BlockedError: The system lacks memory or the like, whatever the slot.
    """
    try:
        return use(make_session(folder, backend, options))
    except DpuError:
        raise
    except Exception as err:
        # ONNX Runtime's own exceptions share no base but this one. The frames go: they
        # hold a session whose memory the old one may need to return.
        err.__traceback__ = None
        trim_heap()
        what = f"cannot load {folder / GRAPH_NAME}"
        if reason := _lacks(str(err)):
            version = sys.modules["onnxruntime"].__version__
            raise BackendError(
                f"{what}: {reason}, and this is ONNX Runtime {version}; install a "
                "newer one (pip install --upgrade onnxruntime), or export the model "
                "for an older one"
            ) from err
        raise _failure(StoreError, what, err) from err


@contextmanager
def failures_as(error: type[DpuError], what: str) -> Iterator[None]:
    """Turn what a session raises for a graph that it cannot run into one of ours.

    Raises:
        BlockedError: The system lacks memory or the like.
    """
    try:
        yield
    except DpuError:
        raise
    except Exception as err:
        # ONNX Runtime's own exceptions share no base but this one.
        raise _failure(error, what, err) from err


def _failure(kind: type[DpuError], what: str, error: Exception) -> DpuError:
    """Return an error of a kind, unless the system is at fault."""
    if not (isinstance(error, MemoryError) or tells_of_the_system(str(error))):
        return kind(f"{what}: {error}")
    said = " ".join(str(error).split()) or "not enough memory"  # ended by a new line
    return BlockedError(
        f"{what}: {said}; that is the system's fault, not the model's: end other "
        "programs, or allow this one more"
    )


def _lacks(message: str) -> str:
    """Say what ONNX Runtime itself lacks for a graph; empty for any other failure."""
    for pattern, words in _LACKS.items():
        if found := re.search(pattern, message[:_SEARCHED]):
            return words.format(*found.groups())
    return ""


def make_session(folder: Path, backend: Backend, options: RunOptions) -> Any:
    """Load a slot as it is, with no contract around it.

    Args:
        folder: Holds ``graph.onnx`` and ``weights.safetensors``.
        backend: NumPy or ONNX Runtime.
        options: How to run it.

    Returns:
        An ``onnxruntime.InferenceSession``, or what has its ``run``.

    Raises:
        BackendError: The backend is not installed, or cannot run this graph.
        Exception: Whatever the backend raises for a graph that it cannot load.
    """
    if backend is Backend.NUMPY:
        from edge_runtime.inference.numpy_backend import NumpySession

        return NumpySession(folder)
    onnxruntime = _import_onnxruntime()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    spinning = str(int(options.spinning))
    settings.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    unpacked = str(int(not options.prepack))
    settings.add_session_config_entry("session.disable_prepacking", unpacked)
    settings.log_severity_level = 4  # nothing that does not come as an exception too
    # A real path: ONNX Runtime refuses weights behind a link out of the folder.
    path = (folder / GRAPH_NAME).resolve()
    try:
        name = utf8_path(path)
    except UnicodeDecodeError as err:
        raise BackendError(
            f"ONNX Runtime takes no path that is not UTF-8: {path}; move the store, or "
            "choose the numpy backend"
        ) from err
    return exact_session(onnxruntime, name, settings)


def exact_session(onnxruntime: Any, path: str, settings: Any) -> Any:
    """Load a graph so that int8 products are summed exactly on every CPU.

    x86 without VNNI adds pairs of products in 16 bits, which are too few for signed
    weights: answers are off by a tenth. As unsigned weights they are added in 32 bits.

    Args:
        onnxruntime: The module.
        path: Of the graph.
        settings: ``SessionOptions`` as wanted else.

    Raises:
        Exception: Whatever ONNX Runtime raises for a graph that it cannot load.
    """
    providers = ["CPUExecutionProvider"]
    settings.add_session_config_entry(_EXACT, "1")
    try:
        return onnxruntime.InferenceSession(path, settings, providers=providers)
    except Exception as err:
        # ONNX Runtime's exceptions have no common base of their own.
        if _SHARED not in str(err):
            raise
    # It cannot do that to weights that share one zero point. They stay as they are, and
    # a trial says whether the answers are good enough.
    settings.add_session_config_entry(_EXACT, "0")
    return onnxruntime.InferenceSession(path, settings, providers=providers)


def trim_heap() -> None:
    """Give freed memory of the whole process back to the system.

    glibc keeps it: after ten swaps of ResNet-34 a process would hold 539 MB, not 154.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # musl has none
        trim(0)
