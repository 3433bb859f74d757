# SPDX-License-Identifier: Apache-2.0
"""Models deployed weight for weight: the graph, the tensors, what is refused."""

import copy
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from edge_runtime.errors import ExportError
from edge_runtime.formats.contract import InputSpec
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.formats.weights import pack_weights, write_weights
from trainer.export.graph import export_graph
from trainer.export.graph_check import check_graph
from trainer.export.tensors import deployed_tensors, load_weights, weights_of

torch.set_num_threads(1)


class Mlp(nn.Module):
    shape = (12,)

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 40, bias=False)
        self.norm = nn.LayerNorm(40)
        self.last = nn.Linear(40, 10)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


class ConvNet(nn.Module):
    shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, groups=4),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
        )
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 10))

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


class Vit(nn.Module):
    shape = (1, 8, 8)

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 16, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 17, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = self.block(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x[:, 0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.output = nn.Linear(8, 20)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        return self.output(self.embedding(x).mean(1))


def build(kind, seed=0):
    """A network in training mode whose BatchNorm statistics are not trivial."""
    torch.manual_seed(seed)
    model = kind()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    return model


def example(kind, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *kind.shape, generator=generator)


def infer(graph, weights, x, folder):
    """ONNX Runtime's answer from the two files that a device has."""
    (folder / "graph.onnx").write_bytes(graph)
    write_weights(weights, folder / WEIGHTS_NAME)
    session = onnxruntime.InferenceSession(folder / "graph.onnx")
    return session.run(["output"], {"input": x.numpy()})[0]


def assert_agrees(found, expected):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def bits(array):
    return array.reshape(-1).view(f"u{array.itemsize}")


def patched(weights, share=0.01):
    """New random values for a share of the weights, and the changed elements."""
    rng = np.random.default_rng(2)
    tensors, changed = {n: np.array(a) for n, a in weights.items()}, {}
    for name in [name for name, array in weights.items() if array.ndim > 1]:
        flat = tensors[name].reshape(-1)
        where = np.sort(rng.choice(flat.size, max(1, int(share * flat.size)), False))
        flat[where] = rng.normal(size=len(where))
        changed[name] = where
    return pack_weights(tensors), changed


@pytest.fixture(scope="module", params=[Mlp, ConvNet, Vit])
def deployed(request):
    model = build(request.param)
    graph = export_graph(model, example(request.param, 1))
    return SimpleNamespace(kind=request.param, model=model, graph=graph)


def test_agrees_with_torch_before_and_after_a_sparse_patch(deployed, tmp_path):
    model = copy.deepcopy(deployed.model).eval()
    before = weights_of(model)
    after, _ = patched(before)
    outputs = []
    for weights in (before, after):
        load_weights(model, weights)
        for count in (1, 2, 5):
            x = example(deployed.kind, count)
            outputs.append(infer(deployed.graph, weights, x, tmp_path))
            assert_agrees(outputs[-1], model(x))
    assert np.abs(outputs[2] - outputs[5]).max() > 1e-2


def test_a_one_percent_patch_stays_a_one_percent_change(deployed):
    model = copy.deepcopy(deployed.model)
    before = weights_of(model)
    after, changed = patched(before)
    load_weights(model, after)
    found = weights_of(model)
    assert found.layout.header == before.layout.header
    for name in before:
        differs = np.flatnonzero(bits(found[name]) != bits(before[name]))
        assert differs.tolist() == list(changed.get(name, []))


def test_other_weights_give_the_same_graph_bytes(deployed):
    other = build(deployed.kind, seed=7).eval().requires_grad_(False)
    assert not np.array_equal(weights_of(other).data, weights_of(deployed.model).data)
    assert export_graph(other, example(deployed.kind, 4, seed=3)) == deployed.graph


def test_every_tensor_is_an_initializer_that_points_into_the_weight_file(deployed):
    weights = weights_of(deployed.model)
    graph = onnx.load_model_from_string(deployed.graph).graph
    places = {
        init.name: {entry.key: entry.value for entry in init.external_data}
        for init in graph.initializer
        if init.external_data
    }
    assert places == {
        tensor.name: {
            "location": WEIGHTS_NAME,
            "offset": str(tensor.start),
            "length": str(tensor.stop - tensor.start),
        }
        for tensor in weights.layout.tensors
    }
    generated = [i for i in graph.initializer if i.name not in places]
    assert sum(len(i.raw_data) for i in generated) < 1000


def test_the_graph_tells_nothing_of_the_exporting_machine(deployed):
    for trace in (b".py", b"torch.nn", b"test_export", b"+cpu", b"pkg."):
        assert trace not in deployed.graph


def test_batch_norm_is_not_folded(deployed):
    kinds = [n.op_type for n in onnx.load_model_from_string(deployed.graph).graph.node]
    norms = [m for m in deployed.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert kinds.count("BatchNormalization") == len(norms)


def test_the_model_is_left_as_it_was(capfd):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = weights_of(model)
    export_graph(model, torch.randn(1, 4))
    assert [module.training for module in model.modules()] == modes
    assert weights_of(model).fingerprint == before.fingerprint
    assert capfd.readouterr().out == ""


def test_tied_weights_are_one_tensor_under_the_first_name(tmp_path):
    model = Tied().eval()
    assert list(deployed_tensors(model)) == ["embedding.weight", "output.bias"]
    x = torch.randint(0, 20, (3, 5))
    graph = export_graph(model, x)
    for weights in (weights_of(model), patched(weights_of(model))[0]):
        load_weights(model, weights)
        assert model.output.weight is model.embedding.weight
        assert_agrees(infer(graph, weights, x, tmp_path), model(x))


def test_parameters_that_share_memory_are_tied_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    assert list(deployed_tensors(model)) == ["0.weight", "0.bias", "1.bias"]
    assert b"1.weight" not in export_graph(model, torch.randn(1, 4))


class NamedLikeOperators(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Parameter(torch.randn(4, 4))
        self.relu = nn.Parameter(torch.randn(4))

    def forward(self, input_a, input_b):
        return torch.relu(F.linear(input_a, self.linear)) + self.relu, input_b * 2


def test_several_inputs_and_tensors_named_like_operators():
    x = torch.randn(2, 4)
    graph = export_graph(NamedLikeOperators(), (x, x))
    graph = onnx.load_model_from_string(graph).graph
    assert [value.name for value in graph.input] == ["input_0", "input_1"]
    assert [value.name for value in graph.output] == ["output_0", "output_1"]
    assert {init.name for init in graph.initializer} >= {"linear", "relu"}


def test_reparametrised_weights_are_deployed_as_their_originals():
    model = nn.Sequential(nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    export_graph(model, torch.randn(1, 4))
    assert "0.parametrizations.weight.original1" in deployed_tensors(model)


def test_recurrent_networks_export_without_a_warning():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRU(4, 3, batch_first=True)

        def forward(self, x):
            return self.cell(x)[0][:, -1]

    assert b"cell.weight_hh_l0" in export_graph(Last(), torch.randn(1, 5, 4))


class Faulty(nn.Module):
    """A network with one fault, made by ``prepare`` and met in ``run``."""

    def __init__(self, prepare, run):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        prepare(self)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def _counts(model, x):
    model.count += 1
    return model.layer(x) * model.count


FAULTS = {
    "unused": (
        lambda m: m.add_module("spare", nn.Linear(4, 4)),
        lambda m, x: m.layer(x),
        "tensor 'spare.weight' is not in the graph",
    ),
    "changes a buffer": (
        lambda m: m.register_buffer("count", torch.zeros(1)),
        _counts,
        "changes 'count' in eval mode",
    ),
    "changes a weight": (
        lambda m: None,
        lambda m, x: m.layer(x) + 0 * m.layer.weight.detach().clamp_(max=0.1).sum(),
        "changes 'layer.weight' in eval mode",
    ),
    "cached": (
        lambda m: setattr(m, "cache", m.layer.weight.detach()),
        lambda m, x: m.layer(x) @ m.cache,
        "tensor 'cache' holds trained values",
    ),
    "not a parameter": (
        lambda m: setattr(m, "scale", torch.ones(4, requires_grad=True)),
        lambda m, x: m.layer(x) * m.scale,
        "tensor 'scale' holds trained values",
    ),
    "overlap": (
        lambda m: setattr(m, "part", nn.Parameter(m.layer.weight.data[:2])),
        lambda m, x: m.layer(x) @ m.part.T,
        "'layer.weight'.*share memory",
    ),
    "name of an input": (
        lambda m: setattr(m, "input", nn.Parameter(torch.ones(4))),
        lambda m, x: m.layer(x) + m.input,
        "tensor 'input' has the name of a graph input",
    ),
    "complex": (
        lambda m: m.register_buffer("phase", torch.ones(4, dtype=torch.complex64)),
        lambda m, x: m.layer(x),
        "'phase' is torch.complex64",
    ),
    "no data": (
        lambda m: setattr(m, "late", nn.Linear(4, 4, device="meta")),
        lambda m, x: m.late(m.layer(x)),
        "tensor 'late.weight' has no data",
    ),
    "fixed batch": (
        lambda m: None,
        lambda m, x: m.layer(x).reshape(2, 2, 2),
        r"input of float32 \[3, 4\].*with 2 rows it works.*test_graph.py, line",
    ),
    "batch as a number": (
        lambda m: None,
        lambda m, x: m.layer(x) + torch.zeros(len(x), 4),
        r"fixes the batch size.*not from len\(x\)",
    ),
    "branches on a weight": (
        lambda m: None,
        lambda m, x: m.layer(x) if m.layer.bias.sum() > 0 else x,
        "branches on a value.*test_graph.py, line",
    ),
    "an operator that ONNX lacks": (
        lambda m: None,
        lambda m, x: m.layer(x) + torch.linalg.eigvalsh(x[:, :, None] * x[:, None]),
        "no ONNX form for the operator 'aten._linalg_eigh': use",
    ),
    "another shape": (
        lambda m: m.add_module("layer", nn.Linear(5, 4)),
        lambda m, x: m.layer(x),
        r"input of float32 \[2, 4\]: RuntimeError: mat1 and mat2 .*contract's inputs",
    ),
    "a projection": (
        lambda m: m.add_module("layer", nn.LSTM(4, 4, proj_size=2)),
        lambda m, x: m.layer(x[None])[0][0],
        "reads tensor 'layer.weight_hr_l0', and torch's exporter leaves it out",
    ),
    "norms of an embedding": (
        lambda m: m.add_module("words", nn.Embedding(4, 4, max_norm=1.0)),
        lambda m, x: m.layer(x) + m.words(x.long().abs() % 4).sum(1),
        "module 'words' has max_norm.*before select",
    ),
    "compiled": (
        lambda m: m.add_module("layer", torch.compile(m.layer, backend="eager")),
        lambda m, x: m.layer(x),
        "module 'layer' is compiled.*compile what start_run",
    ),
    "random": (
        lambda m: None,
        lambda m, x: m.layer(x) + torch.rand_like(x),
        "output 0 .* differs from torch's",
    ),
    "output": (
        lambda m: None,
        lambda m, x: {"y": m.layer(x)},
        "must be a tensor or a tuple of tensors, found dict; put",
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's, once a process
@pytest.mark.parametrize("fault", FAULTS)
def test_refuses_what_cannot_be_deployed_and_says_why(fault):
    prepare, run, message = FAULTS[fault]
    with pytest.raises(ExportError, match=message):
        export_graph(Faulty(prepare, run), torch.randn(2, 4))


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args):
        return self.net(*args)


class Recurrent(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.layer = nn.GRU(8, 6, **how)

    def forward(self, x):
        return self.layer(x)[0]


class Positions(nn.Module):
    """Adds a table that has a row for each step."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return x + self.table


class HalvedAndDoubled(nn.Module):
    """A small U-Net: sizes that are not even do not come back as they were."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)

    def forward(self, x):
        return torch.cat([x, self.up(self.down(x))], 1)


def flat():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))


def with_open(model, *shape):
    """Export with a batch of any size, and any size wherever the shape says None."""
    takes = [InputSpec("x", "float32", (None, *shape))]
    return export_graph(
        model, torch.randn(2, *(size or 6 for size in shape)), takes=takes
    )


FIXED = {
    "a recurrent network": (
        lambda: with_open(Recurrent(batch_first=True), None, 8),
        r"forward fixes x\.shape\[1\].*Recurrent layers.* are unrolled",
    ),
    "one whose inputs have no names": (
        lambda: with_open(Wrapped(Recurrent(batch_first=True)), None, 8),
        r"forward fixes args\[0\]\.shape\[1\]",
    ),
    "a table of positions": (
        lambda: with_open(Positions(), None, 8),
        r"float32 \[3, 5, 8\].*the size of axis 1 of 'x', or",
    ),
    "a flattened image": (
        lambda: with_open(flat(), 1, None, None),
        r"float32 \[3, 1, 5, 5\].* axis 2 of 'x', axis 3 of 'x', or",
    ),
}


@pytest.mark.parametrize("case", FIXED)
def test_an_axis_that_cannot_be_open_is_named_and_not_the_batch(case):
    export, words = FIXED[case]
    with pytest.raises(ExportError, match=words) as told:
        export()
    assert "batch size" not in str(told.value)


def test_a_network_that_has_time_before_the_batch_is_told_of_batch_first():
    with pytest.raises(ExportError, match=r"fixes the batch size.*batch_first=True"):
        with_open(Recurrent(), 4, 8)


def test_a_network_that_takes_even_sizes_only_exports_with_open_sizes(tmp_path):
    model = HalvedAndDoubled()
    graph = with_open(model, 1, None, None)
    x = torch.randn(1, 1, 10, 4)
    (tmp_path / "graph.onnx").write_bytes(graph)
    write_weights(weights_of(model), tmp_path / WEIGHTS_NAME)
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx")
    assert_agrees(session.run(None, {"x": x.numpy()})[0], model(x))


def test_an_open_axis_may_be_of_size_one_in_the_example():
    takes = [InputSpec("x", "float32", (None, 4, None))]
    graph = export_graph(
        nn.Conv1d(4, 2, 3, padding=1), torch.ones(1, 4, 1), takes=takes
    )
    (taken,) = onnx.load_model_from_string(graph).graph.input
    assert taken.type.tensor_type.shape.dim[2].dim_param == "size_1"


class AnyNumber(nn.Module):
    """As many wrappers have it: the names of the inputs are the inner module's."""

    def __init__(self):
        super().__init__()
        self.net = nn.Bilinear(3, 3, 2)

    def forward(self, *args, **options):
        return self.net(*args, **options)


def test_inputs_without_names_of_their_own_export():
    example = torch.randn(2, 3), torch.randn(2, 3)
    graph = onnx.load_model_from_string(export_graph(AnyNumber(), example)).graph
    assert [value.name for value in graph.input] == ["input_0", "input_1"]


def test_refuses_a_scripted_module():
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ExportError, match=r"ScriptModule.*that it was made from"):
        export_graph(scripted, torch.randn(1, 4))


def test_refuses_hook_based_weight_norm():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(model[0])
    with pytest.raises(ExportError, match=r"'0\.weight'.*parametrizations"):
        export_graph(model, torch.randn(1, 4))


def test_refuses_an_example_without_rows():
    with pytest.raises(ExportError, match="at least one row"):
        export_graph(nn.Linear(4, 4), torch.randn(0, 4))


def test_refuses_the_graph_of_another_model():
    graph = export_graph(nn.Linear(4, 4), torch.randn(1, 4))
    with pytest.raises(ExportError, match=r"tensor 'weight' .* another model"):
        check_graph(graph, nn.Linear(4, 5), [[torch.randn(1, 4)]])


def zoo():
    """One tensor of every kind that is easily damaged."""
    model = nn.Module()
    nan = torch.tensor([0x7FA00001, -0x7FFFFFFF - 1, 1], dtype=torch.int32)
    model.register_buffer("nan", nan.view(torch.float32))
    model.register_buffer("brain", torch.randn(2, 3).bfloat16())
    model.register_buffer("eight", torch.arange(4.0).to(torch.float8_e4m3fn))
    model.register_buffer("count", torch.tensor(1 << 60))
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("empty", torch.zeros(0, 3))
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    model.weight = nn.Parameter(image)
    model.norm = nn.BatchNorm1d(3)
    return model


def test_weights_survive_the_way_out_and_back_bit_for_bit():
    model, other = zoo(), zoo()
    weights = weights_of(model)
    with torch.no_grad():
        other.weight.zero_()
        other.nan.zero_()
        other.brain.zero_()
    load_weights(other, weights)
    assert weights_of(other).fingerprint == weights.fingerprint
    assert weights["nan"].view(np.uint32).tolist() == [0x7FA00001, 0x80000000, 1]
    assert weights.layout.by_name["brain"].dtype == "BF16"
    assert weights["brain"].dtype == np.uint16
    assert weights["weight"].tolist() == model.weight.tolist()
    assert "norm.running_var" in weights
    assert "norm.num_batches_tracked" not in weights


@pytest.mark.parametrize("name", ["layer.weight", "extra"])
def test_refuses_weights_of_another_model_before_writing_any(name):
    model = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    before = weights_of(model)
    other = {n: np.zeros_like(array) for n, array in before.items()}
    other[name] = np.zeros((2, 3), np.float32)
    with pytest.raises(ExportError, match=f"tensor '{name}'.*F32 \\[2, 3\\]"):
        load_weights(model, pack_weights(other))
    assert weights_of(model).fingerprint == before.fingerprint
