# SPDX-License-Identifier: Apache-2.0
"""Inference with the weights of a slot; sessions change between two calls."""

import gc
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_runtime.errors import ContractError, DpuError, StoreError
from edge_runtime.formats.contract import Contract
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.inference.session import (
    RunOptions,
    SwapPolicy,
    choose_backend,
    failures_as,
    open_session,
    trim_heap,
)

# Creating a session takes up to 2.9 times the weight file (ResNet-34: 257 MB for 87):
# the mapped file, a copy with BatchNorm folded in, and one in the kernels' own layout.
LOAD_FACTOR = 3
DRAIN_S = 10.0  # how long a swap waits for calls that still use the old session
# What ONNX Runtime calls the tensors that NumPy has types for.
_FLOATS = ("float16", "float", "double")
_INTEGERS = (f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u"))
_TENSORS = {f"tensor({name})" for name in (*_FLOATS, *_INTEGERS, "bool")}
# Types for which ONNX Runtime's Python has no array, or only their bits.
_NO_ARRAY = ("bfloat16", "float8", "float4", "int4", "int2", "complex")


class Predictor:
    """Answers with the weights of one slot, and can move to another between calls.

    Any number of threads may call it. An answer comes from exactly one version: a call
    that has begun ends with the session that it began with.

    Attributes:
        outputs: Of every output its name, and what ONNX Runtime calls its type.
        tensors: The names of those that NumPy has a type for.
        asked: The names of those that a session is asked for; None for all.
        folder: The slot that the current session was made from.
        options: How it runs.
        backend: What runs the model: chosen once, a swap does not change it.
    """

    def __init__(
        self, folder: Path, contract: Contract, options: RunOptions | None = None
    ) -> None:
        """Load a slot.

        Args:
            folder: Holds ``graph.onnx`` and ``weights.safetensors``.
            contract: What goes in and comes out.
            options: How to run it.

        Raises:
            StoreError: The slot cannot be loaded.
            BackendError: The backend is not installed, or cannot run this graph.
            BlockedError: The system lacks memory or the like for it.
        """
        self.options = options or RunOptions()
        self.backend = choose_backend(self.options.backend)
        self._contract = contract
        self._lock = threading.Lock()  # held while sessions change
        self._session: Any = self._load(folder)
        # Every slot of a model has the same graph, so this holds after a swap too.
        self.outputs = {out.name: out.type for out in self._session.get_outputs()}
        names = list(self.outputs)
        self.tensors = [n for n in names if self.outputs[n] in _TENSORS]
        self._first = names.index(self.tensors[0]) if self.tensors else 0
        self.asked = _asked_for(self.outputs)
        self.folder = folder
        # Every slot of a model is of one size.
        self._needed = LOAD_FACTOR * (folder / WEIGHTS_NAME).stat().st_size

    @property
    def session(self) -> Any:
        """The session that answers now; None while there is none."""
        return self._session

    def predict(self, raw: ArrayLike | Mapping[str, ArrayLike]) -> NDArray[Any]:
        """Return the first output for raw inputs: the first that is a tensor.

        Args:
            raw: A batch, or one sample, as :meth:`Contract.by_name` takes it.

        Returns:
            The outputs, shape ``(batch, ...)`` where the model gives a row for each.

        Raises:
            ContractError: The input does not fit, or the model cannot be run on it.
            BlockedError: The system lacks memory or the like for it.
            StoreError: A frugal swap failed and left no session behind.
        """
        outputs: NDArray[Any] = self.predict_all(raw)[self._first]
        return outputs

    def predict_named(
        self, raw: ArrayLike | Mapping[str, ArrayLike]
    ) -> dict[str, NDArray[Any]]:
        """Return every tensor that the model gives, by name; the rest as above."""
        found = dict(zip(self.outputs, self.predict_all(raw), strict=True))
        return {name: found[name] for name in self.tensors}

    def predict_all(self, raw: ArrayLike | Mapping[str, ArrayLike]) -> list[Any]:
        """Return every output for raw inputs, in the graph's order.

        Most are arrays; a graph may also give lists and maps, and tensors of types that
        NumPy lacks: None stands for these. The rest as :meth:`predict`.
        """
        return self.run(self._contract.prepare(raw))

    def run(self, feed: Mapping[str, NDArray[Any]]) -> list[Any]:
        """Return every output for what the graph takes: nothing is prepared.

        Raises:
            ContractError: The graph cannot be run on it.
            BlockedError: The system lacks memory or the like for it.
            StoreError: A frugal swap failed and left no session behind.
        """
        # The one read that decides which version answers.
        session = self._session or self._wait()
        with failures_as(ContractError, "the model cannot be run on it"):
            outputs: list[Any] = session.run(self.asked, feed)
        if self.asked is None:
            return outputs
        found = dict(zip(self.asked, outputs, strict=True))
        return [found.get(name) for name in self.outputs]

    def swap(self, folder: Path) -> None:
        """Move to another slot: calls before see the old weights, calls after the new.

        Returns when no call uses the old session any more and its memory is back with
        the system. The new one has answered once before it replaces anything.

        Raises:
            StoreError: The new slot cannot be loaded; the old one stays in use.
            BlockedError: The system lacks memory or the like for it; likewise.
        """
        with self._lock:
            old = self._session and weakref.ref(self._session)
            if frugal := old and self._frugal():
                self._session = None  # calls wait from here until the lock is free
                _drain(old)
            try:
                self._session = self._load(folder)
            except DpuError:
                if frugal:
                    # If this fails too, calls raise until a swap succeeds.
                    self._session = self._load(self.folder)
                raise
            self.folder = folder
        _drain(old)

    def _load(self, folder: Path) -> Any:
        return open_session(folder, self.backend, self.options, self._warmed_up)

    def _warmed_up(self, session: Any) -> Any:
        # What a call needs beside the weights is taken before anybody relies on it.
        inputs = self._contract.inputs
        if any(None in spec.shape[1:] for spec in inputs):
            return session
        shapes = {spec: [n or 1 for n in spec.shape] for spec in inputs}
        feed = {s.name: np.zeros(shape, s.dtype) for s, shape in shapes.items()}
        try:
            session.run(
                _asked_for({o.name: o.type for o in session.get_outputs()}), feed
            )
        except Exception:
            # ONNX Runtime's own share no base but this one. One array of zeros is a
            # dark image; lengths and indices of zero, say, need not be valid.
            if len(inputs) == 1 and inputs[0].dtype.startswith("float"):
                raise
        return session

    def _frugal(self) -> bool:
        if self.options.policy != SwapPolicy.AUTO:
            return self.options.policy == SwapPolicy.FRUGAL
        # A store that moved on twice has removed the old slot: it could not return.
        return self.folder.exists() and available_memory() < self._needed

    def _wait(self) -> Any:
        with self._lock:
            if self._session is None:
                raise StoreError(
                    "no weights are loaded: the new slot could not be loaded, nor the "
                    "old one again; swap to a slot that can"
                )
            return self._session


def _asked_for(outputs: Mapping[str, str]) -> list[str] | None:
    """Return the outputs that a session can give, by their types; None for all."""
    given = [n for n, kind in outputs.items() if not any(t in kind for t in _NO_ARRAY)]
    return None if len(given) == len(outputs) else given


def available_memory() -> int:
    """Return how many bytes the system can still give; 0 where it does not say.

    A limit on the process's own control group is not in it: set the policy there.
    """
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, LookupError, ValueError):
        return 0  # hidden by a service's hardening, say: then be frugal


def _drain(session: "weakref.ref[Any] | None") -> None:
    """Wait until no call holds a session and give its memory back to the system."""
    deadline = time.monotonic() + DRAIN_S
    while session is not None and session() is not None:
        if time.monotonic() > deadline:
            gc.collect()  # held by a cycle then, such as an exception's traceback
            break
        time.sleep(0.001)
    trim_heap()
