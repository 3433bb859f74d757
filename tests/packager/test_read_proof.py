# SPDX-License-Identifier: Apache-2.0
"""Whose a proof is: nobody else can have written a byte of it."""

import json

import pytest

from edge_runtime import make_proof
from edge_runtime.errors import ProofError, TrustError
from edge_runtime.formats.signing import PATCH_CONTEXT
from edge_runtime.live.proof import device_key
from edge_runtime.live.shared import canonical, public_key
from packager.keys import generate_key
from packager.read_proof import check_origin, read_proof
from packager.signing import add_signature
from tests.crash import world

NONCE = "5f2a"


@pytest.fixture
def device(tmp_path):
    return world.install(tmp_path / "store")


def test_no_byte_of_a_signed_proof_can_be_changed(device):
    keys = {public_key(device_key(device.store)): "board"}
    data = make_proof(device.store, NONCE)
    check_origin(read_proof(data), NONCE, keys)
    for at in range(len(data)):
        for change in (1, 32):
            changed = bytearray(data)
            changed[at] ^= change
            with pytest.raises((ProofError, TrustError)):
                check_origin(read_proof(bytes(changed)), NONCE, keys)
    for length in range(len(data)):
        with pytest.raises(ProofError):
            read_proof(data[:length])


def test_a_patch_signature_is_worth_nothing_on_a_proof(device):
    """The fleet's own key, and the right bytes, but for another purpose."""
    key = generate_key()
    proof = json.loads(make_proof(device.store, NONCE))
    (signed,) = add_signature((), PATCH_CONTEXT, canonical(proof), key)
    proof["signature"] = {"key_id": signed.key_id, "value": signed.value.hex()}
    with pytest.raises(TrustError, match="is wrong"):
        check_origin(read_proof(canonical(proof)), NONCE, {public_key(key): "fleet"})
