# SPDX-License-Identifier: Apache-2.0
"""Changes become a patch file; :mod:`edge_runtime.formats.patch` reads it."""

from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

from numpy.typing import NDArray

from edge_runtime.formats.frames import LEVEL
from edge_runtime.formats.header import (
    SUBSPACE,
    PatchHeader,
    encode_header,
)
from edge_runtime.formats.patch import group_of
from edge_runtime.formats.positions import (
    Positions,
    encode_positions,
)
from edge_runtime.formats.sections import (
    COUNTS,
    FORMS,
    OUTPUTS,
    SUBSPACES,
    encode_body,
    encode_varint,
)
from edge_runtime.formats.subspace import Term, encode_terms
from edge_runtime.formats.value_line import Bits
from edge_runtime.formats.values import TensorValues, encode_values
from edge_runtime.formats.weights import Weights


def encode_patch(
    header: PatchHeader,
    changes: Sequence[Positions],
    base: Weights,
    target: Weights,
    *,
    level: int = LEVEL,
    outputs: bytes = b"",
    terms: Sequence[Term] = (),
) -> bytes:
    """Encode a patch, unsigned.

    Args:
        header: What the patch is for.
        changes: For each tensor of the layout, in file order, the increasing flat
            positions that travel; empty where nothing changed. If they are all of the
            tensor's elements, no position is sent.
        base: The weights that the patch leads from, moved by ``terms``.
        target: The weights that it leads to, of the same layout.
        level: zstd level, 1 to 22.
        outputs: As :attr:`Patch.outputs`.
        terms: As :attr:`Patch.terms`.

    Returns:
        The bytes of the patch file.

    Raises:
        PatchFormatError: Two changes are too far apart for the format, or a term is
            not as a reader wants it.
    """
    tensors = target.layout.tensors
    fine, sections = encode_positions(
        [(t.axes, found) for t, found in zip(tensors, changes, strict=True)], level
    )
    sections[COUNTS] = [encode_varint(len(found)) for found in changes]
    sections[OUTPUTS] = [outputs]
    sections[SUBSPACES] = [encode_terms(terms, len(tensors))]
    if terms:
        header = replace(header, critical=header.critical | SUBSPACE)
    groups: dict[int, list[TensorValues]] = {}
    for tensor, found in zip(tensors, changes, strict=True):
        if len(found):
            old, new = (_bits(w[tensor.name])[found] for w in (base, target))
            group = groups.setdefault(group_of(tensor, len(found)), [])
            group.append(TensorValues(tensor.dtype, old, new))
    forms = [fine] if groups else []
    for kind, group in sorted(groups.items()):
        form, parts = encode_values(group)
        forms += astuple(form)
        sections |= {kind + offset: part for offset, part in parts.items()}
    sections[FORMS] = [encode_varint(number) for number in forms]
    body = encode_body(sections, level)
    return encode_header(header, body) + b"\0\0" + body


def _bits(array: NDArray[Any]) -> Bits:
    return array.reshape(-1).view(f"<u{array.dtype.itemsize}")
