# SPDX-License-Identifier: Apache-2.0
"""int8 graphs give one answer: by ONNX Runtime, by NumPy, on CPUs old and new."""

import platform
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.formats.contract import Contract, InputSpec
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.formats.weights import write_weights
from edge_runtime.inference.predictor import Predictor
from edge_runtime.inference.session import Backend, RunOptions, make_session

WIDTH = 64
CONTRACT = Contract((InputSpec("x", "float32", (None, WIDTH)),))
QEMU = "qemu-x86_64-static"
# Neither AVX-512 nor VNNI, as before 2019.
ANSWER = """
import sys
from pathlib import Path
import numpy as np
from edge_runtime.inference.session import Backend, RunOptions, make_session
for folder in map(Path, sys.argv[1:]):
    session = make_session(folder, Backend.ONNXRUNTIME, RunOptions())
    x = np.load(folder / "x.npy")
    np.save(folder / "y.npy", session.run(None, {"x": x})[0])
"""


def quantised(folder, *, shared):
    """Two layers as large as int8 goes; their weights may share one zero point."""
    rng = np.random.default_rng(0)
    weights = {
        f"w{n}": rng.integers(100, 128, (WIDTH, WIDTH), dtype="i1") for n in (0, 1)
    }
    constants = {
        "step": np.float32(1 / 255),
        "zero": np.uint8(0),
        "wide": np.float32(WIDTH / 255),
        "steps": np.full(WIDTH, 1 / 127, "f4"),
        "z0": np.zeros(WIDTH, "i1"),
        "z1": np.zeros(WIDTH, "i1"),
    }
    nodes = []
    for n, (value, step) in enumerate((("x", "step"), ("h", "wide"))):
        zeros = "z0" if shared else f"z{n}"
        node = helper.make_node
        nodes += [
            node("QuantizeLinear", [value, step, "zero"], [f"q{n}"]),
            node("DequantizeLinear", [f"q{n}", step, "zero"], [f"d{n}"]),
            node("DequantizeLinear", [f"w{n}", "steps", zeros], [f"f{n}"], axis=0),
            node("Gemm", [f"d{n}", f"f{n}"], [("h", "y")[n]], transB=1),
        ]
    folder.mkdir()
    write_weights(weights, folder / WEIGHTS_NAME)
    graph = helper.make_graph(
        nodes,
        "int8",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()]
        + [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(model, folder / "graph.onnx")
    np.save(folder / "x.npy", rng.uniform(0.5, 1, (3, WIDTH)).astype("f4"))
    return folder


def answer(folder, backend):
    predictor = Predictor(folder, CONTRACT, RunOptions(backend=backend))
    return predictor.predict(np.load(folder / "x.npy"))


def test_numpy_and_onnx_runtime_agree(tmp_path):
    folder = quantised(tmp_path / "own", shared=False)
    found, wanted = (answer(folder, b) for b in (Backend.NUMPY, Backend.ONNXRUNTIME))
    assert np.abs(found - wanted).max() <= 1e-6 * wanted.max()


def test_sessions_ask_for_exact_sums(tmp_path):
    folder = quantised(tmp_path / "own", shared=False)
    session = make_session(folder, Backend.ONNXRUNTIME, RunOptions())
    options = session.get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which(QEMU),
    reason=f"needs x86 and {QEMU}",
)
def test_a_cpu_without_vnni_answers_alike_and_loads_what_it_cannot_compute_alike(
    tmp_path,
):
    own = quantised(tmp_path / "own", shared=False)
    shared = quantised(tmp_path / "shared", shared=True)
    emulated = [QEMU, "-cpu", "Haswell", sys.executable, "-c", ANSWER]
    subprocess.run([*emulated, own, shared], check=True, capture_output=True)
    wanted = answer(own, Backend.ONNXRUNTIME)
    found = {folder: np.load(folder / "y.npy") for folder in (own, shared)}
    assert np.array_equal(found[own], wanted)
    # Sums of pairs were cut there, which the trial's expected outputs tell.
    assert np.abs(found[shared] - wanted).max() > 0.02 * wanted.max()
