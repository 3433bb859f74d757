# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as people have them are one model, however their files are cut."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import save_file

from edge_runtime import Store, make_proof
from edge_runtime.errors import RoundError, WeightsError
from edge_runtime.formats.weights import fingerprint_file
from edge_runtime.update.device import Device
from packager.cli.pack import pack, patch
from packager.models.read import pack_models, read_model

torch.manual_seed(5)
STATE = {
    "head.weight": torch.randn(4, 6),
    "embed.weight": torch.randn(9, 6).to(torch.bfloat16),
    "norm.steps": torch.tensor(3),
    "a.mask": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
    "z.bias": torch.randn(4),
}
SHARDS = [
    ("z.bias", "embed.weight"),
    ("norm.steps", "a.mask", "empty"),
    ("head.weight",),
]


def changed(state):
    new = {name: tensor.clone() for name, tensor in state.items()}
    new["head.weight"][2, 3] += 1
    new["embed.weight"][0, 0] += 1
    return new


def cut(folder, state, *, end=".safetensors", index=True, name="model"):
    """Write a state as shards, as Hugging Face's libraries cut it."""
    folder.mkdir(parents=True)
    places = {}
    for number, names in enumerate(SHARDS, 1):
        file = f"{name}-{number:05}-of-{len(SHARDS):05}{end}"
        part = {n: state[n] for n in names}
        if end == ".bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    if index:
        text = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / f"{name}{end}.index.json").write_text(json.dumps(text))
    return folder


def cached(folder, state):
    """Write a state as the Hugging Face cache has it: links into a folder of blobs."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    whole = cut(folder / "made", state)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(whole.iterdir())):
        path.rename(blobs / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    whole.rmdir()
    return folder


def saved(folder, state, wrap=lambda s: s, name="state.pt", **how):
    folder.mkdir(parents=True)
    torch.save(wrap(state), folder / name, **how)
    return folder / name


KINDS = (
    *("float64", "float32", "float16", "bfloat16", "bool", "complex64"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    "float8_e8m0fnu",
)
FORMS = {
    "shards with an index": cut,
    "shards without one": lambda f, s: cut(f, s, index=False),
    "an index alone": lambda f, s: cut(f, s) / "model.safetensors.index.json",
    "shards of state dicts": lambda f, s: cut(f, s, end=".bin", name="pytorch_model"),
    "the Hugging Face cache": cached,
    "a snapshot in it": lambda f, s: cached(f, s) / "snapshots" / "0123abcd",
    "a folder with one file": lambda f, s: saved(f, s, name="pytorch_model.bin").parent,
    "a state dict": saved,
    "a state dict of old": lambda f, s: saved(
        f, s, _use_new_zipfile_serialization=False
    ),
    "Lightning's": lambda f, s: saved(
        f, s, lambda s: {"epoch": 3, "state_dict": s, "optimizer_states": [{}]}
    ),
    "with an optimizer and a best accuracy": lambda f, s: saved(
        f,
        s,
        lambda s: {
            "model": s,
            "optimizer": {"exp_avg": torch.ones(3)},
            "best": torch.tensor(1.0),
        },
    ),
}


@pytest.fixture
def merged(tmp_path):
    """The old and the new state, each in one safetensors file."""
    for name, state in {"old": STATE, "new": changed(STATE)}.items():
        save_file(state, tmp_path / f"{name}.safetensors", {"format": "pt"})
    return tmp_path / "old.safetensors", tmp_path / "new.safetensors"


@pytest.mark.parametrize("form", FORMS)
def test_one_model_in_any_form_gives_one_patch(form, merged, tmp_path):
    old, new = (
        read_model(FORMS[form](tmp_path / form / name, state))
        for name, state in {"old": STATE, "new": changed(STATE)}.items()
    )
    ours, theirs = read_model(merged[0]), read_model(merged[1])
    assert old.weights.fingerprint == ours.weights.fingerprint
    assert bytes(old.weights.data) == bytes(ours.weights.data)
    assert old.model == ours.model
    packed = pack_models(old, new)
    assert packed.data == pack_models(ours, theirs).data == pack_models(ours, new).data
    assert packed.counts["head.weight"] == packed.counts["embed.weight"] == 1


def test_what_is_no_weight_is_named(tmp_path, command, merged):
    path = saved(tmp_path / "a", STATE, lambda s: {"epoch": 3, **s, "args": {"x": 1}})
    code, _, err = command(patch, "diff", path, merged[1])
    assert code == 0
    assert "left out, no weights: 'epoch', 'args'" in err


def test_a_folder_is_packed_beside_itself_under_its_name(merged, tmp_path, command):
    for name, state in {"v1.0": STATE, "v1.1": changed(STATE)}.items():
        cut(tmp_path / name, state)
    files = ("--base", tmp_path / "v1.0", "--target", tmp_path / "v1.1")
    assert command(pack, *files)[0] == 0
    assert command(pack, "--base", merged[0], "--target", merged[1])[0] == 0
    ours = (tmp_path / "v1.1.dpu").read_bytes()
    assert ours == (tmp_path / "new.dpu").read_bytes()


@pytest.mark.parametrize("kind", [*KINDS, "float4_e2m1fn_x2"])
def test_a_state_dict_of_any_type_is_what_safetensors_makes_of_it(kind, tmp_path):
    raw = torch.arange(64, dtype=torch.uint8)
    state = {"w": (raw % 2 if kind == "bool" else raw).view(getattr(torch, kind))}
    state["w"] = state["w"].reshape(2, -1)
    if state["w"].dim() and kind != "float4_e2m1fn_x2":
        state["turned"] = state["w"].t()
    path = saved(tmp_path / "a", state)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "a.safetensors")
    ours, theirs = read_model(path).weights, read_model(tmp_path / "a.safetensors")
    assert ours.layout == theirs.weights.layout
    assert ours.fingerprint == theirs.weights.fingerprint


def test_a_state_dict_without_checksums_is_taken(tmp_path, merged):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "a", STATE)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_model(path).model == read_model(merged[0]).model


# State of training that no graph reads -----------------------------------------------


def normalised(seed, count=7):
    """The state of a network with BatchNorm, after so many batches."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    return net.state_dict() | {"1.num_batches_tracked": torch.tensor(count)}


