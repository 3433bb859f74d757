# SPDX-License-Identifier: Apache-2.0
"""A device moves from round to round, or does not move at all."""

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import Device, UpdateResult, fingerprint_file, read_weights
from edge_runtime.errors import (
    BackendError,
    BundleError,
    ContractError,
    DpuError,
    PatchFormatError,
    PatchIntegrityError,
    RoundNotFoundError,
    StoreError,
    TrialError,
    TrustError,
    WrongModelError,
    WrongParentError,
)
from edge_runtime.files import Files
from edge_runtime.formats.contract import Contract
from edge_runtime.formats.header import PatchHeader, encode_header
from edge_runtime.formats.sections import COUNTS, FORMS, encode_body
from edge_runtime.inference.predictor import Predictor
from edge_runtime.store.state import MAX_TRIES
from edge_runtime.update.golden import check_outputs
from edge_runtime.update.trial import Expected, run_trial, try_slot
from packager.build import build_patch, pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import parent_from, read_init, read_round
from packager.zip_file import encode_bundle
from tests.crash.world import edit_contract, no_trial


def patch_of(folder):
    return pack_round(read_round(folder)).data


def snapshot(root):
    """Every file below a store, with its content."""
    return {
        path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


@pytest.fixture
def bundle(run):
    return build_bundle(read_round(run.path / "round_00")).data


@pytest.fixture
def device(bundle, tmp_path):
    return Device.install(tmp_path / "store", bundle, trial=no_trial)


def active_file(device):
    return device.store.root / "current" / "weights.safetensors"


def test_an_installed_device_has_the_weights_of_the_round(device, run):
    assert fingerprint_file(active_file(device)) == device.verify()
    server = run.path / "round_00" / "weights.safetensors"
    assert active_file(device).read_bytes() == server.read_bytes()


def test_an_update_leads_to_the_servers_bytes(device, run):
    assert device.update(patch_of(run.path / "round_01")) is UpdateResult.APPLIED
    server = run.path / "round_01" / "weights.safetensors"
    assert active_file(device).read_bytes() == server.read_bytes()
    assert device.status()["round"] == 1
    assert device.status()["kept_rounds"] == [1, 0]


def test_applying_twice_is_no_error(device, run):
    patch = patch_of(run.path / "round_01")
    device.update(patch)
    before = snapshot(device.store.root)
    assert device.update(patch) is UpdateResult.ALREADY_CURRENT
    assert snapshot(device.store.root) == before


def test_a_device_opened_again_is_where_it_was(device, run):
    device.update(patch_of(run.path / "round_01"))
    again = Device.open(device.store.root)
    assert again.status() == device.status()


def test_two_slots_are_kept_and_no_more(device, run):
    for number in (1, 2, 3):
        if number > 1:
            run.add(number)
        device.update(patch_of(run.path / f"round_{number:02d}"))
    slots = list((device.store.root / "slots").iterdir())
    assert len(slots) == 2
    assert device.status()["kept_rounds"] == [3, 2]


def test_a_rollback_returns_to_the_former_round_and_forward_again(device, run):
    patch = patch_of(run.path / "round_01")
    device.update(patch)
    assert device.rollback().round == 0
    assert fingerprint_file(active_file(device)) == device.verify()
    assert device.status()["release_floor"] == 1
    assert device.update(patch) is UpdateResult.APPLIED
    assert device.status()["round"] == 1


def test_without_a_former_slot_there_is_no_rollback(device):
    with pytest.raises(RoundNotFoundError, match="no earlier slot"):
        device.rollback()


def test_a_rollback_to_a_damaged_slot_is_refused(device, run):
    former = active_file(device).resolve()
    device.update(patch_of(run.path / "round_01"))
    damage(former)
    with pytest.raises(StoreError, match="is damaged"):
        device.rollback()
    assert device.status()["round"] == 1


def test_a_reinitialised_round_leads_from_the_init_weights(device, run):
    device.update(patch_of(run.path / "round_01"))
    run.add(2, base=run.init, reinitialised=True)
    device.update(patch_of(run.path / "round_02"))
    assert device.verify() == run.deployed.fingerprint


@pytest.fixture
def refused(device):
    """Insist that an update raises and that no file of the store changes."""

    def check(patch, error, match=None):
        before = snapshot(device.store.root)
        with pytest.raises(error, match=match) as refusal:
            device.update(patch)
        assert snapshot(device.store.root) == before
        return refusal.value

    return check


def test_a_patch_from_a_later_round_is_refused_until_the_ones_between(run, refused):
    run.add(2)
    folder = run.path / "round_02"
    refused(patch_of(folder), WrongParentError, "at round 0 .*rounds between")


def test_an_old_patch_is_refused(device, run, refused):
    first = patch_of(run.path / "round_01")
    device.update(first)
    run.add(2)
    device.update(patch_of(run.path / "round_02"))
    refused(first, TrustError, "past that round")


def test_a_patch_of_another_network_is_refused(new_run, refused):
    other = new_run("other", seed=8)
    other.add(0)
    folder = other.add(1)
    # The same tensors, so the same graph: only then the parent decides.
    refused(patch_of(folder), WrongParentError)


def test_a_patch_of_another_graph_is_refused(run, refused):
    base, target = (
        read_weights(run.path / name / "weights.safetensors")
        for name in ("round_00", "round_01")
    )
    header = PatchHeader(
        "cd" * 32, base.fingerprint, target.fingerprint, 1, 1, base.layout.file_size
    )
    refused(build_patch(base, target, header), WrongModelError, "another network")


def test_a_damaged_patch_is_refused(run, refused):
    data = bytearray(patch_of(run.path / "round_01"))
    data[-3] ^= 4
    refused(bytes(data), PatchIntegrityError, "fetch it again")


@pytest.mark.parametrize("which", ["active", "kept"])
def test_a_malformed_patch_to_weights_that_are_here_is_refused(
    device, run, refused, which
):
    device.update(patch_of(run.path / "round_01"))
    state = device.store.state
    (kept,) = (slot.target for slot in state.slots if slot.target != state.active)
    target = {"active": state.active, "kept": kept}[which]
    size = device.store.layout.file_size
    header = PatchHeader(state.model, "77" * 32, target, 9, state.floor + 1, size)
    body = encode_body({COUNTS: [b"\xff\x01" * 3], FORMS: [b"\x7f"]}, 3)
    refused(encode_header(header, body) + b"\0\0" + body, PatchFormatError)


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_parent_is_told_from_a_bad_patch(device, run):
    damage(active_file(device).resolve())
    with pytest.raises(StoreError, match="the parent on this device is damaged"):
        device.update(patch_of(run.path / "round_01"))
    assert device.status()["round"] == 0


def test_verify_finds_one_flipped_bit(device):
    device.verify()
    damage(active_file(device).resolve())
    with pytest.raises(StoreError, match="is damaged"):
        device.verify()


def test_verify_finds_an_exchanged_graph(device):
    path = device.store.root / "model" / "graph.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(StoreError, match=r"damaged|exchanged"):
        device.verify()


class FullDisk(Files):
    """A disk that fills up after a number of bytes."""

    def __init__(self, room):
        self.room = room

    def write(self, path, chunks, **_):
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk[: max(0, self.room)])
                self.room -= len(chunk)
                if self.room < 0:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize("place", ["at the first byte", "in the slot", "in the state"])
