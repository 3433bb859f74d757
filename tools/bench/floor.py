# SPDX-License-Identifier: Apache-2.0
"""How small patches are, on real rounds and beside the floor.

    python -m tools.bench.floor --cache runs --check

packs all rounds of the runs in a folder (``--data`` trains those of
:mod:`tools.bench.rounds` that are not there yet) and prints one line a round: index
against the entropy of its mask, index and values against the floor of
:mod:`tools.bench.floors`, and what the file has beside them. Then random masks, at
densities from 0.1 to 99 %, in the tensors of the same networks.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.positions import encode_positions
from edge_runtime.formats.sections import pack_kind
from edge_runtime.formats.weights import Weights
from packager.build import header_for, pack_changes
from packager.diff import diff
from packager.report.patch_record import section_part
from tools.bench.floors import Moves, entropy_bits, index_floor_bits, value_floor_bits
from tools.bench.rounds import Pair, find_pairs, make_rounds
from tools.ending import end

DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.38, 0.5, 0.62, 0.8, 0.95, 0.99)
# Bars. Of the index to the entropy of the mask; of index and values to their floor.
INDEX_BAR = {"dpu": 1.0}  # any other selection: INDEX_BAR_ANY
INDEX_BAR_ANY = 1.03
CONTENT_BAR = 1.04
FRAMING_BAR = 250  # bytes, without signatures


@dataclass(frozen=True, slots=True)
class Sizes:
    """Where the bytes of a patch go, and what they are held against.

    Attributes:
        pair: Name of the round.
        method: How its weights were selected.
        weights: Elements of the tensors of which up to half changed.
        changed: How many of those changed.
        dense_changed: Changed elements of the other tensors.
        total: Bytes of the patch.
        index: Bytes that say which elements changed.
        values: Bytes of the new values of ``changed``.
        dense: Bytes of the new values of ``dense_changed``.
        framing: All other bytes.
        index_entropy: log2 C(n, m) over all tensors, in bytes.
        index_floor: Bytes; see :mod:`tools.bench.floors`.
        value_floor: Bytes.
        dense_floor: Bytes.
    """

    pair: str
    method: str
    weights: int
    changed: int
    dense_changed: int
    total: int
    index: int
    values: int
    dense: int
    framing: int
    index_entropy: float
    index_floor: float
    value_floor: float
    dense_floor: float

    @property
    def index_ratio(self) -> float:
        """Index to entropy."""
        return self.index / self.index_entropy

    @property
    def content_ratio(self) -> float:
        """Index and values to their floors, the dense part aside."""
        return (self.index + self.values) / (self.index_floor + self.value_floor)

    def missed(self) -> Iterator[str]:
        """Yield the bars that it misses."""
        bar = INDEX_BAR.get(self.method, INDEX_BAR_ANY)
        if self.index_ratio > bar:
            yield f"{self.pair}: index {self.index_ratio:.3f} of the entropy, bar {bar}"
        if self.content_ratio > CONTENT_BAR:
            yield (
                f"{self.pair}: index and values {self.content_ratio:.3f} of the floor, "
                f"bar {CONTENT_BAR}"
            )
        if self.framing > FRAMING_BAR:
            yield f"{self.pair}: framing {self.framing} bytes, bar {FRAMING_BAR}"


@dataclass(frozen=True, slots=True)
class RandomMask:
    """A random mask over the tensors of a network.

    Attributes:
        network: The round whose tensors these are.
        density: Share of elements.
        positions: Number of elements.
        index: Bytes.
        entropy: Bytes.
    """

    network: str
    density: float
    positions: int
    index: int
    entropy: float

    @property
    def ratio(self) -> float:
        """Index to entropy."""
        return self.index / self.entropy


def measure(pair: Pair) -> Sizes:
    """Pack an update, as ``dpu-pack`` does, and hold its parts against the floors."""
    base, target = pair.read()
    layout, found = base.layout, diff(base, target)
    header = header_for(base, target, model="00" * 32, round_=1, counter=1)
    changes = [change.positions for change in found]
    sparse = [
        2 * len(c) <= t.size for t, c in zip(layout.tensors, changes, strict=True)
    ]
    with open_patch(pack_changes(base, target, header, found).data) as patch:
        parts = dict.fromkeys(("header", "index", "values", "dense"), 0)
        for section in patch.sections:
            parts[section_part(section.kind)] += section.packed_size
        content = parts["index"] + parts["values"] + parts["dense"]
        tensors = list(zip(layout.tensors, changes, sparse, strict=True))
        return Sizes(
            pair=pair.name,
            method=pair.method,
            weights=sum(t.size for t, _, few in tensors if few),
            changed=sum(len(c) for _, c, few in tensors if few),
            dense_changed=sum(len(c) for _, c, few in tensors if not few),
            total=patch.size,
            index=parts["index"],
            values=parts["values"],
            dense=parts["dense"],
            framing=patch.size - content,
            index_entropy=sum(entropy_bits(t.size, len(c)) for t, c, _ in tensors) / 8,
            index_floor=sum(index_floor_bits(t.shape, c) for t, c, _ in tensors) / 8,
            value_floor=_value_floor(base, target, changes, sparse),
            dense_floor=_value_floor(
                base, target, changes, [not few for few in sparse]
            ),
        )


def _value_floor(
    old: Weights,
    new: Weights,
    changes: Sequence[NDArray[np.int64]],
    chosen: Sequence[bool],
) -> float:
    names = [tensor.name for tensor in old.layout.tensors]
    picked = [(n, c) for n, c in enumerate(changes) if chosen[n] and len(c)]
    base, target = (
        np.concatenate(
            [np.zeros(0, "<f4"), *(w[names[n]].ravel()[c] for n, c in picked)]
        )
        for w in (old, new)
    )
    tensor = np.repeat([n for n, _ in picked], [len(c) for _, c in picked])
    return value_floor_bits(Moves(base, target, tensor))[0] / 8


def random_mask(network: str, layout: Layout, density: float) -> RandomMask:
    """Encode a random mask over all matrices and kernels of a network."""
    random = np.random.default_rng(0)
    tensors = [
        (tensor.shape, np.flatnonzero(random.random(tensor.size) < density))
        for tensor in layout.tensors
        if len(tensor.shape) > 1
    ]
    _, sections = encode_positions(tensors)
    used = ((kind, parts) for kind, parts in sections.items() if any(parts))
    index = sum(len(pack_kind(kind, parts, 19)[1]) for kind, parts in used)
    bits = sum(entropy_bits(math.prod(shape), len(found)) for shape, found in tensors)
    count = sum(len(found) for _, found in tensors)
    return RandomMask(network, density, count, index, bits / 8)


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Train the rounds that are not there yet: a folder with MNIST/raw, and "
    "cifar10/{train,test}/CLASS/*.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of the runs, the same as for tools.bench.patch.",
)
@click.option("--only", multiple=True, metavar="NAME", help="One of the runs.")
@click.option("--check", is_flag=True, help="Exit 1 if a bar is missed.")
@json_option
def main(
    data: Path | None, cache: Path, only: tuple[str, ...], *, check: bool, as_json: bool
) -> None:
    """Measure the size of patches on real rounds."""
    rows: list[Sizes] = []
    layouts: dict[bytes, tuple[str, Layout]] = {}
    if data is not None:
        make_rounds(only, data, cache, say)
    runs = [cache / name for name in only] or [cache]
    with tempfile.TemporaryDirectory(prefix="bench-rounds-") as scratch:
        for pair in (p for r in runs for p in find_pairs(r, Path(scratch), every=True)):
            say(f"measuring {pair.name}")
            rows.append(measure(pair))
            layout = pair.read()[0].layout
            layouts.setdefault(layout.header, (pair.name, layout))
    masks = [
        random_mask(name.partition("/")[0], layout, density)
        for name, layout in layouts.values()
        for density in DENSITIES
    ]
    missed = [problem for row in rows for problem in row.missed()]
    missed += [
        f"{mask.network}: a random mask of {mask.density:.1%} takes {mask.ratio:.3f} "
        f"of its entropy, bar {INDEX_BAR_ANY}"
        for mask in masks
        if mask.ratio > INDEX_BAR_ANY
    ]
    record = {
        "rounds": [_with_ratios(row) for row in rows],
        "random_masks": [asdict(mask) | {"ratio": mask.ratio} for mask in masks],
        "missed": missed,
    }
    emit(
        record, as_json=as_json, text="\n".join([*table(rows), "", *mask_table(masks)])
    )
    end(missed, check=check)


def _with_ratios(row: Sizes) -> dict[str, object]:
    ratios = {"index_ratio": row.index_ratio, "content_ratio": row.content_ratio}
    return asdict(row) | ratios


def table(rows: Sequence[Sizes]) -> Iterator[str]:
    """Yield the rounds as lines of a table."""
    yield (
        f"{'round':<20} {'changed':>8} {'density':>8} {'index':>8} {'values':>8} "
        f"{'dense':>7} {'framing':>7} {'total':>8} {'index/':>8} {'content/':>8} "
        f"{'dense/':>7}"
    )
    yield f"{'':<92} {'entropy':>6} {'floor':>8} {'floor':>7}"
    for row in rows:
        dense = row.dense / row.dense_floor if row.dense_floor else 0.0
        yield (
            f"{row.pair:<20} {row.changed:>8} {row.changed / row.weights:>8.2%} "
            f"{row.index:>8} {row.values:>8} {row.dense:>7} {row.framing:>7} "
            f"{row.total:>8} {row.index_ratio:>8.3f} {row.content_ratio:>8.3f} "
            f"{dense:>7.3f}"
        )


def mask_table(masks: Sequence[RandomMask]) -> Iterator[str]:
    """Yield the random masks as lines of a table."""
    yield (
        f"{'random mask':<12} {'density':>8} {'positions':>10} {'index':>9} "
        f"{'ratio':>7}"
    )
    for mask in masks:
        yield (
            f"{mask.network:<12} {mask.density:>8.1%} {mask.positions:>10} "
            f"{mask.index:>9} {mask.ratio:>7.3f}"
        )


if __name__ == "__main__":
    main()
