# SPDX-License-Identifier: Apache-2.0
"""int8 graphs: integer kernels, the float network's answers, patches of all tensors."""

from collections import Counter
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edge_runtime.errors import ExportError
from edge_runtime.formats.weights import pack_weights, write_weights
from trainer.export.graph import export_graph
from trainer.export.int8_graph import int8_layout, quantised_graph
from trainer.export.tensors import weights_of

torch.set_num_threads(1)


class Residual(nn.Module):
    """Groups, BatchNorm, ReLU6, a padded shortcut, pooling."""

    shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.grouped = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4), nn.BatchNorm2d(16)
        )
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        x = self.first(x)
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = self.pool(torch.relu(self.grouped(x) + shortcut))
        return self.last(x.mean((2, 3)))


class Tokens(nn.Module):
    """What transformers have: an embedding, products of three axes, LayerNorm."""

    shape = (6,)

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        return self.last(self.block(self.table(x.abs().long().clamp(0, 11))).mean(1))


class Mlp(nn.Sequential):
    shape = (20,)

    def __init__(self):
        layers = [nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)]
        super().__init__(*layers)


class Pixels(nn.Sequential):
    """A segmentation: its last node is a convolution without BatchNorm."""

    shape = (3, 8, 8)

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))


def on_grid(arrays, scales):
    """The weights as int8, and as the float32 numbers that these stand for."""
    whole, wide = dict(arrays), dict(arrays)
    for name, steps in scales.items():
        rows = steps.reshape(-1, *[1] * (arrays[name].ndim - 1))
        whole[name] = np.rint(arrays[name] / rows).clip(-127, 127).astype(np.int8)
        wide[name] = whole[name] * rows
    return pack_weights(whole), pack_weights(wide)


def session(graph, weights, folder, saved=None):
    (folder / "graph.onnx").write_bytes(graph.SerializeToString())
    write_weights(weights, folder / "weights.safetensors")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if saved:
        options.optimized_model_filepath = str(saved)
    return onnxruntime.InferenceSession(folder / "graph.onnx", options)


@cache
def made(kind):
    """A network whose statistics are its own, its two graphs and its scales."""
    torch.manual_seed(0)
    model, x = kind(), 2 * torch.randn(64, *kind.shape)
    for _ in range(20):
        model.train()(x)
    model.eval()
    graph = onnx.load_model_from_string(export_graph(model, x[:2]))
    arrays = {name: np.array(a) for name, a in weights_of(model).items()}
    scales = {
        name: (2 * np.abs(a).reshape(len(a), -1).max(1) / 127).astype(np.float32)
        for name, a in arrays.items()
        if a.ndim > 1
    }
    _, wide = on_grid(arrays, scales)
    x = x.numpy()
    return graph, quantised_graph(graph, wide, scales, {"input": x}), arrays, scales, x


KERNELS = {
    Mlp: {"QGemm": 2},
    Residual: {"QLinearConv": 2, "QLinearAdd": 1, "QGemm": 1},
    Pixels: {"QLinearConv": 2},
    Tokens: {"MatMulIntegerToFloat": 3, "QGemm": 2},
}


@pytest.mark.parametrize("kind", KERNELS)
def test_onnx_runtime_computes_in_integers(kind, tmp_path):
    _, graph, arrays, scales, _ = made(kind)
    session(graph, on_grid(arrays, scales)[0], tmp_path, tmp_path / "fused.onnx")
    fused = onnx.load(tmp_path / "fused.onnx", load_external_data=False).graph
    found = Counter(node.op_type for node in fused.node)
    assert KERNELS[kind].items() <= found.items()
    assert not found.keys() & {"Conv", "Gemm", "BatchNormalization", "Where"}


@pytest.mark.parametrize("kind", KERNELS)
def test_answers_are_the_float_network_s_after_a_patch_of_any_tensor_too(
    kind, tmp_path
):
    graph, whole_graph, arrays, scales, x = made(kind)
    rng = np.random.default_rng(1)
    changed = {
        n: a if n in scales else (a * rng.uniform(0.7, 1.1, a.shape)).astype("f4")
        for n, a in arrays.items()
    }
    for values in (arrays, changed):
        whole, wide = on_grid(values, scales)
        found = session(whole_graph, whole, tmp_path).run(None, {"input": x})[0]
        wanted = session(graph, wide, tmp_path).run(None, {"input": x})[0]
        assert np.abs(found - wanted).max() <= 0.04 * np.abs(wanted).max()


def test_a_batchnorm_that_turns_over_or_ignores_a_channel_is_kept(tmp_path):
    graph, whole_graph, arrays, scales, x = made(Mlp)
    values = {name: a.copy() for name, a in arrays.items()}
    values["1.weight"][:3] = (-1, 0, 1e-12)
    values["1.bias"][:3] = (0.5, 1, 1)
    whole, wide = on_grid(values, scales)
    found = session(whole_graph, whole, tmp_path).run(None, {"input": x})[0]
    wanted = session(graph, wide, tmp_path).run(None, {"input": x})[0]
    assert np.abs(found - wanted).max() <= 0.04 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", KERNELS)
def test_scaled_tensors_are_int8_in_the_state_dict_s_shapes(kind, tmp_path):
    _, graph, arrays, scales, _ = made(kind)
    whole, wide = on_grid(arrays, scales)
    assert whole.layout == int8_layout(wide.layout, scales)
    deployed = {i.name: i for i in graph.graph.initializer if i.external_data}
    assert deployed.keys() == arrays.keys()
    for name, tensor in deployed.items():
        place = whole.layout.by_name[name]
        assert tuple(tensor.dims) == arrays[name].shape
        assert {e.key: e.value for e in tensor.external_data} == {
            "location": "weights.safetensors",
            "offset": str(place.start),
            "length": str(place.stop - place.start),
        }


def test_equal_networks_and_samples_give_equal_bytes():
    graph, whole_graph, arrays, scales, x = made(Residual)
    again = quantised_graph(graph, on_grid(arrays, scales)[1], scales, {"input": x})
    assert again.SerializeToString(deterministic=True) == (
        whole_graph.SerializeToString(deterministic=True)
    )


def test_scales_that_do_not_fit_are_refused_by_name():
    graph, _, arrays, scales, x = made(Mlp)
    wide = on_grid(arrays, scales)[1]
    for odd in (
        {"0.weight": scales["0.weight"][:-1]},
        {"0.weight": scales["0.weight"] * 0},
        {"0.weight": scales["0.weight"].astype(np.float64)},
        {"9.weight": scales["0.weight"]},
    ):
        with pytest.raises(ExportError, match=next(iter(odd))):
            quantised_graph(graph, wide, odd, {"input": x})


def test_activations_that_are_not_finite_are_refused():
    graph, _, arrays, scales, x = made(Mlp)
    broken = {**arrays, "0.bias": np.full_like(arrays["0.bias"], np.inf)}
    with pytest.raises(ExportError, match="finite"):
        quantised_graph(graph, on_grid(broken, scales)[1], scales, {"input": x})
