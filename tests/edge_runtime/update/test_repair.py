# SPDX-License-Identifier: Apache-2.0
"""Damaged stores are made whole again with a bundle; nothing else changes."""

import io
import json
import shutil
import zipfile
from dataclasses import replace
from hashlib import sha256

import pytest

from edge_runtime.cli.main import main
from edge_runtime.errors import (
    BundleError,
    DpuError,
    StoreError,
    TrustError,
    WrongModelError,
    WrongParentError,
)
from edge_runtime.files import Files
from edge_runtime.formats.header import RESERVED_COUNTER
from edge_runtime.formats.identity import Run, encode_run
from edge_runtime.formats.signing import Trust
from edge_runtime.live.shared import public_key
from edge_runtime.update.device import Device
from edge_runtime.update.repair import find_damage, repair
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.keys import generate_key
from packager.rounds.folder import find_parent, read_round
from packager.zip_file import encode_bundle
from tests.crash.world import header_of, no_trial, with_header

KEY = generate_key()


class Board:
    """A store at round 2, installed from round 0, and the bundles of its run."""

    def __init__(self, run, root, signers=(KEY,)):
        self.run, self.root, self.signers = run, root, signers
        trust = Trust(tuple(map(public_key, signers)))
        Device.install(root, self.bundle(0), trust=trust, trial=no_trial)
        for number in (1, 2):
            self.device.update(self.patch(number))
        self.device.pin()
        self.before = self.device.store.state

    def bundle(self, number, **options):
        round_ = read_round(self.run.path / f"round_{number:02d}")
        return build_bundle(round_, **{"signers": self.signers} | options).data

    def patch(self, number):
        round_ = read_round(self.run.path / f"round_{number:02d}")
        return pack_round(round_, find_parent(round_), signers=self.signers).data

    @property
    def device(self):
        return Device.open(self.root, trial=no_trial)

    def weights(self, number=2):
        target = read_round(self.run.path / f"round_{number:02d}").record.target
        return self.root / "slots" / target / "weights.safetensors"

    def rot(self, path):
        """Change one byte, in a file of its own as a disk would."""
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.unlink()
        path.write_bytes(data)

    def insist_same(self):
        """All that is not damaged stays: floors, trust, pin, history, slots."""
        device = self.device
        device.verify()
        state, before = device.store.state, self.before
        for name in ("model", "init", "active", "floor", "floor_target", "trust"):
            assert getattr(state, name) == getattr(before, name)
        assert (state.pinned, state.tries) == (before.pinned, before.tries)
        events = [event for event in state.history if event.event != "mended"]
        assert tuple(events[: len(before.history)]) == before.history
        assert find_damage(device.store) == {}


@pytest.fixture
def rounds(new_run):
    run = new_run(run_id="ab" * 16)
    for number in range(4):
        run.add(number)
    return run


@pytest.fixture
def board(rounds, tmp_path):
    return Board(rounds, tmp_path / "store")


def tree(root):
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in files if path.name != "lock"}


def rot_weights(board):
    board.rot(board.weights())


def lose_weights(board):
    board.weights().unlink()


def lose_slot(board):
    shutil.rmtree(board.weights().parent)


def cut_weights(board):
    data = board.weights().read_bytes()
    board.weights().unlink()
    board.weights().write_bytes(data[:-100])


def lose_graph(board):
    (board.root / "model" / "graph.onnx").unlink()


def rot_graph_of_slot(board):
    board.rot(board.weights().with_name("graph.onnx"))


def rot_recipe(board):
    (board.root / "model" / "init.json").write_bytes(b"{}")


def rot_run(board):
    (board.root / "model" / "run.json").write_bytes(b"")


def rot_contract(board):
    (board.root / "model" / "contract.json").write_bytes(b"[]")


def lose_golden(board):
    (board.root / "model" / "golden.npz").unlink()


def lose_model(board):
    shutil.rmtree(board.root / "model")


def break_state(board):
    (board.root / "state.json").write_bytes(b"{")


DAMAGE = [rot_weights, lose_weights, lose_slot, cut_weights, lose_graph, rot_recipe]
DAMAGE += [rot_graph_of_slot, rot_run, rot_contract, lose_golden, lose_model]


