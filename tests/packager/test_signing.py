# SPDX-License-Identifier: Apache-2.0
"""Signing: files gain a signature and nothing else changes; keys stay private."""

import dataclasses
import doctest
import stat

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import packager.signing
from edge_runtime.errors import BundleError, KeyFileError, PatchError, PatchFormatError
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.header import HEADER_BYTES, PatchHeader, encode_header
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.patch_encoder import encode_patch
from edge_runtime.formats.signing import key_id, load_public, trust_keys
from edge_runtime.formats.weights import pack_weights
from edge_runtime.live.proof import encode_public
from edge_runtime.live.shared import public_key
from packager.keys import encode_private, generate_key, load_private, write_key_pair
from packager.signing import date_patch, sign_bundle, sign_patch

A, B = (ed25519.Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
BASE = pack_weights({"w": np.zeros(50, "<f4")})
TARGET = pack_weights({"w": np.where(np.arange(50) % 7, 0, 1).astype("<f4")})
PATCH = encode_patch(
    PatchHeader(
        "ab" * 32, BASE.fingerprint, TARGET.fingerprint, 1, 1, BASE.layout.file_size
    ),
    [np.flatnonzero(TARGET["w"])],
    BASE,
    TARGET,
)


def test_the_example_in_the_documentation_is_true():
    assert doctest.testmod(packager.signing).failed == 0


def test_a_signature_changes_nothing_but_the_block():
    signed = sign_patch(PATCH, A)
    assert len(signed) == len(PATCH) + 76
    assert signed[:HEADER_BYTES] == PATCH[:HEADER_BYTES]
    assert signed[HEADER_BYTES + 78 :] == PATCH[HEADER_BYTES + 2 :]


def test_the_same_keys_give_the_same_bytes_in_any_order():
    both = sign_patch(sign_patch(PATCH, A), B)
    assert sign_patch(sign_patch(PATCH, B), A) == both
    assert sign_patch(both, A) == both


def test_a_signed_patch_opens_with_its_keys_and_without():
    signed = sign_patch(PATCH, A)
    trust = trust_keys({"a.pem": encode_public(A)})
    for patch in (open_patch(signed), open_patch(signed, trust=trust)):
        assert [s.key_id for s in patch.signatures] == list(trust.ids)


def test_a_damaged_patch_is_not_signed():
    for position in range(len(PATCH)):
        damaged = bytearray(PATCH)
        damaged[position] ^= 1
        with pytest.raises(PatchError):
            sign_patch(bytes(damaged), A)
    for other in (PATCH[:-1], PATCH + b"\0", b""):
        with pytest.raises(PatchError):
            sign_patch(other, A)


def test_a_patch_holds_56_signatures_and_no_more():
    signed = PATCH
    for _ in range(56):
        signed = sign_patch(signed, generate_key())
    assert len(open_patch(signed).signatures) == 56
    with pytest.raises(PatchFormatError, match="no room"):
        sign_patch(signed, A)


def test_what_is_no_bundle_is_not_signed():
    with pytest.raises(BundleError):
        sign_bundle(PATCH, A)


# Key files ---------------------------------------------------------------------------


@pytest.mark.parametrize("passphrase", [None, "a secret"])
def test_a_private_key_comes_back_from_its_file(passphrase):
    pem = encode_private(A, passphrase)
    assert public_key(load_private(pem, passphrase)) == public_key(A)
    assert (b"ENCRYPTED" in pem) == bool(passphrase)


def test_a_passphrase_that_is_not_needed_is_ignored():
    assert public_key(load_private(encode_private(A), "any")) == public_key(A)


def test_an_encrypted_key_asks_for_its_passphrase():
    with pytest.raises(KeyFileError, match="give its passphrase"):
        load_private(encode_private(A, "a secret"))


def test_a_wrong_passphrase_is_refused():
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        load_private(encode_private(A, "a secret"), "another")


def test_a_public_key_does_not_sign():
    with pytest.raises(KeyFileError, match="only the private key signs"):
        load_private(encode_public(A))


def test_a_private_key_of_another_kind_is_refused_by_its_name():
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with pytest.raises(
        KeyFileError, match="the key: expected Ed25519, found secp256r1"
    ):
        load_private(pem)


@pytest.mark.parametrize("pem", [b"", b"\0\xff", b"ssh-ed25519 AAAA"])
def test_what_is_no_key_is_refused(pem):
    with pytest.raises(KeyFileError, match="not a private key"):
        load_private(pem)


def test_a_new_pair_is_two_files_and_the_private_one_is_for_its_owner_only(tmp_path):
    public, name = write_key_pair(tmp_path / "fleet.pem")
    assert public == tmp_path / "fleet.pub.pem"
    assert stat.S_IMODE((tmp_path / "fleet.pem").stat().st_mode) == 0o600
    key = load_private((tmp_path / "fleet.pem").read_bytes())
    assert public_key(key) == load_public(public.read_bytes())
    assert name == key_id(public_key(key))


@pytest.mark.parametrize("existing", ["fleet.pem", "fleet.pub.pem"])
def test_no_key_is_ever_overwritten(tmp_path, existing):
    (tmp_path / existing).write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write_key_pair(tmp_path / "fleet.pem")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"precious"]


# When it was signed -------------------------------------------------------------------


def test_a_dated_patch_says_when_and_changes_the_same():
    with open_patch(date_patch(PATCH, 1767225600)) as dated, open_patch(PATCH) as plain:
        assert (dated.header.signed_at, plain.header.signed_at) == (1767225600, None)
        assert dated.counts == plain.counts
        assert dated.header.target == plain.header.target
        assert 0 < dated.size - plain.size < 12
        assert apply_patch(BASE, dated).data == TARGET.data


def test_dating_again_exchanges_the_time():
    assert date_patch(date_patch(PATCH, 1), 2) == date_patch(PATCH, 2)


def test_a_signed_patch_is_not_dated_any_more():
    with pytest.raises(PatchFormatError, match="would break the signatures"):
        date_patch(sign_patch(PATCH, A), 1)


def test_the_time_is_what_is_signed():
    trust = trust_keys({"a": encode_public(A)})
    one, two = (sign([date_patch(PATCH, n)], A) for n in (1, 2))
    open_patch(one, trust=trust).close()
    start = HEADER_BYTES + 2 + 76
    mixed = one[:start] + two[start:]
    with pytest.raises(PatchError):
        open_patch(mixed, trust=trust)


def sign(patches, key):
    (data,) = (sign_patch(patch, key) for patch in patches)
    return data


@pytest.mark.parametrize("seconds", [0, 1, 253402300799])
def test_any_time_of_the_calendar_can_be_said(seconds):
    with open_patch(date_patch(PATCH, seconds)) as patch:
        assert patch.header.signed_at == seconds


def test_a_time_beyond_the_calendar_is_refused():
    with pytest.raises(PatchFormatError, match="253402300799"):
        date_patch(PATCH, 253402300800)


@pytest.mark.parametrize("critical", [0, 1])
def test_header_and_body_agree_on_whether_there_is_a_time(critical):
    """Else a reader that goes by one of them would see another patch."""
    data = PATCH if critical else date_patch(PATCH, 1)
    with open_patch(data) as patch:
        header = patch.header
    body = data[HEADER_BYTES + 2 :]
    forged = encode_header(dataclasses.replace(header, critical=critical), body)
    with pytest.raises(PatchFormatError, match="disagree"):
        open_patch(forged + b"\0\0" + body)
