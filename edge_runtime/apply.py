"""From base weights and a patch to target weights: every rule of acceptance, no I/O.

The rules, in order:

1. The patch is for this network (:class:`WrongModelError`).
2. The base is the patch's parent (:class:`WrongParentError`).
3. Every position lies inside its tensor and every size adds up
   (:class:`PatchFormatError`), before the first byte of the result exists.
4. The result has the promised fingerprint (:class:`VerificationError`).

:func:`apply_chunks` works on a stream of bytes and needs about as much memory for a
gigabyte as for a kilobyte; :func:`apply_patch` is the same for weights in memory.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle

import numpy as np

from edge_runtime.errors import (
    PatchFormatError,
    VerificationError,
    WrongModelError,
    WrongParentError,
)
from edge_runtime.patch import Patch
from edge_runtime.weights import CHUNK_BYTES, Layout, Weights


def check_model(patch: Patch, model: str) -> None:
    """Insist that a patch is for the network ``model``.

    Raises:
        WrongModelError: It is for another one.
    """
    if patch.header.model != model:
        raise WrongModelError(
            f"the patch is for another network: it names model "
            f"{patch.header.model[:12]}, here is {model[:12]}; fetch the patch of this "
            "device's run, or install that run's bundle",
            expected=patch.header.model,
            actual=model,
        )


def apply_patch(base: Weights, patch: Patch, *, model: str | None = None) -> Weights:
    """Apply a patch to weights in memory.

    Args:
        base: The weights that the patch leads from.
        patch: An open patch.
        model: The network's identity; checked where given.

    Raises:
        WrongModelError: The patch is for another network.
        WrongParentError: The patch leads from other weights.
        PatchFormatError: The patch contradicts itself or the layout.
        VerificationError: The result is not the promised one.
    """
    if model is not None:
        check_model(patch, model)
    if base.fingerprint != patch.header.parent:
        raise WrongParentError(
            f"the patch leads from weights {patch.header.parent[:12]}, here are "
            f"{base.fingerprint[:12]}; apply the rounds between them first",
            expected=patch.header.parent,
            actual=base.fingerprint,
        )
    patch.check(base.layout)
    data = b"".join(map(bytes, apply_chunks([base.data], base.layout, patch)))
    return Weights(base.layout, data)


def apply_chunks(
    base: Iterable[bytes | memoryview], layout: Layout, patch: Patch
) -> Iterator[memoryview]:
    """Turn a stream of base bytes into the stream of target bytes.

    The caller has checked model and parent, and has called :meth:`Patch.check`.

    Args:
        base: The base weight file in pieces of any size, header included.
        layout: The layout of both files.
        patch: An open patch.

    Yields:
        The target weight file, in pieces of at most ``CHUNK_BYTES``. A piece is to be
        written, or copied, before the next one is asked for: its memory is used again.

    Raises:
        PatchFormatError: The base has another size than the layout says.
        VerificationError: After the last piece, if the result is not the promised
            one. The caller must discard all pieces then.
    """
    digest = hashlib.sha256()
    elements = _Lookahead(patch, layout)
    start = 0
    # Hashing takes about as long as all the rest, and OpenSSL needs no Python for it.
    with ThreadPoolExecutor(1) as hasher:
        hashed: Future[None] = hasher.submit(lambda: None)
        for window in _windows(base):
            elements.write_into(window, start)
            start += len(window)
            hashed.result()
            hashed = hasher.submit(digest.update, window)
            yield window
        hashed.result()
    if start != layout.file_size:
        raise PatchFormatError(
            f"the base has {start} bytes, expected {layout.file_size}"
        )
    elements.finish()
    if digest.hexdigest() != patch.header.target:
        raise VerificationError(
            f"the result has fingerprint {digest.hexdigest()[:12]}, the patch promised "
            f"{patch.header.target[:12]}; nothing was installed",
            expected=patch.header.target,
            actual=digest.hexdigest(),
        )


def _windows(chunks: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """Cut a stream into windows, so that no element lies in two of them.

    A window's length is a multiple of every item size, and the weight file aligns its
    tensors to their item size. Every second window is the same memory: fresh memory
    for each would cost as much as reading the file.
    """
    windows = cycle([memoryview(bytearray(CHUNK_BYTES)) for _ in range(2)])
    window, filled = next(windows), 0
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest.nbytes:
            part = rest[: CHUNK_BYTES - filled]
            window[filled : filled + len(part)] = part
            filled, rest = filled + len(part), rest[len(part) :]
            if filled == CHUNK_BYTES:
                yield window
                window, filled = next(windows), 0
    if filled:
        yield window[:filled]


class _Lookahead:
    """Hands out the patch's elements window by window."""

    def __init__(self, patch: Patch, layout: Layout) -> None:
        self._elements = patch.elements(layout)
        self._next = next(self._elements, None)

    def write_into(self, window: memoryview, start: int) -> None:
        """Write what lies in the file's bytes from ``start`` on into ``window``."""
        stop = start + len(window)
        while self._next is not None:
            tensor, positions, values = self._next
            size = tensor.item_size
            inside = int(np.searchsorted(positions, (stop - tensor.start) // size))
            if inside:
                view = np.frombuffer(window, f"<u{size}", count=len(window) // size)
                at = positions[:inside] + (tensor.start - start) // size
                view[at] = values.take(tensor.dtype, view[at])
            if inside < len(positions):
                self._next = tensor, positions[inside:], values
                return
            self._next = next(self._elements, None)

    def finish(self) -> None:
        if self._next is not None:
            raise PatchFormatError("the patch changes bytes behind the weight file")
