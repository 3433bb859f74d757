# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests, and real round folders of a tiny network, written as the
contract in docs/round-folder.md says and by no code of the trainer."""

import json
import os
import sys

import numpy as np
import onnx
import pytest
from hypothesis import settings
from onnx import TensorProto, helper

from edge_runtime.formats.identity import Identity, Run, encode_run, network_id
from edge_runtime.formats.init_weights import InitSpec, TensorInit, write_init_spec
from edge_runtime.formats.weights import pack_weights, write_weights

# Threads that wait for each other on a busy machine made tests ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A slow machine is no bug, and a failure must come back on the next run.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

# Groups that run only where they are asked for, and what they would take.
NOT_RUN = {
    "public": ("downloads 185 MB from PyPI", "pytest -m public"),
    "fleet": ("needs nginx and SeaweedFS (155 MB), or minutes", "make test-fleet"),
}


# What would send the tests elsewhere, or let them find other things than expected.
ASTRAY_IF_BEGUN = ("DPU_", "AWS_")
ASTRAY = {"SOURCE_DATE_EPOCH", "NOTIFY_SOCKET", "RANK", "LOCAL_RANK", "WORLD_SIZE"}


def pytest_configure(config):
    """Forget what this machine is set up for, before anything starts or is imported.

    Proxies stay for those who ask for downloads; no server of the tests is behind one.
    """
    downloads = "public" in config.option.markexpr
    for name in list(os.environ):
        is_proxy = name.lower().endswith("_proxy") and not downloads
        if is_proxy or name in ASTRAY or name.startswith(ASTRAY_IF_BEGUN):
            del os.environ[name]
    os.environ["no_proxy"] = "127.0.0.1,localhost"


def pytest_collection_modifyitems(config, items):
    """Leave out what nobody asked for; the summary says so."""
    for item in items:
        for mark in NOT_RUN.keys() & {mark.name for mark in item.iter_markers()}:
            if mark not in config.option.markexpr:
                what, command = NOT_RUN[mark]
                reason = f"not run: {what}; {command}"
                item.add_marker(pytest.mark.skip(reason=reason))


SHAPES = {
    "fc1.weight": (16, 12),
    "fc1.bias": (16,),
    "fc2.weight": (4, 16),
    "fc2.bias": (4,),
}
SELECTABLE = ("fc1.weight", "fc2.weight")


def make_graph(layout):
    """Gemm, Relu, Gemm, with every weight in the weight file."""
    initializers = []
    for tensor in layout.tensors:
        entry = TensorProto(name=tensor.name, data_type=TensorProto.FLOAT)
        entry.dims.extend(tensor.shape)
        entry.data_location = TensorProto.EXTERNAL
        for key, value in {
            "location": "weights.safetensors",
            "offset": tensor.start,
            "length": tensor.stop - tensor.start,
        }.items():
            entry.external_data.add(key=key, value=str(value))
        initializers.append(entry)
    nodes = [
        helper.make_node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "fc2.weight", "fc2.bias"], ["y"], transB=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("x", TensorProto.FLOAT, ["batch", 12])],
        [value("y", TensorProto.FLOAT, ["batch", 4])],
        initializers,
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9)


class RunOnDisk:
    """A run's folder; rounds are appended with real changes."""

    def __init__(self, path, *, seed=7, run_id=None):
        self.path = path
        self.seed = seed
        self.run = Run(run_id, path.name) if run_id else None
        kinds = {
            n: ("uniform", 0.5) if n in SELECTABLE else ("constant", 0.0)
            for n in SHAPES
        }
        self.recipe = InitSpec(
            seed, {n: TensorInit("F32", SHAPES[n], *kinds[n]) for n in SHAPES}, {}
        )
        self.init = self.recipe.generate()
        self.deployed = self.init
        self._write_model()

    def _write_model(self):
        folder = self.path / "model"
        folder.mkdir(parents=True)
        self.graph = make_graph(self.init.layout).SerializeToString(deterministic=True)
        (folder / "graph.onnx").write_bytes(self.graph)
        write_init_spec(self.recipe, folder)
        if self.run:
            (folder / "run.json").write_bytes(encode_run(self.run))
        contract = {
            "schema": 1,
            "inputs": [
                {
                    "name": "x",
                    "dtype": "float32",
                    "shape": [None, 12],
                    "scale": 0.0625,
                    "mean": [0.5],
                    "std": [0.25],
                }
            ],
            "outputs": [{"name": "y", "dtype": "float32", "shape": [None, 4]}],
            "classes": ["a", "b", "c", "d"],
            "accuracy_floor": 0.0,
            "output_tolerance": 1e-4,
        }
        (folder / "contract.json").write_text(json.dumps(contract))
        rng = np.random.default_rng(self.seed)
        inputs = rng.integers(0, 17, (8, 12), dtype=np.uint8)
        labels = rng.integers(0, 4, 8, dtype=np.int64)
        np.savez(folder / "golden.npz", inputs=inputs, labels=labels)

    def changed(self, base=None, number=0):
        """Arrays that differ from ``base`` in 5 weights a matrix and in every bias."""
        arrays = {n: a.copy() for n, a in (base or self.deployed).items()}
        rng = np.random.default_rng(100 * self.seed + number)
        for name in SELECTABLE:
            at = rng.choice(arrays[name].size, 5, replace=False)
            arrays[name].reshape(-1)[at] = rng.normal(size=5)
        for name in SHAPES.keys() - set(SELECTABLE):
            arrays[name] += rng.normal(size=arrays[name].shape).astype("f4")
        return arrays

    def add(self, number, arrays=None, *, base=None, masks=None, **record):
        """Write ``round_NN``; by default 5 weights a matrix and all biases change.

        ``masks`` are boolean; by default exactly what changed. ``record`` overrides
        fields of round.json.
        """
        base = base or self.deployed
        weights = pack_weights(self.changed(base, number) if arrays is None else arrays)
        if masks is None:
            masks = {
                n: weights[n].view("<u4") != base[n].view("<u4") for n in SELECTABLE
            }
        packed = {
            n: np.packbits(m.ravel(), bitorder="little") for n, m in masks.items()
        }
        folder = self.path / f"round_{number:02d}"
        folder.mkdir()
        write_weights(weights, folder / "weights.safetensors")
        write_weights(packed, folder / "selection.safetensors")
        kept = weights.fingerprint == base.fingerprint
        network = network_id(weights.layout.header, self.graph)
        fields = {
            "schema": 2 if self.run else 1,
            "run": self.path.name,
            "round": number,
            "counter": number,
            "outcome": "kept_base" if kept else "updated",
            "model": Identity(network, self.run).model,
            "parent": base.fingerprint,
            "target": weights.fingerprint,
            "packable": True,
        }
        (folder / "round.json").write_text(json.dumps(fields | record))
        (folder / "metrics.jsonl").write_text('{"epoch": 0}\n')
        self.deployed = weights
        return folder


@pytest.fixture
def new_run(tmp_path):
    """Make a run below ``tmp_path/runs``."""
    return lambda name="tiny", **options: RunOnDisk(tmp_path / "runs" / name, **options)


@pytest.fixture
def run(new_run):
    """A run with an updated round_00 and round_01."""
    run = new_run()
    run.add(0)
    run.add(1)
    return run


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a console script: ``command(pack, "round_05") -> (code, stdout, stderr)``."""

    def start(script, *args):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            script()
        return done.value.code, *capsys.readouterr()

    return start


@pytest.fixture
def reload_graph():
    """Read, change and write a run's graph again."""

    def change(run, edit):
        path = run.path / "model" / "graph.onnx"
        model = onnx.load(path, load_external_data=False)
        edit(model)
        path.write_bytes(model.SerializeToString(deterministic=True))
        return path.read_bytes()

    return change
