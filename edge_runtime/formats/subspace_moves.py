# SPDX-License-Identifier: Apache-2.0
"""Subspaces move weights: a stream of windows, exact on every CPU.

All that is computed: integers, their product with a scale, which is exact in float32,
and one addition a weight, which IEEE 754 rounds in one way. Of int8 weights the sum is
then rounded to a whole number, and ends at -127 and 127.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats.init_weights import philox
from edge_runtime.formats.int8_grid import MOST
from edge_runtime.formats.layout import Layout, Tensor
from edge_runtime.formats.subspace import WORD, Term, check_terms
from edge_runtime.formats.weights import Weights

_PIECE = 1 << 16  # weights: what is computed on the way stays in the cache
_SMALL = 6  # bits of coefficients whose sums fit into a byte

Floats = NDArray[np.float32]


class Mover:
    """Moves the weights of a file, window by window, by one term after the other."""

    def __init__(self, terms: Sequence[Term], layout: Layout) -> None:
        """Start at the first byte of the file.

        Raises:
            PatchFormatError: A tensor that would move is of a type that cannot.
        """
        check_terms(terms, layout)
        self._layout = layout
        self._moves = [_Move(term) for term in terms]
        self._moved = sorted({number for term in terms for number in term.scales})

    def move(self, window: memoryview, start: int) -> None:
        """Move the weights in the file's bytes from ``start`` on, in place.

        Args:
            window: The bytes; no element lies half in it.
            start: Where they begin. Windows are given in order and without holes.

        Raises:
            PatchFormatError: A weight is no finite number, or would be none.
        """
        stop = start + len(window)
        while self._moved:
            number = self._moved[0]
            tensor = self._layout.tensors[number]
            first, last = max(tensor.start, start), min(tensor.stop, stop)
            for at in range(first, last, _PIECE * tensor.item_size):
                end = min(at + _PIECE * tensor.item_size, last)
                piece = window[at - start : end - start]
                for move in self._moves:
                    if number in move.term.scales:
                        move.move(piece, number, tensor)
            if tensor.stop > stop:
                return
            for move in self._moves:
                move.end_tensor()
            del self._moved[0]


def move_weights(base: Weights, terms: Sequence[Term]) -> Weights:
    """Return weights in memory, moved by terms; the same ones if there are none.

    Raises:
        PatchFormatError: As :class:`Mover`.
    """
    if not terms:
        return base
    data = bytearray()
    for chunk in base.chunks():
        data += chunk
    Mover(terms, base.layout).move(memoryview(data), 0)
    return Weights(base.layout, data)


class _Move:
    """One term at work: where it is, and the signs that come next."""

    def __init__(self, term: Term) -> None:
        self.term = term
        kind = np.int8 if term.bits <= _SMALL - (term.taps - 1) // 2 else np.int16
        # Negative, and so is the scale: where taps cancel, 0 * -s is -0.0, and adding
        # that changes nothing, not even -0.0.
        negative = (-term.coefficients).astype(kind)
        self._twice = np.concatenate([negative, negative])
        self._signs = [_Signs(term.seed, tap) for tap in range(term.taps)]
        self._at = 0  # weights before this one, of all that move

    def move(self, piece: memoryview, number: int, tensor: Tensor) -> None:
        count = len(piece) // tensor.item_size
        total = self._signs[0].take(count) * self._of_tap(0, count)
        for tap in range(1, self.term.taps):
            total += self._signs[tap].take(count) * self._of_tap(tap, count)
        self._at += count
        steps = total.astype(np.float32)
        steps *= np.float32(-self.term.scales[number])
        with np.errstate(over="ignore", invalid="ignore"):
            good = _ADD[tensor.dtype](piece, steps)
        if not good:
            raise PatchFormatError(
                f"a weight of tensor {tensor.name!r} is no finite number, or would be "
                "none, and a subspace moves finite numbers only"
            )

    def _of_tap(self, tap: int, count: int) -> NDArray[np.signedinteger]:
        """Return what comes next: of weight i, coefficient i + tap * (i // d + 1)."""
        size, start, stop = len(self._twice) // 2, self._at, self._at + count
        parts = []
        while start < stop:
            block, column = divmod(start, size)
            length = min(size - column, stop - start)
            first = (column + tap * (block + 1)) % size
            parts.append(self._twice[first : first + length])
            start += length
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def end_tensor(self) -> None:
        self._at += -self._at % WORD
        for signs in self._signs:
            signs.end_word()


class _Signs:
    """The random signs of one tap."""

    def __init__(self, seed: int, tap: int) -> None:
        self._words = philox(seed, f"subspace {tap}")
        self._left = np.zeros(0, np.int8)

    def take(self, count: int) -> NDArray[np.int8]:
        """Return the next signs, each 1 or -1."""
        words = -(-(count - len(self._left)) // WORD)
        if words > 0:
            raw = self._words.random_raw(words).astype("<u8").view(np.uint8)
            bits = np.unpackbits(raw, bitorder="little").view(np.int8)
            bits += bits
            signs = np.subtract(1, bits, out=bits)
            left = self._left
            self._left = np.concatenate([left, signs]) if len(left) else signs
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def end_word(self) -> None:
        self._left = self._left[:0]


# One addition a weight, by type; whether all of them are finite ----------------------


def _add(weights: Floats, steps: Floats) -> Floats:
    if np.add(_TINY, _NOTHING).view("<u4")[0]:
        return np.add(weights, steps, out=weights)
    # Something in this process had denormal floats taken as zero.
    return np.where(steps == 0, weights, weights + steps)


_TINY, _NOTHING = np.array([1e-40], np.float32), np.array([-0.0], np.float32)


def _add_f32(piece: memoryview, steps: Floats) -> bool:
    weights = np.frombuffer(piece, "<f4")
    if (moved := _add(weights, steps)) is not weights:
        weights[...] = moved
    return bool(np.isfinite(weights).all())


def _add_f16(piece: memoryview, steps: Floats) -> bool:
    weights = np.frombuffer(piece, "<f2")
    weights[...] = _add(weights.astype(np.float32), steps)
    return bool(np.isfinite(weights).all())


def _add_bf16(piece: memoryview, steps: Floats) -> bool:
    weights = np.frombuffer(piece, "<u2")
    wide = (weights.astype("<u4") << np.uint32(16)).view("<f4")
    bits = _add(wide, steps).view("<u4")
    finite = (bits & np.uint32(0x7F800000)) != 0x7F800000
    # No step is large enough to make the largest of them infinite.
    bits = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    weights[...] = bits >> np.uint32(16)
    return bool(finite.all())


def _add_i8(piece: memoryview, steps: Floats) -> bool:
    weights = np.frombuffer(piece, np.int8)
    moved = np.clip(np.rint(weights.astype(np.float32) + steps), -MOST, MOST)
    weights[...] = np.where(steps, moved.astype(np.int8), weights)
    return True


_ADD = {"F32": _add_f32, "BF16": _add_bf16, "F16": _add_f16, "I8": _add_i8}
