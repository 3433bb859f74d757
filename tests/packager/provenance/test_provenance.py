# SPDX-License-Identifier: Apache-2.0
"""Provenance as public tools see it: each file is judged by the real package."""

import base64
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.cli.main import main as edge
from edge_runtime.errors import BundleError, how_to_install
from edge_runtime.formats.subspace import Term, encode_terms
from packager.cli.pack import pack, patch
from packager.provenance import facts

DEV = how_to_install("dev")
pytest.importorskip("model_signing", reason=how_to_install("provenance"))
pytest.importorskip("cyclonedx", reason=DEV)
pytest.importorskip("in_toto_attestation", reason=DEV)
pytest.importorskip("securesystemslib", reason=DEV)

WEIGHTS = "weights.safetensors"
STATED = {
    "method": "dpu",
    "ratio": 0.01,
    "samples": 1000,
    "metrics": {"val_accuracy": 0.975},
    "versions": {"torch": "2.13.0"},
    "config": {"model": {"name": "mlp"}, "data": {"set": "mnist"}},
}


@pytest.fixture
def keys(command, tmp_path):
    """Private keys: fleet.pem (Ed25519) and model.pem (P-256)."""
    assert command(patch, "keygen", tmp_path / "fleet.pem")[0] == 0
    assert command(patch, "keygen", tmp_path / "model.pem", "--kind", "p256")[0] == 0
    return tmp_path / "fleet.pem", tmp_path / "model.pem"


@pytest.fixture
def release(command, new_run):
    """A run with a round that states much, its patch and its bundle."""
    run = new_run()
    run.add(0)
    run.add(1, **STATED)
    for options in ((), ("--bundle",)):
        assert command(pack, run.path / "round_01", *options)[0] == 0
    return run


def provenance(command, path, *options):
    code, out, err = command(patch, "provenance", path, *options, "--json")
    return code, json.loads(out or err)


def given(keys, *, public=False):
    names = [k.with_name(k.stem + ".pub.pem") if public else k for k in keys]
    return [word for name in names for word in ("--key", name)]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def payload(path):
    return json.loads(base64.b64decode(json.loads(path.read_text())["payload"]))


def stock_tool(path, signature, public):
    """Run the public tool as its users do."""
    words = ("verify", "key", path, "--signature", signature, "--public_key", public)
    return subprocess.run(
        [sys.executable, "-m", "model_signing", *map(str, words)],
        capture_output=True,
        text=True,
    )


KINDS = ["round_01", "round_01.bundle.zip", "round_01.dpu"]


@pytest.mark.parametrize("name", KINDS)
def test_the_stock_tool_verifies_what_we_sign_and_refuses_what_changed(
    command, release, keys, name
):
    path = release.path / name
    assert provenance(command, path, *given(keys))[0] == 0
    signature = release.path / f"{name}.sig"
    public = keys[1].with_name("model.pub.pem")
    done = stock_tool(path, signature, public)
    assert (done.returncode, "succeeded" in done.stdout) == (0, True), done

    file = path / WEIGHTS if path.is_dir() else path
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert stock_tool(path, signature, public).returncode == 1


