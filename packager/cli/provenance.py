# SPDX-License-Identifier: Apache-2.0
"""``dpu-patch provenance``: what a release is, in formats of public tools."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.commandline import emit, json_option
from edge_runtime.errors import how_to_install
from edge_runtime.exit_codes import DIFFERENT, OK
from edge_runtime.formats.kinds import Kind, refuse_others
from edge_runtime.parameters import FileOf
from edge_runtime.reading import read_key_file
from edge_runtime.text import printable
from edge_runtime.times import utc
from packager.cli.keys import ask_passphrase
from packager.cli.options import runs_option

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from packager.provenance import Facts, Paths


@click.command()
@click.argument("release", metavar="ROUND|BUNDLE|PATCH", type=click.Path())
@runs_option
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the files are.  [default: beside the round folder or file]",
)
@click.option(
    "--key",
    "keys",
    metavar="KEY.pem",
    multiple=True,
    required=True,
    type=FileOf(Kind.PRIVATE_KEY, Kind.PUBLIC_KEY),
    help="Sign, or check, with this key (repeatable): Ed25519 the statement, P-256 the "
    "model signature.",
)
@click.option("--check", is_flag=True, help="Check the files; keys are public ones.")
@json_option
def provenance(
    release: str,
    *,
    runs: Path,
    output: Path | None,
    keys: tuple[Path, ...],
    check: bool,
    as_json: bool,
) -> int:
    """Write a release's provenance for public tools, or check it.

    \b
    NAME.cdx.json     bill of materials (CycloneDX 1.6)
    NAME.intoto.json  in-toto statement (SLSA provenance), signed by Ed25519 keys
    NAME.sig          signature of the OpenSSF Model Signing tool, by a P-256 key
                      (dpu-patch keygen --kind p256; the extra 'provenance')

    All speak of the same SHA-256. They hold a time only where SOURCE_DATE_EPOCH gives
    one. With --check exit code 5 says that something differs or was not checked, 8
    that a signature is not trusted.
    """  # noqa: D301 - click looks for this very character
    from packager.provenance import Paths, read_facts
    from packager.rounds.names import find_round

    path = Path(release)
    if path.is_file():
        refuse_others(path, (Kind.PATCH, Kind.BUNDLE))
    facts = read_facts(path if path.is_file() else find_round(release, runs))
    paths = Paths.of(facts, output)
    run = _check if check else _write
    with _extra():
        return run(facts, paths, keys, as_json=as_json)


def _write(
    facts: "Facts", paths: "Paths", keys: Sequence[Path], *, as_json: bool
) -> int:
    from packager.provenance import write_provenance

    signers, model_key = _private_keys(keys)
    written = write_provenance(facts, paths, signers, model_key, _time())
    reasons = {
        paths.statement: "no Ed25519 key was given (dpu-patch keygen)",
        paths.signature: "no P-256 key was given (dpu-patch keygen --kind p256)",
    }
    left = {path: why for path, why in reasons.items() if path not in written}
    record = {
        "subjects": facts.subjects,
        "written": [str(path) for path in written],
        "not_written": {str(path): why for path, why in left.items()},
    }
    lines = [
        *(f"{digest}  {printable(name)}" for name, digest in facts.subjects.items()),
        *(f"written      {printable(path)}" for path in written),
        *(f"not written  {printable(path)}: {why}" for path, why in left.items()),
    ]
    emit(record, as_json=as_json, text="\n".join(lines))
    return OK


def _check(
    facts: "Facts", paths: "Paths", keys: Sequence[Path], *, as_json: bool
) -> int:
    from edge_runtime.formats.signing import load_public
    from packager.keys import is_model_key
    from packager.provenance import check_provenance
    from packager.provenance.check import Found

    pems = {path: read_key_file(path) for path in keys}
    model = [path for path, pem in pems.items() if is_model_key(pem)]
    public = [
        load_public(p, str(path)) for path, p in pems.items() if path not in model
    ]
    parts = check_provenance(facts, paths, public, model)
    record = {"subjects": facts.subjects, "parts": [asdict(part) for part in parts]}
    lines = [
        *(f"{digest}  {printable(name)}" for name, digest in facts.subjects.items()),
        *(f"{p.found:<11}  {printable(p.name)}: {printable(p.reason)}" for p in parts),
    ]
    emit(record, as_json=as_json, text="\n".join(lines))
    return OK if all(part.found is Found.RIGHT for part in parts) else DIFFERENT


def _private_keys(
    paths: Sequence[Path],
) -> "tuple[list[Ed25519PrivateKey], tuple[Path, str | None] | None]":
    """Sort private keys by what they sign."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from packager.keys import is_encrypted, load_any_private

    signers, model = [], []
    for path in paths:
        pem = read_key_file(path)
        passphrase = ask_passphrase(path) if is_encrypted(pem) else None
        key = load_any_private(pem, passphrase, str(path))
        if isinstance(key, Ed25519PrivateKey):
            signers.append(key)
        else:
            model.append((path, passphrase))
    if len(model) > 1:
        raise click.UsageError(
            f"{len(model)} P-256 keys: a model signature is by one; give one, and "
            "write to another folder (-o) with the other"
        )
    return signers, model[0] if model else None


def _time() -> str:
    from packager.signing import stated_seconds

    seconds = stated_seconds()
    return "" if seconds is None else utc(seconds)


@contextmanager
def _extra() -> Iterator[None]:
    """Turn a missing package into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as err:
        raise click.ClickException(
            f"the model signature needs {err.name}; {how_to_install('provenance')}"
        ) from err
