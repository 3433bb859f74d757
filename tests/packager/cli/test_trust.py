# SPDX-License-Identifier: Apache-2.0
"""Key lists on the command lines: made by several people, taken by devices."""

import json
import re
import stat

import pytest
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from edge_runtime.cli.main import main as edge
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.signing import key_id, load_public
from packager.cli.pack import pack, patch


@pytest.fixture
def here(tmp_path, monkeypatch, command):
    """A folder with the keys of two owners and of two fleet signers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    for name in ("ann", "bob", "fleet", "new"):
        assert command(patch, "keygen", f"{name}.pem")[0] == 0
    return tmp_path


@pytest.fixture
def trust(command, here):
    """Run dpu-patch trust with --json; return what it says, or the error."""

    def trust(*words):
        code, out, err = command(patch, "trust", *words, "--json")
        return json.loads(out if code == 0 else err.splitlines()[-1])

    return trust


@pytest.fixture
def first(trust):
    made = trust(
        *("init", "--root", "ann.pub.pem", "--root", "bob.pub.pem"),
        *("--root-threshold", 2, "--release", "fleet.pub.pem"),
    )
    assert made["signatures"]["own"]["missing"] == 2
    trust("sign", "1.root.json", "--key", "ann.pem")
    done = trust("sign", "1.root.json", "--key", "bob.pem")
    assert done["signatures"]["own"]["missing"] == 0
    return done


def id_of(path):
    return key_id(load_public(path.read_bytes()))


def test_two_people_sign_one_after_the_other_and_a_device_begins_with_it(
    here, first, trust, command, run
):
    runs = ("--runs", run.path.parent)
    command(pack, "round_00", "--bundle", "--sign", "fleet.pem", *runs)
    command(pack, "round_01", "--sign", "fleet.pem", *runs)
    bundle, one = run.path / "round_00.bundle.zip", run.path / "round_01.dpu"
    store = ("--store", here / "store")
    code, out, err = command(edge, *store, "init", bundle, "--trust", "1.root.json")
    assert code == 0, err
    assert f"key list 1 expires {first['expires']}" in out

    # The fleet's key is stolen: one command, two signatures, one file to send.
    trust(
        *("rotate", "1.root.json", "--remove-release", id_of(here / "fleet.pub.pem")),
        *("--add-release", "new.pub.pem", "--sign", "ann.pem"),
    )
    code, _, err = command(edge, *store, "trust", "add", "2.root.json")
    assert (code, "2.root.json: key list 2 is signed by" in err) == (8, True)
    done = trust("sign", "2.root.json", "--key", "bob.pem")
    assert [w["missing"] for w in done["signatures"].values()] == [0, 0]
    code, out, _ = command(edge, *store, "trust", "add", "2.root.json")
    assert (code, out.startswith("2.root.json: applied")) == (0, True)
    assert command(edge, *store, "trust", "add", "2.root.json")[0] == 0
    assert command(edge, *store, "trust", "add", "1.root.json")[0] == 8
    code, _, err = command(edge, *store, "apply", one)
    assert (code, "not trusted" in err) == (8, True)
    command(patch, "sign", one, "--key", "new.pem")
    assert command(edge, *store, "apply", one)[0] == 0

    code, out, _ = command(edge, "trust", "show", *store, "--json")
    shown = json.loads(out)
    assert shown["key_list"]["version"] == 2
    assert [e["version"] for e in shown["key_list"]["history"]] == [1, 2]
    assert shown["releases"]["keys"][0]["key_id"] == id_of(here / "new.pub.pem")
    assert shown["key_list"]["next_list"]["threshold"] == 2
    status = json.loads(command(edge, *store, "status", "--json")[1])
    assert status["key_list"]["expired"] is False
    assert "keys changed" in [event["event"] for event in status["history"]]
    text = command(edge, *store, "trust", "show")[1]
    assert f"1 of {id_of(here / 'new.pub.pem')}" in text


def test_lists_that_were_taken_are_told_though_the_next_one_is_refused(
    here, first, trust, command, run
):
    runs = ("--runs", run.path.parent)
    command(pack, "round_00", "--bundle", "--sign", "fleet.pem", *runs)
    store = ("--store", here / "store")
    bundle = run.path / "round_00.bundle.zip"
    command(edge, *store, "init", bundle, "--trust", "1.root.json")
    new = ("--add-release", "new.pub.pem")
    trust("rotate", "1.root.json", *new, "--sign", "ann.pem", "--sign", "bob.pem")
    given = ("2.root.json", "1.root.json")
    code, out, err = command(edge, *store, "trust", "add", *given)
    assert (code, out) == (8, "2.root.json: applied\n")
    code, _, err = command(edge, *store, "trust", "add", *given, "--json")
    taken = [{"file": "2.root.json", "result": "already current"}]
    assert (code, json.loads(err)["lists"]) == (8, taken)


def test_a_device_with_single_keys_moves_over(here, first, trust, command, run):
    runs = ("--runs", run.path.parent)
    command(pack, "round_00", "--bundle", "--sign", "fleet.pem", *runs)
    bundle = run.path / "round_00.bundle.zip"
    store = ("--store", here / "store")
    command(edge, *store, "init", bundle, "--trust", "fleet.pub.pem")
    assert "key list      none" in command(edge, *store, "trust", "show")[1]
    assert command(edge, *store, "trust", "add", "1.root.json")[0] == 8
    trust("sign", "1.root.json", "--key", "fleet.pem")
    assert command(edge, *store, "trust", "add", "1.root.json")[0] == 0


def test_python_tuf_takes_what_the_commands_write(here, first, trust):
    signers = ("--sign", "ann.pem", "--sign", "bob.pem")
    trust("rotate", "1.root.json", "--add-release", "new.pub.pem", *signers)
    trust("revoke", "2.root.json", id_of(here / "fleet.pub.pem"), *signers)
    lists = [(here / f"{n}.root.json").read_bytes() for n in (1, 2, 3)]
    trusted = TrustedMetadataSet(lists[0], EnvelopeType.METADATA)
    for data in lists[1:]:
        trusted.update_root(data)
    assert trusted.root.version == 3
    keys = [k.keyval["public"] for k in trusted.root.keys.values()]
    assert load_public((here / "fleet.pub.pem").read_bytes()) not in keys


def test_a_revoked_key_leaves_every_role(here, trust):
    trust(
        *("init", "--root", "ann.pub.pem", "--root", "bob.pub.pem"),
        *("--release", "ann.pub.pem", "--release", "fleet.pub.pem"),
    )
    made = trust("revoke", "1.root.json", "ann.pub.pem", "--sign", "bob.pem")
    ann = id_of(here / "ann.pub.pem")
    assert ann not in (*made["roots"], *made["releases"])
    assert made["signatures"]["former"]["signed_by"] == [id_of(here / "bob.pub.pem")]


def test_the_last_key_of_a_role_cannot_be_revoked(here, first, trust):
    made = trust("revoke", "1.root.json", "fleet.pub.pem")
    assert (made["exit_code"], made["error"]) == (3, "KeyListError")
    assert "no key of role targets any more; add another one" in made["message"]
    assert not (here / "2.root.json").exists()


def test_a_list_is_never_overwritten_and_a_key_neither(here, first, trust, command):
    before = (here / "1.root.json").read_bytes()
    again = ("init", "--root", "bob.pub.pem", "--release", "new.pub.pem")
    assert trust(*again)["exit_code"] == 2
    assert (here / "1.root.json").read_bytes() == before
    private = (here / "ann.pem").read_bytes()
    assert command(patch, "keygen", "ann.pem")[0] == 2
    assert (here / "ann.pem").read_bytes() == private
    assert stat.S_IMODE((here / "ann.pem").stat().st_mode) == 0o600


def test_no_private_key_gets_into_a_list(here, trust):
    made = trust("init", "--root", "ann.pem", "--release", "fleet.pub.pem")
    assert (made["exit_code"], "is a private key" in made["message"]) == (2, True)
    for data in here.glob("*.root.json"):
        assert b"PRIVATE" not in data.read_bytes()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("90d", "2026-04-01T00:00:00Z"),
        ("2y", "2028-01-01T00:00:00Z"),
        ("2030-06-07", "2030-06-07T00:00:00Z"),
        ("2030-06-07T08:09:10Z", "2030-06-07T08:09:10Z"),
    ],
)
def test_a_list_expires_when_it_is_told_to(here, trust, monkeypatch, given, found):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767225600")  # 1 January 2026
    keys = ("--root", "ann.pub.pem", "--release", "fleet.pub.pem")
    made = trust("init", *keys, "--expires", given)
    assert (made["issued"], made["expires"]) == ("2026-01-01T00:00:00Z", found)


@pytest.mark.parametrize(
    "given", ["", "soon", "2y ", "0d", "9999y", "2026-02-30", "2020-01-01", "-1d"]
)
def test_a_time_that_is_none_or_over_is_refused(here, trust, given):
    keys = ("--root", "ann.pub.pem", "--release", "fleet.pub.pem")
    made = trust("init", *keys, "--expires", given)
    assert made["exit_code"] in (2, 3)
    assert not list(here.glob("*.root.json"))


def test_a_list_that_would_be_over_at_once_is_called_so(here, first, trust):
    made = trust("rotate", "1.root.json", "--expires", "2020-01-01")
    assert "would expire 2020-01-01T00:00:00Z; give a later" in made["message"]


def test_who_signs_with_a_key_that_brings_a_list_no_further_is_told(here, command):
    keys = ("--root", "ann.pub.pem", "--release", "fleet.pub.pem")
    words = "is no root key of this list"
    command(patch, "trust", "init", *keys, "--sign", "ann.pem")
    for key, idle in (("fleet.pem", True), ("ann.pem", False)):
        code, _, err = command(patch, "trust", "sign", "1.root.json", "--key", key)
        assert (code, words in err) == (0, idle)
    made = ("rotate", "1.root.json", "--add-root", "bob.pub.pem", "--sign", "new.pem")
    assert words in command(patch, "trust", *made)[2]


def test_whoever_renews_too_late_is_told_what_that_costs(
    here, trust, command, monkeypatch
):
    keys = ("--root", "ann.pub.pem", "--release", "fleet.pub.pem")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1577836800")  # 1 January 2020
    trust("init", *keys, "--expires", "1y")
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    code, _, err = command(patch, "trust", "rotate", "1.root.json")
    assert (code, "--lapsed" in err) == (0, True)


@pytest.mark.parametrize(
    "words", [["init"], ["rotate"], ["revoke"], ["sign"], ["show"]]
)
def test_every_command_of_the_group_has_help(command, words):
    code, out, _ = command(patch, "trust", *words, "--help")
    assert (code, "Usage: " in out) == (0, True)


def test_what_doctor_advises_a_device_without_keys_works(here, first, command, run):
    command(pack, "round_00", "--bundle", "--runs", run.path.parent)
    store = ("--store", here / "store")
    assert command(edge, *store, "init", run.path / "round_00.bundle.zip")[0] == 0
    out = command(edge, *store, "doctor")[1]
    (advice,) = re.findall(r"'dpu-edge (trust add .+)N\.root\.json'", out)
    assert command(edge, *store, *advice.split(), "1.root.json")[0] == 0


def test_a_key_list_stands_alone(here, first, command, run):
    command(pack, "round_00", "--bundle", "--runs", run.path.parent)
    bundle, store = run.path / "round_00.bundle.zip", ("--store", here / "store")
    for more in (("--trust", "ann.pub.pem"), ("--threshold", "2")):
        words = ("init", bundle, "--trust", "1.root.json", *more)
        code, _, err = command(edge, *store, *words)
        assert (code, "give it alone" in err) == (2, True)
    code, _, err = command(edge, *store, "init", bundle, "--trust", "1.root.json")
    assert code == 8  # the bundle is not signed
    assert not (here / "store").exists()


def test_the_store_is_asked_for_by_the_last_command_alone(command, monkeypatch):
    monkeypatch.delenv("DPU_STORE", raising=False)
    code, _, err = command(edge, "trust", "show")
    assert (code, "--store" in err) == (2, True)


def test_a_patch_is_dated_when_it_is_signed(here, command, run, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767225600")
    command(pack, "round_01", "--runs", run.path.parent)
    path = run.path / "round_01.dpu"
    assert command(patch, "sign", path, "--key", "fleet.pem", "--dated")[0] == 0
    with open_patch(path) as signed:
        assert signed.header.signed_at == 1767225600
    assert "time of signing" in command(patch, "info", path)[1]
    code, _, err = command(patch, "sign", path, "--key", "new.pem", "--dated")
    assert (code, "round_01.dpu: the patch is signed" in err) == (3, True)
    assert command(patch, "sign", path, "--key", "new.pem")[0] == 0


def test_who_dates_a_bundle_is_told_that_it_tells_no_time(here, command, run):
    command(pack, "round_01", "--bundle", "--runs", run.path.parent)
    path = run.path / "round_01.bundle.zip"
    code, _, err = command(patch, "sign", path, "--key", "fleet.pem", "--dated")
    assert (code, "it is signed, not dated" in err) == (0, True)
    assert command(patch, "verify", path, "--key", "fleet.pub.pem")[0] == 0
