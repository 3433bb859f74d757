# SPDX-License-Identifier: Apache-2.0
"""Rounds in a subspace, from a loop to a device: small patches, the very weights."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edge_runtime import Device
from edge_runtime.errors import (
    BudgetError,
    FrozenWeightChangedError,
    RoundError,
    TrainingError,
)
from edge_runtime.formats.apply import apply_patch
from edge_runtime.formats.model_folder import SUBSPACES_NAME, list_rounds
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.weights import read_weights
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.compose import compose_patches
from packager.keys import generate_key
from packager.rounds.folder import read_init, read_round
from packager.rounds.names import named_parent
from trainer.export.subspace_size import coefficients_within, subspace_bytes
from trainer.folder.contract import make_contract
from trainer.method.subspace import SubspaceUpdater
from trainer.method.updater import PartialUpdater
from trainer.publish import publish_round, start_run

torch.set_num_threads(1)
INPUTS = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
LABELS = INPUTS[:, :3].argmax(1)


def net():
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))


def train(model, optimizer, steps=4):
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        answers = model(torch.from_numpy(INPUTS))
        nn.functional.cross_entropy(answers, torch.from_numpy(LABELS)).backward()
        optimizer.step()


def move(model, seed=0, coefficients=64, **options):
    """Train a round in a subspace; return how the weights moved."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    updater = SubspaceUpdater(
        model.named_parameters(), coefficients=coefficients, seed=seed, **options
    )
    updater.attach(optimizer)
    train(model, optimizer)
    updater.select()
    train(model, optimizer)
    return updater.finish()


