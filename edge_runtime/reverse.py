"""Reverse patches: how a device keeps the way back to weights that it drops."""

from pathlib import Path

import numpy as np

from edge_runtime.header import PatchHeader
from edge_runtime.patch import encode_patch
from edge_runtime.weights import CHUNK_BYTES, Layout, Weights

MAX_CHANGES = 1 << 18  # elements: encoding them takes about 16 MB of memory
_LEVEL = 3  # of zstd: a small board has better things to do


def encode_reverse(
    layout: Layout, base: Path, target: Path, header: PatchHeader
) -> bytes | None:
    """Encode the patch from one weight file to another, in bounded memory.

    Args:
        layout: Of both files.
        base: The weight file that the patch leads from.
        target: The one that it leads to.
        header: What the patch is for.

    Returns:
        The patch; None if more than ``MAX_CHANGES`` elements differ.

    Raises:
        OSError: A file cannot be read.
        WeightsError: One is not of this layout.
    """
    # Values are read through a mapping: pages that the kernel may take back.
    old, new = (
        Weights(layout, np.memmap(path, np.uint8, "r").data) for path in (base, target)
    )
    changes, total = [], 0
    with open(base, "rb") as before, open(target, "rb") as after:
        before.seek(len(layout.header))
        after.seek(len(layout.header))
        for tensor in layout.tensors:
            found, step = [np.arange(0)], CHUNK_BYTES // tensor.item_size
            for start in range(0, tensor.size, step):
                size = min(step, tensor.size - start) * tensor.item_size
                a, b = (
                    np.frombuffer(file.read(size), f"<u{tensor.item_size}")
                    for file in (before, after)
                )
                found.append(np.flatnonzero(a != b) + start)
                total += len(found[-1])
                if total > MAX_CHANGES:
                    return None
            changes.append(np.concatenate(found))
    return encode_patch(header, changes, old, new, level=_LEVEL)
