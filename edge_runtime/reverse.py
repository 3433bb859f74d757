"""Reverse patches: how a device keeps the way back to weights that it drops."""

from pathlib import Path

import numpy as np

from edge_runtime.header import PatchHeader
from edge_runtime.patch import PIECE, encode_patch
from edge_runtime.weights import Layout, Weights

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
    weights = [
        Weights(layout, np.memmap(path, np.uint8, "r").data) for path in (target, base)
    ]
    changes, total = [], 0
    with open(base, "rb") as old, open(target, "rb") as new:
        old.seek(len(layout.header))
        new.seek(len(layout.header))
        for tensor in layout.tensors:
            found, size = [np.arange(0)], tensor.item_size
            for start in range(0, tensor.size, PIECE):
                count = min(PIECE, tensor.size - start)
                # Read, not mapped: the pages of a mapping would count as ours.
                a, b = (
                    np.frombuffer(file.read(count * size), f"<u{size}")
                    for file in (old, new)
                )
                found.append(np.flatnonzero(a != b) + start)
                total += len(found[-1])
                if total > MAX_CHANGES:
                    return None
            changes.append(np.concatenate(found))
    return encode_patch(header, changes, weights[0], level=_LEVEL)
