# SPDX-License-Identifier: Apache-2.0
"""Which key list may follow which. No I/O and no clock: times are given.

*Expired* is a list from its ``expires`` on. What counts is when something was signed,
not when it arrives: a device that slept through years takes every list that was signed
in time, one after the other. A list that does not say when it was signed counts as
signed now.
"""

from edge_runtime.errors import KeyListError, ListExpiredError, TrustError
from edge_runtime.formats.signing import Trust, key_id
from edge_runtime.trust.root import Root, SignedRoot, read_root


def first_root(data: bytes, present: Trust | None = None) -> Root:
    """Return the first list of a device.

    Any version will do: there is none to compare it with.

    Args:
        data: The content of the file.
        present: Whom the device trusts so far, by single keys: enough of these must
            have signed it too. None where the owner vouches for it.

    Raises:
        KeyListError: Damaged, or not a key list.
        TrustError: Too few signatures, of its own keys or of the present ones.
    """
    given = read_root(data)
    if present is not None:
        _insist(given, present, "the keys that this device trusts")
    _insist(given, given.root.keys, "its own root keys")
    return given.root


def next_root(
    current: Root, data: bytes, *, now: str = "", lapsed: bool = False
) -> Root:
    """Return the list that follows another one.

    Args:
        current: The list that holds.
        data: The content of the file.
        now: The time, for a list that does not say when it was signed; empty where it
            is not known.
        lapsed: Take a list that was signed after the current one expired: the owner's
            way out, at the device itself.

    Raises:
        KeyListError: Damaged, or not a key list.
        TrustError: Another version than the next one, or too few signatures: of the
            current list's keys or of its own.
        ListExpiredError: It was signed after the current list expired.
    """
    given = read_root(data)
    root = given.root
    if root.version != current.version + 1:
        order = "older than" if root.version < current.version else "not the next after"
        if root.version == current.version:
            order = "another one than"
        raise TrustError(
            f"key list {root.version} is {order} list {current.version}, which this "
            f"device has; give {current.version + 1}.root.json"
        )
    _insist(given, current.keys, f"the root keys of list {current.version}")
    _insist(given, root.keys, "its own root keys")
    if root.issued and root.issued < current.issued:
        raise TrustError(
            f"key list {root.version} was signed {root.issued}, before list "
            f"{current.version} ({current.issued}); make it anew"
        )
    signed = root.issued or now
    if signed >= current.expires and not lapsed:
        raise ListExpiredError(
            f"key list {root.version} was signed {signed}, after list "
            f"{current.version} expired ({current.expires}); if its owner vouches for "
            "it, take it here with 'dpu-edge trust add --lapsed'"
        )
    return root


def missing(given: SignedRoot, trust: Trust) -> int:
    """Return how many signatures of these keys a list still needs."""
    return max(0, trust.threshold - len(given.signers(trust)))


def _insist(given: SignedRoot, trust: Trust, whose: str) -> None:
    if not trust.keys:
        raise KeyListError(f"there are no keys that could have signed it: {whose}")
    if missing(given, trust):
        found = ", ".join(map(key_id, given.signers(trust))) or "nobody"
        raise TrustError(
            f"key list {given.root.version} is signed by {found} of {whose}, expected "
            f"{trust.threshold} of the keys {', '.join(trust.ids)}; have it signed "
            "with 'dpu-patch trust sign'"
        )
