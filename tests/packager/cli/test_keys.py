# SPDX-License-Identifier: Apache-2.0
"""Keys on the command line, from keygen to a device that trusts nobody else."""

import json
import resource
import stat

import pytest

import packager.cli.keys
from edge_runtime.cli.main import main as edge
from edge_runtime.errors import BudgetError, PatchError
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.signing import FirstUse, load_public
from edge_runtime.live.shared import public_key
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.cli.pack import pack, patch
from packager.keys import generate_key, load_private
from packager.rounds.folder import read_round
from packager.signing import sign_patch


@pytest.fixture
def key(command, tmp_path):
    """A key pair that dpu-patch made; the path of the private half."""
    path = tmp_path / "fleet.pem"
    assert command(patch, "keygen", path)[0] == 0
    return path


@pytest.fixture
def public(key):
    return key.with_name("fleet.pub.pem")


@pytest.fixture
def make(command, run):
    """Run dpu-pack on the run ``tiny``; return the file that it wrote."""

    def make(name, *options):
        code, _, err = command(pack, name, "--runs", run.path.parent, *options)
        assert code == 0, err
        suffix = ".bundle.zip" if "--bundle" in options else ".dpu"
        return run.path / (name + suffix)

    return make


def key_id_of(public):
    from edge_runtime.formats.signing import key_id

    return key_id(load_public(public.read_bytes()))


def test_from_a_new_key_to_a_device_that_accepts_nothing_else(
    command, make, key, public, tmp_path
):
    bundle = make("round_00", "--bundle", "--sign", key)
    signed = make("round_01", "--sign", key).read_bytes()
    unsigned = make("round_01", "--force")
    store = ("--store", tmp_path / "store")

    code, out, _ = command(edge, *store, "init", bundle, "--trust", public)
    assert (code, f"trusted keys  {key_id_of(public)}" in out) == (0, True)
    code, _, err = command(edge, *store, "apply", unsigned)
    assert (code, "signed by nobody" in err) == (8, True)
    unsigned.write_bytes(signed)
    assert command(edge, *store, "apply", unsigned)[0] == 0
    record = json.loads(command(edge, *store, "status", "--json")[1])
    assert (record["trusted_keys"], record["round"]) == ([key_id_of(public)], 1)
    assert record["signatures_needed"] == 1


def test_a_device_without_keys_says_so(command, make, tmp_path):
    bundle = make("round_00", "--bundle")
    out = command(edge, "--store", tmp_path / "store", "init", bundle)[1]
    assert "trusted keys  none" in out
    assert (
        "--trust KEY.pub.pem"
        in command(edge, "--store", tmp_path / "store", "status")[1]
    )


def test_exit_8_for_a_bundle_that_the_trusted_key_did_not_sign(
    command, make, public, tmp_path
):
    bundle = make("round_00", "--bundle")
    store = ("--store", tmp_path / "store")
    assert command(edge, *store, "init", bundle, "--trust", public)[0] == 8
    assert command(edge, *store, "init", bundle, "--trust-on-first-use")[0] == 8
    assert command(edge, *store, "status")[0] == 7


def test_trust_on_first_use_takes_the_keys_of_the_bundle(
    command, make, key, public, tmp_path
):
    bundle = make("round_00", "--bundle", "--sign", key)
    store = ("--store", tmp_path / "store")
    assert command(edge, *store, "init", bundle, "--trust-on-first-use")[0] == 0
    assert f"trusted keys   {key_id_of(public)}\n" in command(edge, *store, "status")[1]


def test_two_signatures_of_two_keys(command, make, key, public, tmp_path):
    second = tmp_path / "second.pem"
    command(patch, "keygen", second)
    bundle = make("round_00", "--bundle", "--sign", key, "--sign", second)
    update = make("round_01", "--sign", key)
    store = ("--store", tmp_path / "store")
    trust = ("--trust", public, "--trust", tmp_path / "second.pub.pem")
    assert command(edge, *store, "init", bundle, *trust, "--threshold", 2)[0] == 0
    assert "(2 of them must sign)" in command(edge, *store, "status")[1]
    assert command(edge, *store, "apply", update)[0] == 8
    assert command(patch, "sign", update, "--key", second)[0] == 0
    assert command(edge, *store, "apply", update)[0] == 0


