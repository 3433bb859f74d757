# SPDX-License-Identifier: Apache-2.0
"""One release: a line of the ledger, ``runs/NAME/releases.jsonl``."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from edge_runtime.errors import RoundError
from edge_runtime.formats.json_record import Record
from edge_runtime.times import FORM
from packager.packed_file import Facts

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One file that was made for devices.

    Attributes:
        counter: Release counter of the target.
        round: Number of the round.
        kind: ``patch`` or ``bundle``.
        model: Identity of network and run, hexadecimal.
        parent: Fingerprint that the file leads from, hexadecimal.
        target: Fingerprint that it leads to, hexadecimal.
        signers: Ids of the keys that signed it.
        file: Its name.
        to: Where it was written to: a folder, ``.`` for the run's own, or an address.
        bytes: Its size.
        sha256: Its SHA-256, hexadecimal.
        at: When it was recorded, UTC.
    """

    counter: int
    round: int
    kind: str
    model: str
    parent: str
    target: str
    signers: tuple[str, ...]
    file: str
    to: str
    bytes: int
    sha256: str
    at: str

    @property
    def second(self) -> int:
        """When it was recorded, in seconds since 1970."""
        return int(datetime.strptime(self.at, FORM).replace(tzinfo=UTC).timestamp())


def release_of(
    facts: Facts, *, file: str, to: str, size: int, sha256: str, at: str
) -> Release:
    """Return the release that a finished file is; the rest as in :class:`Release`."""
    header = facts.header
    return Release(
        counter=header.counter,
        round=header.round,
        kind=facts.kind,
        model=header.model,
        parent=header.parent,
        target=header.target,
        signers=facts.signers,
        file=file,
        to=to,
        bytes=size,
        sha256=sha256,
        at=at,
    )


def as_text(name: object) -> str:
    """Return a name as text; those on a disk may be none."""
    return str(name).encode(errors="backslashreplace").decode()


def encode_release(release: Release) -> bytes:
    """Return the line of the ledger for a release."""
    return json.dumps({"schema": SCHEMA} | asdict(release)).encode() + b"\n"


def decode_release(record: Record) -> Release:
    """Return the release that a line of the ledger holds.

    Raises:
        RoundError: A field is missing or malformed.
    """
    record.schema(SCHEMA)
    try:
        release = Release(
            counter=record.integer("counter"),
            round=record.integer("round", most=(1 << 32) - 1),
            kind=record.text("kind"),
            model=record.digest("model"),
            parent=record.digest("parent"),
            target=record.digest("target"),
            signers=tuple(record.texts("signers")),
            file=record.text("file"),
            to=record.text("to"),
            bytes=record.integer("bytes"),
            sha256=record.digest("sha256"),
            at=record.text("at"),
        )
        if not _is_time(release):
            raise record.problem("at", "a time such as 2026-01-31T23:59:00Z")
    except RoundError as err:
        raise not_readable(err) from err
    return release


def _is_time(release: Release) -> bool:
    try:
        release.second  # noqa: B018 - whether it can be told
    except ValueError:
        return False
    return True


def not_readable(error: RoundError) -> RoundError:
    """Return the error for a line that cannot be read, with what to do about it."""
    return RoundError(
        f"{error}; restore the file, or move it away: it is made again from the "
        "patches beside the rounds"
    )
