# SPDX-License-Identifier: Apache-2.0
"""Subspaces: every weight moves by a few coefficients under seeded random signs.

A *term* moves weight ``i`` of all weights that it covers by ``m * s``: ``s`` is its
tensor's scale, and ``m`` the sum of one coefficient a *tap*, each with a sign drawn
from a seed. So a patch carries some thousand coefficients, and every weight may change.
Here is what a term is, and its bytes; :mod:`edge_runtime.formats.subspace_moves` moves
weights. FORMAT.md is the normative description.

Training in such a subspace is the intrinsic dimension of Li et al. (2018); weights that
share values under a hash are HashedNets (Chen et al., 2015); a network as a seed and
coefficients is PRANC (Nooralinejad et al., 2023).
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import PatchFormatError
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.sections import (
    MAX_COUNTED_BYTES,
    decode_varint,
    encode_varint,
)

MAX_TERMS, MAX_BITS, MAX_TAPS = 64, 8, 4
MAX_COEFFICIENTS = 1 << 22  # of all terms together
WORD = 64  # signs of a random word; the weights of a tensor begin with a new one
# With such a scale no sum is so small that a CPU which flushes those to zero gives
# another one, and no product is infinite.
LEAST_SCALE, MOST_SCALE = 2.0**-100, 2.0**100
TYPES = ("F32", "BF16", "F16", "I8")


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One movement of all weights of some tensors.

    Attributes:
        seed: Of the signs, below 2**63.
        bits: Of a coefficient, 1 to 8.
        taps: How many coefficients move a weight, 1 to 4.
        scales: By number of the tensor in file order; other tensors stay. Each is a
            float32 whose lower 16 bits are zero (:func:`round_scale`).
        coefficients: Odd integers from ``-(2**bits - 1)`` to ``2**bits - 1``, int16;
            there are a multiple of 64.
    """

    seed: int
    bits: int
    taps: int
    scales: Mapping[int, float]
    coefficients: NDArray[np.int16]


def round_scale(scale: float) -> float:
    """Return the scale that a term may have and that is nearest to another one."""
    bits = int(np.float32(min(max(scale, LEAST_SCALE), MOST_SCALE)).view("<u4"))
    return float(np.uint32((bits + 0x8000) >> 16 << 16).view("<f4"))