def test_a_disk_that_fills_up_changes_nothing(device, run, refused, place):
    slot = device.store.layout.file_size
    room = {"at the first byte": 0, "in the slot": slot - 1, "in the state": slot + 9}
    device.store.files = FullDisk(room[place])
    refused(patch_of(run.path / "round_01"), OSError, "No space left")
    device.store.files = Files()
    assert device.update(patch_of(run.path / "round_01")) is UpdateResult.APPLIED


@pytest.mark.skipif(sys.platform != "linux", reason="advice is given on Linux")
def test_a_sandbox_that_forbids_advice_to_the_kernel_costs_no_update(
    device, run, monkeypatch
):
    asked = []

    def forbidden(*args):
        asked.append(args)
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "posix_fadvise", forbidden)
    assert device.update(patch_of(run.path / "round_01")) is UpdateResult.APPLIED
    assert asked


class LittleRoom(Files):
    """A disk with room for one more slot only after another one went."""

    def __init__(self, slots):
        self.slots = slots

    def free_bytes(self, path):
        used = len(list((path / "slots").iterdir()))
        return 10 << 20 if used < self.slots else 0


def test_a_kept_slot_makes_room_for_a_new_one(device, run):
    device.update(patch_of(run.path / "round_01"))
    device.store.files = LittleRoom(2)
    run.add(2)
    device.update(patch_of(run.path / "round_02"))
    assert device.status()["kept_rounds"] == [2, 1]


