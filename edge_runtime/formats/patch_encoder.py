# SPDX-License-Identifier: Apache-2.0
"""Changes become a patch file; :mod:`edge_runtime.formats.patch` reads it."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import astuple, dataclass, replace

from edge_runtime.formats.frames import LEVEL, Parts
from edge_runtime.formats.header import (
    SUBSPACE,
    PatchHeader,
    encode_header,
)
from edge_runtime.formats.layout import Tensor
from edge_runtime.formats.patch import group_of
from edge_runtime.formats.positions import encode_positions
from edge_runtime.formats.sections import (
    COUNTS,
    FORMS,
    OUTPUTS,
    SUBSPACES,
    encode_body,
    encode_varint,
)
from edge_runtime.formats.subspace import Term, encode_terms
from edge_runtime.formats.tensor_index import Found, Positions, in_pieces
from edge_runtime.formats.value_line import Bits
from edge_runtime.formats.values import encode_values
from edge_runtime.formats.weights import Weights


def encode_patch(  # noqa: PLR0913 - what a patch is made of, and how
    header: PatchHeader,
    changes: Sequence[Found | Positions],
    base: Weights,
    target: Weights,
    *,
    level: int = LEVEL,
    outputs: bytes = b"",
    terms: Sequence[Term] = (),
    pool: Executor | None = None,
) -> bytes:
    """Encode a patch, unsigned.

    It takes about as much memory for large weights as for small ones, beside the patch;
    more than that lies in temporary files.

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
        pool: Threads to compress in, where there are several processors.

    Returns:
        The bytes of the patch file.

    Raises:
        PatchFormatError: Two changes are too far apart for the format, or a term is
            not as a reader wants it.
        OSError: There is no room for temporary files.
    """
    tensors = target.layout.tensors
    sections: dict[int, Parts]
    fine, sections = encode_positions(
        [(t.axes, found) for t, found in zip(tensors, changes, strict=True)],
        level,
        pool,
    )
    sections[COUNTS] = [encode_varint(len(found)) for found in changes]
    sections[OUTPUTS] = [outputs]
    sections[SUBSPACES] = [encode_terms(terms, len(tensors))]
    if terms:
        header = replace(header, critical=header.critical | SUBSPACE)
    groups: dict[int, list[_Moved]] = {}
    for tensor, found in zip(tensors, changes, strict=True):
        if len(found):
            group = groups.setdefault(group_of(tensor, len(found)), [])
            group.append(_Moved(tensor, found, base, target))
    forms = [fine] if groups else []
    for kind, moved in sorted(groups.items()):
        form, parts = encode_values(moved)
        forms += astuple(form)
        sections |= {kind + offset: part for offset, part in parts.items()}
    sections[FORMS] = [encode_varint(number) for number in forms]
    body = encode_body(sections, level, pool)
    return encode_header(header, body) + b"\0\0" + body


@dataclass(frozen=True, slots=True, eq=False)
class _Moved:
    """The elements of one tensor that travel, where the weights have them."""

    tensor: Tensor
    found: Found | Positions
    base: Weights
    target: Weights

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def __len__(self) -> int:
        return len(self.found)

    def pieces(self) -> Iterator[tuple[Bits, Bits]]:
        for positions in in_pieces(self.found):
            start, stop = int(positions[0]), int(positions[-1]) + 1
            inside = positions - start
            old, new = (
                weights.bits(self.tensor, start, stop).take(inside)
                for weights in (self.base, self.target)
            )
            yield old, new
