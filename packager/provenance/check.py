# SPDX-License-Identifier: Apache-2.0
"""Check the provenance of a release against the release as it is here."""

import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from edge_runtime.errors import TrustError
from edge_runtime.reading import read_bounded
from packager.provenance.bom import stated_target
from packager.provenance.facts import Facts
from packager.provenance.model_signature import verify_model
from packager.provenance.statement import build_definition, digests, open_statement
from packager.provenance.write import Paths


class Found(StrEnum):
    """What a check came to."""

    RIGHT = "right"
    DIFFERENT = "different"
    UNCHECKED = "not checked"


@dataclass(frozen=True, slots=True)
class Part:
    """What is known of one provenance file.

    Attributes:
        name: Of the file.
        found: What the check came to.
        reason: Why, or who signed it.
    """

    name: str
    found: Found
    reason: str


def check_provenance(
    facts: Facts, paths: Paths, keys: Sequence[str], model_keys: Sequence[Path] = ()
) -> list[Part]:
    """Check every provenance file of a release that is there.

    Args:
        facts: The release as it is here.
        paths: Where its provenance lies.
        keys: Public Ed25519 keys that the statement may be signed by, in hex.
        model_keys: Files of public keys that the model may be signed by.

    Raises:
        OSError: A file cannot be read, or there is none at all.
        TrustError: A file is malformed, altered, or signed by none of the keys.
    """
    there = [p for p in (paths.bom, paths.statement, paths.signature) if p.exists()]
    if not there:
        raise FileNotFoundError(
            f"{paths.statement.parent} holds no provenance of {facts.name}; write it "
            f"with 'dpu-patch provenance {shlex.quote(facts.name)}', or say where it "
            "is with -o"
        )
    return list(_parts(facts, paths, there, keys, model_keys))


def _parts(
    facts: Facts,
    paths: Paths,
    there: Sequence[Path],
    keys: Sequence[str],
    model_keys: Sequence[Path],
) -> Iterator[Part]:
    written: Mapping[str, str] = {}
    if paths.statement in there:
        if keys:
            part, written = _statement(facts, paths.statement, keys)
            yield part
        else:
            yield _unchecked(paths.statement, "give the Ed25519 public key with --key")
    if paths.bom in there:
        yield _bom(facts, paths.bom, written)
    if paths.signature in there:
        if model_keys:
            yield _signature(facts, paths.signature, model_keys)
        else:
            yield _unchecked(paths.signature, "give the P-256 public key with --key")


def _statement(
    facts: Facts, path: Path, keys: Sequence[str]
) -> tuple[Part, Mapping[str, str]]:
    statement, signers = open_statement(_read(path), keys)
    predicate = statement.record("predicate")
    wrong = list(_differences(digests(statement.records("subject")), facts.subjects))
    if predicate.record("buildDefinition").values != build_definition(facts):
        wrong.append("what it says of how the weights were made is not what is here")
    written = digests(predicate.record("runDetails").records("byproducts"))
    if wrong:
        return Part(path.name, Found.DIFFERENT, "; ".join(wrong)), written
    return Part(path.name, Found.RIGHT, f"signed by {', '.join(signers)}"), written


def _differences(stated: Mapping[str, str], here: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(stated.keys() | here.keys()):
        if name not in here:
            yield f"{name} is not here"
        elif name not in stated:
            yield f"{name} is not spoken of"
        elif stated[name] != here[name]:
            yield f"{name} has SHA-256 {here[name]}, stated is {stated[name]}"


def _bom(facts: Facts, path: Path, written: Mapping[str, str]) -> Part:
    data = _read(path)
    target = stated_target(data)
    if target != facts.target:
        reason = f"about weights {target}, here are {facts.target}"
        return Part(path.name, Found.DIFFERENT, reason)
    if path.name not in written:
        return _unchecked(path, "only a statement that is checked proves who wrote it")
    if written[path.name] != hashlib.sha256(data).hexdigest():
        return Part(
            path.name, Found.DIFFERENT, "altered since the statement was signed"
        )
    return Part(path.name, Found.RIGHT, "bound by the statement")


def _signature(facts: Facts, path: Path, keys: Sequence[Path]) -> Part:
    _read(path)  # is it a file, and within its limit
    key, problem = verify_model(facts.path, path, keys)
    if problem:
        return Part(path.name, Found.DIFFERENT, problem)
    return Part(path.name, Found.RIGHT, f"signed by {key.name}")


def _unchecked(path: Path, reason: str) -> Part:
    return Part(path.name, Found.UNCHECKED, reason)


def _read(path: Path) -> bytes:
    return read_bounded(path, "record_bytes", str(path), TrustError, regular=True)
