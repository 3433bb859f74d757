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
    >>> patch = encode_patch(header, [np.array([7])], base, target)
    >>> apply_patch(base, open_patch(patch)).fingerprint == target.fingerprint
    True

On a device, :class:`Device` does all of it safely::

    device = Device.open("/var/lib/dpu")
    device.update("round_06.dpu")
    scores = device.predictor().predict(image)
"""

import importlib
from typing import Any

# Imported when first used: ``dpu-edge --help`` answers at once on a small board.
_HOMES = {
    "Device": "update.device",
    "DpuError": "errors",
    "Limits": "limits",
    "Patch": "formats.patch",
    "PatchHeader": "formats.header",
    "Predictor": "inference.predictor",
    "RunOptions": "inference.predictor",
    "Store": "store.store",
    "StorePredictor": "live.store_predictor",
    "Trust": "formats.signing",
    "UpdateResult": "update.device",
    "Weights": "formats.weights",
    "apply_patch": "formats.apply",
    "encode_patch": "formats.patch",
    "fingerprint_file": "formats.weights",
    "make_proof": "live.proof",
    "open_patch": "formats.patch",
    "pack_weights": "formats.weights",
    "read_weights": "formats.weights",
    "trust_keys": "formats.signing",
    "write_weights": "formats.weights",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"edge_runtime.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
