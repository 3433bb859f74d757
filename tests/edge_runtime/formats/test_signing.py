# SPDX-License-Identifier: Apache-2.0
"""Signature blocks and trust: one form, one meaning, and nobody else's signature."""

import hashlib
import struct
import subprocess
import sys
import zlib

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import (
    KeyFileError,
    PatchError,
    PatchFormatError,
    PatchIntegrityError,
    TrustError,
)
from edge_runtime.formats.signing import (
    BUNDLE_CONTEXT,
    PATCH_CONTEXT,
    Signature,
    Trust,
    decode_signatures,
    encode_signatures,
    key_id,
    load_public,
    trust_keys,
)
from edge_runtime.live.proof import encode_public
from edge_runtime.live.shared import public_key
from packager.keys import encode_private
from packager.signing import add_signature


def key_of(number):
    """A private key that is the same in every run."""
    return ed25519.Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


A, B, C = (key_of(number) for number in (1, 2, 3))
ID_A, ID_B, ID_C = (key_id(public_key(key)) for key in (A, B, C))
MESSAGE = b"the bytes of a header"


def trust(*keys, threshold=1):
    pems = {f"{n}.pem": encode_public(key) for n, key in enumerate(keys)}
    return trust_keys(pems, threshold)


def signed(*keys, context=PATCH_CONTEXT, message=MESSAGE):
    signatures = ()
    for key in keys:
        signatures = add_signature(signatures, context, message, key)
    return signatures


# The block ---------------------------------------------------------------------------

SIGNATURES = st.builds(
    Signature,
    st.binary(min_size=8, max_size=8).map(bytes.hex),
    st.binary(min_size=64, max_size=64),
)


@given(st.lists(SIGNATURES, max_size=5, unique_by=lambda s: s.key_id))
def test_any_signatures_come_back_in_the_order_of_their_keys(signatures):
    block = encode_signatures(signatures)
    assert decode_signatures(block) == tuple(sorted(signatures))
    assert encode_signatures(reversed(signatures)) == block


def test_no_signatures_are_no_bytes():
    assert encode_signatures(()) == b""
    assert decode_signatures(b"") == ()


def test_a_signature_takes_72_bytes_and_the_checksum_4():
    assert len(encode_signatures(signed(A))) == 76
    assert len(encode_signatures(signed(A, B))) == 148


def test_a_block_cut_or_lengthened_at_any_byte_is_refused():
    block = encode_signatures(signed(A, B))
    for cut in range(1, len(block)):
        with pytest.raises(PatchError):
            decode_signatures(block[:cut])
    for more in (b"\0", bytes(4), bytes(72)):
        with pytest.raises(PatchError):
            decode_signatures(block + more)


def test_a_block_with_any_flipped_bit_is_refused_without_any_key():
    block = encode_signatures(signed(A, B))
    for position in range(8 * len(block)):
        damaged = bytearray(block)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(PatchIntegrityError):
            decode_signatures(bytes(damaged))


def seal(entries):
    return entries + zlib.crc32(entries).to_bytes(4, "little")


def test_entries_out_of_order_or_twice_are_refused():
    one, two = (encode_signatures(signed(key))[:-4] for key in (A, B))
    first, second = sorted((one, two))
    assert len(decode_signatures(seal(first + second))) == 2
    for entries in (second + first, first + first, b""):
        with pytest.raises(PatchFormatError):
            decode_signatures(seal(entries))


# What a signature means --------------------------------------------------------------


def test_a_signature_verifies_as_the_format_document_says():
    (signature,) = signed(A)
    raw = A.public_key().public_bytes_raw()
    assert signature.key_id == hashlib.sha256(raw).digest()[:8].hex()
    framed = struct.pack("<Q16sQ", 16, b"dpu patch header", len(MESSAGE)) + MESSAGE
    A.public_key().verify(signature.value, framed)


def test_a_signature_is_the_same_on_every_machine():
    (signature,) = signed(A)
    assert signature.key_id == "34750f98bd59fcfc"
    assert hashlib.sha256(signature.value).hexdigest()[:16] == "cc0ee4723e21e6f7"


def test_whoever_signs_first_the_bytes_are_the_same():
    assert encode_signatures(signed(A, B, C)) == encode_signatures(signed(C, A, B, A))


