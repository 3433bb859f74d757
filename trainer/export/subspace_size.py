# SPDX-License-Identifier: Apache-2.0
"""How many coefficients a subspace may have, for a patch of a size: before training."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor, nn

from edge_runtime.errors import TrainingError
from edge_runtime.formats.header import HEADER_BYTES
from edge_runtime.formats.layout import Layout
from edge_runtime.formats.sections import encode_varint
from edge_runtime.formats.subspace import MAX_COEFFICIENTS, WORD, term_size
from edge_runtime.sizes import parse_size
from trainer.export.tensors import layout_of
from trainer.method.selectable import is_weight
from trainer.method.subspace_weights import MOST_BITS

_SEED_BYTES = 5  # that a term may have more for its seed than ours take
_GROUP_BYTES = 64  # what the sections of a group of values take beside the values


def coefficients_within(
    size: str | int,
    model: nn.Module,
    *,
    bits: int = 1,
    selectable: Callable[[str, Tensor], bool] = is_weight,
    still: Collection[str] = (),
    layout: Layout | None = None,
) -> int:
    """Return how many coefficients a patch of a size has room for.

    Where nothing but them travels, the unsigned patch, without expected outputs, has
    this very size, or up to 8 times ``bits`` bytes less, for a seed below 2**28. A
    dense part is taken at its full size, and packs smaller.

    Args:
        size: Of the patch, such as ``"4KB"``, or its bytes.
        model: The network that devices get.
        bits: Of a coefficient.
        selectable: Which tensors move, as for :class:`SubspaceUpdater`.
        still: Names of tensors that stay as they are, beside parameters that do not
            train; all others are the dense part.
        layout: Of the weight file, where it is not the network's own.

    Raises:
        TrainingError: There is no room for 64 of them.
    """
    layout, limit = layout or layout_of(model), parse_size(str(size))
    rest = _Rest.of(model, selectable, still, layout)
    most = min(MAX_COEFFICIENTS, MOST_BITS // bits, rest.weights)
    if most < WORD:
        raise TrainingError(
            f"{rest.weights} weights move, and a subspace has at least {WORD} "
            "coefficients, no more than weights: choose more tensors"
        )
    for count in range(most // WORD * WORD, 0, -WORD):
        if rest.with_term(count, bits) <= limit:
            return count
    raise TrainingError(
        f"a patch of {limit} bytes has no room for coefficients: {rest.taken} are "
        f"needed beside them; "
        f"{'freeze biases and normalisation, or ' if rest.dense else ''}allow more"
    )


def subspace_bytes(
    coefficients: int,
    model: nn.Module,
    *,
    bits: int = 1,
    selectable: Callable[[str, Tensor], bool] = is_weight,
    still: Collection[str] = (),
    layout: Layout | None = None,
) -> int:
    """Return the size of a patch with so many coefficients, as far as it may get.

    The arguments are those of :func:`coefficients_within`.
    """
    rest = _Rest.of(model, selectable, still, layout or layout_of(model))
    return rest.with_term(coefficients, bits)


@dataclass(frozen=True, slots=True)
class _Rest:
    """What a patch takes beside its coefficients.

    Attributes:
        taken: Bytes of it.
        dense: Whether there are tensors that travel by themselves.
        tensors: Of the weight file.
        moved: Tensors that move.
        weights: Elements of these.
    """

    taken: int
    dense: bool
    tensors: int
    moved: int
    weights: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        selectable: Callable[[str, Tensor], bool],
        still: Collection[str],
        layout: Layout,
    ) -> "_Rest":
        named = dict(model.named_parameters())
        moved = {n for n, p in named.items() if selectable(n, p)}
        rest = {n for n, p in named.items() if not p.requires_grad} | {*still} | moved
        dense = [t for t in layout.tensors if t.name not in rest]
        groups = {t.item_size for t in dense}
        # How much of each tensor travels; nothing is a number of one byte.
        counts = len(layout.tensors)
        counts += sum(len(encode_varint(t.size)) - 1 for t in dense)
        taken = HEADER_BYTES + 2 + 1 + _section(counts)
        taken += sum(t.size * t.item_size for t in dense) + _GROUP_BYTES * len(groups)
        weights = sum(t.size for t in layout.tensors if t.name in moved)
        return cls(taken, bool(dense), len(layout.tensors), len(moved), weights)

    def with_term(self, count: int, bits: int) -> int:
        """Return the bytes of a patch with so many coefficients."""
        term = term_size(self.tensors, self.moved, count, bits) - _SEED_BYTES
        return self.taken + _section(1 + term)


def _section(size: int) -> int:
    """Return the bytes of a section with its entry in the table."""
    return 2 + len(encode_varint(size)) + size