def test_the_active_slot_never_makes_room(device, run, refused):
    device.store.files = LittleRoom(1)
    refused(patch_of(run.path / "round_01"), StoreError, "bytes free")


def test_a_second_writer_is_refused(device, run, refused):
    with open(device.store.root / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        refused(patch_of(run.path / "round_01"), StoreError, "another process")


def test_a_store_is_not_installed_over(device, bundle):
    with pytest.raises(StoreError, match="already holds"):
        Device.install(device.store.root, bundle, trial=no_trial)


def test_an_empty_folder_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="init BUNDLE"):
        Device.open(tmp_path)


def test_leftovers_of_a_cut_update_are_cleaned_up(device, run):
    leftover = device.store.root / "slots" / "half.part"
    leftover.mkdir()
    (leftover / "weights.safetensors").write_bytes(b"half")
    device.update(patch_of(run.path / "round_01"))
    assert not leftover.exists()


def test_a_damaged_bundle_installs_nothing(bundle, tmp_path):
    for position in range(0, len(bundle), 97):
        data = bytearray(bundle)
        data[position] ^= 0x20
        try:
            store = tmp_path / str(position)
            device = Device.install(store, bytes(data), trial=no_trial)
        except DpuError:
            with pytest.raises(StoreError):
                Device.open(store)
        else:  # a bit that zip and we both ignore, such as a time stamp
            assert device.verify()


@pytest.mark.parametrize("data", [b"", b"PK", b"x" * 1000])
def test_what_is_no_bundle_is_refused(data, tmp_path):
    with pytest.raises(BundleError, match="not an installation bundle"):
        Device.install(tmp_path / "s", data)


# With the real trial session -------------------------------------------------------


def test_predictions_follow_the_weights(bundle, run, tmp_path):
    device = Device.install(tmp_path / "store", bundle)
    golden = np.load(run.path / "model" / "golden.npz")
    predictor = device.predictor()
    before = predictor.predict(golden["inputs"])
    device.update(patch_of(run.path / "round_01"))
    # A live session keeps its own weights until it is told to swap.
    assert np.array_equal(predictor.predict(golden["inputs"]), before)
    predictor.swap(device.store.slot_folder(device.verify()))
    w = read_weights(run.path / "round_01" / "weights.safetensors")
    x = (golden["inputs"] * np.float32(0.0625) - 0.5) / 0.25
    hidden = np.maximum(x @ w["fc1.weight"].T + w["fc1.bias"], 0)
    wanted = hidden @ w["fc2.weight"].T + w["fc2.bias"]
    np.testing.assert_allclose(predictor.predict(golden["inputs"]), wanted, atol=1e-4)


def test_weights_that_give_nan_are_refused_and_remembered(bundle, run, tmp_path):
    device = Device.install(tmp_path / "store", bundle)
    arrays = run.changed(read_weights(run.path / "round_00" / "weights.safetensors"), 9)
    arrays["fc2.bias"][:] = np.nan
    base = read_weights(run.path / "round_00" / "weights.safetensors")
    folder = run.add(2, arrays, base=base)
    patch = patch_of(folder)
    with pytest.raises(TrialError, match="not finite"):
        device.update(patch)
    assert device.status()["round"] == 0
    assert device.status()["history"][-1]["event"] == "refused"
    assert len(list((tmp_path / "store" / "slots").iterdir())) == 1
    with pytest.raises(TrustError, match="--force"):
        device.update(patch)
    with pytest.raises(TrialError):
        device.update(patch, force=True)


