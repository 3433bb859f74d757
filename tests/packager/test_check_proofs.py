# SPDX-License-Identifier: Apache-2.0
"""Proofs of a whole fleet: one table, each fault counted and named."""

import json
import os
from itertools import count

import pytest

from edge_runtime import Device, make_proof
from edge_runtime.formats.signing import framed, key_id
from edge_runtime.live.proof import CONTEXT, encode_public
from edge_runtime.live.shared import canonical, public_key
from packager import check_proofs as many
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.check_proof import known_rounds
from packager.check_proofs import Standard, proof_files
from packager.cli.pack import patch
from packager.keys import generate_key
from packager.read_proof import Question
from packager.rounds.folder import read_round

NONCE, EARLIER = "5f2a", "0001"


@pytest.fixture
def facts(run, tmp_path):
    """What real devices say at round 0 and at round 1, not signed yet."""
    bundle = build_bundle(read_round(run.path / "round_00")).data
    device = Device.install(tmp_path / "store", bundle, trial=lambda *_, **__: None)
    found = [json.loads(make_proof(device.store, NONCE))]
    device.update(pack_round(read_round(run.path / "round_01")).data)
    return [*found, json.loads(make_proof(device.store, NONCE))]


class Fleet:
    """Folders of proofs and of the public keys of the devices that made them."""

    def __init__(self, folder):
        self.proofs, self.keys = folder / "proofs", folder / "keys"
        self.keys.mkdir()
        self._number = count()

    def answer(self, facts, folder="", *, known=True, change=None, **also):
        """Let one more device answer; ``change`` comes after its signature."""
        name, key = f"board{next(self._number)}", generate_key()
        if known:
            (self.keys / f"{name}.pub.pem").write_bytes(encode_public(key))
        proof = facts | also
        signed = key.sign(framed(CONTEXT, canonical(proof))).hex()
        proof["signature"] = {"key_id": key_id(public_key(key)), "value": signed}
        path = self.proofs / folder / f"{name}.proof"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(canonical(proof | (change or {})))
        return path


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path)


@pytest.fixture
def check(fleet, run, command):
    def check(*paths, words=()):
        words = ("--nonce", NONCE, "--runs", run.path.parent, "--json", *words)
        paths = paths or (fleet.proofs,)
        key = ("--key", fleet.keys)
        code, out, err = command(patch, "check-proof", *paths, *words, *key)
        return code, json.loads(out or err)

    return check


def faults(record):
    return {kind: fault["proofs"] for kind, fault in record["faults"].items()}


def test_a_folder_is_grouped_by_what_its_devices_hold(check, fleet, facts):
    for number in range(5):
        fleet.answer(facts[number > 2], f"site{number % 2}")
    code, record = check()
    assert (code, record["proofs"], record["devices"]) == (0, 5, 5)
    groups = [(g["name"], g["proofs"], g["equal"]) for g in record["holds"]]
    assert groups == [("tiny/round_00", 3, 3), ("tiny/round_01", 2, 2)]
    assert record["holds"][0]["fingerprint"] == facts[0]["disk"]["fingerprint"]
    code, record = check(words=("--round", "tiny/round_01"))
    assert (code, faults(record)) == (5, {"different": 3})
    assert [g["different"] for g in record["holds"]] == [3, 0]


def test_each_fault_is_counted_and_named_with_its_file(check, fleet, facts):
    at_round_1 = facts[1]
    fleet.answer(at_round_1)
    wrong = {
        "old nonce": fleet.answer(at_round_1, nonce=EARLIER),
        "wrong nonce": fleet.answer(at_round_1, nonce="other"),
        "unknown key": fleet.answer(at_round_1, known=False),
        "altered": fleet.answer(at_round_1, change={"round": 7}),
        "unknown weights": fleet.answer(at_round_1, fingerprint="ab" * 32),
        "unclear": fleet.answer(at_round_1, untold=[77]),
        "different": fleet.answer(at_round_1, disk=None),
        "too old": fleet.answer(at_round_1, time="2020-01-01T00:00:00Z"),
        "unreadable": fleet.proofs / "torn.proof",
        "not signed": fleet.proofs / "unsigned.proof",
    }
    wrong["unreadable"].write_bytes(wrong["altered"].read_bytes()[:-9])
    wrong["not signed"].write_bytes(canonical(at_round_1))
    code, record = check(words=("--old-nonce", EARLIER, "--max-age", 86400))
    assert code == 8
    assert faults(record) == dict.fromkeys(wrong, 1)
    for kind, path in wrong.items():
        (file,) = record["faults"][kind]["files"]
        assert file["path"] == str(path)
        assert file["reason"]
    assert sum(group["proofs"] for group in record["holds"]) == 3


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("equal", {}, 0),
        ("different", {"disk": None}, 5),
        ("unclear", {"untold": [77]}, 5),
        ("unknown weights", {"fingerprint": "ab" * 32}, 5),
        ("wrong nonce", {"nonce": "other"}, 8),
    ],
)
def test_the_exit_code_is_that_of_the_gravest_fault(
    check, fleet, facts, name, change, code
):
    fleet.answer(facts[0])
    fleet.answer(facts[0], **change)
    found, record = check()
    assert (found, list(faults(record))) == (code, [name] if code else [])
    (fleet.proofs / "torn.proof").write_bytes(b"{")
    assert check()[0] == (8 if code == 8 else 3)