def term_size(tensors: int, moved: int, coefficients: int, bits: int) -> int:
    """Return the most bytes that a term takes.

    Args:
        tensors: Number of tensors of the weight file.
        moved: How many of them move.
        coefficients: How many there are.
        bits: Of a coefficient.
    """
    sizes = len(encode_varint((1 << 63) - 1)) + len(encode_varint(coefficients // WORD))
    return sizes + 2 + -(-tensors // 8) + 2 * moved + coefficients * bits // 8


def encode_terms(terms: Sequence[Term], tensors: int) -> bytes:
    """Encode terms in the order in which they move the weights; none are no bytes.

    Args:
        terms: What moves.
        tensors: Number of tensors of the weight file.

    Raises:
        PatchFormatError: A reader would not take them.
    """
    parts = [encode_varint(len(terms))] if terms else []
    for term in terms:
        moved = np.zeros(tensors, bool)
        moved[list(term.scales)] = True
        scales = np.array([term.scales[n] for n in sorted(term.scales)], "<f4")
        codes = (term.coefficients + ((1 << term.bits) - 1)) >> 1
        each = codes[:, None] >> np.arange(term.bits) & 1
        parts += [
            encode_varint(term.seed),
            encode_varint(len(term.coefficients) // WORD),
            bytes([term.bits, term.taps]),
            _pack(moved),
            (scales.view("<u4") >> 16).astype("<u2").tobytes(),
            _pack(each.astype(bool)),
        ]
    data = b"".join(parts)
    decode_terms(data, tensors)
    return data


def decode_terms(data: bytes, tensors: int) -> tuple[Term, ...]:
    """Decode what :func:`encode_terms` returned.

    Raises:
        PatchFormatError: It is malformed, too long or too short.
    """
    file, terms = io.BytesIO(data), list[Term]()
    left = MAX_COEFFICIENTS
    count = _varint(file) if data else 0
    if data and not 1 <= count <= MAX_TERMS:
        raise PatchFormatError(
            f"the patch has {count} subspaces, expected 1 to {MAX_TERMS}"
        )
    for _ in range(count):
        terms.append(_read_term(file, tensors, left))
        left -= len(terms[-1].coefficients)
    if rest := file.read():
        raise PatchFormatError(
            f"the subspaces of the patch have {len(rest)} bytes too many"
        )
    return tuple(terms)


def together(terms: Iterable[Sequence[Term]], tensors: int) -> tuple[Term, ...]:
    """Concatenate the terms of several patches; empty if one patch cannot hold them.

    Args:
        terms: Of each patch.
        tensors: Number of tensors of the weight file.

    Returns:
        All of them; none where they are more than one patch may have.
    """
    every = tuple(chain.from_iterable(terms))
    total = sum(len(term.coefficients) for term in every)
    size = 1 + sum(
        term_size(tensors, len(term.scales), len(term.coefficients), term.bits)
        for term in every
    )
    fits = len(every) <= MAX_TERMS and total <= MAX_COEFFICIENTS
    return every if fits and size <= MAX_COUNTED_BYTES else ()


def check_terms(terms: Sequence[Term], layout: Layout) -> None:
    """Insist that the tensors that move are of a type that may.

    Raises:
        PatchFormatError: One is not.
    """
    for number in sorted({number for term in terms for number in term.scales}):
        tensor = layout.tensors[number]
        if tensor.dtype not in TYPES:
            raise PatchFormatError(
                f"a subspace of the patch moves tensor {tensor.name!r} of type "
                f"{tensor.dtype}; possible are {', '.join(TYPES)}"
            )


def _read_term(file: io.BytesIO, tensors: int, most: int) -> Term:
    seed, count = _varint(file), WORD * _varint(file)
    bits, taps = _take(file, 2)
    if not (1 <= bits <= MAX_BITS and 1 <= taps <= MAX_TAPS and 0 < count <= most):
        raise PatchFormatError(
            f"a subspace of the patch has {count} coefficients of {bits} bits, {taps} "
            f"for each weight; at most {most} more, {MAX_BITS} and {MAX_TAPS} are "
            "possible"
        )
    moved = _unpack(_take(file, -(-tensors // 8)))
    numbers = np.flatnonzero(moved)
    upper = np.frombuffer(_take(file, 2 * len(numbers)), "<u2").astype("<u4")
    scales = (upper << np.uint32(16)).view("<f4")
    good = (scales >= LEAST_SCALE) & (scales <= MOST_SCALE)
    if not len(numbers) or numbers[-1] >= tensors or not good.all():
        raise PatchFormatError(
            "a subspace of the patch moves no tensor, one that is not there, or one by "
            "a scale that is out of range"
        )
    each = _unpack(_take(file, count * bits // 8)).reshape(count, bits)
    codes = each @ (2 << np.arange(bits, dtype=np.int16))
    scale_of = _Scales(numbers, scales)
    coefficients = (codes - ((1 << bits) - 1)).astype(np.int16)
    return Term(seed, bits, taps, scale_of, coefficients)


class _Scales(Mapping[int, float]):
    """Scales of a term that was read: a dict would take 20 times the memory."""

    def __init__(self, numbers: NDArray[np.intp], scales: NDArray[Any]) -> None:
        self._numbers, self._scales = numbers, scales

    def __getitem__(self, number: int) -> float:
        at = int(self._numbers.searchsorted(number))
        if at == len(self._numbers) or self._numbers[at] != number:
            raise KeyError(number)
        return float(self._scales[at])

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers.tolist())

    def __len__(self) -> int:
        return len(self._numbers)


def _take(file: io.BytesIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise PatchFormatError("the subspaces of the patch end early; pack it again")
    return data


def _varint(file: io.BytesIO) -> int:
    return decode_varint(chain.from_iterable(iter(partial(file.read, 1), b"")))


def _pack(bits: NDArray[Any]) -> bytes:
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack(data: bytes) -> NDArray[np.uint8]:
    return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
