# SPDX-License-Identifier: Apache-2.0
"""What the reports are about, as data: the JSON of ``dpu-pack`` and ``dpu-patch``.

Sizes are in bytes, digests in hexadecimal, times in seconds. Fields are written in the
order in which they stand here, unless a function says otherwise.
"""

from typing import NotRequired, TypedDict


class SectionRecord(TypedDict):
    """One section of a patch file."""

    name: str
    kind: int
    encoding: str
    packed_bytes: int
    raw_bytes: int


class LinkRecord(TypedDict):
    """How long a patch and the full weights take on one kind of link."""

    name: str
    unit: str
    note: str
    payload_bits_per_s: float
    duty_cycle: float
    messages: int
    seconds: float
    full_messages: int
    full_seconds: float


class TensorRecord(TypedDict):
    """One tensor and what changes in it.

    ``shares`` are shares of changed elements along the tensor; ``relative_change`` says
    how far it moved, as a share of its own length (None where that is not finite).
    """

    name: str
    dtype: str
    shape: list[int]
    size: int
    changed: int
    index_floor_bytes: float
    value_floor_bytes: int
    shares: NotRequired[list[float]]
    relative_change: NotRequired[float | None]


class FloorRecord(TypedDict):
    """Bytes of one part of a patch beside its floor; lower is better."""

    bytes: int
    floor_bytes: float
    ratio: float | None


class SubspaceRecord(TypedDict):
    """One subspace of a patch: what moves whole tensors."""

    coefficients: int
    bits: int
    taps: int
    tensors: int


class PatchRecord(TypedDict):
    """A patch; ``tensors`` and ``floor`` where the layout of its network is known."""

    path: str
    model: str
    parent: str
    target: str
    round: int
    counter: int
    critical: int
    optional: int
    bytes: int
    full_bytes: int
    signature_bytes: int
    signed_by: list[str]
    changed: int
    tensors_changed: int
    subspaces: list[SubspaceRecord]
    sections: list[SectionRecord]
    parts: dict[str, int]
    links: list[LinkRecord]
    tensors: NotRequired[list[TensorRecord]]
    floor: NotRequired[dict[str, FloorRecord]]


class DiffRecord(TypedDict):
    """Where two weight files differ."""

    base: str
    target: str
    full_bytes: int
    size: int
    changed: int
    tensors_changed: int
    floor_bytes: float
    other_network: str | None
    tensors: list[TensorRecord]


class RoundTensor(TypedDict):
    """One tensor of a round: its elements, and how many of them change."""

    name: str
    size: int
    changed: int
    dense: bool


class SentRecord(TypedDict):
    """What one round costs a device. ``bytes`` is None where it cannot be packed."""

    bytes: int | None
    bytes_from: str
    tensors: list[RoundTensor]


class OtherRound(TypedDict):
    """One round of a run that another one is compared with."""

    round: int
    outcome: str
    bytes: int | None
    cumulative_bytes: int | None
    bytes_from: str
    metric: str
    better: str
    val_metric: float | None
    test_metric: float | None
    val_accuracy: float | None
    test_accuracy: float | None


class RoundEntry(OtherRound):
    """One round of a run.

    What a trainer need not state is None. ``val_metric`` and ``test_metric`` are of
    ``metric``, which is "accuracy" where nothing else is stated. ``cumulative_bytes``
    are those of all rounds up to this one; None once one of them is unknown.
    """

    model: str
    counter: int
    full_bytes: int
    method: str | None
    ratio: float | None
    seed: int | None
    samples: int | None
    reinitialised: bool | None
    tensors: list[RoundTensor]


class OtherRun(TypedDict):
    """A run that another one is compared with."""

    run: str
    path: str
    method: str | None
    seed: int | None
    rounds: list[OtherRound]


class FrontierPoint(TypedDict):
    """A method beside full updating: what it loses, and what it sends.

    ``points`` is the mean difference over rounds and runs, in the metric's own unit,
    positive for better; ``error`` its standard error over runs. ``bytes`` is the mean
    of the patches behind the first, 0 where there are none.
    """

    name: str
    runs: int
    points: float
    error: float | None
    bytes: int
    first_bytes: int
    all_bytes: int


class OverlapRecord(TypedDict):
    """How far the selections of rounds coincide; see ``overlap_record``."""

    rounds: list[int]
    shares: list[list[float]]
    by_chance: list[list[float]]


class RunRecord(TypedDict):
    """A run: its rounds, what they cost, and the runs that it is compared with."""

    run: str
    path: str
    model: str
    full_bytes: int
    bytes: int
    patches: int
    rounds: list[RoundEntry]
    overlap: OverlapRecord
    links: list[LinkRecord]
    beside: list[OtherRun]
    frontier: list[FrontierPoint]


class PackRecord(TypedDict):
    """A round that was packed; from ``parent`` on where there was something to send.

    ``bytes`` are those of the file that is written, which may be a bundle.
    """

    run: str
    round: int
    counter: int
    round_counter: int
    outcome: str
    model: str
    target: str
    path: str | None
    parent: NotRequired[str]
    parent_name: NotRequired[str]
    bytes: NotRequired[int]
    patch_bytes: NotRequired[int]
    signed_by: NotRequired[list[str]]
    full_bytes: NotRequired[int]
    weights: NotRequired[int]
    weights_changed: NotRequired[int]
    tensors_changed: NotRequired[int]
    weights_moved: NotRequired[int]
    coefficients: NotRequired[int]
    every_weight: NotRequired[bool]
    dense: NotRequired[int]
    dense_changed: NotRequired[int]
    written: NotRequired[bool]


class FilesRecord(TypedDict):
    """Two files that were packed, or one; with ``bytes`` if there was a difference."""

    base: str
    target_path: str
    model: str
    run_id: str | None
    graph: bool
    canonical: bool
    parent: str
    target: str
    path: str | None
    signed_by: list[str]
    counter: NotRequired[int]
    bytes: NotRequired[int]
    patch_bytes: NotRequired[int]
    full_bytes: NotRequired[int]
    values: NotRequired[int]
    changed: NotRequired[int]
    tensors_changed: NotRequired[int]
    golden: NotRequired[str]
    task: NotRequired[str]
    remarks: NotRequired[list[str]]
    written: NotRequired[bool]