def test_a_device_that_sent_no_proof_is_named(check, fleet, facts):
    fleet.answer(facts[0])
    fleet.answer(facts[0]).unlink()
    code, record = check()
    assert code == 0
    assert [s["name"] for s in record["silent"]] == [str(fleet.keys / "board1.pub.pem")]


def test_two_proofs_of_one_device_are_one_device(check, fleet, facts):
    path = fleet.answer(facts[0])
    path.with_name("again.proof").write_bytes(path.read_bytes())
    assert [check()[1][name] for name in ("proofs", "devices")] == [2, 1]


def test_several_files_are_a_fleet_too(check, fleet, facts):
    paths = [fleet.answer(facts[0]), fleet.answer(facts[1])]
    assert (check(*paths)[0], check(*paths)[1]["proofs"]) == (0, 2)
    assert check(paths[0], fleet.proofs)[1]["proofs"] == 3
    assert check(paths[0])[1]["verdict"] == "equal"  # as ever


def test_what_lies_in_a_folder_cannot_hang_or_lead_elsewhere(
    check, fleet, facts, tmp_path
):
    fleet.answer(facts[0], "site")
    os.mkfifo(fleet.proofs / "pipe.proof")
    secret = tmp_path / "elsewhere.proof"
    secret.write_bytes(b"{}")
    (fleet.proofs / "link.proof").symlink_to(secret)
    (fleet.proofs / "round").symlink_to(fleet.proofs)
    (fleet.proofs / "large.proof").write_bytes(bytes(20_000_000))
    (fleet.proofs / "README").write_text("no proof, and not counted")
    code, record = check()
    assert (code, faults(record), record["proofs"]) == (3, {"unreadable": 3}, 4)


def test_a_folder_without_proofs_and_one_without_keys_are_refused(
    check, fleet, facts, tmp_path
):
    fleet.answer(facts[0])
    (tmp_path / "empty").mkdir()
    code, record = check(tmp_path / "empty")
    assert (code, "no *.proof" in record["message"]) == (3, True)
    code, record = check(words=("--key", tmp_path / "empty"))
    assert (code, "no *.pub.pem" in record["message"]) == (2, True)


def test_people_read_one_table_and_no_name_moves_their_cursor(
    fleet, facts, run, command
):
    for _ in range(12):
        fleet.answer(facts[0], nonce="\x1b[2Jother")
    fleet.answer(facts[0])
    fleet.proofs.joinpath("\x1b]0;mine.proof").write_bytes(b"{")
    words = ("--nonce", NONCE, "--runs", run.path.parent)
    code, out, err = command(patch, "check-proof", fleet.proofs, *words)
    assert (code, err, "\x1b" in out) == (8, "", False)
    assert out.startswith("14 proofs: 13 not as expected\n")
    assert "signatures not checked" in out
    row = next(line for line in out.splitlines() if "tiny/round_00" in line)
    assert row.split() == ["tiny/round_00", facts[0]["fingerprint"][:12], *"1100"]
    assert "Wrong nonce: 12" in out
    assert "2 more" in out


def test_what_is_kept_does_not_grow_with_what_devices_make_up(
    fleet, facts, run, monkeypatch
):
    monkeypatch.setattr(many, "KEPT", 20)
    paths = [fleet.answer(facts[0], nonce=str(number)) for number in range(50)]
    for number in range(50):
        disk = facts[0]["disk"] | {"fingerprint": f"{number:064x}"}
        paths.append(fleet.answer(facts[0], disk=disk))
    standard = Standard(known_rounds(run.path.parent))
    found = many.check_proofs(paths, Question(NONCE), standard)
    assert found.proofs == 100
    assert [fault.count for fault in found.faults.values()] == [50, 50]
    assert [len(fault.files) for fault in found.faults.values()] == [20, 20]
    assert (len(found.holds), found.holds["others", ""].total()) == (21, 30)


def test_files_of_a_folder_come_in_order_and_from_below(tmp_path):
    for name in ("b/2.proof", "a/9.proof", "c.proof", "b/1.proof", "b/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [str(path.relative_to(tmp_path)) for path in proof_files(tmp_path)]
    assert found == ["a/9.proof", "b/1.proof", "b/2.proof", "c.proof"]