def test_a_trusted_signature_is_named():
    assert trust(A, B).check(PATCH_CONTEXT, MESSAGE, signed(B)) == (ID_B,)


def test_without_trusted_keys_nothing_is_checked():
    garbage = [Signature(ID_A, bytes(64))]
    assert Trust().check(PATCH_CONTEXT, MESSAGE, garbage) == ()


def test_a_missing_signature_is_refused_and_the_keys_are_named():
    with pytest.raises(TrustError, match=f"by nobody, expected 1 of the keys {ID_A}"):
        trust(A).check(PATCH_CONTEXT, MESSAGE, ())


def test_an_unknown_key_is_refused_by_its_id():
    with pytest.raises(TrustError, match=f"by {ID_B}, expected 1 of the keys {ID_A}"):
        trust(A).check(PATCH_CONTEXT, MESSAGE, signed(B))


def test_unknown_signatures_beside_a_trusted_one_do_no_harm():
    signatures = (*signed(A), Signature(ID_C, bytes(64)))
    assert trust(A).check(PATCH_CONTEXT, MESSAGE, signatures) == (ID_A,)


@pytest.mark.parametrize("threshold", [1, 2])
def test_a_wrong_signature_of_a_trusted_key_is_refused_beside_right_ones(threshold):
    signatures = (*signed(A), *signed(B), *signed(C, message=b"something else"))
    with pytest.raises(TrustError, match=f"signature of key {ID_C} is wrong"):
        trust(A, B, C, threshold=threshold).check(PATCH_CONTEXT, MESSAGE, signatures)


def test_a_signature_for_another_purpose_is_refused():
    with pytest.raises(TrustError, match="wrong"):
        trust(A).check(PATCH_CONTEXT, MESSAGE, signed(A, context=BUNDLE_CONTEXT))


def test_context_and_message_cannot_be_shifted_into_each_other():
    shifted = signed(A, context=PATCH_CONTEXT[:-1], message=b"r" + MESSAGE)
    with pytest.raises(TrustError, match="wrong"):
        trust(A).check(PATCH_CONTEXT, MESSAGE, shifted)


def test_as_many_keys_as_the_threshold_says_must_sign():
    both = trust(A, B, threshold=2)
    assert set(both.check(PATCH_CONTEXT, MESSAGE, signed(A, B))) == {ID_A, ID_B}
    with pytest.raises(TrustError, match="expected 2 of"):
        both.check(PATCH_CONTEXT, MESSAGE, signed(A, C))


def test_one_key_counts_once_however_often_it_signs():
    with pytest.raises(TrustError, match="expected 2 of"):
        trust(A, B, threshold=2).check(PATCH_CONTEXT, MESSAGE, [*signed(A), *signed(A)])


@pytest.mark.parametrize("threshold", [0, -1, 2])
def test_a_threshold_that_cannot_be_met_is_refused(threshold):
    with pytest.raises(KeyFileError, match="cannot be asked of 1"):
        trust(A, A, threshold=threshold)


# Key files ---------------------------------------------------------------------------


def test_a_public_key_comes_back_from_its_file():
    assert load_public(encode_public(A)) == A.public_key().public_bytes_raw().hex()


def test_a_private_key_is_not_taken_for_a_public_one():
    for passphrase in (None, "secret"):
        with pytest.raises(KeyFileError, match="stays with its owner"):
            load_public(encode_private(A, passphrase))


def test_a_public_key_of_another_kind_is_refused_by_its_name():
    pem = (
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(
            serialization.Encoding.PEM,
            serialization.PublicFormat.SubjectPublicKeyInfo,
        )
    )
    with pytest.raises(KeyFileError, match="the key: expected Ed25519, found EC"):
        load_public(pem)


@pytest.mark.parametrize("pem", [b"", b"\0\xff", encode_public(A)[:60]])
def test_what_is_no_key_is_refused(pem):
    with pytest.raises(KeyFileError, match="the key is not a public key"):
        load_public(pem)


def test_importing_the_runtime_does_not_import_cryptography():
    code = (
        "import sys, edge_runtime.cli.main, edge_runtime.formats.signing\n"
        "import edge_runtime.update.device\n"
        "sys.exit('cryptography' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
