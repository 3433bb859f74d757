# SPDX-License-Identifier: Apache-2.0
"""Changes -> a finished, proven patch.

No patch leaves this module unproven: its bytes are opened, applied to the base and
compared with the target before anybody sees them, and a file gets its name only when
it is complete and on the disk.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import ENOTDIR
from os import PathLike
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.errors import (
    BudgetError,
    RoundError,
    VerificationError,
    WrongModelError,
)
from edge_runtime.files import Files, mode_for
from edge_runtime.formats.apply import apply_weights
from edge_runtime.formats.frames import LEVEL
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.identity import same_network
from edge_runtime.formats.model_folder import Outcome
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.patch_encoder import encode_patch
from edge_runtime.formats.subspace import Term
from edge_runtime.formats.weights import Weights, fingerprint_file
from packager.diff import TensorChange, diff
from packager.moved import moved_weights
from packager.release_counter import check_counter
from packager.rounds.folder import Parent, RoundFolder, find_parent, terms_since

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class PackedPatch:
    """A patch that was applied to its base and gave its target.

    Attributes:
        data: The bytes of the patch file.
        header: What the patch is for.
        parent_name: The parent in words, for example ``round_04``.
        counts: For each tensor in file order, how many of its elements travel.
        terms: The subspaces that move whole tensors before.
    """

    data: bytes
    header: PatchHeader
    parent_name: str
    counts: dict[str, int]
    terms: Sequence[Term] = ()


def pack_round(
    round_: RoundFolder,
    parent: Parent | None = None,
    *,
    level: int = LEVEL,
    max_size: int | None = None,
    counter: int | None = None,
    signers: Sequence["Ed25519PrivateKey"] = (),
    expect_outputs: int = 0,
) -> PackedPatch | None:
    """Pack the update of one round.

    Args:
        round_: The round, as :func:`packager.rounds.folder.read_round` returns it.
        parent: What the update leads from; by default the round's recorded parent.
        level: zstd level, 1 to 22.
        max_size: Largest patch in bytes, with its signatures.
        counter: Release counter; by default the one that the round states. A reverse
            patch, to an older round, needs a higher one than its parent has.
        signers: Whose keys sign it (:mod:`packager.signing`).
        expect_outputs: For how many golden inputs the patch carries the outputs that
            a device's trial must give; needs ONNX Runtime and the run's model folder.

    Returns:
        The proven patch; None where there is nothing to send, because the round kept
        its base or because the parent already is the target.

    Raises:
        RoundError: The parent is not to be found; the trainer changed weights that it
            did not select; the round kept its base and ``parent`` is not that base; or
            every device at ``parent`` would refuse the release counter.
        WrongModelError: The parent is of another network or run.
        BudgetError: The patch is larger than ``max_size``.
        VerificationError: The patch does not lead to the target: a bug, or bad memory.
        DpuError: As :func:`packager.rounds.golden.expected_outputs`.
    """
    record = round_.record
    if record.outcome is Outcome.KEPT_BASE and parent is None:
        return None
    parent = parent or find_parent(round_)
    base = parent.weights.fingerprint
    if base == record.target:
        return None
    _check_run(round_, parent)
    if record.outcome is Outcome.KEPT_BASE:
        raise RoundError(
            f"{round_.name} kept its base, so its weights are another round's release: "
            f"pack {find_parent(round_).name} instead"
        )
    counter = record.counter if counter is None else counter
    _check_counter(round_, parent, counter)
    terms = terms_since(round_, base)
    changes = diff(moved_weights(parent.weights, terms), round_.weights)
    if base == record.parent:  # from another parent, several selections add up
        check_selection(round_, changes)
    header = header_for(
        parent.weights,
        round_.weights,
        model=record.model,
        round_=record.round,
        counter=counter,
    )
    outputs = b""
    if expect_outputs:
        from packager.rounds.golden import expected_outputs  # with ONNX Runtime

        outputs = expected_outputs(round_, expect_outputs)
    packed = pack_changes(
        parent.weights,
        round_.weights,
        header,
        changes,
        parent_name=parent.name,
        level=level,
        signers=signers,
        outputs=outputs,
        terms=terms,
    )
    check_budget(f"the patch of {round_.name}", len(packed.data), max_size)
    return packed


def header_for(
    base: Weights, target: Weights, *, model: str, round_: int, counter: int
) -> PatchHeader:
    """Return the header of a patch that leads from one weight file to another."""
    return PatchHeader(
        model=model,
        parent=base.fingerprint,
        target=target.fingerprint,
        round=round_,
        counter=counter,
        file_size=target.layout.file_size,
    )


def build_patch(
    base: Weights,
    target: Weights,
    header: PatchHeader,
    *,
    level: int = LEVEL,
    terms: Sequence[Term] = (),
) -> bytes:
    """Build a patch between any two weight files of one network, without rounds.

    Args:
        base: The weights that the patch leads from.
        target: The weights that it leads to.
        header: What the patch is for; its ``parent`` and ``target`` must be the
            fingerprints of ``base`` and ``target``.
        level: zstd level, 1 to 22.
        terms: Subspaces that move the base's tensors first.

    Returns:
        The bytes of the patch file, proven.

    Raises:
        WrongModelError: The weight files hold different tensors.
        WrongParentError: ``header.parent`` is not the fingerprint of ``base``.
        VerificationError: ``header.target`` is not the fingerprint of ``target``.
    """
    changes = diff(moved_weights(base, terms), target)
    return pack_changes(base, target, header, changes, level=level, terms=terms).data


def pack_changes(  # noqa: PLR0913 - all but four by name
    base: Weights,
    target: Weights,
    header: PatchHeader,
    changes: Sequence[TensorChange],
    *,
    parent_name: str = "",
    level: int = LEVEL,
    signers: Sequence["Ed25519PrivateKey"] = (),
    outputs: bytes = b"",
    terms: Sequence[Term] = (),
) -> PackedPatch:
    """Build a patch from changes that are known already; as :func:`build_patch`.

    With ``terms`` they move the base first: ``changes`` are what differs after that.
    """
    moved = moved_weights(base, terms)
    # A tensor travels whole only if all of it changed: see the decision list.
    with ThreadPoolExecutor(_processors()) as pool:
        data = encode_patch(
            header,
            changes,
            moved,
            target,
            level=level,
            outputs=outputs,
            terms=terms,
            pool=pool,
        )
    if signers:
        from packager.signing import sign  # cryptography only where it is needed

        data = sign(data, signers)
    _prove(data, base)
    counts = {change.name: len(change) for change in changes}
    return PackedPatch(data, header, parent_name, counts, terms)


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _prove(data: bytes, base: Weights) -> None:
    """Apply a finished patch to its base: the result must have the target's hash."""
    try:
        with open_patch(data) as patch:
            for _ in apply_weights(base, patch):
                pass
    except VerificationError as err:
        raise VerificationError(
            "the finished patch does not lead to the target; nothing was written. Was "
            "a file changed while it was packed? Pack again",
            expected=err.expected,
            actual=err.actual,
        ) from err


