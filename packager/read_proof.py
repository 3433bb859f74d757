# SPDX-License-Identifier: Apache-2.0
"""Read a device's proof, and say whose it is and which question it answers.

A proof is untrusted input. Nothing but numbers and hex digits of it is ever printed.
What it says of weights is judged in :mod:`packager.check_proof`.
"""

import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from edge_runtime.errors import ProofError, TrustError
from edge_runtime.formats.json_file import parse_values
from edge_runtime.formats.signing import Signature, Trust, key_id
from edge_runtime.limits import limits
from edge_runtime.live.proof import CONTEXT, SCHEMA
from edge_runtime.live.shared import canonical
from edge_runtime.text import listed
from edge_runtime.times import FORM, seconds_of

_HEX = re.compile(r"[0-9a-f]{64}|")
_KEY_ID, _SIGNATURE = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{128}")
_TOLD_KEYS = 8  # of the known ones, in a message


def read_proof(data: bytes) -> dict[str, Any]:
    """Parse a proof; its fields have the types that they should have afterwards.

    Raises:
        ProofError: Malformed, or not in canonical form.
    """
    try:
        if problem := limits().problem("proof_bytes", len(data), "it"):
            raise ValueError(problem)
        proof = parse_values(data.decode("ascii"))
        # One form only: no second key of a name, nothing that is read in two ways.
        if canonical(proof) != data.removesuffix(b"\n"):
            raise ValueError("not in canonical form")
        if proof["schema"] != SCHEMA:
            raise ValueError(f"schema {proof['schema']}, known is {SCHEMA}")
        _check(proof, nonce=str, round=int, live=list, untold=list)
        _check({"model": ""} | proof, model=_HEX, fingerprint=_HEX)
        datetime.strptime(proof["time"], FORM)
        _check_parts(proof)
        if "signature" in proof:
            _check(proof["signature"], key_id=_KEY_ID, value=_SIGNATURE)
    except (ValueError, LookupError, TypeError, RecursionError) as err:
        raise ProofError(
            f"not a proof as 'dpu-edge proof' writes it: {str(err)[:200]!r}; ask "
            "for it again, and carry it unchanged"
        ) from err
    return dict(proof)


def _check_parts(proof: Mapping[str, Any]) -> None:
    if (disk := proof["disk"]) is not None:
        _check(disk, fingerprint=_HEX, graph=_HEX, bytes=int)
        if "tensors" in disk:
            _check(disk, header=_HEX, tensors=dict)
    for entry in proof["live"]:
        _check(entry, pid=int, status=str, file_now=_HEX)
        if entry["status"] == "loaded":
            _check(entry, fingerprint=_HEX, graph=_HEX)
            datetime.strptime(entry["loaded"], FORM)
    for pid in proof["untold"]:
        _check({"pid": pid}, pid=int)


def _check(record: Mapping[str, Any], **fields: Any) -> None:
    for name, kind in fields.items():
        value = record[name]
        good = (
            type(value) is kind
            if isinstance(kind, type)
            else isinstance(value, str) and kind.fullmatch(value)
        )
        if not good:
            raise ValueError(f"{name}: {value!r}")


class Doubt(StrEnum):
    """Reason why a proof is rejected before weights are compared."""

    UNREADABLE = "unreadable"  # no proof, or a file that cannot be read
    OLD_NONCE = "old nonce"  # answers an earlier question
    WRONG_NONCE = "wrong nonce"
    UNSIGNED = "not signed"
    UNKNOWN_KEY = "unknown key"
    ALTERED = "altered"
    TOO_OLD = "too old"
    UNKNOWN_WEIGHTS = "unknown weights"  # says that it is at no round of any run


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked, and of whom.

    Attributes:
        nonce: What the devices were asked with.
        signers: Key id to public key and name of each known device; none: nobody's
            signature is looked at.
        earlier: Nonces of questions before, so that a late answer is told as one.
    """

    nonce: str
    signers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    earlier: Collection[str] = ()

    @classmethod
    def of(
        cls, nonce: str, keys: Mapping[str, str], earlier: Collection[str] = ()
    ) -> Self:
        """Return the question; keys are public keys in hex, with a name for each."""
        return cls(nonce, {key_id(k): (k, name) for k, name in keys.items()}, earlier)


def check_origin(
    proof: Mapping[str, Any], nonce: str, keys: Mapping[str, str]
) -> tuple[str, str]:
    """Insist on nonce and signer.

    Args:
        proof: From :func:`read_proof`.
        nonce: What the device was asked with.
        keys: Public keys of devices, in hex, with a name for each; none: the signature
            is not looked at.

    Returns:
        The signer's key id and name; empty where nobody's signature was checked.

    Raises:
        TrustError: An answer to another question, altered, or from another device.
    """
    question = Question.of(nonce, keys)
    if found := doubt(proof, question):
        raise TrustError(found[1])
    if not keys:
        return "", ""
    signer: str = proof["signature"]["key_id"]
    return signer, question.signers[signer][1]


def doubt(proof: Mapping[str, Any], question: Question) -> tuple[Doubt, str] | None:
    """Say why a proof is no answer of a known device to this question, if it is none.

    Returns:
        The kind and a sentence; None for an answer. Without signers the signature is
        not looked at.
    """
    nonce = question.nonce
    if proof["nonce"] != nonce:
        kind = Doubt.WRONG_NONCE
        if proof["nonce"] in question.earlier:
            kind = Doubt.OLD_NONCE
        return kind, (
            f"the proof answers the nonce {proof['nonce'][:80]!r}, expected {nonce!r}: "
            "it is an old one, or of another request; ask the device again"
        )
    if not question.signers:
        return None
    if "signature" not in proof:
        return Doubt.UNSIGNED, (
            "the proof is not signed; make a key on the device with 'dpu-edge "
            "device-key' and ask again"
        )
    signature = proof["signature"]
    if signature["key_id"] not in question.signers:
        known = listed(list(question.signers), _TOLD_KEYS)
        return Doubt.UNKNOWN_KEY, (
            f"the proof is signed by key {signature['key_id']}, expected one of "
            f"{known}: it comes from another device"
        )
    public, _ = question.signers[signature["key_id"]]
    message = {key: value for key, value in proof.items() if key != "signature"}
    given = Signature(signature["key_id"], bytes.fromhex(signature["value"]))
    try:
        Trust((public,)).check(CONTEXT, canonical(message), [given])
    except TrustError as err:
        return Doubt.ALTERED, str(err)
    return None


def age_s(proof: Mapping[str, Any]) -> float:
    """Return how old a proof is by the device's clock; negative if that is ahead."""
    return time.time() - seconds_of(proof["time"])