@pytest.mark.parametrize("damage", [*DAMAGE, break_state])
def test_what_is_damaged_is_made_whole_and_nothing_else_changes(board, damage):
    weights = board.weights().read_bytes()
    damage(board)
    repair(board.device, board.bundle(2))
    assert board.weights().read_bytes() == weights
    board.insist_same()


@pytest.fixture
def lax_contract(board):
    """A contract that still parses, and asks for less than the one installed."""
    path = board.root / "model" / "contract.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"output_tolerance": ', b'"output_tolerance": 9'))
    return path, whole


def test_another_contract_than_the_installed_is_seen_and_made_whole(
    board, lax_contract
):
    path, whole = lax_contract
    for look in (
        board.device.verify,
        lambda: board.device.store.contract,
        lambda: board.device.update(board.patch(3)),
    ):
        with pytest.raises(StoreError, match=r"contract\.json is [0-9a-f]+, expected"):
            look()
    assert list(find_damage(board.device.store)) == ["contract"]
    assert repair(board.device, board.bundle(2)).mended == ("model/contract.json",)
    assert path.read_bytes() == whole
    board.insist_same()


def test_a_store_without_the_contracts_hash_is_compared_with_the_bundle(
    board, lax_contract
):
    path, whole = lax_contract
    store = board.device.store
    with store.lock():
        store.commit(replace(store.state, contract=""))
    board.device.verify()
    assert repair(board.device, board.bundle(2)).mended == ("model/contract.json",)
    assert path.read_bytes() == whole
    assert board.device.store.state.contract == sha256(whole).hexdigest()


def test_all_of_it_at_once_is_made_whole(board):
    for damage in (break_state, rot_weights, rot_run, lose_golden):
        damage(board)
    done = repair(board.device, board.bundle(2))
    assert "the weights of round 2" in done.mended
    board.insist_same()


def test_what_is_whole_is_left_alone_and_not_fetched_for(board, command):
    before = tree(board.root)
    call = ("--store", board.root, "repair", "https://example.invalid/digits")
    code, out, _ = command(main, *call)
    assert (code, out.splitlines()[0]) == (0, "nothing is damaged")
    assert tree(board.root) == before


@pytest.mark.parametrize("signers", [[], [generate_key()]])
def test_a_bundle_that_is_not_trusted_touches_nothing(board, signers):
    rot_weights(board)
    before = tree(board.root)
    with pytest.raises(TrustError):
        repair(board.device, board.bundle(2, signers=signers))
    assert tree(board.root) == before


def test_a_bundle_of_another_run_touches_nothing(board, new_run):
    other = new_run("other", run_id="cd" * 16)
    other.add(0)
    rot_weights(board)
    before = tree(board.root)
    bundle = build_bundle(read_round(other.path / "round_00"), signers=[KEY]).data
    with pytest.raises(WrongModelError, match="nothing was touched"):
        repair(board.device, bundle)
    assert tree(board.root) == before