def _check_run(round_: RoundFolder, parent: Parent) -> None:
    stated = round_.record.model
    if parent.model not in ("", stated):
        what = "run" if same_network(parent.model, stated) else "network"
        raise WrongModelError(
            f"{parent.name} is of another {what} than {round_.path}, and no device has "
            f"models of both; give --from a round of {round_.path.parent}, or 'init'",
            expected=stated,
            actual=parent.model,
        )


def _check_counter(round_: RoundFolder, parent: Parent, counter: int) -> None:
    check_counter(counter)
    if parent.counter is not None and counter <= parent.counter:
        raise RoundError(
            f"{round_.name} would be release {counter}, but devices at {parent.name} "
            f"have seen release {parent.counter} and refuse what is not newer; give "
            f"--counter {parent.counter + 1} or more"
        )


def check_selection(round_: RoundFolder, changes: Sequence[TensorChange]) -> None:
    """Insist that only selected weights and the dense part changed.

    Raises:
        RoundError: Something else changed; the tensor and the number are named.
    """
    for change in changes:
        mask = round_.selection.get(change.name)
        if mask is None:
            continue
        outside = sum(
            int(np.count_nonzero((mask[at >> 3] >> (at & 7).astype(np.uint8) & 1) == 0))
            for at in change.pieces()
        )
        if outside:
            raise RoundError(
                f"{round_.path}: {outside} of {len(change)} changed weights in tensor "
                f"{change.name!r} are not in the selection; something other than the "
                "selected weights was trained, or the selection is of another round"
            )


def check_budget(what: str, size: int, limit: int | None) -> None:
    """Insist on a size limit.

    Raises:
        BudgetError: ``size`` is above ``limit``.
    """
    if limit is not None and size > limit:
        raise BudgetError(
            f"{what} has {size} bytes, the limit is {limit}; nothing was written. "
            "Train with a smaller ratio or raise --max-size",
            limit=limit,
            actual=size,
        )


def write_file(
    data: bytes | Weights,
    path: str | PathLike[str],
    before_named: Callable[[], None] = lambda: None,
) -> None:
    """Write a finished file: complete, on the disk and read back, or absent.

    An earlier file of that name stays as it is until then, and who could not read it
    cannot read this one. Folders on the way to it are made.

    Args:
        data: All of it; weights need not be in memory.
        path: Its name.
        before_named: Called when all of it is on the disk and nobody can see it yet.

    Raises:
        OSError: It cannot be written, or something other than a file has that name.
        VerificationError: The disk gives other bytes than were written.
    """
    # What a link points to is written; /dev/null and its like are not replaced.
    path, files = Path(path), Files()
    path = Path(realpath(path)) if path.is_symlink() else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as err:
        words = "is a file, expected a folder"
        raise NotADirectoryError(ENOTDIR, words, err.filename) from err
    with files.replacing(path) as part:
        if isinstance(data, Weights):
            expected = data.fingerprint
            files.write(part, data.chunks(), mode=mode_for(path))
        else:
            expected = hashlib.sha256(data).hexdigest()
            files.write(part, [data], mode=mode_for(path))
        if (actual := fingerprint_file(part)) != expected:
            raise VerificationError(
                f"{path} does not hold what was written to it: check the disk",
                expected=expected,
                actual=actual,
            )
        before_named()
