# SPDX-License-Identifier: Apache-2.0
"""Attacks on a device that trusts keys: one named test each, and nothing moves."""

import dataclasses
import hashlib
import io
import json
import struct
import zipfile
import zlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from edge_runtime.errors import (
    BundleError,
    DpuError,
    PatchError,
    PatchFormatError,
    PatchIntegrityError,
    StoreError,
    TrustError,
    WrongModelError,
    WrongParentError,
)
from edge_runtime.formats import sections
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.header import HEADER_BYTES, PatchHeader
from edge_runtime.formats.identity import network_id
from edge_runtime.formats.init_weights import InitSpec, TensorInit, write_init_spec
from edge_runtime.formats.patch_encoder import encode_patch
from edge_runtime.formats.signing import (
    BUNDLE_CONTEXT,
    PATCH_CONTEXT,
    FirstUse,
    Signature,
    encode_signatures,
    key_id,
    trust_keys,
)
from edge_runtime.formats.weights import pack_weights
from edge_runtime.live.proof import encode_public
from edge_runtime.live.shared import public_key
from edge_runtime.store.state import decode_state, encode_state
from edge_runtime.update.device import Device, UpdateResult
from packager.signing import add_signature, sign_bundle, sign_patch
from packager.zip_file import encode_bundle, encode_members
from tests.crash.world import no_trial


def key_of(number):
    return ed25519.Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


OURS, SECOND, THEIRS = key_of(1), key_of(2), key_of(66)
TRUST = trust_keys({"ours": encode_public(OURS)})
BOTH = trust_keys({"ours": encode_public(OURS), "second": encode_public(SECOND)}, 2)
GRAPH = b"a graph; no session is started here"
RECIPE = InitSpec(7, {"w": TensorInit("F32", (20, 30), "uniform", 0.1)}, {})
INIT = RECIPE.generate()
MODEL = network_id(INIT.layout.header, GRAPH)


def changed(base, seed):
    """Weights that differ from ``base`` in ten places."""
    array = base["w"].copy()
    rng = np.random.default_rng(seed)
    array.reshape(-1)[rng.choice(array.size, 10, replace=False)] = rng.normal(size=10)
    return pack_weights({"w": array})


def patch_of(base, target, round_, *, counter=None, model=MODEL, key=OURS):
    header = PatchHeader(
        model,
        base.fingerprint,
        target.fingerprint,
        round_,
        round_ if counter is None else counter,
        base.layout.file_size,
    )
    at = np.flatnonzero(base["w"].view("<u4") != target["w"].view("<u4"))
    data = encode_patch(header, [at], base, target)
    return sign_patch(data, key) if key else data


ROUNDS = [changed(INIT, 0)]
for number in (1, 2, 3):
    ROUNDS.append(changed(ROUNDS[-1], number))
PATCHES = [None] + [patch_of(ROUNDS[n - 1], ROUNDS[n], n) for n in (1, 2, 3)]


def bundle_of(folder, *, keys=(), **members):
    """An unsigned bundle of round 0."""
    write_init_spec(RECIPE, folder)
    files = {
        "graph.onnx": GRAPH,
        "init.json": (folder / "init.json").read_bytes(),
        "contract.json": b'{"schema": 1, "inputs": []}',
        "golden.npz": b"golden",
        "patch.dpu": patch_of(INIT, ROUNDS[0], 0, key=None),
    }
    files |= {f"keys/{number}.pem": encode_public(k) for number, k in enumerate(keys)}
    manifest = {
        "run": "r",
        "round": 0,
        "model": MODEL,
        "target": ROUNDS[0].fingerprint,
    }
    return encode_bundle(manifest, files | members)


@pytest.fixture
def bundle(tmp_path):
    return bundle_of(tmp_path)


@pytest.fixture
def device(bundle, tmp_path):
    return Device.install(
        tmp_path / "store", sign_bundle(bundle, OURS), trust=TRUST, trial=no_trial
    )