@pytest.fixture
def graph(tmp_path):
    """The graph.onnx of that network, as devices have it."""
    order = "weight", "bias", "running_mean", "running_var"
    inner, norm = ["0.weight", "0.bias"], [f"1.{name}" for name in order]
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Gemm", ["x", *inner], ["h"], transB=1),
        helper.make_node("BatchNormalization", ["h", *norm], ["y"]),
    ]
    found = helper.make_graph(
        nodes,
        "graph",
        [value("x", onnx.TensorProto.FLOAT, ["n", 6])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(normalised(0)[n].numpy(), n) for n in inner + norm],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(found, opset_imports=opsets, ir_version=9)
    onnx.save(model, tmp_path / "whole.onnx")
    path = tmp_path / "graph.onnx"
    path.write_bytes(read_model(tmp_path / "whole.onnx").graph)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_what_batch_norm_counts_is_left_out_where_the_graph_does_not_read_it(
    kind, graph, tmp_path, command
):
    files = [tmp_path / f"{name}.{kind}" for name in ("old", "new")]
    save = save_file if kind == "safetensors" else torch.save
    for seed, path in enumerate(files):
        save(normalised(seed, seed), path)
    old, new = files
    code, _, err = command(pack, "--base", old, "--graph", graph, "--bundle")
    left = f"{old}: left out, no weights: '1.num_batches_tracked'"
    assert (code, left in err) == (0, True), err
    assert command(pack, "--base", old, "--target", new, "--graph", graph)[0] == 0
    device = Device.install(tmp_path / "store", tmp_path / "old.bundle.zip")
    device.update(tmp_path / "new.dpu")
    held = tmp_path / "held"
    assert command(patch, "extract", new, "--graph", graph, "-o", held)[0] == 0
    fingerprint = fingerprint_file(held / "weights.safetensors")
    assert device.verify() == fingerprint
    assert "1.num_batches_tracked" in read_model(new).weights  # files are packed whole


def test_a_patch_for_devices_without_counters_is_proved_on_checkpoints_with_them(
    graph, tmp_path, command
):
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    for seed, path in enumerate((old, new)):
        torch.save(normalised(seed, seed), path)
    assert command(pack, "--base", old, "--graph", graph, "--bundle")[0] == 0
    assert command(pack, "--base", old, "--target", new, "--graph", graph)[0] == 0
    update = tmp_path / "new.dpu"
    code, out, err = command(patch, "verify", update, "--base", old)
    assert (code, "as promised" in out, "left out" in err) == (0, True, True), err
    code, out, _ = command(patch, "info", update, "--base", old)
    assert (code, "0.weight" in out) == (0, True)
    one = tmp_path / "one.dpu"
    assert command(patch, "compose", update, "--base", old, "-o", one)[0] == 0
    device = Device.install(tmp_path / "store", tmp_path / "old.bundle.zip")
    device.update(one)
    proof = tmp_path / "board.proof"
    proof.write_bytes(make_proof(Store(tmp_path / "store"), "5f2a"))
    ask = "check-proof", proof, "--nonce", "5f2a", "--weights", new
    code, out, err = command(patch, *ask, "--graph", graph)
    assert (code, "not compared" in out) == (0, False), err
    assert command(patch, "verify", update, "--base", new)[0] == 4  # not its parent


def test_what_batch_norm_counts_is_no_difference_to_weights_without_it(
    graph, tmp_path, command
):
    torch.save(normalised(1), tmp_path / "new.pt")
    held, new = tmp_path / "held", tmp_path / "new.pt"
    assert command(patch, "extract", tmp_path / "whole.onnx", "-o", held)[0] == 0
    files = held / "weights.safetensors", new
    for pair in (files, files[::-1]):
        code, _, err = command(patch, "diff", *pair)
        assert (code, f"{new}: left out" in err) == (0, True), err
    assert command(pack, "--base", files[0], "--target", new)[0] == 0
    code, _, err = command(pack, "--base", new, "--target", files[0])
    assert (code, "missing in the target" in err) == (4, True)  # of a file with it


def test_a_tensor_that_the_graph_does_not_read_is_to_be_left_out(graph, tmp_path):
    save_file(normalised(0) | {"1.seen": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(RoundError, match=r"'1\.seen'.*leave it out of the checkpoint"):
        read_model(tmp_path / "more.safetensors", graph)


# What is refused, and how ------------------------------------------------------------


def test_a_shard_that_is_not_there_is_named(tmp_path):
    for number, index in enumerate((True, False)):
        folder = cut(tmp_path / f"{number}", STATE, index=index)
        (folder / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(WeightsError, match=r"00002-of-00003|lacks shard 2"):
            read_model(folder)


def test_a_link_into_a_cache_that_lacks_its_blob_is_named(tmp_path):
    folder = cached(tmp_path / "c", STATE)
    (folder / "blobs" / "1").unlink()
    with pytest.raises(WeightsError, match="leads to nothing; fetch"):
        read_model(folder)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS.*pull"),
        (b"not found", "00002-of-00003.* neither a safetensors nor a PyTorch file"),
    ],
)
def test_a_shard_that_is_something_else_is_called_what_it_is(data, words, tmp_path):
    folder = cut(tmp_path / "f", STATE)
    (folder / "model-00002-of-00003.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=words):
        read_model(folder)


def test_one_tensor_in_two_shards_is_refused(tmp_path):
    folder = cut(tmp_path / "f", STATE, index=False)
    save_file({"z.bias": STATE["z.bias"]}, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(WeightsError, match=r"'z\.bias' lies in .*-00001.*-00003"):
        read_model(folder)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m.pop("z.bias"), r"'z\.bias' in no file, it is in model-00001"),
        (lambda m: m.update(more=m["z.bias"]), "'more' in model-00001.*it is in none"),
        (lambda m: m.update({"z.bias": m["head.weight"]}), "it is in model-00001"),
        (lambda m: m.update({"z.bias": "../secret"}), "without a path"),
        (lambda m: m.update({"z.bias": 3}), "expected text"),
        (lambda m: m.clear(), "names no tensor"),
    ],
)
def test_an_index_that_tells_otherwise_is_refused(edit, words, tmp_path):
    folder = cut(tmp_path / "f", STATE)
    index = folder / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    edit(record["weight_map"])
    index.write_text(json.dumps(record))
    with pytest.raises(WeightsError, match=words):
        read_model(folder)


def test_a_choice_is_left_to_the_caller(tmp_path):
    folder = cut(tmp_path / "f", STATE)
    save_file(STATE, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="a whole model and shards"):
        read_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(STATE, folder / "consolidated.safetensors")
    with pytest.raises(WeightsError, match="more than one set of shards"):
        read_model(folder)
    for name in ("one.pt", "two.pt"):
        saved(tmp_path / name, STATE, name=name).rename(tmp_path / "f.pt")
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "f.pt").rename(tmp_path / "t" / name)
    with pytest.raises(WeightsError, match=r"several PyTorch files \(one.pt, two.pt\)"):
        read_model(tmp_path / "t")


