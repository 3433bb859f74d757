# SPDX-License-Identifier: Apache-2.0
"""Several patches -> one: for a device that missed some of them.

The result does what the patches do one after another, and costs less than their sum:
an element that changes twice travels once, and so does the header. Subspaces are put
one behind the other.
"""

from collections.abc import Sequence

from edge_runtime.errors import WrongModelError, WrongParentError, prefix_errors
from edge_runtime.formats.frames import LEVEL
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.identity import same_network
from edge_runtime.formats.patch import Patch
from edge_runtime.formats.subspace import together
from edge_runtime.formats.weights import Weights
from packager.build import PackedPatch, header_for, pack_changes
from packager.diff import diff
from packager.moved import moved_weights, patched_weights

Named = tuple[str, Patch]  # a patch, and what to call it in messages


def compose_patches(
    base: Weights, patches: Sequence[Named], *, level: int = LEVEL
) -> PackedPatch | None:
    """Make one patch that equals applying several in order.

    Each patch is applied, so every one of them proves itself, and the result is
    applied to the base and compared as any finished patch is. Round and release
    counter are the last patch's.

    Args:
        base: The weights that the first patch leads from.
        patches: At least one open patch with its name, in the order of application.
        level: zstd level, 1 to 22.

    Returns:
        The proven patch, unsigned; None where the patches lead back to the base.

    Raises:
        WrongModelError: The patches are for different networks.
        WrongParentError: They do not chain from the base; the message says where, and
            in which order they would.
        PatchError: A patch contradicts itself or the base.
        VerificationError: A patch does not lead to its target.
    """
    check_chain(base.fingerprint, [(name, patch.header) for name, patch in patches])
    target = base
    for name, patch in patches:
        with prefix_errors(name):
            target = patched_weights(target, patch)
    if target.fingerprint == base.fingerprint:
        return None
    last = patches[-1][1].header
    header = header_for(
        base, target, model=last.model, round_=last.round, counter=last.counter
    )
    terms = together([p.terms for _, p in patches], len(base.layout.tensors))
    changes = diff(moved_weights(base, terms), target)
    name = f"the parent of {patches[0][0]}"
    return pack_changes(
        base, target, header, changes, parent_name=name, level=level, terms=terms
    )


def check_chain(base: str, patches: Sequence[tuple[str, PatchHeader]]) -> None:
    """Insist that each patch leads from where the one before it ended.

    Args:
        base: Fingerprint that the first patch must lead from.
        patches: The headers, with names.

    Raises:
        WrongModelError: Two of them are for different networks or runs.
        WrongParentError: They do not chain.
    """
    at, before, first = base, "the base", patches[0][1]
    for name, header in patches:
        if header.model != first.model:
            what = "runs" if same_network(header.model, first.model) else "networks"
            raise WrongModelError(
                f"{name} is for model {header.model}, {patches[0][0]} for "
                f"{first.model}: patches of two {what} do not compose",
                expected=first.model,
                actual=header.model,
            )
        if header.parent != at:
            raise WrongParentError(
                f"{name} leads from weights {header.parent[:12]}, but {before} "
                f"{'is' if before == 'the base' else 'leads to'} {at[:12]}: the "
                f"patches do not chain; {_advice(base, patches)}",
                expected=header.parent,
                actual=at,
            )
        at, before = header.target, name


def _advice(base: str, patches: Sequence[tuple[str, PatchHeader]]) -> str:
    """Say in which order the patches would chain, or that one is missing."""
    left, order, at = list(patches), [], base
    while following := [item for item in left if item[1].parent == at]:
        name, header = following[0]
        left.remove(following[0])
        order.append(name)
        at = header.target
    if not left:
        return f"give them in this order: {' '.join(order)}"
    return f"from the base they lead to {at[:12]}, and nothing leads on from there"
