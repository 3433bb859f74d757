# SPDX-License-Identifier: Apache-2.0
"""The file of a channel's head: small, signed, and strictly read. No I/O.

::

    {"signatures": {KEY_ID: BASE64, ...},
     "signed": {"schema": 1, "model": BASE64, "channel": "stable", "version": 17,
                "at": 1796169600, "expires": 1798761600, "counter": 5, "round": 5,
                "target": BASE64,
                "ways": [[FROM, BYTES, SHA256], [FROM, BYTES, SHA256, TO], ...],
                "bundle": [BYTES, SHA256], "keys": 2, "pausers": [KEY, ...],
                "rollout": {"id": "5", "steps": [[10, 1798700000], ...],
                            "groups": ["lab"]}},
     "pause": {"at": 1798700500, "key": KEY_ID, "signature": BASE64}}

Every device polls this file, so its bytes count: digests are base64 without padding,
``FROM`` and ``TO`` are the first 6 bytes of a fingerprint (they choose a file, and the
file's own header then proves what it is), and what is not used is left out. ``TO`` is
left out where a way leads to the target. Signed are the bytes of ``signed`` as
canonical JSON, in a context of their own.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from edge_runtime.errors import HeadError
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.json_record import Record, is_whole
from edge_runtime.formats.signing import Signature
from edge_runtime.sync.head import (
    CHANNEL_FORM,
    PERMILLE,
    SHORT,
    Head,
    Pause,
    Rollout,
    SignedHead,
    Way,
)
from edge_runtime.times import MAX_SECONDS
from edge_runtime.trust.canonical import encode_canonical

_WHAT = "the channel's head"
_SCHEMA = 1
_NAME_FORM = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def head_message(head: Head) -> bytes:
    """Return the bytes of a head that are signed."""
    return encode_canonical(_signed(head))


def encode_head(
    head: Head, signatures: Iterable[Signature], pause: Pause | None = None
) -> bytes:
    """Encode the file of a head; the same content gives the same bytes."""
    value: dict[str, Any] = {
        "signed": _signed(head),
        "signatures": {s.key_id: _base64(s.value) for s in signatures},
    }
    if pause:
        name, signature = pause.signature.key_id, _base64(pause.signature.value)
        value["pause"] = {"at": pause.at, "key": name, "signature": signature}
    return encode_canonical(value)


def _signed(head: Head) -> dict[str, Any]:
    value: dict[str, Any] = {
        "schema": _SCHEMA,
        "model": _digest64(head.model),
        "channel": head.channel,
        "version": head.version,
        "at": head.at,
        "expires": head.expires,
        "counter": head.counter,
        "round": head.round,
        "target": _digest64(head.target),
        "ways": [_encode_way(way, head.target) for way in head.ways],
    }
    if head.bundle:
        value["bundle"] = [head.bundle[0], _digest64(head.bundle[1])]
    if head.keys:
        value["keys"] = head.keys
    if head.pausers:
        value["pausers"] = [_digest64(key) for key in head.pausers]
    if head.rollout:
        steps = [list(step) for step in head.rollout.steps]
        value["rollout"] = {"id": head.rollout.id, "steps": steps}
        if head.rollout.groups:
            value["rollout"]["groups"] = list(head.rollout.groups)
    return value


def _encode_way(way: Way, target: str) -> list[Any]:
    found: list[Any] = [_digest64(way.parent), way.size, _digest64(way.sha256)]
    return found if target.startswith(way.target) else [*found, _digest64(way.target)]


def _base64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


def _digest64(digest: str) -> str:
    return _base64(bytes.fromhex(digest))


# Reading ------------------------------------------------------------------------------


def read_head(data: bytes) -> SignedHead:
    """Read a head, strictly; nothing is believed yet.

    Raises:
        HeadError: Too large, damaged, not a head, or of a newer schema.
    """
    record = parse_record(data, "head_bytes", _WHAT, HeadError)
    signed, names = record.record("signed"), record.record("signatures")
    signatures = tuple(
        Signature(_key_id(names, name, name), _bytes(names, name, names.text(name), 64))
        for name in names.values
    )
    pause = _read_pause(record.record("pause")) if "pause" in record else None
    return replace(_read_record(signed), signatures=signatures, pause=pause)


def read_signed(values: Mapping[str, Any]) -> SignedHead:
    """Read what a head says where something else vouches for it, without signatures.

    Raises:
        HeadError: Not what a head says, or of a newer schema.
    """
    return _read_record(Record(values, _WHAT, HeadError))


def _read_record(signed: Record) -> SignedHead:
    signed.schema(_SCHEMA)
    try:
        message = encode_canonical(signed.values)
    except ValueError as err:
        raise HeadError(f"{_WHAT} cannot be signed: {err}") from err
    head = _read_signed(signed)
    # One form for one content: else whoever adds a pause could break a signature.
    if message != head_message(head):
        known = ", ".join(json.loads(head_message(head)))
        raise HeadError(f"{_WHAT} holds more, or less, than {known}")
    return SignedHead(head, message, ())


def _read_signed(signed: Record) -> Head:
    at = _second(signed, "at")
    target = _hex(signed, "target", signed.text("target"))
    bundle = _bundle(signed) if "bundle" in signed else None
    return Head(
        _hex(signed, "model", signed.text("model")),
        signed.matching("channel", CHANNEL_FORM, "a name of a to z, 0 to 9, - and _"),
        signed.integer("version", least=1),
        at,
        _second(signed, "expires", least=at + 1),
        signed.integer("counter"),
        signed.integer("round"),
        target,
        tuple(_read_way(signed, entry, target) for entry in _lists(signed, "ways")),
        bundle,
        signed.integer("keys", 0),
        _read_rollout(signed.record("rollout")) if "rollout" in signed else None,
        tuple(_hex(signed, "pausers", key) for key in signed.texts("pausers", [])),
    )


def _second(record: Record, name: str, least: int = 0) -> int:
    """Return a time; later ones could be written nowhere."""
    return record.integer(name, least=least, most=MAX_SECONDS)


def _lists(record: Record, name: str) -> list[list[Any]]:
    found = record.values.get(name)
    if not isinstance(found, list) or not all(isinstance(e, list) for e in found):
        raise record.problem(name, "a list of lists")
    return found


def _read_way(signed: Record, entry: list[Any], target: str) -> Way:
    match entry:
        case [str(parent), size, str(sha256), *rest] if (
            is_whole(size, 1) and not rest[1:]
        ):
            to = target[:SHORT]
            if rest and isinstance(rest[0], str):
                to = _hex(signed, "ways", rest[0], SHORT // 2)
            if not rest or isinstance(rest[0], str):
                start = _hex(signed, "ways", parent, SHORT // 2)
                return Way(start, to, size, _hex(signed, "ways", sha256))
    raise signed.problem("ways", "entries of from, bytes, SHA-256 and perhaps to")


def _bundle(signed: Record) -> tuple[int, str]:
    match signed.values["bundle"]:
        case [size, str(sha256)] if is_whole(size, 1):
            return size, _hex(signed, "bundle", sha256)
    raise signed.problem("bundle", "bytes and SHA-256")


def _read_rollout(record: Record) -> Rollout:
    steps = []
    for entry in _lists(record, "steps"):
        match entry:
            case [share, start] if is_whole(share, most=PERMILLE) and is_whole(
                start, most=MAX_SECONDS
            ):
                steps.append((share, start))
            case _:
                raise record.problem("steps", "entries of permille and second")
    starts = [start for _, start in steps]
    if starts != sorted(starts):
        raise record.problem("steps", "entries in the order of their time")
    groups = record.texts("groups", [])
    if not all(re.fullmatch(_NAME_FORM, group) for group in groups):
        raise record.problem("groups", "names of letters, digits, '.', '_' and '-'")
    name = record.matching("id", _NAME_FORM, "letters, digits, '.', '_' and '-'")
    return Rollout(name, tuple(steps), tuple(groups))


def _read_pause(record: Record) -> Pause:
    name = record.text("key")
    value = _bytes(record, "signature", record.text("signature"), 64)
    return Pause(_second(record, "at"), Signature(_key_id(record, "key", name), value))


def _key_id(record: Record, field: str, text: str) -> str:
    if not re.fullmatch("[0-9a-f]{16}", text):
        raise record.problem(field, "a key's id, 16 hexadecimal digits")
    return text


def _hex(record: Record, field: str, text: str, size: int = 32) -> str:
    return _bytes(record, field, text, size).hex()


def _bytes(record: Record, field: str, text: str, size: int) -> bytes:
    try:
        found = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (ValueError, binascii.Error):
        found = b""
    # One form only for the same bytes: no padding, no stray bits or characters.
    if len(found) != size or _base64(found) != text:
        raise record.problem(field, f"{size} bytes in base64 for addresses")
    return found
