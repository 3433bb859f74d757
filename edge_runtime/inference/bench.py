# SPDX-License-Identifier: Apache-2.0
"""How fast a model answers here, beside ONNX Runtime alone on the same weights."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.contract import Contract
from edge_runtime.inference.inputs import rows_of
from edge_runtime.inference.predictor import Predictor
from edge_runtime.inference.session import Backend, RunOptions

MIN_CALLS = 20


def bench(
    folder: Path,
    contract: Contract,
    inputs: NDArray[Any] | Mapping[str, NDArray[Any]],
    options: RunOptions | None = None,
    *,
    seconds: float = 3.0,
) -> dict[str, Any]:
    """Measure one slot.

    Args:
        folder: The slot.
        contract: What goes in.
        inputs: Raw values of one call, with the batch axis; of several by name.
        options: How to run it.
        seconds: How long to measure.

    Returns:
        Plain data, times in seconds: ``backend``, ``batch``, ``calls``; ``load_s``
        from the files to the first answer; ``latency_s`` of :meth:`Predictor.predict`
        with its raw values; ``samples_per_s``; ``memory_bytes``, the most that the
        process held until then, interpreter and imports included; ``raw``: the same
        latencies of ONNX Runtime's own ``run`` with prepared values, its calls and ours
        made in turn, with what ours take longer (the median difference of neighbours,
        and that beside its median as a ratio), or None where NumPy computes.

    Raises:
        StoreError: The slot cannot be loaded.
        BackendError: The backend is not installed, or cannot run this graph.
        ContractError: The inputs do not fit.
    """
    batch = _samples(contract, inputs)
    start = time.perf_counter()
    predictor = Predictor(folder, contract, options)
    predictor.predict(inputs)
    load_s = time.perf_counter() - start
    calls: list[Callable[[], Any]] = [lambda: predictor.predict(inputs)]
    _in_turn(calls, seconds / 10)
    memory = peak_memory()
    if predictor.backend is Backend.ONNXRUNTIME:
        # The predictor's own: two sessions of one model differ by more than we add.
        session, feed = predictor.session, contract.prepare(inputs)
        calls.append(lambda: session.run(predictor.asked, feed))
    ours, *raw = _in_turn(calls, seconds)
    return {
        "backend": str(predictor.backend),
        "batch": batch,
        "calls": len(ours),
        "load_s": load_s,
        "latency_s": _percentiles(ours),
        "samples_per_s": batch / float(np.mean(ours)),
        "memory_bytes": memory,
        "raw": _beside(ours, raw[0]) if raw else None,
    }


def _samples(
    contract: Contract, inputs: NDArray[Any] | Mapping[str, NDArray[Any]]
) -> int:
    """Return how many samples a call has; what knows no batch is one."""
    rows, given = rows_of(contract), contract.by_name(inputs)
    return max(
        [len(s.batch(given[s.name])) for s in contract.inputs if s.name in rows] or [1]
    )


def _in_turn(calls: list[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """Time functions in turn, so that a busy moment of the machine slows all."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    order = list(range(len(calls)))
    while time.perf_counter() < end or len(times[0]) < MIN_CALLS:
        order.reverse()  # who goes second may find a warmer cache
        for index in order:
            start = time.perf_counter()
            calls[index]()
            times[index].append(time.perf_counter() - start)
    return times


def _percentiles(times: list[float]) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(times, share)) for share in (50, 90, 99)}


def _beside(ours: list[float], raw: list[float]) -> dict[str, Any]:
    latency = _percentiles(raw)
    # Of neighbours, so that what slows the machine down for a while falls out.
    overhead = float(np.median(np.subtract(ours, raw)))
    ratio = 1 + overhead / latency["p50"]
    return {"latency_s": latency, "overhead_s": overhead, "ratio": ratio}


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
