# SPDX-License-Identifier: Apache-2.0
"""The key list as a file: root metadata of The Update Framework (TUF), version 1.0.

::

    {"signatures": [{"keyid": ..., "sig": ...}, ...],
     "signed": {"_type": "root", "spec_version": "1.0.31", "version": 2,
                "expires": "2030-01-01T00:00:00Z", "x-issued": "2026-11-28T00:00:00Z",
                "consistent_snapshot": false,
                "keys": {KEYID: {"keytype": "ed25519", "scheme": "ed25519",
                                 "keyval": {"public": HEX}}, ...},
                "roles": {"root": {"keyids": [...], "threshold": 2}, "targets": ...,
                          "snapshot": ..., "timestamp": ...}}}

The keys of ``root`` sign the next list, the keys of ``targets`` sign releases: a patch
and a bundle are what TUF calls targets, and their keys sign them directly. ``snapshot``
and ``timestamp`` have to be there, and nothing here asks them. ``x-issued``, of which
TUF knows nothing, says when the list was made. Here a list is read and its signatures
are counted; which list may follow which is in :mod:`edge_runtime.trust.rules`.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from edge_runtime.errors import KeyFileError, KeyListError
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.json_record import Record
from edge_runtime.formats.signing import Trust, is_signed
from edge_runtime.limits import limits
from edge_runtime.reading import read_bounded
from edge_runtime.times import seconds_of
from edge_runtime.trust.canonical import encode_canonical

_WHAT = "the key list"
_LIMIT = "key_list_bytes"
ED25519 = "ed25519", "ed25519"  # type and scheme of a key
# TUF's other kinds: they may stand in a list, and count for nothing here.
OTHERS = ("rsa", "rsassa-pss-sha256"), ("ecdsa", "ecdsa-sha2-nistp256")
ROLES = ("root", "targets", "snapshot", "timestamp")
ISSUED = "x-issued"
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-5][0-9]Z")
_NAME = re.compile(r"([1-9][0-9]{0,8})\.root\.json", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Root:
    """What a key list says.

    Times are UTC as text of one form, so they compare as text.

    Attributes:
        version: Its number; the next one's is higher by one.
        expires: From when on it counts as expired.
        issued: When it was made; empty where it does not say.
        keys: Who signs the next list, and how many of them have to.
        releases: Who signs releases, and how many of them have to.
        sha256: Of the file's signed part, hex.
    """

    version: int
    expires: str
    issued: str
    keys: Trust
    releases: Trust
    sha256: str


@dataclass(frozen=True, slots=True)
class SignedRoot:
    """A key list whose signatures have not been looked at yet.

    Attributes:
        root: What it says.
        message: The bytes that are signed.
        signatures: In hex, by TUF's id of the key.
    """

    root: Root
    message: bytes
    signatures: Mapping[str, str]

    def signers(self, trust: Trust) -> tuple[str, ...]:
        """Return which of these keys signed it; a wrong signature counts for none."""
        return tuple(
            key
            for key in dict.fromkeys(trust.keys)
            if is_signed(
                key, _unhex(self.signatures.get(tuf_key_id(key), "")), self.message
            )
        )


def tuf_key(public: str) -> dict[str, Any]:
    """Return the entry of a public key, 32 raw bytes in hex, in a key list."""
    return {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": public}}


def tuf_key_id(public: str) -> str:
    """Return TUF's id of a public key: SHA-256 of its entry, hex."""
    return _entry_id(tuf_key(public))


def is_list(data: bytes) -> bool:
    """Whether this is the beginning of a key list rather than of a PEM file."""
    return data.lstrip()[:1] == b"{"