@pytest.mark.parametrize(
    "options", [("--trust", "KEY", "--trust-on-first-use"), ("--trust", "PRIVATE")]
)
def test_exit_2_for_contradictory_or_private_keys(
    command, make, key, public, tmp_path, options
):
    bundle = make("round_00", "--bundle", "--sign", key)
    words = [{"KEY": public, "PRIVATE": key}.get(word, word) for word in options]
    assert command(edge, "--store", tmp_path / "store", "init", bundle, *words)[0] == 2


def test_exit_2_for_a_threshold_that_cannot_be_met(
    command, make, key, public, tmp_path
):
    bundle = make("round_00", "--bundle", "--sign", key)
    words = ("--trust", public, "--threshold", 2)
    code, _, err = command(edge, "--store", tmp_path / "s", "init", bundle, *words)
    assert (code, "cannot be asked of 1" in err) == (2, True)


# keygen ------------------------------------------------------------------------------


def test_keygen_writes_both_halves_and_names_the_key(command, tmp_path):
    code, out, _ = command(patch, "keygen", tmp_path / "a.pem", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["key_id"] == key_id_of(tmp_path / "a.pub.pem")
    assert stat.S_IMODE((tmp_path / "a.pem").stat().st_mode) == 0o600


def test_keygen_never_overwrites(command, key):
    before = key.read_bytes()
    code, _, err = command(patch, "keygen", key)
    assert (code, "never overwritten" in err) == (2, True)
    assert key.read_bytes() == before


def test_the_public_half_keeps_the_whole_name(command, tmp_path):
    assert command(patch, "keygen", tmp_path / "fleet.v2")[0] == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["fleet.v2", "fleet.v2.pub.pem"]


def test_no_private_key_gets_the_name_of_a_public_one(command, tmp_path):
    code, _, err = command(patch, "keygen", tmp_path / "rel.pub.pem")
    assert (code, "give KEY.pem" in err, list(tmp_path.iterdir())) == (2, True, [])


@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_a_passphrase_that_is_too_long_is_refused(command, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("DPU_PASSPHRASE", 512 * "é")
    words = ("keygen", tmp_path / "k.pem", "--encrypt", "--kind", kind)
    code, _, err = command(patch, *words)
    assert (code, "has 1024 bytes, expected at most 1023" in err) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_the_disk_has_no_room_for_leaves_no_half(command, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        code, _, err = command(patch, "keygen", tmp_path / "fleet.pem")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, list(tmp_path.iterdir())) == (10, [])
    assert str(tmp_path / "fleet.pem") in err


def test_of_several_files_the_bad_one_is_named_and_none_is_signed(command, key, make):
    good = make("round_01")
    bad = good.with_name("bad.dpu")
    bad.write_bytes(good.read_bytes()[:-1])
    before = good.read_bytes()
    code, _, err = command(patch, "sign", good, bad, "--key", key)
    assert (code, f"{bad}: the patch is damaged" in err) == (3, True)
    assert good.read_bytes() == before


def test_an_encrypted_key_takes_its_passphrase_from_the_environment(
    command, make, tmp_path, monkeypatch
):
    monkeypatch.setenv("DPU_PASSPHRASE", "a secret")
    key = tmp_path / "k.pem"
    assert command(patch, "keygen", key, "--encrypt")[0] == 0
    assert b"ENCRYPTED" in key.read_bytes()
    make("round_01", "--sign", key)
    monkeypatch.setenv("DPU_PASSPHRASE", "another")
    update = make("round_01")
    code, _, err = command(patch, "sign", update, "--key", key)
    assert (code, "wrong passphrase for" in err) == (2, True)
    monkeypatch.delenv("DPU_PASSPHRASE")
    code, _, err = command(patch, "sign", update, "--key", key)
    assert (code, "give its passphrase" in err) == (2, True)
    assert command(patch, "keygen", tmp_path / "l.pem", "--encrypt")[0] == 2


def test_a_passphrase_is_asked_for_on_a_terminal(command, tmp_path, monkeypatch):
    monkeypatch.setattr(packager.cli.keys.sys.stdin, "isatty", lambda: True)
    answers = iter(["a secret", "a secret", "a secret"])
    monkeypatch.setattr("click.termui.hidden_prompt_func", lambda _: next(answers))
    monkeypatch.delenv("DPU_PASSPHRASE", raising=False)
    command(patch, "keygen", tmp_path / "k.pem", "--encrypt")
    load_private((tmp_path / "k.pem").read_bytes(), "a secret")
    (keys, ids) = packager.cli.keys.read_signers([tmp_path / "k.pem"])
    assert (len(keys), len(ids)) == (1, 1)


# sign and verify ---------------------------------------------------------------------


def test_sign_and_pack_with_sign_give_the_same_bytes(command, make, key):
    packed = make("round_01", "--sign", key).read_bytes()
    later = make("round_01")
    code, out, _ = command(patch, "sign", later, "--key", key)
    assert (code, later.read_bytes()) == (0, packed)
    assert "signed by" in out


def test_verify_insists_on_every_key_given(command, make, key, public, tmp_path):
    command(patch, "keygen", tmp_path / "other.pem")
    other = tmp_path / "other.pub.pem"
    for path in (
        make("round_01", "--sign", key),
        make("round_00", "--bundle", "--sign", key),
    ):
        code, out, _ = command(patch, "verify", path, "--key", public)
        assert (code, f"signed by {key_id_of(public)}" in out) == (0, True)
        assert command(patch, "verify", path, "--key", other)[0] == 8
        words = ("--key", public, "--key", other)
        assert command(patch, "verify", path, *words)[0] == 8
        assert "signatures not checked" in command(patch, "verify", path)[1]


def test_info_names_the_signers_and_counts_their_bytes(command, make, key, public):
    path = make("round_01", "--sign", key)
    record = json.loads(command(patch, "info", path, "--json")[1])
    assert record["signature_bytes"] == 76
    assert record["signed_by"] == [key_id_of(public)]
    text = command(patch, "info", path)[1]
    assert f"signed   by {key_id_of(public)}" in text
    rows = [line.split()[:2] for line in text.splitlines()]
    assert ["signatures", "76"] in rows


def test_exit_3_for_signing_what_is_no_patch(command, key, tmp_path):
    (tmp_path / "x").write_bytes(b"nonsense")
    assert command(patch, "sign", tmp_path / "x", "--key", key)[0] == 3
    (tmp_path / "x").write_bytes(b"PK nonsense")
    assert command(patch, "sign", tmp_path / "x", "--key", key)[0] == 3
    assert (tmp_path / "x").read_bytes() == b"PK nonsense"


# From Python -------------------------------------------------------------------------


def test_signatures_count_for_the_size_limit(run):
    round_, key = read_round(run.path / "round_01"), generate_key()
    size = len(pack_round(round_).data)
    assert len(pack_round(round_, max_size=size + 76, signers=[key]).data) == size + 76
    with pytest.raises(BudgetError):
        pack_round(round_, max_size=size + 75, signers=[key])


def test_the_same_round_and_keys_give_the_same_bytes(run):
    one, two = generate_key(), generate_key()
    for make, name in ((pack_round, "round_01"), (build_bundle, "round_00")):
        round_ = read_round(run.path / name)
        first = make(round_, signers=[one, two]).data
        assert make(round_, signers=[two, one]).data == first


def test_a_signed_bundle_carries_the_keys_and_an_unsigned_patch(run):
    key = generate_key()
    data = build_bundle(read_round(run.path / "round_00"), signers=[key]).data
    content = read_bundle(data, FirstUse(1))
    assert content.trust.keys == (public_key(key),)
    assert open_patch(content.patch).signatures == ()


def test_a_signed_patch_is_still_no_other_patch(run):
    data = pack_round(read_round(run.path / "round_01"), signers=[generate_key()]).data
    with pytest.raises(PatchError):
        sign_patch(data[:-1], generate_key())
