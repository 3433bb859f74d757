# SPDX-License-Identifier: Apache-2.0
"""Reading what devices reported: strictly, as anybody may have written it.

What counts is who signed. A report is proved if a key that the operator knows made both
signatures, of the report and of the proof in it, and it then counts for the device that
the key belongs to, wherever it lay and whatever it says of itself.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import KeyFileError, ProofError, TrustError
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.json_record import Record
from edge_runtime.formats.signing import framed, is_signed, key_id, read_public
from edge_runtime.live.report import (
    CONTEXT,
    DEVICE_FORM,
    MAX_REASON,
    NO_HEAD,
    SCHEMA,
    Outcome,
)
from edge_runtime.live.shared import canonical
from edge_runtime.text import printable
from edge_runtime.times import MAX_SECONDS, UPTIME_S
from packager.fleet.database import Row
from packager.fleet.head import MOST
from packager.read_proof import check_origin, read_proof
from packager.release import as_text

_WHAT = "the report"
_KEY_SUFFIX = ".pub.pem"
DeviceKeys = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Known:
    """A head that the watcher has seen.

    Attributes:
        version: Its version.
        at: When it was signed.
    """

    version: int
    at: int


@dataclass(frozen=True, slots=True)
class Reported:
    """A report whose signatures have not been looked at yet.

    Attributes:
        record: Its fields, of the right types.
        proof: The proof in it; None where it had no room.
    """

    record: Mapping[str, Any]
    proof: Mapping[str, Any] | None


def read_keys(folder: Path) -> dict[str, tuple[str, str]]:
    """Read the devices' public keys: ``<device>.pub.pem``, a file each.

    Returns:
        Public key (hex) and name of the device, by key id. Of two files with one key
        the first counts: a device is counted once.

    Raises:
        KeyFileError: A file holds no public key, or a folder none at all.
        OSError: It cannot be read.
    """
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.glob(f"*{_KEY_SUFFIX}")):
        public, name = read_public(path), as_text(path.name)
        found.setdefault(key_id(public), (public, name.removesuffix(_KEY_SUFFIX)))
    if not found:
        raise KeyFileError(
            f"{folder} holds no keys of devices: put what 'dpu-edge device-key' prints "
            f"there, as DEVICE{_KEY_SUFFIX}"
        )
    return found


def read_report(data: bytes) -> Reported:
    """Read a report, strictly; nothing is believed yet.

    Raises:
        ProofError: Too large, malformed, not in canonical form, or of a newer schema.
    """
    record = parse_record(data, "report_bytes", _WHAT, ProofError)
    record.schema(SCHEMA)
    if canonical(record.values) != data.removesuffix(b"\n"):
        raise ProofError(f"{_WHAT} is malformed: it is not in canonical form")
    proof = record.values.get("proof")
    fields = {
        "device": record.matching("device", DEVICE_FORM, "a name"),
        "n": record.integer("n", least=1, most=MOST),
        "at": record.integer("at", most=MAX_SECONDS),
        "outcome": record.one_of("outcome", list(Outcome)),
        "month_bytes": record.integer("month_bytes", most=MOST),
        **{name: _text(record, name) for name in ("reason", "name", "group")},
        "runtime": _text(record, "runtime"),
        **_read_head(record),
        **_read_release(record.record("release")),
        **_read_signature(record.record("signature")),
    }
    message = {k: v for k, v in record.values.items() if k != "signature"}
    fields["message"] = canonical(message)
    return Reported(fields, None if proof is None else read_proof(canonical(proof)))


def _read_head(record: Record) -> dict[str, Any]:
    if record.values.get("head") is None:
        return {"head": "", "head_version": 0}
    head = record.record("head")
    version = head.integer("version", most=MOST)
    return {"head": head.digest("sha256"), "head_version": version}


def _read_release(release: Record) -> dict[str, Any]:
    numbers = {n: release.integer(n, most=MOST) for n in ("counter", "round")}
    return numbers | {"target": release.digest("target")}


def _read_signature(signature: Record) -> dict[str, Any]:
    name = signature.matching("key_id", "[0-9a-f]{16}", "a key's id")
    value = signature.matching("value", "[0-9a-f]{128}", "a signature")
    return {"key_id": name, "signature": bytes.fromhex(value)}


def _text(record: Record, name: str) -> str:
    return printable(record.text(name)[:MAX_REASON])[:MAX_REASON]


def signer(report: Reported, keys: DeviceKeys) -> str:
    """Return the name of the device whose known key signed; empty for nobody known.

    Raises:
        TrustError: It says that a known key signed it, and that is not so; or its proof
            answers another head than the report names.
    """
    record, proof = report.record, report.proof
    public, name = keys.get(record["key_id"], ("", ""))
    if not public:
        return ""
    message = framed(CONTEXT, record["message"])
    if not is_signed(public, record["signature"], message):
        raise TrustError(f"the signature of {name}'s key is wrong: altered, or forged")
    if proof is not None:
        check_origin(proof, record["head"] or NO_HEAD, {public: name})
    return name


def row_of(
    report: Reported,
    name: str,
    *,
    heads: Mapping[str, Known],
    counters: Mapping[str, Iterable[tuple[int, int]]],
    now: int,
) -> Row:
    """Return what the database takes of a report.

    Args:
        report: The report.
        name: Of the device that signed it; empty for nobody known.
        heads: The heads that are known, by SHA-256.
        counters: Counter and head version of the known releases, by fingerprint.
        now: Seconds since 1970.
    """
    record = report.record
    head = heads.get(record["head"])
    running, unclear = runs(report.proof)
    proof = report.proof or {}
    version = head.version if head else record["head_version"]
    least = head.at if head else 0
    if record["at"] < UPTIME_S and not head:  # no time; the first head's is the least
        least = min((known.at for known in heads.values()), default=0)
    known = [c for c, since in counters.get(record["target"], ()) if since <= version]
    return Row(
        # Not before the head that it answers, nor after it came: clocks may be wrong.
        at=min(max(record["at"], least), now),
        device=name or record["device"],
        received=now,
        head_version=version,
        counter=max(known, default=record["counter"]),
        reason=record["reason"] or unclear,
        proved=bool(name),
        running=running,
        running_round=_number(proof.get("round")) if running else 0,
        running_counter=_number(proof.get("release_counter")) if running else 0,
        group=record["group"],
        **{
            field: record[field]
            for field in (
                *("n", "round", "target", "outcome", "key_id", "name"),
                *("runtime", "month_bytes"),
            )
        },
    )


def runs(proof: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return what a device runs by its proof, or nothing and why that is not clear."""
    if proof is None:
        return "", "the report has no proof: it would be too long"
    claimed, disk = proof["fingerprint"], proof["disk"]
    if disk is None or disk["fingerprint"] != claimed:
        return "", "the disk does not hold what the device says that it runs"
    for entry in proof["live"]:
        if entry["status"] != "loaded":
            return "", f"process {_number(entry['pid'])} does not tell what it runs"
        if entry["fingerprint"] != claimed or entry["graph"] != disk["graph"]:
            return "", f"process {_number(entry['pid'])} still runs other weights"
        if entry["file_now"] not in ("", claimed):
            return "", f"the weights of process {_number(entry['pid'])} were written to"
    if proof["untold"]:
        return "", f"process {_number(proof['untold'][0])} does not tell what it runs"
    return claimed, ""


def _number(value: object) -> int:
    return value if type(value) is int and 0 <= value <= MOST else 0


def device_of(path: str) -> str:
    """Return the device that a report's path claims; empty if it is no such path."""
    found = re.fullmatch(rf"reports/({DEVICE_FORM})/[A-Za-z0-9._-]{{1,80}}\.json", path)
    return found[1] if found else ""
