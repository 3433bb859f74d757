# SPDX-License-Identifier: Apache-2.0
"""What the NumPy backend answers, and what ONNX Runtime does."""

import numpy as np
import onnxruntime

from edge_runtime.inference.numpy_backend import NumpySession


def difference(found, wanted):
    """Largest difference, relative to the largest value: ONNX Runtime's is 1e-6."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    found, wanted = found.astype("f8"), wanted.astype("f8")
    return np.abs(found - wanted).max(initial=0) / (np.abs(wanted).max(initial=0) or 1)


def both(folder, feed):
    path = folder / "graph.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return NumpySession(folder).run(None, feed), session.run(None, feed)