def select(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    updater = PartialUpdater(model.named_parameters(), ratio=0.1).attach(optimizer)
    train(model, optimizer)
    updater.select()
    return updater.finish()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four rounds: two in subspaces, one of selected weights, one in a subspace."""
    folder = tmp_path_factory.mktemp("subspaces") / "run"
    model = start_run(
        folder,
        net,
        contract=make_contract((6,), ["a", "b", "c"]),
        golden_inputs=INPUTS,
        golden_labels=LABELS,
    )
    for seed in range(4):
        moved = select(model) if seed == 2 else move(model, seed)
        publish_round(folder, model, moved)
    return [read_round(path) for path in list_rounds(folder)]


def test_a_patch_holds_what_moved_and_nothing_of_the_weights(run):
    for round_ in run:
        packed = pack_round(round_)
        with open_patch(packed.data) as patch:
            moved = round_.name != "round_02"
            assert len(patch.terms) == moved
            counts = dict(zip(round_.weights, patch.counts, strict=True))
            assert (counts["0.weight"] == 0) == moved
            assert counts["0.bias"] > 0  # the dense part travels as ever
        assert (round_.path / SUBSPACES_NAME).exists() == moved


def test_a_device_follows_the_rounds(run, tmp_path):
    device = Device.install(tmp_path / "device", build_bundle(run[0]).data)
    for round_ in run[1:]:
        device.update(pack_round(round_).data)
        assert device.verify() == round_.record.target
    device.rollback()
    assert device.verify() == run[2].record.target


def test_from_init_the_subspaces_are_put_one_behind_the_other(run):
    for number, round_ in enumerate(run):
        packed = pack_round(round_, read_init(round_))
        kept = {0: 1, 1: 2, 2: 2, 3: 3}[number]
        assert len(packed.terms) == kept
        with open_patch(packed.data) as patch:
            base = read_init(round_).weights
            assert apply_patch(base, patch).data == round_.weights.data


def test_from_an_earlier_round_too(run):
    packed = pack_round(run[3], named_parent(run[3], "round_00", run[3].path.parent))
    assert [term.seed for term in packed.terms] == [1, 3]
    assert packed.counts["0.weight"] < 30  # those that the round between selected


def test_composed_patches_do_what_they_do_one_after_another(run):
    opened = [(r.name, open_patch(pack_round(r).data)) for r in run[1:]]
    base = run[0].weights
    packed = compose_patches(base, opened)
    with open_patch(packed.data) as patch:
        assert len(patch.terms) == 2
        assert apply_patch(base, patch).data == run[3].weights.data
    assert len(packed.data) < sum(patch.size for _, patch in opened)


def test_a_reverse_patch_from_init_is_small_and_one_from_the_later_round_is_not(run):
    back = run[0]
    from_init = pack_round(back, read_init(back), counter=9)
    from_later = pack_round(
        back, named_parent(back, "round_01", back.path.parent), counter=9
    )
    assert from_later.terms == ()
    assert len(from_init.data) < len(from_later.data)
    with open_patch(from_later.data) as patch:
        assert apply_patch(run[1].weights, patch).data == back.weights.data


def test_a_device_goes_back_by_a_patch_from_init(run, tmp_path):
    device = Device.install(tmp_path / "device", build_bundle(run[0]).data)
    device.update(pack_round(run[1]).data)
    device.update(pack_round(run[0], read_init(run[0]), counter=9).data)
    assert device.verify() == run[0].record.target


def test_a_signed_one_is_the_same_with_a_signature(run):
    plain, key = pack_round(run[1]).data, generate_key()
    signed = pack_round(run[1], signers=[key]).data
    with open_patch(signed) as patch, open_patch(plain) as unsigned:
        assert len(patch.signatures) == 1
        assert patch.header == unsigned.header


def test_a_damaged_subspace_of_a_round_is_refused_by_name(run, tmp_path):
    folder = tmp_path / "run"
    for path in (run[0].path, run[0].model_folder):
        target = folder / path.name
        target.mkdir(parents=True)
        for file in path.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    path = folder / "round_00" / SUBSPACES_NAME
    good = path.read_bytes()
    path.write_bytes(good + b"\0")
    with pytest.raises(RoundError, match=r"subspaces\.bin: .* 1 bytes too many"):
        read_round(folder / "round_00")
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(RoundError, match="are not in the selection"):
        pack_round(read_round(folder / "round_00"))


def test_weights_that_are_not_where_the_subspace_moves_them_are_not_published(tmp_path):
    folder = tmp_path / "run"
    model = start_run(
        folder,
        net,
        contract=make_contract((6,), ["a", "b", "c"]),
        golden_inputs=INPUTS,
        golden_labels=LABELS,
    )
    moved = move(model)
    moved.coefficients = -moved.coefficients
    with pytest.raises(FrozenWeightChangedError, match="outside of its mask"):
        publish_round(folder, model, moved)
    assert list_rounds(folder) == []


# Sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["300", "331", "340"])
@pytest.mark.parametrize("bits", [1, 3])
def test_what_fits_into_a_size_is_known_before_training(tmp_path, size, bits):
    model = start_run(
        tmp_path / "run",
        net,
        contract=make_contract((6,), ["a", "b", "c"]),
        golden_inputs=INPUTS,
        golden_labels=LABELS,
    )
    for index in (0, 2):
        model[index].bias.requires_grad_(False)
    count = coefficients_within(size, model, bits=bits)
    moved = move(model, seed=(1 << 28) - 1, coefficients=count, bits=bits)
    publish_round(tmp_path / "run", model, moved)
    packed = pack_round(read_round(tmp_path / "run" / "round_00"), max_size=int(size))
    assert int(size) - 8 * bits - 1 < len(packed.data) <= int(size) or count == 320
    known = subspace_bytes(count, model, bits=bits)
    assert len(packed.data) <= known < len(packed.data) + 5


def test_a_dense_part_fits_too(tmp_path):
    model = start_run(
        tmp_path / "run",
        net,
        contract=make_contract((6,), ["a", "b", "c"]),
        golden_inputs=INPUTS,
        golden_labels=LABELS,
    )
    count = coefficients_within("500", model)
    publish_round(tmp_path / "run", model, move(model, coefficients=count))
    round_ = read_round(tmp_path / "run" / "round_00")
    assert len(pack_round(round_, max_size=500).data) > 400
    with pytest.raises(BudgetError):
        pack_round(round_, max_size=300)


def test_a_size_may_be_a_number_of_bytes():
    assert coefficients_within(500, net()) == coefficients_within("500", net())


def test_a_size_without_room_for_coefficients_is_refused():
    with pytest.raises(TrainingError, match="has no room for coefficients: "):
        coefficients_within("300", net())


def test_a_network_too_small_for_a_subspace_is_told_so():
    with pytest.raises(TrainingError, match=r"32 weights move.* at least 64 coeffic"):
        coefficients_within("1MB", nn.Linear(8, 4))


@pytest.mark.parametrize(("name", "fits"), [("aside", False), ("zloss", True)])
def test_signs_are_counted_as_a_device_counts_them_or_the_round_is_refused(
    tmp_path, name, fits
):
    """What trains beside the network and is named before it would shift them."""
    network = start_run(
        tmp_path / "run",
        net,
        contract=make_contract((6,), ["a", "b", "c"]),
        golden_inputs=INPUTS,
        golden_labels=LABELS,
    )

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network
            setattr(self, name, nn.Linear(3, 3))

        def forward(self, inputs):
            return getattr(self, name)(self.net(inputs))

    around = Around()
    movement = move(around)
    if fits:
        assert publish_round(tmp_path / "run", around, movement).round == 0
        return
    with pytest.raises(TrainingError, match=r"ahead of its own.*named_parameters"):
        publish_round(tmp_path / "run", around, movement)


def test_a_movement_names_the_tensors_of_the_weight_file(run):
    layout = read_weights(run[0].path / "weights.safetensors").layout
    (term,) = run[0].terms
    assert [layout.tensors[n].name for n in term.scales] == ["0.weight", "2.weight"]
    assert replace(term, seed=5).seed == 5


def test_a_large_patch_says_why_and_what_would_be_small(run, tmp_path):
    command = [sys.executable, "-m", "packager", "run/round_00", "--from", "round_01"]
    command += ["--counter", "9", "--dry-run", "--runs", str(run[0].path.parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "all weights travel, as no chain of up to 64 rounds" in done.stdout
