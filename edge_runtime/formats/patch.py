# SPDX-License-Identifier: Apache-2.0
"""The patch file: header, signature block, and a body of sections.

Reading is in steps, cheapest refusal first, and needs no more memory for a large patch
than for a small one: :func:`open_patch` proves size, magic, version, checksum and the
SHA-256 of everything behind the header before a single byte is decompressed.
:meth:`Patch.runs` and :meth:`Patch.values` then decode against a weight file's layout.
FORMAT.md is the normative description; :mod:`edge_runtime.formats.apply` turns
a patch into weights.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, starmap
from typing import Any, BinaryIO, Self, cast

from edge_runtime.errors import PatchFormatError, PatchIntegrityError
from edge_runtime.formats import signing
from edge_runtime.formats.checked_file import CheckedFile
from edge_runtime.formats.header import DATED, SUBSPACE, PatchHeader
from edge_runtime.formats.layout import DTYPES, Layout, Tensor
from edge_runtime.formats.positions import (
    Change,
    PositionReader,
    PositionRun,
    pack_run,
    unpack_run,
)
from edge_runtime.formats.sections import (
    COUNTS,
    FORMS,
    SUBSPACES,
    Body,
    group_kind,
)
from edge_runtime.formats.signed_header import read_signed_header
from edge_runtime.formats.subspace import check_terms, decode_terms
from edge_runtime.formats.value_line import MANTISSA_BITS, Form
from edge_runtime.formats.values import ValueReader
from edge_runtime.limits import MIB, Limits
from edge_runtime.limits import limits as current_limits
from edge_runtime.reading import Source, open_source

KEPT_BYTES = 16 << 20  # of positions that are decoded once only


@dataclass(slots=True)
class _Plan:
    """What a patch says of one layout.

    Attributes:
        layout: The layout.
        changed: Every tensor of which something travels: its group, and how much.
        totals: How much travels of each group and type.
        fine: How the gaps are written.
        forms: Of each group.
        kept: The positions, where they have been decoded and take little memory.
    """

    layout: Layout
    changed: list[Change]
    totals: Mapping[tuple[int, str], int]
    fine: int
    forms: dict[int, Form]
    kept: list[tuple[PositionRun, Any]] | None = None


class Patch:
    """An open patch whose integrity is proved; made by :func:`open_patch`.

    Attributes:
        header: What the patch is for.
        signatures: Whose signatures the patch carries; they are proved only if it was
            opened with trusted keys.
        sections: The section table.
        counts: For each tensor of the weight file, in file order, how many of its
            elements travel; the element count of the tensor means all of them.
        terms: The subspaces that move whole tensors, before any of their elements are
            changed one by one; empty where there are none.
        outputs: What the network gives with the target's weights for the first golden
            inputs, as little-endian float32; empty where the patch does not say.
        size: Bytes of the whole file.
    """

    def __init__(
        self,
        file: BinaryIO,
        header: PatchHeader,
        signatures: Sequence[signing.Signature],
        body: Body,
        limits: Limits,
    ) -> None:
        self._file, self._body = file, body
        self.header = replace(header, signed_at=body.signed_at())
        if (self.header.signed_at is None) == bool(header.critical & DATED):
            raise PatchFormatError(
                "header and body of the patch disagree on whether it says when it was "
                "signed; sign the undated patch again"
            )
        self.signatures = tuple(signatures)
        self.sections = body.sections
        self.size = body.size
        self.counts = body.numbers(COUNTS)
        if problem := limits.problem("tensors", len(self.counts), "the patch"):
            raise PatchFormatError(problem)
        self.terms = decode_terms(body.whole(SUBSPACES), len(self.counts))
        if bool(self.terms) != bool(header.critical & SUBSPACE):
            raise PatchFormatError(
                "header and body of the patch disagree on whether it has subspaces; "
                "pack it again"
            )
        self.outputs = body.outputs()
        self._plan: _Plan | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def values(self, layout: Layout) -> dict[int, ValueReader]:
        """Return what reads the values of each group, in the order of :meth:`runs`.

        Args:
            layout: Of the weight file that the patch is for.

        Raises:
            PatchFormatError: The patch contradicts the layout or itself.
        """
        plan = self._plan_for(layout)
        return {
            group: ValueReader(
                DTYPES[dtype].itemsize,
                plan.forms[group],
                partial(self._body.reader, group),
            )
            for group, dtype in plan.totals  # types of one group are of one size
        }

    def runs(self, layout: Layout) -> Iterator[PositionRun]:
        """Yield what travels, in the order of the weight file and in small pieces.

        Raises:
            PatchFormatError: The patch contradicts the layout or itself.
        """
        plan = self._plan_for(layout)
        return (
            self._decode(plan) if plan.kept is None else starmap(unpack_run, plan.kept)
        )

    def check(self, layout: Layout) -> None:
        """Decode every position and look at every size, without any weight.

        Raises:
            PatchFormatError: The patch contradicts the layout or itself.
        """
        plan = self._plan_for(layout)
        kept, room = list[tuple[PositionRun, Any]](), KEPT_BYTES
        for run in self._decode(plan):
            first, steps = pack_run(run)
            room -= first.positions.nbytes + steps.nbytes
            if room >= 0:
                kept.append((first, steps))
        plan.kept = kept if room >= 0 else None
        expected = Counter[int]()
        for (group, dtype), count in plan.totals.items():
            for kind in plan.forms[group].kinds(DTYPES[dtype].itemsize):
                expected[group + kind] += count
        self._body.check_values(expected)

    def _decode(self, plan: "_Plan") -> Iterator[PositionRun]:
        index = PositionReader(self._body.reader, plan.fine)
        yield from index.runs(plan.changed)
        index.finish()

    def _plan_for(self, layout: Layout) -> "_Plan":
        """Check counts and forms against a layout, once for each layout."""
        if self._plan is None or self._plan.layout is not layout:
            changed, totals = self._changed(layout), Counter[tuple[int, str]]()
            check_terms(self.terms, layout)
            for group, tensor, count in changed:
                totals[group, tensor.dtype] += count
            self._plan = _Plan(layout, changed, totals, *self._forms(totals))
        return self._plan

    def _changed(self, layout: Layout) -> list[Change]:
        """Return every tensor of which something travels: its group, and how much."""
        if self.header.file_size != layout.file_size or len(self.counts) != len(
            layout.tensors
        ):
            raise PatchFormatError(
                f"the patch describes {len(self.counts)} tensors in a file of "
                f"{self.header.file_size} bytes; this weight file has "
                f"{len(layout.tensors)} in {layout.file_size}"
            )
        changed: list[Change] = []
        whole = None  # the tensor before, if all of it travels
        for tensor, count in zip(layout.tensors, self.counts, strict=True):
            if count > tensor.size:
                raise PatchFormatError(
                    f"the patch changes {count} elements of tensor {tensor.name!r}, "
                    f"which has {tensor.size}"
                )
            if whole and count == tensor.size and whole.dtype == tensor.dtype:
                # Neighbours that travel whole are as good as one tensor.
                count += whole.size
                tensor = Tensor(*whole[:4], tensor.stop, count, tensor.item_size)
                del changed[-1]
            whole = tensor if 0 < count == tensor.size else None
            if count:
                changed.append((group_of(tensor, count), tensor, count))
        return changed

    def _forms(self, types: Collection[tuple[int, str]]) -> tuple[int, dict[int, Form]]:
        """Read how gaps are written, and the form of every group of these types."""
        kinds = sorted({group for group, _ in types})
        numbers = self._body.numbers(FORMS)
        if len(numbers) != (4 * len(kinds) + 1 if kinds else 0):
            raise PatchFormatError(
                f"the patch has {len(numbers)} numbers for the forms of {len(kinds)} "
                "groups of values"
            )
        fields = iter(numbers[1:])
        forms = {group: Form(*islice(fields, 4)) for group in kinds}
        for group, dtype in types:
            forms[group].check(dtype, DTYPES[dtype].itemsize)
        floats = {group for group, dtype in types if dtype in MANTISSA_BITS}
        if any(form.unit != 1 for group, form in forms.items() if group not in floats):
            raise PatchFormatError("the patch has a unit for a group without floats")
        return numbers[0] if numbers else 0, forms


def group_of(tensor: Tensor, count: int) -> int:
    """Return the group of values (its first kind) that a tensor belongs to.

    Args:
        tensor: The tensor.
        count: How many of its elements travel.
    """
    return group_kind(tensor.item_size, 2 * count > tensor.size)


def open_patch(
    source: Source,
    limits: Limits | None = None,
    trust: signing.Trust | None = None,
) -> Patch:
    """Open a patch and prove everything that needs no weights.

    Args:
        source: A path, the bytes of the file, or the open file, which the patch
            closes in the end.
        limits: What to accept; by default what :func:`edge_runtime.limits.limits` says.
        trust: Whose signatures it needs; by default nobody's.

    Returns:
        The open patch; close it, or use it in a ``with`` statement.

    Raises:
        OSError: The file cannot be read.
        PatchFormatError: Not a patch, truncated, malformed or over a limit.
        PatchVersionError: Made for a newer runtime.
        PatchIntegrityError: A checksum does not match.
        TrustError: The trusted keys did not sign it.
    """
    file = open_source(source)
    with ExitStack() as opened:
        opened.enter_context(file)
        patch = _open(file, limits or current_limits(), trust or signing.Trust())
        opened.pop_all()  # open from here on: the patch reads from it
    return patch


def _open(file: BinaryIO, limits: Limits, trust: signing.Trust) -> Patch:
    found = read_signed_header(file, limits, trust)
    size = found.start + found.body_size
    _check_size(size, found.header, limits)
    digest = hashlib.sha256()
    checked = CheckedFile(file, found.start, found.body_size, digest.update)
    body = cast(BinaryIO, checked)
    if digest.digest() != found.body_digest:
        raise PatchIntegrityError(
            "the patch is damaged: its content does not match its checksum; fetch it "
            "again",
            expected=found.body_digest.hex(),
            actual=digest.hexdigest(),
        )
    return Patch(body, found.header, found.signatures, Body(body, size), limits)


def _check_size(size: int, header: PatchHeader, limits: Limits) -> None:
    """Insist on a size that a patch for such a weight file may have."""
    if problem := limits.problem("patch_bytes", size, "the patch"):
        raise PatchFormatError(problem)
    # Values, where they belong, which is never as much again, and counted sections.
    if size > (most := 2 * header.file_size + 4 * MIB):
        raise PatchFormatError(
            f"the patch states {size} bytes for a weight file of {header.file_size}, "
            f"at most {most} are possible; pack it again"
        )
