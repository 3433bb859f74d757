# SPDX-License-Identifier: Apache-2.0
"""The in-toto statement: a SLSA provenance, in an envelope that release keys sign.

Statement v1, predicate ``https://slsa.dev/provenance/v1``, DSSE v1. Ed25519 is
deterministic and the JSON has one form, so the same release and keys give the same
bytes. Who vouches is the holder of the key and no build platform: ``builder`` says so.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.errors import TrustError
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.json_record import Record
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.formats.signing import is_signed, key_id
from edge_runtime.live.shared import public_key
from packager.provenance.facts import Facts

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:dpu-edge:release:v1"


def encode_statement(
    facts: Facts, byproducts: Mapping[str, str], signers: Iterable[str], time: str = ""
) -> bytes:
    """Return the statement about a release, as the bytes to be signed.

    Args:
        facts: What is known of it.
        byproducts: SHA-256 of files that were written about it.
        signers: Ids of the keys that will sign.
        time: When, in ISO 8601; empty to leave it out.
    """
    details: dict[str, Any] = {
        "builder": {"id": f"urn:dpu-edge:key:{'+'.join(sorted(set(signers)))}"},
        "byproducts": _resources(byproducts),
    }
    if time:
        details["metadata"] = {"finishedOn": time}
    if versions := facts.record.get("versions"):
        details["builder"]["version"] = versions
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": _resources(facts.subjects),
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": build_definition(facts),
            "runDetails": details,
        },
    }
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()


def build_definition(facts: Facts) -> dict[str, Any]:
    """Return what went into a release, as SLSA's ``buildDefinition``."""
    given = {"run": facts.run, "round": facts.round, "counter": facts.counter}
    if facts.run is None:
        del given["run"]
    parent = {f"parent/{WEIGHTS_NAME}": facts.parent}
    return {
        "buildType": BUILD_TYPE,
        "externalParameters": {**given, "model": facts.model, **facts.stated},
        "resolvedDependencies": _resources(parent | dict(facts.parts)),
    }


def _resources(digests: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": n, "digest": {"sha256": d}} for n, d in digests.items()]


def digests(resources: Iterable[Record]) -> dict[str, str]:
    """Return the digests that a list of in-toto resources states, by name."""
    return {r.text("name"): r.record("digest").digest("sha256") for r in resources}


# The envelope -------------------------------------------------------------------------


def sign_statement(payload: bytes, keys: Iterable[Ed25519PrivateKey]) -> bytes:
    """Return a statement in its DSSE envelope, signed by some keys."""
    signed = {key_id(public_key(key)): key.sign(_framed(payload)) for key in keys}
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [
            {"keyid": name, "sig": base64.b64encode(value).decode()}
            for name, value in sorted(signed.items())
        ],
    }
    return json.dumps(envelope, indent=1).encode() + b"\n"


def open_statement(data: bytes, keys: Iterable[str]) -> tuple[Record, list[str]]:
    """Open an envelope that at least one of some keys signed.

    Args:
        data: The envelope.
        keys: Public Ed25519 keys, 32 raw bytes in hex.

    Returns:
        The statement, and the ids of those of the keys that signed it.

    Raises:
        TrustError: Malformed, signed by none of them, or altered.
    """
    what = "the statement"
    envelope = parse_record(data, "record_bytes", what, TrustError)
    if envelope.text("payloadType") != PAYLOAD_TYPE:
        raise envelope.problem("payloadType", f'"{PAYLOAD_TYPE}"')
    payload = _bytes(envelope, "payload")
    trusted = {key_id(key): key for key in keys}
    signers = []
    for signature in envelope.records("signatures"):
        name = signature.text("keyid", "")
        if name not in trusted:
            continue  # someone else's, which says nothing to us
        if not is_signed(trusted[name], _bytes(signature, "sig"), _framed(payload)):
            raise TrustError(
                f"the signature of key {name} is wrong: the statement was altered"
            )
        signers.append(name)
    if not signers:
        raise TrustError(
            f"the statement is signed by none of {', '.join(sorted(trusted))}; give "
            "the public key of who wrote it"
        )
    statement = parse_record(payload, "record_bytes", what, TrustError)
    for name, known in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
        if statement.text(name) != known:
            raise statement.problem(name, f'"{known}"')
    return statement, signers


def _bytes(record: Record, name: str) -> bytes:
    try:
        return base64.b64decode(record.text(name), validate=True)
    except ValueError as err:
        raise record.problem(name, "base64") from err


def _framed(payload: bytes) -> bytes:
    """Return what is really signed: DSSE's pre-authentication encoding."""
    parts = (PAYLOAD_TYPE.encode(), payload)
    return b"DSSEv1" + b"".join(b" %d %b" % (len(part), part) for part in parts)