def test_a_folder_without_weights_says_what_is_in_it(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"no checkpoint.*found config\.json"):
        read_model(tmp_path / "f")


class Evil:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def zipped_again(path):
    other = path.with_name("packed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return other


def rewritten(path, data):
    path.write_bytes(data(path.read_bytes()))
    return path


def another_bit(data):
    """Flip a bit of a tensor: torch itself does not look at checksums."""
    at = data.index(STATE["head.weight"].numpy().tobytes())
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def far_away(data):
    """Let the zip's index say that members begin before the file does."""
    at = data.rindex(b"PK\6\6") + 48
    return data[:at] + bytes([data[at] + 9 & 255]) + data[at + 1 :]


ODD = {
    "code": (lambda f: saved(f, Evil()), "objects of Python"),
    "a module": (
        lambda f: saved(f, torch.nn.Linear(2, 2)),
        r"objects of Python \(torch.*Linear",
    ),
    "a plain pickle": (
        lambda f: rewritten(saved(f, STATE), lambda _: pickle.dumps({"a": 1})),
        "torch.save did not write",
    ),
    "a file that was cut": (
        lambda f: rewritten(saved(f, STATE), lambda d: d[: len(d) // 2]),
        "truncated or damaged",
    ),
    "a file with another bit": (
        lambda f: rewritten(saved(f, STATE), another_bit),
        "truncated or damaged.*CRC",
    ),
    "a file whose index points before it": (
        lambda f: rewritten(saved(f, STATE), far_away),
        "truncated or damaged",
    ),
    "a compressed one": (lambda f: zipped_again(saved(f, STATE)), "was compressed"),
    "two sets": (
        lambda f: saved(f, STATE, lambda s: {"state_dict": s, "ema_state_dict": s}),
        "'state_dict', 'ema_state_dict', and it is not known",
    ),
    "a set under another name": (
        lambda f: saved(f, STATE, lambda s: {"weights_of_mine": s}),
        "'weights_of_mine'",
    ),
    "tensors within tensors": (
        lambda f: saved(f, STATE, lambda s: s | {"deep": {"w": torch.ones(2)}}),
        "'deep'",
    ),
    "a list": (lambda f: saved(f, [1, 2]), "holds a list"),
    "one tensor": (lambda f: saved(f, torch.ones(2)), "holds a Tensor"),
    "no tensor": (lambda f: saved(f, {"a": 1}), "no tensors, found 'a'"),
    "numbers for names": (lambda f: saved(f, {1: torch.ones(2)}), "under 1, expected"),
    "a sparse one": (
        lambda f: saved(f, {"s": torch.eye(3).to_sparse()}),
        "'s' of .* sparse",
    ),
    "a type of none": (
        lambda f: saved(f, {"c": torch.ones(2, dtype=torch.complex128)}),
        "'c' of .* complex128",
    ),
    "no values": (
        lambda f: saved(f, {"m": torch.ones(2, device="meta")}),
        "'m' of .* meta",
    ),
    "a number that is said again and again": (
        lambda f: saved(f, {"e": torch.ones(1).expand(1 << 40)}),
        "'e' of .* repeats",
    ),
    "many that are said again": (
        lambda f: saved(f, {f"e{n}": torch.ones(1).expand(1 << 12) for n in range(99)}),
        "up to 'e.*', repeat its values",
    ),
    "a set deeper within": (
        lambda f: saved(f, {"net": {"encoder": {"w": torch.ones(2)}}}),
        "holds tensors in 'net'",
    ),
    "another name than any tensor has": (
        lambda f: saved(f, {"__metadata__": torch.ones(2)}),
        "'__metadata__', which safetensors keeps",
    ),
    "half a byte": (
        lambda f: saved(
            f, {"h": torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
        ),
        "'h': a tensor of F4",
    ),
}


def test_what_modules_keep_beside_their_weights_is_left_out(tmp_path):
    more = {"block._extra_state": {"scale": torch.ones(2)}}
    path = saved(tmp_path / "extra", STATE, lambda s: s | more)
    model = read_model(path)
    plain = read_model(saved(tmp_path / "plain", STATE))
    assert model.weights.fingerprint == plain.weights.fingerprint
    assert "'block._extra_state'" in model.notes[0]


def test_a_name_that_is_not_utf_8_is_called_so(tmp_path):
    path = saved(tmp_path / "made", STATE).rename(tmp_path / os.fsdecode(b"caf\xe9.pt"))
    with pytest.raises(WeightsError, match=r"a name that is not UTF-8.*rename"):
        read_model(path)


@pytest.mark.parametrize("case", ODD)
def test_what_is_no_state_dict_is_refused_in_words(
    case, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    make, words = ODD[case]
    path = make(tmp_path / "made")
    with pytest.raises(WeightsError, match=words) as caught:
        read_model(path)
    assert "weights_only" not in str(caught.value)  # torch advises to switch it off
    assert not (tmp_path / "harmed").exists()
    assert command(patch, "extract", path, "-o", "x")[0] == 3


def test_a_program_is_refused_as_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("data/0", "data.pkl", "code/net.py", "constants.pkl"):
            archive.writestr(f"script/{name}", b"x")
    with pytest.raises(WeightsError, match="TorchScript"):
        read_model(tmp_path / "script.pt")


def test_torch_is_imported_for_its_own_files_alone_and_asked_for_by_its_extra(
    tmp_path, merged
):
    path = saved(tmp_path / "a", STATE)
    code = (
        "import sys; from packager.models.read import read_model\n"
        f"read_model({str(merged[0])!r}); assert 'torch' not in sys.modules\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = ['dpu-patch', 'extract', sys.argv[1], '-o', 'x']\n"
        "from packager.__main__ import patch; patch()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "pip install -e '.[checkpoints]'" in done.stderr


def test_a_files_own_bytes_are_mapped_not_copied(tmp_path):
    data = np.arange(1 << 20, dtype="<f4")
    header = b'{"w":{"dtype":"F32","shape":[1048576],"data_offsets":[0,4194304]}}'
    text = header + b" " * (-len(header) % 8)
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data.tobytes())
    weights = read_model(path).weights
    assert not weights["w"].flags.owndata
    assert np.array_equal(weights["w"], data)
    assert b"".join(weights.chunks()) == path.read_bytes()