def test_too_few_golden_labels_right_is_refused(bundle, run, tmp_path):
    Device.install(tmp_path / "store", bundle, trial=no_trial)
    edit_contract(tmp_path / "store", accuracy_floor=1.0)
    with pytest.raises(TrialError, match="golden labels"):
        Device.open(tmp_path / "store").update(patch_of(run.path / "round_01"))


def test_a_trial_that_hangs_is_ended(device):
    slot = device.store.slot_folder(device.verify())
    with pytest.raises(TrialError, match="did not end within"):
        run_trial(slot, device.store.root / "model", timeout_s=0.01)


def test_a_trial_that_cannot_load_says_why(device, tmp_path):
    shutil.copy(active_file(device), tmp_path)
    (tmp_path / "graph.onnx").write_bytes(b"no graph")
    with pytest.raises(TrialError, match="cannot load"):
        run_trial(tmp_path, device.store.root / "model")


@pytest.fixture
def only_onnx_runtime(new_run, reload_graph):
    """A run of two rounds whose graph the NumPy backend cannot run."""

    def edit(model):
        model.graph.node[1].op_type = "Softsign"

    run = new_run("softsign")
    run.graph = reload_graph(run, edit)
    return [run.add(0), run.add(1)]


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_device_that_cannot_load_its_runtime_does_not_blame_the_release(
    only_onnx_runtime, tmp_path, monkeypatch, error
):
    first, second = only_onnx_runtime
    device = Device.install(tmp_path / "store", build_bundle(read_round(first)).data)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "onnxruntime.py").write_text(f"raise {error}('no libonnxruntime.so')")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(broken)  # the trial looks where this process does
        for _ in range(MAX_TRIES + 1):
            with pytest.raises(BackendError, match=r"nothing changed.*lacks.*Softsign"):
                device.update(patch_of(second))
    status = Device.open(tmp_path / "store").status()
    assert (status["skipped"], device.store.state.tries) == ([], {})
    assert "Softsign" in status["blocked"]["reason"]
    assert [event["event"] for event in status["history"]] == ["installed", "blocked"]
    assert device.update(patch_of(second)) is UpdateResult.APPLIED


def test_outputs_that_are_not_the_servers_are_refused_at_installation(run, tmp_path):
    from edge_runtime.formats.bundle import read_bundle

    data = build_bundle(read_round(run.path / "round_00")).data
    content = read_bundle(data)
    golden = tmp_path / "golden.npz"
    golden.write_bytes(content.files["golden.npz"])
    arrays = dict(np.load(golden))
    arrays["outputs"] += 0.01 * np.abs(arrays["outputs"]).max()
    np.savez(golden, **arrays)
    files = content.files | {"golden.npz": golden.read_bytes()}
    files["patch.dpu"] = content.patch
    manifest = {"model": content.model, "target": content.target}
    with pytest.raises(TrialError, match="does not compute what the server's does"):
        Device.install(tmp_path / "store", encode_bundle(manifest, files))
    with pytest.raises(StoreError):
        Device.open(tmp_path / "store")


def test_a_swap_to_a_broken_slot_keeps_the_old_session(device, tmp_path):
    predictor = device.predictor()
    inputs = np.zeros((1, 12), np.uint8)
    before = predictor.predict(inputs)
    with pytest.raises(StoreError, match="cannot load"):
        predictor.swap(Path(tmp_path))
    assert np.array_equal(predictor.predict(inputs), before)


def test_inputs_that_do_not_fit_are_refused(device):
    with pytest.raises(ContractError, match=r"\[batch, 12\]"):
        device.predictor().predict(np.zeros((1, 13), np.uint8))


