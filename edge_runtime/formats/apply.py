# SPDX-License-Identifier: Apache-2.0
"""From base weights and a patch to target weights: what the bytes must prove, no I/O.

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
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from errno import EAGAIN
from queue import SimpleQueue
from threading import Thread

import numpy as np

from edge_runtime.errors import (
    PatchFormatError,
    VerificationError,
    WrongParentError,
)
from edge_runtime.formats.identity import wrong_model
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.numbers import PIECE
from edge_runtime.formats.patch import Patch
from edge_runtime.formats.positions import PositionRun
from edge_runtime.formats.subspace_moves import Mover
from edge_runtime.formats.weights import CHUNK_BYTES, Weights


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
    data = b"".join(map(bytes, apply_weights(base, patch, model=model)))
    return Weights(base.layout, data)


def apply_weights(
    base: Weights, patch: Patch, *, model: str | None = None
) -> Iterator[memoryview]:
    """Apply a patch to weights that need not be in memory; as :func:`apply_patch`.

    The base is hashed again while it is read: whoever changes its file meanwhile gets
    an error, not another result.

    Yields:
        The target weight file, as :func:`apply_chunks` does.
    """
    if model is not None and (error := wrong_model(patch.header, model)):
        raise error
    if base.fingerprint != patch.header.parent:
        raise WrongParentError(
            f"the patch leads from weights {patch.header.parent[:12]}, here are "
            f"{base.fingerprint[:12]}; give the weights {patch.header.parent[:12]}, or "
            "apply the rounds between them first if these are older",
            expected=patch.header.parent,
            actual=base.fingerprint,
        )
    patch.check(base.layout)
    digest = hashlib.sha256()
    yield from apply_chunks(_copied(base.chunks(), digest), base.layout, patch)
    if digest.hexdigest() != patch.header.parent:
        raise VerificationError(
            "the base was changed while it was read; try again",
            expected=patch.header.parent,
            actual=digest.hexdigest(),
        )


def _copied(
    chunks: Iterable[memoryview], digest: "hashlib._Hash"
) -> Iterator[memoryview]:
    """Yield chunks as they were when they were hashed, whatever happens to the file."""
    for chunk in chunks:
        copy = bytes(chunk)
        digest.update(copy)
        yield memoryview(copy)


def apply_chunks(
    base: Iterable[bytes | memoryview], layout: Layout, patch: Patch
) -> Iterator[memoryview]:
    """Turn a stream of base bytes into the stream of target bytes.

    The caller has checked model and parent, and has called :meth:`Patch.check`.

    Args:
        base: The base weight file in pieces of any size, header included. The memory
            of writable ones is written to, and neighbours must not share it.
        layout: The layout of both files.
        patch: An open patch.

    Yields:
        The target weight file, in read-only pieces of at most ``CHUNK_BYTES``. A piece
        is to be written, or copied, before the next one is asked for: its memory is
        used again. Another thread hashes it meanwhile.

    Raises:
        PatchFormatError: The base has another size than the layout says, or a weight
            that a subspace moves is no finite number.
        VerificationError: After the last piece, if the result is not the promised
            one. The caller must discard all pieces then.
        OSError: The system cannot start another thread.
    """
    digest = hashlib.sha256()
    yield from _hashed(_patched(base, layout, patch), digest)
    if digest.hexdigest() != patch.header.target:
        raise VerificationError(
            f"the result has fingerprint {digest.hexdigest()[:12]}, the patch promised "
            f"{patch.header.target[:12]}; nothing was installed",
            expected=patch.header.target,
            actual=digest.hexdigest(),
        )


def _hashed(
    windows: Iterable[memoryview], digest: "hashlib._Hash"
) -> Iterator[memoryview]:
    """Yield the windows as they are, while another thread hashes each of them."""
    todo, done = SimpleQueue[memoryview | None](), SimpleQueue[None]()

    def work() -> None:
        for window in iter(todo.get, None):
            digest.update(window)
            done.put(None)

    thread = Thread(target=work, daemon=True)
    try:
        thread.start()
    except RuntimeError as err:
        raise OSError(EAGAIN, "the system has no room for another thread") from err
    done.put(None)
    try:
        for window in windows:
            done.get()  # there are two buffers: the next window takes the other one's
            todo.put(window)
            yield window.toreadonly()  # whoever changed it would change the hash
    finally:
        todo.put(None)
        thread.join()


def _patched(
    base: Iterable[bytes | memoryview], layout: Layout, patch: Patch
) -> Iterator[memoryview]:
    elements, mover = _Lookahead(patch, layout), Mover(patch.terms, layout)
    start = 0
    for window in windows(base, layout.file_size):
        mover.move(window, start)
        elements.write_into(window, start)
        start += len(window)
        yield window
    if start != layout.file_size:
        raise PatchFormatError(
            f"the base has {start} bytes, expected {layout.file_size}"
        )
    elements.finish()


def windows(chunks: Iterable[bytes | memoryview], size: int) -> Iterator[memoryview]:
    """Cut a stream of ``size`` bytes into windows, so that no element lies in two.

    A window's length is a multiple of every item size, and the weight file aligns its
    tensors to their item size. A chunk that is such a window is not copied; all others
    go through the same two buffers, as fresh memory costs as much as reading the file.
    """
    window = other = memoryview(b"")
    filled, seen = 0, 0
    for chunk in chunks:
        rest = memoryview(chunk)
        seen += rest.nbytes
        if not (filled or rest.readonly or (rest.nbytes % 8 and seen < size)):
            yield rest
            continue
        while rest.nbytes:
            window = window or memoryview(bytearray(CHUNK_BYTES))
            part = rest[: CHUNK_BYTES - filled]
            window[filled : filled + len(part)] = part
            filled, rest = filled + len(part), rest[len(part) :]
            if filled == CHUNK_BYTES:
                yield window
                window, other, filled = other, window, 0
    if filled:
        yield window[:filled]


class _Lookahead:
    """Hands out the patch's elements window by window."""

    def __init__(self, patch: Patch, layout: Layout) -> None:
        self._values = patch.values(layout)
        self._runs = patch.runs(layout)
        self._next = next(self._runs, None)

    def write_into(self, window: memoryview, start: int) -> None:
        """Write what lies in the file's bytes from ``start`` on into ``window``."""
        stop = start + len(window)
        # Small tensors are written together: what NumPy costs a call counts there.
        waiting: dict[int, list[PositionRun]] = {}
        held = Counter[int]()
        while run := self._next:
            inside, limit = len(run.positions), stop // run.item_size
            if ends := run.positions[-1] >= limit:
                inside = int(run.positions.searchsorted(limit))
                self._next = run._replace(positions=run.positions[inside:])
                run = run._replace(positions=run.positions[:inside])
            else:
                self._next = next(self._runs, None)
            if inside:
                runs = waiting.setdefault(run.group, [])
                full = held[run.group] + inside > PIECE
                if runs and (full or run.dtype != runs[0].dtype):
                    self._write(window, start, runs)
                    runs.clear()
                    held[run.group] = 0
                runs.append(run)
                held[run.group] += inside
            if ends:
                break
        for runs in waiting.values():
            self._write(window, start, runs)

    def _write(
        self, window: memoryview, start: int, runs: Sequence[PositionRun]
    ) -> None:
        """Write runs of one group and type."""
        group, dtype, size, _ = runs[0]
        view = np.frombuffer(window, f"<u{size}", count=len(window) // size)
        at = np.concatenate([run.positions for run in runs])
        at -= start // size
        view[at] = self._values[group].take(dtype, view.take(at))

    def finish(self) -> None:
        if self._next:
            raise PatchFormatError("the patch changes bytes behind the weight file")
        for values in self._values.values():
            values.finish()
