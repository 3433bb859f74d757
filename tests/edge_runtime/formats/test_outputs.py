# SPDX-License-Identifier: Apache-2.0
"""A patch may say what its target must answer: then the trial insists on it."""

import json

import numpy as np
import onnx
import pytest

from edge_runtime import Device, UpdateResult, open_patch
from edge_runtime.errors import RoundError, TrialError, TrustError
from edge_runtime.formats.sections import OUTPUTS
from packager.build import pack_changes, pack_round
from packager.bundles.from_round import build_bundle
from packager.cli.pack import pack
from packager.cli.pack import patch as patch_command
from packager.compose import compose_patches
from packager.diff import diff
from packager.rounds import golden
from packager.rounds.folder import find_parent, read_round
from packager.rounds.golden import expected_outputs


@pytest.fixture
def device(run, tmp_path):
    bundle = build_bundle(read_round(run.path / "round_00")).data
    return Device.install(tmp_path / "store", bundle)


@pytest.fixture
def round_1(run):
    return read_round(run.path / "round_01")


def patch_with(round_, outputs):
    """The patch of a round, with any outputs."""
    parent = find_parent(round_)
    plain = pack_round(round_, parent)
    changes = diff(parent.weights, round_.weights)
    return pack_changes(
        parent.weights, round_.weights, plain.header, changes, outputs=outputs
    ).data


def true_outputs(round_):
    return np.frombuffer(expected_outputs(round_, 8), "<f4")


def refused(device, patch):
    """The reason why a patch is refused, after which all is as before."""
    state, current = device.store.state, device.verify()
    with pytest.raises(TrialError) as refusal:
        device.update(patch)
    assert (device.verify(), device.status()["round"]) == (current, 0)
    assert device.store.state.slots == state.slots
    assert device.store.state.floor == state.floor
    with open_patch(patch) as opened:
        assert device.status()["skipped"] == [opened.header.target]
    with pytest.raises(TrustError, match="--force"):
        device.update(patch)
    return str(refusal.value)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_outputs_of_the_packager_pass_the_trial(device, round_1, count):
    patch = pack_round(round_1, expect_outputs=count).data
    with open_patch(patch) as opened:
        assert opened.outputs == true_outputs(round_1)[: 4 * count].tobytes()
    assert device.update(patch) is UpdateResult.APPLIED
    assert device.status()["round"] == 1


def test_one_number_for_all_inputs_is_expected_as_it_is(
    new_run, reload_graph, tmp_path
):
    def to_one_number(model):
        (end,) = model.graph.output
        total = onnx.helper.make_node("ReduceMean", [end.name], ["total"], keepdims=0)
        model.graph.node.append(total)
        info = onnx.helper.make_tensor_value_info
        end.CopyFrom(info("total", onnx.TensorProto.FLOAT, []))

    run = new_run("totals")
    run.graph = reload_graph(run, to_one_number)
    path = run.path / "model" / "contract.json"
    free = json.loads(path.read_text()) | {"schema": 2, "task": "free", "classes": []}
    path.write_text(json.dumps(free))
    with np.load(run.path / "model" / "golden.npz") as arrays:
        inputs = arrays["inputs"]
    np.savez(run.path / "model" / "golden.npz", inputs=inputs)
    first, second = (read_round(run.add(number)) for number in range(2))
    device = Device.install(tmp_path / "store", build_bundle(first).data)
    assert len(expected_outputs(second, 3)) == 4
    reason = refused(device, patch_with(second, np.zeros(1, "<f4").tobytes()))
    assert "does not compute what the server's does" in reason
    patch = pack_round(second, expect_outputs=3).data
    assert device.update(patch, force=True) is UpdateResult.APPLIED


def test_no_more_inputs_are_asked_for_than_there_are(round_1):
    assert len(expected_outputs(round_1, 1000)) == 8 * 4 * 4  # inputs, classes, bytes


def test_nobody_pays_for_outputs_that_were_not_asked_for(round_1):
    with open_patch(pack_round(round_1).data) as patch:
        assert patch.outputs == b""
        assert OUTPUTS not in {section.kind for section in patch.sections}


@pytest.mark.parametrize("error", [1e-3, -1e-3, np.nan, np.inf])
def test_other_outputs_are_refused_and_nothing_changes(device, round_1, error):
    outputs = true_outputs(round_1).copy()
    outputs[2] += error * np.abs(outputs).max()
    reason = refused(device, patch_with(round_1, outputs.tobytes()))
    assert "does not compute what the server's does" in reason


def test_outputs_within_the_tolerance_of_the_contract_pass(device, round_1):
    outputs = true_outputs(round_1) + 5e-5 * np.abs(true_outputs(round_1)).max()
    patch = patch_with(round_1, outputs.astype("<f4").tobytes())
    assert device.update(patch) is UpdateResult.APPLIED


@pytest.mark.parametrize("values", [1, 3, 5, 31, 33, 36])
def test_outputs_of_another_shape_are_refused(device, round_1, values):
    outputs = np.resize(true_outputs(round_1), values).tobytes()
    reason = refused(device, patch_with(round_1, outputs))
    assert f"expects {values} output values; the network gives 4 for each" in reason


def test_more_outputs_than_a_patch_can_carry_are_not_packed(round_1, monkeypatch):
    monkeypatch.setattr(golden, "MAX_COUNTED_BYTES", 60)
    with pytest.raises(RoundError, match="have 64 bytes, a patch carries up to 60"):
        expected_outputs(round_1, 4)


def test_composing_drops_the_outputs(run, round_1):
    run.add(2)
    patches = [
        pack_round(round_, expect_outputs=2).data
        for round_ in (round_1, read_round(run.path / "round_02"))
    ]
    named = [(str(number), open_patch(data)) for number, data in enumerate(patches)]
    made = compose_patches(find_parent(round_1).weights, named)
    with open_patch(made.data) as patch:
        assert patch.outputs == b""


def test_the_command_line_packs_and_shows_them(command, run, tmp_path):
    files = {}
    for extra in ((), ("--expect-outputs",), ("--expect-outputs", "2")):
        files[extra] = path = tmp_path / f"{'_'.join(extra)}.dpu"
        code, _, err = command(pack, run.path / "round_01", "-o", path, *extra)
        assert code == 0, err
    sizes = {}
    for extra, path in files.items():
        shown = json.loads(command(patch_command, "info", path, "--json")[1])
        assert sum(shown["parts"].values()) == shown["bytes"]
        found = [s for s in shown["sections"] if s["name"] == "expected outputs"]
        sizes[extra] = [section["raw_bytes"] for section in found]
    assert list(sizes.values()) == [[], [8 * 16], [2 * 16]]


@pytest.mark.parametrize(
    "more", [("--bundle",), ("--from", "init", "--bundle"), ("--base", "x.onnx")]
)
def test_only_patches_of_rounds_take_outputs(command, run, tmp_path, more):
    (tmp_path / "x.onnx").write_bytes(b"\x08")
    more = [tmp_path / word if word == "x.onnx" else word for word in more]
    assert command(pack, run.path / "round_01", *more, "--expect-outputs")[0] == 2