def snapshot(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


@pytest.fixture
def refused(device):
    """Insist that an update raises and that no file of the store changes."""

    def check(patch, error=TrustError, match=None):
        before = snapshot(device.store.root)
        with pytest.raises(error, match=match) as refusal:
            device.update(patch)
        assert snapshot(device.store.root) == before
        return refusal.value

    return check


def test_without_an_attack_the_device_moves_on(device):
    for number in (1, 2, 3):
        assert device.update(PATCHES[number]) is UpdateResult.APPLIED
    assert device.verify() == ROUNDS[3].fingerprint
    assert device.status()["trusted_keys"] == [key_id(public_key(OURS))]
    assert Device.open(device.store.root).store.state.trust == TRUST


# Patches -----------------------------------------------------------------------------


def split(patch):
    """Header, signature block with its length, body."""
    end = (
        HEADER_BYTES
        + 2
        + int.from_bytes(patch[HEADER_BYTES : HEADER_BYTES + 2], "little")
    )
    return patch[:HEADER_BYTES], patch[HEADER_BYTES:end], patch[end:]


def join(header, block, body):
    return header + len(block).to_bytes(2, "little") + block + body


def test_an_arbitrary_patch_is_refused(refused):
    evil = changed(ROUNDS[0], 666)
    refused(patch_of(ROUNDS[0], evil, 9, key=None), match="signed by nobody")


def test_a_patch_of_a_wrong_key_is_refused(refused):
    evil = changed(ROUNDS[0], 666)
    theirs = key_id(public_key(THEIRS))
    refused(patch_of(ROUNDS[0], evil, 9, key=THEIRS), match=f"signed by {theirs}")


def test_a_wrong_key_under_our_name_is_refused(refused):
    header, _, body = split(patch_of(ROUNDS[0], changed(ROUNDS[0], 666), 9))
    (theirs,) = add_signature((), PATCH_CONTEXT, header, THEIRS)
    posing = Signature(key_id(public_key(OURS)), theirs.value)
    refused(join(header, encode_signatures([posing]), body), match="is wrong")


def test_a_patch_without_its_signature_is_refused(refused):
    header, _, body = split(PATCHES[1])
    refused(join(header, b"", body), match="signed by nobody")


def test_the_signature_of_another_patch_is_refused(refused):
    header, _, body = split(PATCHES[1])
    _, block, _ = split(PATCHES[2])
    refused(header + block + body, match="is wrong")


def test_a_signature_of_another_context_is_refused(refused):
    header, _, body = split(PATCHES[1])
    signatures = add_signature((), BUNDLE_CONTEXT, header, OURS)
    refused(join(header, encode_signatures(signatures), body), match="is wrong")


def test_a_signature_over_the_bare_header_is_refused(refused):
    header, _, body = split(PATCHES[1])
    bare = Signature(key_id(public_key(OURS)), OURS.sign(header))
    refused(join(header, encode_signatures([bare]), body), match="is wrong")


@pytest.mark.parametrize("position", range(HEADER_BYTES - 4))
def test_an_altered_header_with_a_right_checksum_is_refused(refused, position):
    header, block, body = split(PATCHES[1])
    altered = bytearray(header)
    altered[position] ^= 64
    struct.pack_into("<I", altered, HEADER_BYTES - 4, zlib.crc32(altered[:-4]))
    # Magic, version, sizes and critical bits are refused for what they are.
    error = TrustError if position >= 14 else PatchError
    refused(bytes(altered) + block + body, error)


def test_a_signed_header_with_an_altered_body_is_refused(refused):
    header, block, body = split(PATCHES[1])
    for position in range(len(body)):
        altered = bytearray(body)
        altered[position] ^= 0x10
        refused(header + block + bytes(altered), PatchIntegrityError)


def test_a_signed_header_with_the_body_of_another_signed_patch_is_refused(refused):
    header, block, _ = split(patch_of(ROUNDS[0], changed(ROUNDS[0], 5), 5))
    other = split(patch_of(ROUNDS[0], changed(ROUNDS[0], 6), 6))[2]
    refused(header + block + other, (PatchIntegrityError, PatchFormatError))


def test_mix_and_match_with_another_model_is_refused(refused):
    other = network_id(INIT.layout.header, b"another graph")
    refused(patch_of(ROUNDS[0], ROUNDS[1], 1, model=other), WrongModelError)


def test_mix_and_match_with_another_run_of_the_model_is_refused(refused):
    base = changed(INIT, 100)
    refused(patch_of(base, changed(base, 101), 1), WrongParentError)


def test_mix_and_match_with_a_later_round_is_refused(refused):
    refused(PATCHES[3], WrongParentError)


def test_a_replay_is_refused(device, refused):
    device.update(PATCHES[1])
    device.update(PATCHES[2])
    refused(PATCHES[1], match="past that round")


def test_a_replay_after_a_local_rollback_is_refused(device, refused):
    for number in (1, 2, 3):
        device.update(PATCHES[number])
    assert device.rollback().round == 2
    refused(PATCHES[1], match="has already been at 3")
    assert device.update(PATCHES[3]) is UpdateResult.APPLIED


def test_a_replay_of_the_patch_that_led_to_the_active_weights_changes_nothing(device):
    device.update(PATCHES[1])
    before = snapshot(device.store.root)
    assert device.update(PATCHES[1]) is UpdateResult.ALREADY_CURRENT
    assert snapshot(device.store.root) == before


def test_the_active_weights_without_a_signature_are_refused(device, refused):
    device.update(PATCHES[1])
    refused(patch_of(ROUNDS[0], ROUNDS[1], 1, key=None), match="signed by nobody")


def test_a_downgrade_by_an_old_reverse_patch_is_refused(device, refused):
    device.update(PATCHES[1])
    device.update(PATCHES[2])
    refused(patch_of(ROUNDS[2], ROUNDS[1], 1), match="release counter 1")


def test_a_downgrade_to_other_weights_under_the_same_counter_is_refused(
    device, refused
):
    device.update(PATCHES[1])
    refused(patch_of(ROUNDS[1], ROUNDS[0], 0, counter=1), match="release counter 1")


def test_a_downgrade_to_a_release_that_was_withheld_is_refused(device, refused):
    # Round 1, then back to round 0 under counter 2, then round 1 again under 3. The
    # attacker holds 2 back until the device, at round 1 all the time, has seen 3.
    device.update(PATCHES[1])
    withheld = patch_of(ROUNDS[1], ROUNDS[0], 0, counter=2)
    device.update(patch_of(ROUNDS[0], ROUNDS[1], 1, counter=3))
    assert device.status()["release_floor"] == 3
    refused(withheld, match="has already been at 3")


def test_a_downgrade_by_force_is_refused(device, refused):
    device.update(PATCHES[1])
    device.update(PATCHES[2])
    with pytest.raises(TrustError):
        device.update(PATCHES[1], force=True)


def test_endless_signatures_are_refused(refused):
    header, _, body = split(PATCHES[1])
    many = [Signature(f"{n:016x}", bytes(64)) for n in range(900)]
    refused(join(header, encode_signatures(many), body), PatchFormatError, "accepts")


def test_one_signer_of_two_that_are_needed_is_refused(bundle, tmp_path):
    signed = sign_bundle(sign_bundle(bundle, OURS), SECOND)
    device = Device.install(tmp_path / "s", signed, trust=BOTH, trial=no_trial)
    theirs = add_signature((), PATCH_CONTEXT, split(PATCHES[1])[0], THEIRS)
    with pytest.raises(TrustError, match="expected 2 of"):
        device.update(PATCHES[1])
    with pytest.raises(TrustError, match="expected 2 of"):
        device.update(sign_patch(PATCHES[1], THEIRS))
    header, _, body = split(PATCHES[1])
    posing = [Signature(key_id(public_key(SECOND)), theirs[0].value)]
    posing += add_signature((), PATCH_CONTEXT, header, OURS)
    with pytest.raises(TrustError, match="is wrong"):
        device.update(join(header, encode_signatures(posing), body))
    assert device.update(sign_patch(PATCHES[1], SECOND)) is UpdateResult.APPLIED


def test_nothing_is_unpacked_or_hashed_before_the_signature_is_right(
    refused, monkeypatch
):
    def touched(*_):
        raise AssertionError("the body was looked at")

    monkeypatch.setattr(sections, "decode_varint", touched)
    monkeypatch.setattr(sections, "SectionReader", touched)
    header, _, body = split(PATCHES[1])
    # The body is damaged too: only the signature is complained about.
    refused(join(header, b"", body[:-1] + b"?"), match="signed by nobody")


def test_a_signed_patch_with_any_flipped_bit_is_refused_by_every_store(
    device, bundle, tmp_path
):
    trusting = device
    simple = Device.install(tmp_path / "simple", bundle, trial=no_trial)
    for position in range(8 * len(PATCHES[1])):
        data = bytearray(PATCHES[1])
        data[position // 8] ^= 1 << position % 8
        for store in (trusting, simple):
            with pytest.raises(DpuError):
                store.update(bytes(data))
    assert simple.update(PATCHES[1]) is UpdateResult.APPLIED


# The store's own state ---------------------------------------------------------------


def states(device):
    """The bytes of state.json before and after an update."""
    path = device.store.root / "state.json"
    old = path.read_bytes()
    device.update(PATCHES[1])
    return path, old, path.read_bytes()


def test_state_file_torn_at_any_byte(device):
    path, _, new = states(device)
    copy = path.with_name("state.copy")
    for cut in range(len(new) - 1):  # the last byte is a line end
        for torn in (new[:cut], new[:cut] + bytes(len(new) - cut)):
            path.write_bytes(torn)
            copy.unlink(missing_ok=True)
            with pytest.raises(StoreError, match="damaged"):
                device.update(PATCHES[2])
            # The copy serves, and is not a bit more trusting.
            copy.write_bytes(new)
            served, whole = Device.open(path.parent).store.state, decode_state(new)
            assert (served.floor, served.trust) == (whole.floor, whole.trust)


def test_state_file_half_old_and_half_new(device):
    _, old, new = states(device)
    whole = decode_state(old), decode_state(new)
    for cut in range(len(new)):
        for mixed in (new[:cut] + old[cut:], old[:cut] + new[cut:]):
            try:
                state = decode_state(mixed)
            except StoreError:
                continue
            assert state in whole


def test_state_file_with_any_flipped_bit(device):
    _, _, data = states(device)
    good = decode_state(data)
    for position in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        try:
            assert decode_state(bytes(damaged)) == good  # white space
        except StoreError:
            continue


@pytest.mark.parametrize("content", [b"", b"5", b"[]", b"null", b'{"schema": 1}'])
def test_state_file_of_something_else(device, content):
    (device.store.root / "state.json").write_bytes(content)
    (device.store.root / "state.copy").write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        device.update(PATCHES[1])


def test_state_file_without_its_keys(device):
    path = device.store.root / "state.json"
    record = json.loads(path.read_bytes())
    for edit in ({"trust": {"keys": [], "threshold": 1}}, {"floor": 0, "round": 0}):
        path.with_name("state.copy").write_text(json.dumps(record))
        path.write_text(json.dumps(record | edit))
        with pytest.raises(TrustError, match="signed by nobody"):  # by the copy
            device.update(patch_of(ROUNDS[0], ROUNDS[1], 1, key=None))
        for name in ("state.json", "state.copy"):
            path.with_name(name).write_text(json.dumps(record | edit))
        with pytest.raises(StoreError, match="damaged"):
            device.update(patch_of(ROUNDS[0], ROUNDS[1], 1, key=None))


def test_a_state_with_keys_comes_back(device):
    state = device.store.state
    assert decode_state(encode_state(state)) == state
    state = dataclasses.replace(state, trust=BOTH)
    assert decode_state(encode_state(state)) == state


# Bundles -----------------------------------------------------------------------------


@pytest.fixture
def not_installed(tmp_path):
    """Insist that a bundle is refused, and that nothing is installed."""

    def check(data, error=TrustError, match=None, trust=TRUST):
        with pytest.raises(error, match=match):
            Device.install(tmp_path / "none", data, trust=trust, trial=no_trial)
        assert not (tmp_path / "none").exists()

    return check


def members_of(bundle):
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_an_unsigned_bundle_installs_nothing(bundle, not_installed):
    not_installed(bundle, match="signed by nobody")


def test_a_bundle_of_another_key_installs_nothing(bundle, not_installed):
    not_installed(sign_bundle(bundle, THEIRS), match="expected 1 of")


def test_a_bundle_whose_patch_alone_is_signed_installs_nothing(tmp_path, not_installed):
    signed = patch_of(INIT, ROUNDS[0], 0)
    not_installed(bundle_of(tmp_path, **{"patch.dpu": signed}), match="by nobody")


def test_a_bundle_signed_as_if_it_were_a_patch_installs_nothing(bundle, not_installed):
    members = members_of(bundle)
    signatures = add_signature((), PATCH_CONTEXT, members["bundle.json"], OURS)
    members["bundle.sig"] = encode_signatures(signatures)
    not_installed(encode_members(members), match="is wrong")


@pytest.mark.parametrize(
    "name", ["graph.onnx", "init.json", "contract.json", "golden.npz", "patch.dpu"]
)
def test_a_signed_bundle_with_an_exchanged_member_installs_nothing(
    bundle, name, not_installed
):
    members = members_of(sign_bundle(bundle, OURS))
    members[name] += b" "
    not_installed(encode_members(members), BundleError, f"{name} is damaged")
    manifest = json.loads(members["bundle.json"])
    manifest["files"][name] = hashlib.sha256(members[name]).hexdigest()
    members["bundle.json"] = json.dumps(manifest, indent=1).encode()
    not_installed(encode_members(members), match="is wrong")


def test_a_signed_bundle_with_a_second_manifest_installs_nothing(bundle, not_installed):
    members = members_of(sign_bundle(bundle, OURS))
    out = io.BytesIO(encode_members(members))
    evil = json.loads(members["bundle.json"]) | {"round": 9}
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(out, "a") as archive,
    ):
        archive.writestr("bundle.json", json.dumps(evil))
    not_installed(out.getvalue(), match="is wrong")


def test_damaged_signatures_of_a_bundle_are_refused_without_any_key(
    bundle, not_installed
):
    members = members_of(sign_bundle(bundle, OURS))
    for block in (b"x", members["bundle.sig"][:-1] + b"?", members["bundle.sig"][:-1]):
        members["bundle.sig"] = block
        not_installed(encode_members(members), BundleError, r"bundle\.sig", trust=None)


@pytest.mark.parametrize(
    "manifest",
    [
        *(b"[" * 100_000, b"[]", b"null", b'{"schema": 1, "files": [1]}'),
        b'{"schema": 1, "files": {"keys/0.pem": 0}}',
    ],
)
def test_a_manifest_of_any_other_shape_installs_nothing(
    bundle, manifest, not_installed
):
    data = encode_members(members_of(bundle) | {"bundle.json": manifest})
    not_installed(data, BundleError, trust=None)
    with pytest.raises(BundleError):
        read_bundle(data, FirstUse(1))


@pytest.mark.parametrize(("offset", "value"), [(6, 99), (8, 1)])
def test_a_bundle_whose_members_no_reader_knows_installs_nothing(
    bundle, offset, value, not_installed
):
    """Of a zip version to come, or said to be encrypted."""
    data = bytearray(bundle)
    entry = data.index(b"PK\x01\x02")
    while data[entry : entry + 4] == b"PK\x01\x02":
        data[entry + offset] = value
        sizes = struct.unpack_from("<HHH", data, entry + 28)
        entry += 46 + sum(sizes)
    not_installed(bytes(data), BundleError, trust=None)


def test_keys_that_a_bundle_brings_along_do_not_count(tmp_path, not_installed):
    carrying = sign_bundle(bundle_of(tmp_path, keys=[THEIRS]), THEIRS)
    not_installed(carrying, match="expected 1 of")
    device = Device.install(tmp_path / "s", carrying, trial=no_trial)
    assert device.status()["trusted_keys"] == []


def test_keys_that_a_bundle_brings_along_count_on_first_use(tmp_path):
    carrying = sign_bundle(bundle_of(tmp_path, keys=[OURS]), OURS)
    trust = read_bundle(carrying, FirstUse(1)).trust
    device = Device.install(tmp_path / "s", carrying, trust=trust, trial=no_trial)
    with pytest.raises(TrustError):
        device.update(patch_of(ROUNDS[0], ROUNDS[1], 1, key=THEIRS))
    device.update(PATCHES[1])


def test_first_use_needs_a_bundle_that_its_own_keys_signed(tmp_path, not_installed):
    carrying = bundle_of(tmp_path, keys=[OURS])
    not_installed(carrying, match="by nobody", trust=FirstUse(1))


def test_first_use_of_a_bundle_without_keys(bundle):
    with pytest.raises(TrustError, match="carries no keys"):
        read_bundle(sign_bundle(bundle, OURS), FirstUse(1))


def test_a_key_slipped_into_a_signed_bundle_does_not_count(tmp_path):
    members = members_of(sign_bundle(bundle_of(tmp_path, keys=[OURS]), OURS))
    members["keys/x.pem"] = encode_public(THEIRS)
    assert read_bundle(encode_members(members), FirstUse(1)).trust == TRUST
    members["keys/0.pem"] = encode_public(THEIRS)
    with pytest.raises(BundleError, match="is damaged"):
        read_bundle(encode_members(members), FirstUse(1))


def test_two_signers_of_a_bundle_do_not_undo_each_other(bundle):
    both = sign_bundle(sign_bundle(bundle, OURS), SECOND)
    assert sign_bundle(sign_bundle(bundle, SECOND), OURS) == both
    assert sign_bundle(both, OURS) == both
    unsigned = members_of(both)
    del unsigned["bundle.sig"]
    assert encode_members(unsigned) == bundle