@pytest.mark.parametrize("name", KINDS)
def test_statement_and_bom_satisfy_the_public_validators(command, release, keys, name):
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement, statement_pb2
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    code, record = provenance(command, release.path / name, *given(keys))
    assert code == 0
    bom = (release.path / f"{name}.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom) is None

    path = release.path / f"{name}.intoto.json"
    stated = payload(path)
    parsed = ParseDict(stated, statement_pb2.Statement())
    statement.Statement.copy_from_pb(parsed).validate()
    ParseDict(stated["predicate"], provenance_pb2.Provenance())

    envelope = json.loads(path.read_text())
    (signature,) = envelope["signatures"]
    pem = keys[0].with_name("fleet.pub.pem").read_bytes()
    key = SSlibKey.from_crypto(load_pem_public_key(pem), keyid=signature["keyid"])
    assert Envelope.from_dict(envelope).verify([key], 1)
    assert {s["name"]: s["digest"]["sha256"] for s in stated["subject"]} == (
        record["subjects"]
    )


@pytest.mark.parametrize("name", KINDS)
def test_all_files_are_bound_to_the_same_sha256(command, release, keys, name):
    path = release.path / name
    assert provenance(command, path, *given(keys))[0] == 0
    weights = digest(release.path / "round_01" / WEIGHTS)
    stated = payload(release.path / f"{name}.intoto.json")
    subjects = {s["name"]: s["digest"]["sha256"] for s in stated["subject"]}
    bom = json.loads((release.path / f"{name}.cdx.json").read_text())
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["hashes"] == [{"alg": "SHA-256", "content": weights}]
    assert subjects[WEIGHTS] == weights
    listed = {c["name"]: c["hashes"][0]["content"] for c in bom["components"]}
    for file in set(KINDS[1:]) & (set(KINDS) if path.is_dir() else {name}):
        assert subjects[file] == listed[file] == digest(release.path / file)
    (byproduct,) = stated["predicate"]["runDetails"]["byproducts"]
    assert byproduct["digest"]["sha256"] == digest(release.path / f"{name}.cdx.json")


def test_a_round_tells_what_it_knows(command, release, keys):
    provenance(command, release.path / "round_01", *given(keys))
    bom = json.loads((release.path / "round_01.cdx.json").read_text())
    card = bom["metadata"]["component"]["modelCard"]
    assert card["modelParameters"] == {
        "task": "classification",
        "modelArchitecture": "mlp",
        "datasets": [{"type": "dataset", "name": "mnist"}],
        "inputs": [{"format": "x: float32 [batch, 12]"}],
        "outputs": [{"format": "y: float32 [batch, 4]"}],
    }
    measures = card["quantitativeAnalysis"]["performanceMetrics"]
    assert measures == [{"type": "val_accuracy", "value": "0.975"}]
    given_ = payload(release.path / "round_01.intoto.json")["predicate"]
    assert given_["buildDefinition"]["externalParameters"]["config"] == STATED["config"]
    assert given_["runDetails"]["builder"]["version"] == STATED["versions"]


def test_a_measure_that_is_no_number_is_left_out(command, run, keys):
    """A trainer may write NaN, which is packed, and which public JSON lacks."""
    run.add(2, metrics={"val_loss": float("nan"), "val_accuracy": 0.5})
    path = run.path / "round_02"
    assert provenance(command, path, *given(keys))[0] == 0
    bom = json.loads((run.path / "round_02.cdx.json").read_text())
    card = bom["metadata"]["component"]["modelCard"]
    measures = card["quantitativeAnalysis"]["performanceMetrics"]
    assert measures == [{"type": "val_accuracy", "value": "0.5"}]
    assert provenance(command, path, "--check", *given(keys, public=True))[0] == 0


def test_the_subspaces_of_a_round_are_spoken_of(command, run, keys):
    term = Term(300, 1, 1, {0: 1.0}, np.ones(128, np.int16))
    path = run.path / "round_01"
    (path / "subspaces.bin").write_bytes(encode_terms([term], 4))
    assert provenance(command, path, *given(keys))[0] == 0
    said = payload(run.path / "round_01.intoto.json")["predicate"]["buildDefinition"]
    named = {part["name"]: part["digest"] for part in said["resolvedDependencies"]}
    found = {"sha256": digest(path / "subspaces.bin")}
    assert named["subspaces.bin"] == found


def test_what_nobody_stated_is_not_said(command, run, keys):
    path = run.path / "round_00"
    contract = run.path / "model" / "contract.json"
    record = json.loads(contract.read_text())
    contract.write_text(json.dumps(record | {"classes": []}))
    provenance(command, path, *given(keys))
    card = json.loads((run.path / "round_00.cdx.json").read_text())["metadata"]
    assert set(card) == {"tools", "component"}
    assert set(card["component"]["modelCard"]["modelParameters"]) == {
        "inputs",
        "outputs",
    }
    assert "quantitativeAnalysis" not in card["component"]["modelCard"]
    details = payload(run.path / "round_00.intoto.json")["predicate"]
    assert set(details["runDetails"]) == {"builder", "byproducts"}
    assert set(details["buildDefinition"]["externalParameters"]) == {
        *("run", "round", "counter", "model")
    }


def test_the_same_release_and_keys_give_the_same_bytes(
    command, release, keys, tmp_path, monkeypatch
):
    names = ["round_01.cdx.json", "round_01.intoto.json"]
    path = release.path / "round_01"

    def written(folder):
        assert provenance(command, path, "-o", folder, *given(keys))[0] == 0
        return [(folder / name).read_bytes() for name in names]

    first = written(tmp_path / "a")
    assert written(tmp_path / "b") == first
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    dated = written(tmp_path / "c")
    assert b"1970-01-02T00:00:00Z" in dated[0]
    assert dated == written(tmp_path / "d") != first
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    code, record = provenance(command, path, *given(keys))
    assert (code, "seconds since 1970" in str(record)) == (2, True)


# --check ------------------------------------------------------------------------------


@pytest.fixture
def written(command, release, keys):
    assert provenance(command, release.path / "round_01", *given(keys))[0] == 0
    return release.path


def verdicts(command, path, *options):
    code, record = provenance(command, path, "--check", *options)
    return code, {p["name"].split(".", 1)[1]: p["found"] for p in record["parts"]}


def test_what_was_written_checks(command, written, keys):
    assert verdicts(command, written / "round_01", *given(keys, public=True)) == (
        0,
        {"intoto.json": "right", "cdx.json": "right", "sig": "right"},
    )


def test_a_part_without_its_key_is_not_called_right(command, written, keys):
    public = given(keys, public=True)
    code, found = verdicts(command, written / "round_01", *public[:2])
    assert (code, found["sig"]) == (5, "not checked")
    code, found = verdicts(command, written / "round_01", *public[2:])
    assert code == 5
    assert found == {
        "intoto.json": "not checked",
        "cdx.json": "not checked",
        "sig": "right",
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("bom", {"intoto.json": "right", "cdx.json": "different", "sig": "right"}),
        ("patch", {"intoto.json": "different", "cdx.json": "right", "sig": "right"}),
        ("record", {"intoto.json": "different", "cdx.json": "right"}),
        ("stray", {"intoto.json": "right", "cdx.json": "right"}),
        ("another", {"intoto.json": "different", "cdx.json": "right", "sig": "right"}),
    ],
)
def test_what_changed_afterwards_is_named(
    command, written, keys, change, expected, tmp_path
):
    round_ = written / "round_01"
    if change == "bom":
        bom = written / "round_01.cdx.json"
        bom.write_text(bom.read_text().replace("0.975", "0.999"))
    elif change == "patch":
        (written / "round_01.dpu").unlink()
    elif change == "record":
        record = json.loads((round_ / "round.json").read_text())
        record["metrics"] = {"val_accuracy": 0.999}
        (round_ / "round.json").write_text(json.dumps(record))
    elif change == "stray":
        (round_ / "notes.txt").write_text("stray")
    elif change == "another":
        assert command(pack, round_, "--from", "init")[0] == 0
        assert (written / "round_01_from_init.dpu").exists()
    code, found = verdicts(command, round_, *given(keys, public=True))
    assert code == 5
    assert found == {"sig": "different"} | expected