def test_a_trial_counts_golden_labels(device):
    outputs = np.eye(8, dtype="f4")
    check_outputs([outputs], np.arange(8), Contract((), accuracy_floor=1.0))
    wrong = np.array([0, 1, 2, 3, 4, 5, 6, 0])
    check_outputs([outputs], wrong, Contract((), accuracy_floor=0.875))
    with pytest.raises(TrialError, match=r"accuracy 0\.875 \(7 of 8 right\) on golden"):
        check_outputs([outputs], wrong, Contract((), accuracy_floor=0.876))


def test_a_trial_compares_the_golden_outputs_where_it_is_told_to(device, tmp_path):
    slot, model = device.store.slot_folder(device.verify()), tmp_path / "model"
    shutil.copytree(device.store.root / "model", model)
    try_slot(slot, model, expected=Expected(golden=True))
    golden = dict(np.load(model / "golden.npz"))
    np.savez(model / "golden.npz", **golden | {"outputs": golden["outputs"] + 1})
    try_slot(slot, model)
    with pytest.raises(TrialError, match="differ from the expected ones"):
        try_slot(slot, model, expected=Expected(golden=True))


def test_a_predictor_is_made_of_the_slot_it_names(device):
    assert isinstance(device.predictor(), Predictor)
    assert device.predictor().folder == device.store.slot_folder(device.verify())


# Two runs of one recipe ---------------------------------------------------------------


@pytest.fixture
def two_runs(new_run):
    """Two runs with the same init weights; all that differs is what they trained."""
    runs = [
        new_run(name, run_id=digits * 16) for name, digits in (("a", "11"), ("b", "22"))
    ]
    for number in (0, 1):
        runs[0].add(number)
    for number in (5, 6):  # other weights
        runs[1].add(number)
    return runs


def test_a_device_refuses_the_patches_of_another_run_and_takes_its_own(
    two_runs, tmp_path
):
    own, other = two_runs
    bundle = build_bundle(read_round(own.path / "round_00")).data
    device = Device.install(tmp_path / "store", bundle, trial=no_trial)
    round_ = read_round(other.path / "round_06")
    foreign = pack_round(round_, read_init(round_)).data  # leads from init, as ours do
    before = snapshot(device.store.root)
    with pytest.raises(WrongModelError) as refused:
        device.update(foreign)
    assert "of another run of this network (run 222222222222)" in str(refused.value)
    assert "this device holds run a (111111111111)" in str(refused.value)
    assert snapshot(device.store.root) == before
    assert device.update(patch_of(own.path / "round_01")) is UpdateResult.APPLIED
    assert device.status()["run"] == {"id": "11" * 16, "name": "a"}
    assert device.verify() == device.store.state.active


def test_a_device_from_before_there_were_ids_refuses_runs_that_have_one(
    device, new_run
):
    other = new_run("other", run_id="33" * 16)
    other.add(0)
    other.add(1)
    with pytest.raises(WrongModelError, match="holds a model without a run's id"):
        device.update(patch_of(other.path / "round_01"))
    assert device.status()["run"] is None


def test_a_run_id_that_is_exchanged_on_the_device_is_noticed(two_runs, tmp_path):
    bundle = build_bundle(read_round(two_runs[0].path / "round_00")).data
    device = Device.install(tmp_path / "store", bundle, trial=no_trial)
    shutil.copy(two_runs[1].path / "model" / "run.json", tmp_path / "store" / "model")
    with pytest.raises(StoreError, match=r"run\.json is damaged or was exchanged"):
        device.verify()


def test_a_bundle_states_schema_2_only_where_its_run_has_an_id(two_runs, bundle):
    named = build_bundle(read_round(two_runs[0].path / "round_00")).data
    schemas = []
    for data in (bundle, named):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            schemas.append(json.loads(archive.read("bundle.json"))["schema"])
    assert schemas == [1, 2]


def test_a_parent_of_another_run_is_refused_when_packing(two_runs):
    own, other = (run.path for run in two_runs)
    parent = parent_from(read_round(other / "round_05"))
    with pytest.raises(WrongModelError, match="round_05 is of another run than"):
        pack_round(read_round(own / "round_01"), parent)
