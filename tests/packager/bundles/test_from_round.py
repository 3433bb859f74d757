# SPDX-License-Identifier: Apache-2.0
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_runtime.errors import BudgetError, RoundError, TrialError
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.patch import open_patch
from edge_runtime.update.device import Device
from packager.bundles.from_round import build_bundle, write_bundle
from packager.models.onnx_check import check_graph
from packager.models.onnx_split import split_onnx
from packager.rounds.folder import read_round
from packager.zip_file import encode_bundle


def golden(bundle):
    return np.load(io.BytesIO(read_bundle(bundle.data).files["golden.npz"]))


def test_a_device_is_installed_from_a_bundle(run, tmp_path):
    write_bundle(read_round(run.path / "round_01"), tmp_path / "round_01.bundle.zip")
    device = Device.install(tmp_path / "store", tmp_path / "round_01.bundle.zip")
    assert device.verify() == run.deployed.fingerprint


def test_the_patch_inside_leads_from_the_init_to_the_round(run):
    bundle = build_bundle(read_round(run.path / "round_01"))
    content = read_bundle(bundle.data)
    with open_patch(content.patch) as patch:
        assert patch.header.parent == run.init.fingerprint
        assert patch.header.target == content.target == run.deployed.fingerprint


def test_any_zip_tool_opens_it_and_its_manifest_lists_every_member(run):
    bundle = build_bundle(read_round(run.path / "round_00"))
    with zipfile.ZipFile(io.BytesIO(bundle.data)) as archive:
        assert archive.testzip() is None
        manifest = json.loads(archive.read("bundle.json"))
        members = set(archive.namelist()) - {"bundle.json"}
        assert manifest["files"] == {
            name: hashlib.sha256(archive.read(name)).hexdigest() for name in members
        }


def test_the_golden_outputs_are_those_of_the_rounds_weights(run):
    arrays = golden(build_bundle(read_round(run.path / "round_01")))
    w = {name: array.astype("f8") for name, array in run.deployed.items()}
    x = (arrays["inputs"] * 0.0625 - 0.5) / 0.25
    h = np.maximum(x @ w["fc1.weight"].T + w["fc1.bias"], 0)
    expected = h @ w["fc2.weight"].T + w["fc2.bias"]
    assert np.abs(arrays["outputs"] - expected).max() < 1e-5 * np.abs(expected).max()
    assert arrays["labels"].shape == (8,)


def test_the_same_round_gives_the_same_bytes(run):
    round_ = read_round(run.path / "round_00")
    assert build_bundle(round_).data == build_bundle(round_).data


def test_every_process_gives_the_same_bytes(run, tmp_path):
    made = set()
    for seed in "123":  # of the order in which a set of names is walked through
        command = [sys.executable, "-m", "packager", run.path / "round_00", "--bundle"]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([*command, "-q"], env=environment, check=True)
        made.add((run.path / "round_00.bundle.zip").read_bytes())
    assert len(made) == 1


def test_a_bundle_over_its_limit_is_refused(run, tmp_path):
    with pytest.raises(BudgetError, match="the bundle of round_00"):
        build_bundle(read_round(run.path / "round_00"), max_size=100)


def test_a_round_that_kept_its_base_names_the_one_to_bundle(run):
    run.add(2, run.deployed)
    with pytest.raises(RoundError, match="pack round_01 instead"):
        build_bundle(read_round(run.path / "round_02"))


def test_init_weights_alone_are_nothing_to_install(new_run):
    run = new_run()
    run.add(0, run.init)
    with pytest.raises(RoundError, match="bundle a later round"):
        build_bundle(read_round(run.path / "round_00"))


@pytest.mark.parametrize("name", ["init.json", "contract.json", "golden.npz"])
def test_an_incomplete_run_is_refused_by_the_name_of_the_file(run, name):
    (run.path / "model" / name).unlink()
    with pytest.raises(RoundError, match=f"{name} is missing"):
        build_bundle(read_round(run.path / "round_00"))


def test_weights_that_every_device_would_refuse_are_refused_here(run):
    path = run.path / "model" / "contract.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy_floor": 1.0}))
    with pytest.raises(TrialError, match="golden labels"):
        build_bundle(read_round(run.path / "round_00"))


def first_offset(model, value):
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "offset":
            entry.value = value


def inlined(model):
    tensor = model.graph.initializer[1]
    array = np.zeros(tuple(tensor.dims), "f4")
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def renamed(model):
    model.graph.initializer[0].name = "fc9.weight"


def reshaped(model):
    model.graph.initializer[0].dims[:] = [2, 8]


def extended(model):
    model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
    model.graph.initializer[-1].name = "fc9.bias"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda model: first_offset(model, "0"), "'fc1.bias' with offset 0, but"),
        (inlined, "does not read 'fc1.weight'"),
        (renamed, "does not read 'fc1.bias'"),
        (reshaped, r"'fc1.bias' with shape \(2, 8\), but .* \(16,\)"),
        (extended, r"reads 'fc9.bias', which weights\.safetensors lacks"),
    ],
)
def test_a_graph_that_reads_other_bytes_is_refused_and_the_tensor_named(
    run, reload_graph, edit, words
):
    graph = reload_graph(run, edit)
    with pytest.raises(RoundError, match=words):
        check_graph(graph, run.init.layout)


def test_a_full_folder_for_temporary_files_is_named(run, tmp_path):
    path = run.path / "whole.onnx"
    model = onnx.load_model_from_string(run.graph)
    arrays = (numpy_helper.from_array(array, n) for n, array in run.init.items())
    del model.graph.initializer[:]
    model.graph.initializer.extend(arrays)
    onnx.save(model, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        for work in (
            lambda: encode_bundle({}, {"graph.onnx": bytes(1000)}),
            lambda: split_onnx(path),
        ):
            with pytest.raises(OSError, match="too large") as refusal:
                work()
            assert refusal.value.filename.startswith(tempfile.gettempdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_not_a_graph_is_refused(run):
    with pytest.raises(RoundError, match="not an ONNX file"):
        check_graph(b"\xff\xff\xff", run.init.layout)