@pytest.mark.parametrize("field", ["payload", "sig", "nothing"])
def test_exit_8_for_a_statement_that_was_altered(command, written, keys, field):
    path = written / "round_01.intoto.json"
    envelope = json.loads(path.read_text())
    if field == "payload":
        stated = payload(path)
        stated["predicate"]["buildDefinition"]["externalParameters"]["counter"] = 9
        envelope["payload"] = base64.b64encode(json.dumps(stated).encode()).decode()
    elif field == "sig":
        envelope["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    else:
        envelope["signatures"] = []
    path.write_text(json.dumps(envelope))
    options = ("--check", *given(keys, public=True))
    assert provenance(command, written / "round_01", *options)[0] == 8


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"payload": 1}', "\ud800"])
@pytest.mark.parametrize("ending", ["intoto.json", "cdx.json", "sig"])
def test_exit_8_for_a_file_that_is_none(command, written, keys, ending, text):
    path = written / f"round_01.{ending}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    options = ("--check", *given(keys, public=True))
    assert provenance(command, written / "round_01", *options)[0] == 8


def test_exit_8_for_keys_of_others(command, written, keys, tmp_path):
    others = tmp_path / "other.pem", tmp_path / "stranger.pem"
    command(patch, "keygen", others[0])
    command(patch, "keygen", others[1], "--kind", "p256")
    for pair in ((keys[0], others[1]), (others[0], keys[1])):
        options = ("--check", *given(pair, public=True))
        assert provenance(command, written / "round_01", *options)[0] == 8


def test_a_round_without_provenance_is_told_how_to_get_one(command, run, keys):
    options = ("--check", *given(keys, public=True))
    code, record = provenance(command, run.path / "round_01", *options)
    assert (code, "dpu-patch provenance" in str(record)) == (10, True)


