# SPDX-License-Identifier: Apache-2.0
import os

import numpy as np
import pytest

from edge_runtime.errors import (
    BudgetError,
    RoundError,
    VerificationError,
    WrongModelError,
    WrongParentError,
)
from edge_runtime.files import Files
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.header import PatchHeader
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.weights import pack_weights
from packager.build import build_patch, pack_round, write_file
from packager.rounds.folder import Parent, parent_from, read_init, read_round


def header_for(base, target, **fields):
    return PatchHeader(
        model="ab" * 32,
        parent=base.fingerprint,
        target=target.fingerprint,
        round=fields.get("round", 1),
        counter=fields.get("counter", 1),
        file_size=target.layout.file_size,
    )


def applied(data, base):
    with open_patch(data) as patch:
        return apply_patch(base, patch)


def test_packs_a_round_that_leads_from_its_parent_to_its_target(run):
    before = read_round(run.path / "round_00").weights
    packed = pack_round(read_round(run.path / "round_01"))
    assert applied(packed.data, before).data == run.deployed.data
    assert packed.parent_name == "round_00"
    assert packed.counts == {
        "fc1.weight": 5,
        "fc2.weight": 5,
        "fc1.bias": 16,
        "fc2.bias": 4,
    }


def test_the_header_says_what_the_record_says(run):
    run.add(2, counter=41)
    round_ = read_round(run.path / "round_02")
    with open_patch(pack_round(round_).data) as patch:
        header = patch.header
    assert (header.round, header.counter) == (2, 41)
    assert header.model == round_.record.model
    assert (header.parent, header.target) == (
        round_.record.parent,
        round_.record.target,
    )
    assert (
        header.file_size == (run.path / "round_02/weights.safetensors").stat().st_size
    )


def test_the_same_round_gives_the_same_bytes(run):
    first = pack_round(read_round(run.path / "round_01")).data
    assert pack_round(read_round(run.path / "round_01")).data == first


def test_negative_zeros_and_nan_payloads_travel(run):
    arrays = {name: array.copy() for name, array in run.deployed.items()}
    arrays["fc1.weight"][0, :3] = 0.0
    base = pack_weights(arrays)
    run.add(2, base)
    arrays["fc1.weight"][0, 0] = -0.0
    arrays["fc1.weight"].view("<u4")[0, 1] = 0x7FC00123
    run.add(3, arrays)
    packed = pack_round(read_round(run.path / "round_03"))
    bits = applied(packed.data, base)["fc1.weight"].view("<u4")
    assert packed.counts["fc1.weight"] == 2
    assert bits[0, :3].tolist() == [0x80000000, 0x7FC00123, 0]


def test_a_change_outside_the_selection_is_refused_by_name_and_number(run):
    arrays = run.changed(number=2)
    masks = {
        name: arrays[name] != run.deployed[name]
        for name in ("fc1.weight", "fc2.weight")
    }
    hidden = np.flatnonzero(masks["fc2.weight"])[:2]
    masks["fc2.weight"].reshape(-1)[hidden] = False
    run.add(2, arrays, masks=masks)
    with pytest.raises(
        RoundError, match=r"2 of 5 changed weights in tensor 'fc2\.weight'"
    ):
        pack_round(read_round(run.path / "round_02"))


def test_selected_weights_need_not_change(run):
    masks = {name: np.ones(run.init[name].shape, bool) for name in ("fc1.weight",)}
    run.add(2, masks=masks)  # and fc2.weight is dense part now
    assert pack_round(read_round(run.path / "round_02")).counts["fc2.weight"] == 5


def test_a_round_that_kept_its_base_has_nothing_to_send(run):
    run.add(2, run.deployed)
    assert pack_round(read_round(run.path / "round_02")) is None


def test_a_kept_base_is_not_released_again_under_another_round(run):
    run.add(2, run.deployed)
    round_ = read_round(run.path / "round_02")
    with pytest.raises(RoundError, match="pack round_01 instead"):
        pack_round(round_, read_init(round_))


def test_a_reinitialised_round_leads_from_the_init(run):
    run.add(2, base=run.init)
    packed = pack_round(read_round(run.path / "round_02"))
    assert packed.header.parent == run.init.fingerprint
    assert packed.counts["fc1.weight"] == 5


def test_packs_from_an_older_parent_with_the_selections_of_both_rounds(run):
    run.add(2)
    first = read_round(run.path / "round_00")
    packed = pack_round(read_round(run.path / "round_02"), parent_from(first))
    assert packed.parent_name == "round_00"
    assert 5 < packed.counts["fc1.weight"] <= 10
    assert applied(packed.data, first.weights).data == run.deployed.data


