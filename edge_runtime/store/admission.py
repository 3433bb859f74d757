# SPDX-License-Identifier: Apache-2.0
"""Which patches a store may apply: every rule, in one place. No I/O.

Each function takes what the store knows (:class:`edge_runtime.store.state.State`) and
what the patch says of itself (its header) and returns why it may not be applied, or
None. The rules, in the order in which a device asks them:

1. The trusted keys signed it (:attr:`.State.trust`), before a byte of its body is read.
2. It is for this network and this run.
3. The device is not pinned.
4. Its release counter is above the floor, or equal to it with the same target; not by
   more than :data:`MAX_JUMP`, unless somebody insists; and it is not the reserved one,
   whoever insists: each would end the device's life.
5. It did not fail its trial here before, unless somebody insists.
6. The key list that vouches for it had not expired when it was signed.
7. It leads from weights that this store has.

What needs the bytes themselves (sizes, positions, the fingerprint of the result) is in
:mod:`edge_runtime.formats.apply`.
"""

from collections.abc import Callable

from edge_runtime.errors import (
    DpuError,
    HeldError,
    ListExpiredError,
    TrustError,
    WrongParentError,
)
from edge_runtime.formats.header import MAX_JUMP, RESERVED_COUNTER, PatchHeader
from edge_runtime.formats.identity import Identity, wrong_model
from edge_runtime.store.state import MAX_TRIES, State


def is_current(state: State, header: PatchHeader) -> bool:
    """Return whether a patch leads to the active weights, and to no newer release.

    The active weights under a higher counter are a release too: left out, one that was
    held back in between could be played later.
    """
    return (header.model, header.target) == (state.model, state.active) and (
        header.counter <= state.floor
    )


def refusal(
    state: State,
    header: PatchHeader,
    *,
    force: bool = False,
    identity: Callable[[], Identity] | None = None,
) -> DpuError | None:
    """Say why a store may not move to a patch's target; None if it may.

    Where the patch leads from is asked by :func:`parent_refusal`: the patches before
    it in a chain may change the answer to that, and to nothing here.

    Args:
        state: The store's state.
        header: The patch's header.
        force: Admit a release that failed its trial before, or whose counter is far
            above the floor. Never lowers the floor.
        identity: Gives the store's network and run, for the words of a refusal.

    Returns:
        A WrongModelError if it is for another network or run; a HeldError if the
        device is pinned; a TrustError if the release is older than one that was
        active or is out of all proportion, or failed its trial; a ListExpiredError if
        the key list has expired.
    """
    return (
        wrong_model(header, state.model, identity)
        or _pinned(state)
        or _older(state, header)
        or _reserved(header)
        or (None if force else _too_far(state, header))
        or (None if force else _failed_before(state, header))
        or _expired(state, header)
    )


def parent_refusal(state: State, header: PatchHeader) -> WrongParentError | None:
    """Say why a store cannot apply a patch to what it has now; None if it can."""
    # Weights whose slot is still there need no parent to be released again.
    if state.slot(header.target):
        return None
    return unknown_parent(state, header.parent)


def unknown_parent(state: State, parent: str) -> WrongParentError | None:
    """Say why a store does not have the weights that a patch leads from; None if so.

    Args:
        state: The store's state.
        parent: Their fingerprint.
    """
    if parent == state.init or state.slot(parent):
        return None
    if not state.active:
        return WrongParentError(
            f"the bundle's patch leads from {parent[:12]}, its init recipe gives "
            f"{state.init[:12]}: the bundle is damaged, or this machine generates "
            "other init weights than the server",
            expected=parent,
            actual=state.init,
        )
    active = state.active_slot
    was_here = state.was_active(parent)
    return WrongParentError(
        f"the patch leads from weights {parent[:12]}; this device is at round "
        f"{active.round} ({active.target[:12]})"
        + (
            " and no longer keeps them; ask for a patch from its own round"
            if was_here
            else "; apply the rounds between them first"
        ),
        expected=parent,
        actual=active.target,
    )


def was_left(state: State, header: PatchHeader) -> bool:
    """Return whether a device was rolled back from the release that a patch leads to.

    A person may apply it again; the agent waits for a newer one.
    """
    return (header.counter, header.target) == (state.floor, state.floor_target) and (
        header.target != state.active
    )


def _pinned(state: State) -> HeldError | None:
    if not state.pinned:
        return None
    return HeldError(
        f"this device is pinned to round {state.active_slot.round}; allow updates "
        "again with 'dpu-edge pin --off'"
    )


def _older(state: State, header: PatchHeader) -> TrustError | None:
    # Equal with the same target: a device that rolled back can come forward again.
    if header.counter > state.floor or (
        (header.counter, header.target) == (state.floor, state.floor_target)
    ):
        return None
    past = state.was_active(header.target)
    return TrustError(
        f"round {header.round} has release counter {header.counter}, this device "
        f"has already been at {state.floor}"
        + ("; it is past that round" if past else "")
        + ". To go back use 'dpu-edge rollback', or publish the old weights as a "
        "new release with a higher counter"
    )


def _reserved(header: PatchHeader) -> TrustError | None:
    if header.counter != RESERVED_COUNTER:
        return None
    return TrustError(
        f"round {header.round} has release counter {header.counter}, which is "
        "reserved: no release could follow it; pack the round with a smaller one"
    )


def _too_far(state: State, header: PatchHeader) -> TrustError | None:
    # A device without a release yet begins wherever its bundle says.
    if not state.active or header.counter - state.floor <= MAX_JUMP:
        return None
    return TrustError(
        f"round {header.round} has release counter {header.counter}, this device is at "
        f"{state.floor}: more than {MAX_JUMP} releases ahead, and everything below "
        "would be refused from then on; pack the round again with a smaller counter, "
        "or apply it with --force if it is meant"
    )


def _failed_before(state: State, header: PatchHeader) -> TrustError | None:
    if header.target not in state.skipped:
        return None
    return TrustError(
        f"round {header.round} ({header.target[:12]}) failed its trial on this "
        f"device before, or was cut off in {MAX_TRIES} of them; apply a newer "
        "round, or try again with --force"
    )


def _expired(state: State, header: PatchHeader) -> ListExpiredError | None:
    # Whatever expires while it runs goes on running: only what is new is held back.
    problem = state.expired(header.signed_at)
    return ListExpiredError(problem) if problem else None