# Keys ---------------------------------------------------------------------------------


def test_a_p256_pair_is_private_and_never_overwritten(command, keys):
    private = keys[1]
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    assert command(patch, "keygen", private, "--kind", "p256")[0] == 2
    assert private.read_bytes() == before


def test_a_p256_key_signs_no_release_and_no_device_trusts_it(
    command, release, keys, tmp_path
):
    bundle = release.path / "round_01.bundle.zip"
    code, _, err = command(patch, "sign", bundle, "--key", keys[1])
    assert (code, "public tools" in err) == (2, True)
    public = keys[1].with_name("model.pub.pem")
    store = ("--store", tmp_path / "store")
    assert command(edge, *store, "init", bundle, "--trust", public)[0] == 2


@pytest.mark.parametrize("secret", ["correct horse", "p\udcff"])
def test_an_encrypted_p256_key_signs(command, release, tmp_path, monkeypatch, secret):
    monkeypatch.setenv("DPU_PASSPHRASE", secret)
    key = tmp_path / "locked.pem"
    command(patch, "keygen", key, "--kind", "p256", "--encrypt")
    assert b"ENCRYPTED" in key.read_bytes()
    path = release.path / "round_01.dpu"
    assert provenance(command, path, "--key", key)[0] == 0
    signature = release.path / "round_01.dpu.sig"
    public = key.with_name("locked.pub.pem")
    assert stock_tool(path, signature, public).returncode == 0


def test_what_a_missing_key_leaves_out_is_said(command, release, keys):
    path = release.path / "round_01"
    code, record = provenance(command, path, "--key", keys[0])
    assert code == 0
    assert [Path(name).name for name in record["not_written"]] == ["round_01.sig"]
    assert "keygen --kind p256" in str(record["not_written"])
    assert not (release.path / "round_01.sig").exists()


def test_a_curve_that_the_tool_does_not_know_is_refused(command, release, tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    key = ec.generate_private_key(ec.SECP256K1())
    path = tmp_path / "coin.pem"
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    code, record = provenance(command, release.path / "round_01", "--key", path)
    assert (code, "secp256k1" in str(record)) == (2, True)


# Misuse -------------------------------------------------------------------------------


def test_nothing_is_written_into_what_is_signed(command, release, keys):
    path = release.path / "round_01"
    before = sorted(path.iterdir())
    assert provenance(command, path, "-o", path, *given(keys))[0] == 3
    assert provenance(command, path, "-o", path / "below", *given(keys))[0] == 3
    assert sorted(path.iterdir()) == before


def test_a_link_in_a_round_folder_is_not_signed(command, release, keys):
    path = release.path / "round_01"
    (path / "secret").symlink_to("/etc/hostname")
    code, record = provenance(command, path, *given(keys))
    assert (code, "cannot be signed" in str(record)) == (8, True)
    assert not (release.path / "round_01.cdx.json").exists()


def test_a_damaged_release_gets_no_provenance(command, release, keys):
    for name in KINDS[1:]:
        path = release.path / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert provenance(command, path, *given(keys))[0] == 3
    shutil.rmtree(release.path / "model")
    assert provenance(command, release.path / "round_01", *given(keys))[0] == 3


@pytest.mark.parametrize(
    "change", [{"inputs": "abc"}, {"outputs": [3]}, {"inputs": [{"shape": 7}]}]
)
def test_a_contract_of_odd_shape_is_refused_in_words(command, release, keys, change):
    path = release.path / "model" / "contract.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    code, record = provenance(command, release.path / "round_01", *given(keys))
    assert (code, "expected" in str(record)) == (2, True)


def test_a_pipe_in_the_place_of_a_provenance_file_hangs_nothing(command, written, keys):
    for ending in ("intoto.json", "cdx.json", "sig"):
        path = written / f"round_01.{ending}"
        data = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        options = ("--check", *given(keys, public=True))
        assert provenance(command, written / "round_01", *options)[0] == 10
        path.unlink()
        path.write_bytes(data)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.dpu"
    path.write_bytes(b"one")
    assert facts._steady(path, Path.read_bytes) == (
        b"one",
        hashlib.sha256(b"one").hexdigest(),
    )
    with pytest.raises(BundleError, match="changed while it was read"):
        facts._steady(path, lambda file: file.write_bytes(b"two"))
