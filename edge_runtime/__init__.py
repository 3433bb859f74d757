"""What runs on a device: patches, the store, inference.

It imports the standard library, NumPy, zstandard, click and cryptography; ONNX Runtime
only once a model is loaded; nothing of the trainer or the packager.

    >>> import numpy as np
    >>> from edge_runtime import apply_patch, encode_patch, open_patch, pack_weights
    >>> from edge_runtime import PatchHeader
    >>> base = pack_weights({"w": np.zeros(1000, np.float32)})
    >>> target = pack_weights({"w": np.eye(1, 1000, 7, np.float32)[0]})
    >>> header = PatchHeader(
    ...     model="00" * 32, parent=base.fingerprint, target=target.fingerprint,
    ...     round=1, counter=1, file_size=base.layout.file_size)
    >>> patch = encode_patch(header, [np.array([7])], target)
    >>> apply_patch(base, open_patch(patch)).fingerprint == target.fingerprint
    True

On a device, :class:`Device` does all of it safely::

    device = Device.open("/var/lib/dpu")
    device.update("round_06.dpu")
    scores = device.predictor().predict(image)
"""

from edge_runtime.apply import apply_patch
from edge_runtime.device import Device, UpdateResult
from edge_runtime.errors import DpuError
from edge_runtime.header import PatchHeader
from edge_runtime.infer import Predictor
from edge_runtime.patch import Limits, Patch, encode_patch, open_patch
from edge_runtime.store import Store
from edge_runtime.weights import (
    Weights,
    fingerprint_file,
    pack_weights,
    read_weights,
    write_weights,
)

__all__ = [
    "Device",
    "DpuError",
    "Limits",
    "Patch",
    "PatchHeader",
    "Predictor",
    "Store",
    "UpdateResult",
    "Weights",
    "apply_patch",
    "encode_patch",
    "fingerprint_file",
    "open_patch",
    "pack_weights",
    "read_weights",
    "write_weights",
]
