"""Inference: a graph and a slot become an ONNX Runtime session.

``onnxruntime`` is imported when the first session is made, not before.
"""

import ctypes
import gc
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike, NDArray

from edge_runtime.contract import Contract
from edge_runtime.errors import StoreError


class Predictor:
    """Answers with the weights of one slot, and can move to another between calls.

    Attributes:
        folder: The slot that the current session was made from.
    """

    def __init__(self, folder: Path, contract: Contract, *, threads: int = 1) -> None:
        """Load a slot.

        Args:
            folder: Holds ``graph.onnx`` and ``weights.safetensors``.
            contract: What goes in and comes out.
            threads: CPU threads of one call.

        Raises:
            StoreError: ONNX Runtime cannot load it.
        """
        self._contract, self._threads = contract, threads
        self._lock = threading.Lock()
        self.folder = folder
        self._session = _make_session(folder, threads)

    def predict(self, raw: ArrayLike | Mapping[str, ArrayLike]) -> NDArray[Any]:
        """Return the first output for raw inputs.

        Args:
            raw: A batch, or one sample, as :meth:`Contract.prepare` takes it.

        Returns:
            The outputs, shape ``(batch, ...)``.

        Raises:
            ContractError: The input does not fit.
        """
        feed = self._contract.prepare(raw)
        session = self._session  # one version for the whole call, whatever swaps
        outputs: list[NDArray[Any]] = session.run(None, feed)
        return outputs[0]

    def swap(self, folder: Path) -> None:
        """Move to another slot: calls before see the old weights, calls after the new.

        Raises:
            StoreError: The new slot cannot be loaded; the old one stays in use.
        """
        with self._lock:
            session = _make_session(folder, self._threads)
            self._session, self.folder = session, folder
        release_memory()


def _make_session(folder: Path, threads: int) -> Any:
    # Imported late: looking at patches and stores must not need a runtime.
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # On a shared board idle threads must not burn a core.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only: they come as exceptions too
    path = folder / "graph.onnx"
    try:
        # A real path: ONNX Runtime refuses weights behind a link out of the folder.
        return onnxruntime.InferenceSession(
            str(path.resolve()), options, providers=["CPUExecutionProvider"]
        )
    except Exception as err:
        # ONNX Runtime's own exceptions share no base but this one.
        raise StoreError(f"ONNX Runtime cannot load {path}: {err}") from err


def release_memory() -> None:
    """Give the memory of dropped sessions back to the system.

    glibc keeps freed pages: after ten swaps of ResNet-34 a process would hold 539 MB
    instead of 154.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # musl has none
        trim(0)