def test_a_damaged_bundle_touches_nothing(board):
    rot_weights(board)
    before, data = tree(board.root), bytearray(board.bundle(2))
    data[len(data) // 2] ^= 1
    with pytest.raises(BundleError):
        repair(board.device, bytes(data))
    assert tree(board.root) == before


# Bundles whose digests are right, and whose parts do not belong together --------------


def exchange_target(board, manifest, members):
    manifest["target"] = "f" * 64


def exchange_model(board, manifest, members):
    manifest["model"] = "f" * 64


def exchange_run(board, manifest, members):
    members["run.json"] = encode_run(Run("cd" * 16))


def exchange_init(board, manifest, members):
    recipe = json.loads(members["init.json"])
    members["init.json"] = json.dumps(recipe | {"seed": recipe["seed"] + 1}).encode()


def exchange_patch(board, manifest, members):
    round_ = read_round(board.run.path / "round_03")
    members["patch.dpu"] = pack_round(round_, find_parent(round_)).data


def exchange_counter(board, manifest, members):
    header = replace(header_of(members["patch.dpu"]), counter=RESERVED_COUNTER)
    members["patch.dpu"] = with_header(members["patch.dpu"], header)


def install(board, bundle):
    Device.install(board.root.with_name("new"), bundle, trial=no_trial)


def take(board, bundle):
    board.device.take_bundle(bundle)


def mend(board, bundle):
    rot_weights(board)
    repair(board.device, bundle, newer=True)


OTHERS = "patch is not for the bundle's weights"
# A device that is installed takes nothing of a bundle but its patch.
REFUSALS = [
    *(
        (edit, how, OTHERS)
        for edit in (exchange_target, exchange_model)
        for how in (install, take, mend)
    ),
    (exchange_run, install, "another run of this network"),
    (exchange_run, mend, "contradicts itself: graph, recipe and run are of model"),
    (exchange_init, install, "its init recipe gives"),
    (exchange_init, mend, "contradicts itself: the recipe gives init weights"),
    (exchange_patch, install, "its init recipe gives"),
    (exchange_patch, mend, "does not lead from its init weights"),
    *((exchange_counter, how, "is reserved") for how in (install, take, mend)),
]


@pytest.mark.parametrize(("edit", "how", "words"), REFUSALS)
def test_a_whole_bundle_whose_parts_do_not_belong_together_is_refused_everywhere(
    rounds, tmp_path, edit, how, words
):
    board = Board(rounds, tmp_path / "store", signers=())
    board.device.pin(held=False)
    with zipfile.ZipFile(io.BytesIO(board.bundle(3))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members.pop("bundle.json"))
    edit(board, manifest, members)
    state = (board.root / "state.json").read_bytes()
    with pytest.raises(DpuError, match=words):
        how(board, encode_bundle(manifest, members))
    assert (board.root / "state.json").read_bytes() == state
    assert not (board.root.with_name("new") / "state.json").exists()


def test_weights_of_another_round_are_not_put_in_their_place(board):
    rot_weights(board)
    before = tree(board.root)
    with pytest.raises(WrongParentError, match="has lost round 2"):
        repair(board.device, board.bundle(3))
    assert tree(board.root) == before


def test_the_network_is_mended_by_a_bundle_of_any_round(board):
    lose_model(board)
    assert "model/graph.onnx" in repair(board.device, board.bundle(3)).mended
    board.insist_same()


def test_a_newer_round_is_taken_if_the_owner_says_so(board):
    board.device.pin(held=False)
    rot_weights(board)
    done = repair(board.device, board.bundle(3), newer=True)
    state = board.device.store.state
    assert (done.moved, state.active_slot.round) == (True, 3)
    board.device.verify()
    assert find_damage(board.device.store) == {}  # no rollback to what is lost


def test_an_older_round_is_never_taken(board):
    board.device.pin(held=False)
    rot_weights(board)
    with pytest.raises(TrustError, match="release counter"):
        repair(board.device, board.bundle(0), newer=True)
    assert board.device.store.state.active == board.before.active


def test_a_kept_slot_that_cannot_be_made_again_is_given_up(board):
    board.rot(board.weights(1))
    done = repair(board.device, board.bundle(2))
    assert done.dropped[0] == "the weights of round 1"
    assert board.device.status()["kept_rounds"] == [2]
    board.insist_same()


def test_the_folder_of_all_slots_comes_back_with_the_active_one(board):
    weights = board.weights().read_bytes()
    shutil.rmtree(board.root / "slots")
    done = repair(board.device, board.bundle(2))
    assert done.mended == ("the weights of round 2",)
    assert done.dropped == ("the weights of round 1",)
    assert board.weights().read_bytes() == weights


def test_a_state_without_a_copy_is_said_to_be_beyond_repair(board, command):
    for name in ("state.json", "state.copy"):
        (board.root / name).write_bytes(b"{")
    code, _, err = command(main, "--store", board.root, "repair", board.root.parent)
    assert (code, "install the bundle again into an empty folder" in err) == (7, True)


def test_without_room_nothing_is_touched(board, monkeypatch):
    rot_weights(board)
    before = tree(board.root)
    monkeypatch.setattr(Files, "free_bytes", lambda *_: 100)
    with pytest.raises(StoreError, match="100 bytes free"):
        repair(board.device, board.bundle(2))
    assert tree(board.root) == before


def test_the_command_says_what_it_did(board, command, tmp_path):
    rot_weights(board)
    path = tmp_path / "round_02.bundle.zip"
    path.write_bytes(board.bundle(2))
    call = ("--store", board.root, "repair", path)
    code, out, _ = command(main, *call)
    assert (code, out.splitlines()[0]) == (0, "mended   the weights of round 2")
    code, out, _ = command(main, *call, "--json")
    assert json.loads(out)["mended"] == []
    last = board.device.store.state.history[-1]
    assert (last.event, last.reason) == ("repaired", "the weights of round 2")
