# SPDX-License-Identifier: Apache-2.0
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
from typing import TYPE_CHECKING, Any

# For type checkers alone; the same names as below.
if TYPE_CHECKING:
    from edge_runtime.errors import DpuError as DpuError
    from edge_runtime.formats.apply import apply_patch as apply_patch
    from edge_runtime.formats.header import PatchHeader as PatchHeader
    from edge_runtime.formats.patch import Patch as Patch
    from edge_runtime.formats.patch import open_patch as open_patch
    from edge_runtime.formats.patch_encoder import encode_patch as encode_patch
    from edge_runtime.formats.signing import Trust as Trust
    from edge_runtime.formats.signing import trust_keys as trust_keys
    from edge_runtime.formats.weights import Weights as Weights
    from edge_runtime.formats.weights import fingerprint_file as fingerprint_file
    from edge_runtime.formats.weights import pack_weights as pack_weights
    from edge_runtime.formats.weights import read_weights as read_weights
    from edge_runtime.formats.weights import write_weights as write_weights
    from edge_runtime.inference.predictor import Predictor as Predictor
    from edge_runtime.inference.session import RunOptions as RunOptions
    from edge_runtime.limits import Limits as Limits
    from edge_runtime.live.proof import make_proof as make_proof
    from edge_runtime.live.store_predictor import StorePredictor as StorePredictor
    from edge_runtime.store.store import Store as Store
    from edge_runtime.update.device import Device as Device
    from edge_runtime.update.device import UpdateResult as UpdateResult

    __version__: str

# Imported when first used: ``dpu-edge --help`` answers at once on a small board.
_HOMES = {
    "Device": "update.device",
    "DpuError": "errors",
    "Limits": "limits",
    "Patch": "formats.patch",
    "PatchHeader": "formats.header",
    "Predictor": "inference.predictor",
    "RunOptions": "inference.session",
    "Store": "store.store",
    "StorePredictor": "live.store_predictor",
    "Trust": "formats.signing",
    "UpdateResult": "update.device",
    "Weights": "formats.weights",
    "apply_patch": "formats.apply",
    "encode_patch": "formats.patch_encoder",
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
    if name == "__version__":  # pyproject.toml says which
        return importlib.import_module("importlib.metadata").version("dpu-edge")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"edge_runtime.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
