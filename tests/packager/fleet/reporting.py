# SPDX-License-Identifier: Apache-2.0
"""Devices that are nothing but a key: they report whatever a test wants."""

import json
import time

from edge_runtime.formats.signing import framed, key_id
from edge_runtime.live.proof import CONTEXT, encode_public
from edge_runtime.live.report import NO_HEAD, Change, Outcome, Report, encode_report
from edge_runtime.live.shared import canonical, public_key
from packager.keys import generate_key

OTHER = "77" * 32


class Fake:
    """A device that reports into a place."""

    def __init__(self, name, place=None, keys=None):
        self.name, self.place, self.key, self.n = name, place, generate_key(), 0
        if keys is not None:
            keys.mkdir(exist_ok=True)
            (keys / f"{name}.pub.pem").write_bytes(encode_public(self.key))

    @property
    def id(self):
        return key_id(public_key(self.key))

    def proof(self, nonce, fingerprint, **changes):
        """A proof as a device makes it, signed by this one's key."""
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        disk = {"fingerprint": fingerprint, "graph": "33" * 32, "bytes": 9}
        record = {
            "schema": 1,
            "time": made,
            "nonce": nonce,
            "round": 1,
            "disk": disk,
            "fingerprint": fingerprint,
            "live": [],
            "untold": [],
            "release_counter": 1,
        } | changes
        value = self.key.sign(framed(CONTEXT, canonical(record))).hex()
        record["signature"] = {"key_id": self.id, "value": value}
        return record

    def report(
        self, signed, outcome=Outcome.APPLIED, *, about=None, running=None, **facts
    ):
        """The bytes of a report that answers a head."""
        self.n = facts.pop("n", self.n + 1)
        target, number, counter = about or (
            (signed.head.target, signed.head.round, signed.head.counter)
            if signed
            else (OTHER, 1, 1)
        )
        proof = facts.pop("proof", None)
        made = Report(
            device=self.name,
            n=self.n,
            counter=counter,
            head=(signed.sha256, signed.head.version) if signed else None,
            change=Change("", outcome, number, target, facts.pop("reason", "")),
            **{"at": facts.pop("at", int(time.time())), "runtime": "1.0"} | facts,
        )
        nonce = signed.sha256 if signed else NO_HEAD
        proof = proof or self.proof(nonce, running or target)
        return encode_report(made, json.loads(canonical(proof)), self.key)

    def put(self, data, name=None, device=None):
        """Leave bytes where a device of some name leaves its reports."""
        path = self.place.root / "reports" / (device or self.name)
        path.mkdir(parents=True, exist_ok=True)
        (path / (name or f"{self.n}.json")).write_bytes(data)

    def send(self, signed, outcome=Outcome.APPLIED, **facts):
        """Leave a report."""
        self.put(self.report(signed, outcome, **facts))
