# SPDX-License-Identifier: Apache-2.0
"""Key lists: made, changed, and signed by several people one after the other.

Devices read them with :mod:`edge_runtime.trust`, which says what a list is. A list is
changed as it stands: fields, keys and roles that this module does not know stay.

    >>> from packager.keys import generate_key
    >>> from edge_runtime.live.proof import public_key
    >>> from edge_runtime.trust import first_root, next_root
    >>> owner, fleet = generate_key(), generate_key()
    >>> times = "2026-11-28T00:00:00Z", "2028-11-28T00:00:00Z"
    >>> one = make_list([public_key(owner)], [public_key(fleet)], times)
    >>> root = first_root(sign_list(one, [owner]))
    >>> two = change_list(one, times, add={"targets": [public_key(generate_key())]})
    >>> len(next_root(root, sign_list(two, [owner])).releases.keys)
    2
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.errors import KeyFileError, KeyListError
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.signing import key_id
from edge_runtime.live.shared import public_key
from edge_runtime.times import FORM, utc
from edge_runtime.trust import read_root, tuf_key, tuf_key_id
from edge_runtime.trust.root import ISSUED
from packager.signing import seconds_now

SPEC_VERSION = "1.0.31"  # of TUF, as python-tuf 5 to 7 write it
OWNERS, RELEASES = "root", "targets"
_MIRRORS = ("snapshot", "timestamp")  # TUF wants them; they follow the release keys
_DAYS = {"d": 1, "w": 7, "m": 30, "y": 365}
_DATE = re.compile(r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\dZ)?", re.ASCII)

Times = tuple[str, str]  # when a list is made, when it expires


def make_list(
    owners: Sequence[str],
    releases: Sequence[str],
    times: Times,
    thresholds: Mapping[str, int] | None = None,
    *,
    online: Mapping[str, Sequence[str]] | None = None,
) -> bytes:
    """Make list 1, unsigned.

    Args:
        owners: The public keys that sign the next list, 32 raw bytes in hex.
        releases: Those that sign releases.
        times: When it is made, when it expires.
        thresholds: How many of each role have to sign, by role; 1 where not given.
        online: Keys of ``snapshot`` and ``timestamp``, for a TUF repository, which
            then has consistent snapshots. By default they are those of releases.

    Raises:
        KeyListError: A threshold cannot be met, or there is no key.
    """
    empty = {role: {"keyids": [], "threshold": 1} for role in (OWNERS, RELEASES)}
    signed = {
        "_type": "root",
        "spec_version": SPEC_VERSION,
        "version": 0,
        "consistent_snapshot": online is not None,
        "keys": {},
        "roles": empty | dict.fromkeys(_MIRRORS, empty[RELEASES]),
    }
    add = {OWNERS: owners, RELEASES: releases} | dict(online or {})
    return _changed(signed, times, add, {}, thresholds or {})


def change_list(
    data: bytes,
    times: Times,
    *,
    add: Mapping[str, Sequence[str]] | None = None,
    remove: Mapping[str, Sequence[str]] | None = None,
    thresholds: Mapping[str, int] | None = None,
) -> bytes:
    """Make the list that follows another one, unsigned.

    Args:
        data: The list before it.
        times: When it is made, when it expires.
        add: Public keys to add, by role.
        remove: Public keys to take out, by role.
        thresholds: How many of each role have to sign from then on, by role.

    Raises:
        KeyListError: It is no key list, or a role could not be met any more.
        KeyFileError: A key to take out is not in that role.
    """
    read_root(data)
    signed = _parsed(data)["signed"]
    return _changed(signed, times, add or {}, remove or {}, thresholds or {})


def _changed(
    signed: dict[str, Any],
    times: Times,
    add: Mapping[str, Sequence[str]],
    remove: Mapping[str, Sequence[str]],
    thresholds: Mapping[str, int],
) -> bytes:
    roles, keys = signed["roles"], signed["keys"]
    if times[1] <= times[0]:
        raise KeyListError(
            f"the list is made {times[0]} and would expire {times[1]}; give a later "
            "time with --expires"
        )
    mirrors = [
        name
        for name in _MIRRORS
        if name not in (*add, *remove) and roles[name] == roles[RELEASES]
    ]
    for name in {OWNERS, RELEASES, *add, *remove}:
        ids = list(roles[name]["keyids"])
        for key in remove.get(name, ()):
            if tuf_key_id(key) not in ids:
                raise KeyFileError(
                    f"key {key_id(key)} is not among the keys of role {name}"
                )
            ids.remove(tuf_key_id(key))
        new = {tuf_key_id(key): tuf_key(key) for key in add.get(name, ())}
        if not ids and not new:
            raise KeyListError(
                f"the list would have no key of role {name} any more; add another one "
                "in the same step ('dpu-patch trust rotate --add-root, --add-release')"
            )
        keys |= new
        threshold = thresholds.get(name, roles[name]["threshold"])
        role = {"keyids": [*dict.fromkeys([*ids, *new])], "threshold": threshold}
        roles[name] = roles[name] | role  # one of its own: another may be the same now
    for name in mirrors:
        roles[name] = roles[RELEASES]
    used = {name for role in roles.values() for name in role["keyids"]}
    signed["keys"] = {name: key for name, key in keys.items() if name in used}
    signed["version"] += 1
    signed[ISSUED], signed["expires"] = times
    return _encode({"signatures": [], "signed": signed})


def sign_list(data: bytes, keys: Iterable[Ed25519PrivateKey]) -> bytes:
    """Sign a list with some keys, beside the signatures that it has.

    Raises:
        KeyListError: It is no key list.
    """
    given = read_root(data)
    new = {tuf_key_id(public_key(key)): key.sign(given.message).hex() for key in keys}
    record = _parsed(data)
    others = [entry for entry in record["signatures"] if entry["keyid"] not in new]
    entries = [*others, *({"keyid": name, "sig": sig} for name, sig in new.items())]
    record["signatures"] = sorted(entries, key=lambda entry: str(entry["keyid"]))
    return _encode(record)


def _parsed(data: bytes) -> dict[str, Any]:
    """Return a list that :func:`read_root` took, with what else it says."""
    return dict(parse_record(data, "key_list_bytes", "key list", KeyListError).values)


def _encode(record: dict[str, Any]) -> bytes:
    data = json.dumps(record, indent=1, sort_keys=True).encode() + b"\n"
    read_root(data)  # nobody's name goes on what no device would take
    return data


def today() -> str:
    """Return this moment, or that of SOURCE_DATE_EPOCH, as lists write it.

    Raises:
        KeyFileError: SOURCE_DATE_EPOCH is set and is no number of seconds.
    """
    return utc(seconds_now())


def expiry(text: str, issued: str) -> str:
    """Return a time from ``90d``, ``6m``, ``2y`` after another one, or from a date.

    Raises:
        ValueError: Neither of them.
    """
    if span := re.fullmatch(r"([1-9][0-9]{0,3})([dwmy])", text):
        with suppress(OverflowError):  # beyond the year 9999
            days = timedelta(int(span[1]) * _DAYS[span[2]])
            return (datetime.strptime(issued, FORM) + days).strftime(FORM)
    if _DATE.fullmatch(text):
        full = text if "T" in text else f"{text}T00:00:00Z"
        with suppress(ValueError):
            return datetime.strptime(full, FORM).strftime(FORM)
    raise ValueError(f"{text!r} is neither a span such as 90d or 2y nor a date")