def test_nothing_to_send_from_a_parent_that_is_the_target(run):
    round_ = read_round(run.path / "round_01")
    assert pack_round(round_, parent_from(round_)) is None


def test_a_parent_of_another_network_is_refused(run):
    other = Parent("other", pack_weights({"fc1.weight": np.zeros((16, 12), "f4")}))
    with pytest.raises(WrongModelError):
        pack_round(read_round(run.path / "round_01"), other)


def test_a_patch_over_its_limit_is_refused(run):
    round_ = read_round(run.path / "round_01")
    size = len(pack_round(round_).data)
    assert len(pack_round(round_, max_size=size).data) == size
    with pytest.raises(BudgetError) as refused:
        pack_round(round_, max_size=size - 1)
    assert (refused.value.limit, refused.value.actual) == (size - 1, size)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_builds_between_any_two_weight_files(share):
    rng = np.random.default_rng(int(share * 100))
    kinds = {"F64": "<u8", "F32": "<u4", "BF16": "<u2", "F8_E4M3": "u1", "I64": "<u8"}
    shapes = {"m": (7, 11), "s": (), "none": (0, 3)}
    base, target, types = {}, {}, {}
    for code, dtype in kinds.items():
        for name, shape in shapes.items():
            bits = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
            base[f"{name}.{code}"] = bits.view(dtype).reshape(shape)
            flips = (rng.random(shape) < share).astype(dtype)
            target[f"{name}.{code}"] = base[f"{name}.{code}"] ^ flips
            types[f"{name}.{code}"] = code
    base, target = pack_weights(base, types), pack_weights(target, types)
    data = build_patch(base, target, header_for(base, target))
    assert applied(data, base).data == target.data


def test_a_header_for_other_weights_is_refused():
    base, target = (pack_weights({"w": np.full(9, v, "f4")}) for v in (0, 1))
    with pytest.raises(WrongParentError):
        build_patch(base, target, header_for(target, target))
    with pytest.raises(VerificationError):
        build_patch(base, target, header_for(base, base))


def test_a_written_file_is_complete_and_leaves_nothing_else(tmp_path):
    write_file(b"patch", tmp_path / "round_00.dpu")
    write_file(b"newer", tmp_path / "round_00.dpu")
    assert [path.name for path in tmp_path.iterdir()] == ["round_00.dpu"]
    assert (tmp_path / "round_00.dpu").read_bytes() == b"newer"


def test_a_private_file_that_is_written_again_stays_private(tmp_path):
    path = tmp_path / "round_00.dpu"
    path.write_bytes(b"before")
    path.chmod(0o600)
    for data in (b"patch", pack_weights({"w": np.ones(3, "f4")})):
        write_file(data, path)
        assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_no_ordinary_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out").symlink_to("pipe")
    for name in ("pipe", "out"):
        with pytest.raises(OSError, match="no ordinary file; choose another name"):
            write_file(b"patch", tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pipe"]
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_leads_to_the_file_that_is_written(tmp_path):
    (tmp_path / "latest.dpu").symlink_to("round_00.dpu")
    write_file(b"patch", tmp_path / "latest.dpu")
    assert (tmp_path / "latest.dpu").is_symlink()
    assert (tmp_path / "round_00.dpu").read_bytes() == b"patch"


def test_a_file_that_cannot_get_its_name_leaves_nothing_behind(tmp_path):
    (tmp_path / "round_00.dpu").mkdir()
    with pytest.raises(OSError, match="no ordinary file"):
        write_file(b"patch", tmp_path / "round_00.dpu")
    assert [path.name for path in tmp_path.iterdir()] == ["round_00.dpu"]


class Forgetful(Files):
    """A disk that gives the last byte back otherwise."""

    def write(self, path, chunks, **options):
        data = bytearray(b"".join(chunks))
        data[-1] ^= 1
        super().write(path, [data], **options)


@pytest.mark.parametrize("data", [b"patch", pack_weights({"w": np.ones(3, "f4")})])
def test_a_file_that_the_disk_gives_back_otherwise_never_gets_its_name(
    tmp_path, monkeypatch, data
):
    monkeypatch.setattr("packager.build.Files", Forgetful)
    path = tmp_path / "round_00"
    path.write_bytes(b"before")
    with pytest.raises(VerificationError, match="check the disk"):
        write_file(data, path, lambda: pytest.fail("nobody may hear of it"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "round_00": b"before"
    }