def list_number(name: str) -> int | None:
    """Return N of a file's name ``N.root.json``; None for other names."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def load_list(path: str | PathLike[str], *, regular: bool = False) -> bytes:
    """Read the file of a key list, and no more of it than a list may have.

    Args:
        path: The file.
        regular: Whether it must be an ordinary file, as others may put things there.

    Raises:
        OSError: It cannot be read.
        KeyListError: It is larger.
    """
    return read_bounded(Path(path), _LIMIT, _WHAT, KeyListError, regular=regular)


def read_root(data: bytes) -> SignedRoot:
    """Read a key list, strictly; nothing is believed yet.

    Stricter than TUF asks for: every key has the id that follows from it, no name
    stands twice in an object, and the threshold of the release keys can be met.

    Args:
        data: The content of the file.

    Raises:
        KeyListError: Too large, damaged, or not a key list.
    """
    record = parse_record(data, _LIMIT, _WHAT, KeyListError)
    signed, signatures = record.record("signed"), _signatures(record)
    try:
        message = encode_canonical(signed.values)
    except ValueError as err:
        raise KeyListError(f"{_WHAT} cannot be signed: {err}") from err
    _insist(signed, "_type", "'root'", signed.text("_type") == "root")
    spec = re.fullmatch(r"1\.[0-9]+(\.[0-9]+)?", signed.text("spec_version"))
    _insist(signed, "spec_version", "1.x", spec)
    signed.flag("consistent_snapshot", False)
    version = signed.integer("version", least=1)
    expires, issued = _time(signed, "expires"), ""
    if ISSUED in signed:
        issued = _time(signed, ISSUED)
        _insist(signed, ISSUED, f"a time before {expires}", issued < expires)
    keys, roles = _keys(signed), signed.record("roles")
    _insist(signed, "roles", f"{', '.join(ROLES)}", set(roles.values) == set(ROLES))
    trusts = {name: _role(name, role, keys) for name, role in roles.members()}
    digest = hashlib.sha256(message).hexdigest()
    root = Root(version, expires, issued, trusts["root"], trusts["targets"], digest)
    return SignedRoot(root, message, signatures)


def _signatures(record: Record) -> dict[str, str]:
    entries, found = record.records("signatures"), dict[str, str]()
    if problem := limits().problem("list_signatures", len(entries), _WHAT):
        raise KeyListError(problem)
    for entry in entries:
        name = entry.text("keyid")
        _insist(entry, "keyid", "one signature of each key", name not in found)
        found[name] = entry.text("sig")
    return found


def _keys(signed: Record) -> dict[str, str]:
    """Return the Ed25519 keys, hex, by TUF's ids; other kinds count for nothing."""
    entries, found = signed.record("keys"), dict[str, str]()
    if problem := limits().problem("list_keys", len(entries.values), _WHAT):
        raise KeyListError(problem)
    for name, entry in entries.members():
        kind = entry.text("keytype"), entry.text("scheme")
        value = entry.record("keyval")
        public = value.text("public")
        _insist(entry, "scheme", "one that TUF names", kind in (ED25519, *OTHERS))
        # Else one key under two ids could meet a threshold of two.
        _insist(entries, name, "the id of the key", name == _entry_id(entry.values))
        if kind == ED25519:
            form, expected = re.fullmatch("[0-9a-f]{64}", public), "64 digits, 0 to f"
            _insist(value, "public", expected, form)
            _insist(value, "public", "no key twice", public not in found.values())
            found[name] = public
    return found


def _entry_id(entry: Mapping[str, Any]) -> str:
    what = {name: entry[name] for name in ("keytype", "scheme", "keyval")}
    try:
        return hashlib.sha256(encode_canonical(what)).hexdigest()
    except ValueError as err:
        raise KeyListError(f"a key of {_WHAT} has no id: {err}") from err


def _role(name: str, role: Record, keys: Mapping[str, str]) -> Trust:
    ids, threshold = role.texts("keyids"), role.integer("threshold", least=1)
    _insist(role, "keyids", "no id twice", len(set(ids)) == len(ids))
    if name not in ("root", "targets"):
        return Trust()  # nothing here asks the other two
    found = tuple(keys[i] for i in ids if i in keys)
    # No key at all would mean elsewhere that nothing is checked.
    _insist(role, "keyids", "one Ed25519 key of the list at least", found)
    try:
        return Trust(found, threshold)
    except KeyFileError as err:
        raise KeyListError(f"{_WHAT} cannot be met, role {name}: {err}") from err


def _time(record: Record, name: str) -> str:
    text = record.text(name)
    try:
        seconds_of(text)  # no 30 February
        is_time = _TIME.fullmatch(text)
    except ValueError:
        is_time = None
    _insist(record, name, "a time such as 2030-01-01T00:00:00Z", is_time)
    return text


def _insist(record: Record, name: str, expected: str, holds: object) -> None:
    if not holds:
        raise record.problem(name, expected)


def _unhex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""  # verifies nothing
