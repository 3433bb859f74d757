# SPDX-License-Identifier: Apache-2.0
"""A file given to the wrong command: what it is is said, and what takes it."""

import json
import os
import shutil
import threading
import zipfile

import numpy as np
import pytest

from edge_runtime.cli.main import main
from edge_runtime.formats.kinds import Kind, kind_of, recognise
from edge_runtime.live.shared import public_key
from packager.cli.pack import pack, patch
from packager.key_lists import make_list, sign_list
from packager.keys import generate_key, write_key_pair

PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(40)


def prove(command, store):
    return command(main, "--store", store, "proof", "--nonce", "n")[1].encode()


@pytest.fixture
def files(run, command, tmp_path):
    """One file or folder of each kind."""
    folder, store = tmp_path / "some", tmp_path / "store"
    shards = tmp_path / "shards"
    folder.mkdir()
    shards.mkdir()
    (shards / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    runs = run.path.parent
    command(pack, "round_00", "--bundle", "-q", "--runs", runs)
    command(pack, "round_01", "-q", "--runs", runs)
    command(main, "--store", store, "init", run.path / "round_00.bundle.zip")
    write_key_pair(folder / "own.pem", "secret")
    owner = generate_key()
    times = "2026-01-01T00:00:00Z", "2099-01-01T00:00:00Z"
    listed = make_list([public_key(owner)], [public_key(owner)], times)
    found = {
        Kind.PATCH: run.path / "round_01.dpu",
        Kind.BUNDLE: run.path / "round_00.bundle.zip",
        Kind.WEIGHTS: run.path / "round_01" / "weights.safetensors",
        Kind.ONNX: run.path / "model" / "graph.onnx",
        Kind.NPZ: run.path / "model" / "golden.npz",
        Kind.CONTRACT: run.path / "model" / "contract.json",
        Kind.PRIVATE_KEY: folder / "own.pem",
        Kind.PUBLIC_KEY: folder / "own.pub.pem",
        Kind.ROUND: run.path / "round_01",
        Kind.RUN: run.path,
        Kind.STORE: store,
        Kind.SHARDS: shards,
        Kind.INDEX: shards / "model.safetensors.index.json",
    }
    made = {
        Kind.KEY_LIST: sign_list(listed, [owner]),
        Kind.PROOF: command(main, "--store", store, "proof", "--nonce", "n")[
            1
        ].encode(),
        Kind.IMAGE: PNG,
        Kind.GGUF: b"GGUF\3\0\0\0" + bytes(40),
        Kind.HDF5: b"\x89HDF\r\n\x1a\n" + bytes(40),
        Kind.POINTER: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    }
    for kind, data in made.items():
        found[kind] = folder / kind.name
        found[kind].write_bytes(data)
    found[Kind.NPY] = folder / "one.npy"
    np.save(found[Kind.NPY], np.zeros((1, 12), np.uint8))
    for kind, members in {Kind.TORCH: ["net/data.pkl"], Kind.ZIP: ["a.txt"]}.items():
        found[kind] = folder / f"{kind.name}.zip"
        with zipfile.ZipFile(found[kind], "w") as archive:
            for name in members:
                archive.writestr(name, "x")
    return found


def test_each_kind_is_recognised_whatever_its_name(files, tmp_path):
    assert set(files) == set(Kind)
    for kind, path in files.items():
        assert kind_of(path) is kind
        if path.is_file():
            assert recognise(path.read_bytes()[: 1 << 16]) is kind
    assert recognise(JPEG) is Kind.IMAGE
    for other in (b"", b"x", bytes(64), b"PK", b"{}", b"\x08", b"[1]", b"hello world"):
        assert recognise(other) is None


FOLDERS = {Kind.ROUND, Kind.RUN, Kind.STORE, Kind.SHARDS}
MODELS = {Kind.WEIGHTS, Kind.ONNX, Kind.TORCH, Kind.INDEX, Kind.SHARDS}
# Each command that takes a file, and what it takes.
COMMANDS = {
    "init": (main, ["init", "FILE"], {Kind.BUNDLE, Kind.ZIP}),
    "repair": (main, ["repair", "FILE"], {Kind.BUNDLE, Kind.ZIP}),
    "trust": (
        main,
        ["init", "BUNDLE", "--trust", "FILE"],
        {Kind.PUBLIC_KEY, Kind.KEY_LIST},
    ),
    "apply": (main, ["apply", "FILE"], {Kind.PATCH}),
    "infer": (
        main,
        ["infer", "FILE"],
        {Kind.IMAGE, Kind.NPY, Kind.NPZ, *FOLDERS},
    ),
    "expect": (main, ["verify", "--expect", "FILE"], {Kind.WEIGHTS}),
    "add": (main, ["trust", "add", "FILE"], {Kind.KEY_LIST}),
    "info": (patch, ["info", "FILE"], {Kind.PATCH, Kind.BUNDLE, Kind.ZIP}),
    "verify": (patch, ["verify", "FILE"], {Kind.PATCH, Kind.BUNDLE, Kind.ZIP}),
    "verify --key": (patch, ["verify", "BUNDLE", "--key", "FILE"], {Kind.PUBLIC_KEY}),
    "sign": (
        patch,
        ["sign", "FILE", "--key", "KEY"],
        {Kind.PATCH, Kind.BUNDLE, Kind.ZIP},
    ),
    "sign --key": (patch, ["sign", "PATCH", "--key", "FILE"], {Kind.PRIVATE_KEY}),
    "check-proof": (patch, ["check-proof", "FILE", "--nonce", "n"], {Kind.PROOF}),
    "compose": (
        patch,
        ["compose", "FILE", "--base", "WEIGHTS", "-o", "x.dpu"],
        {Kind.PATCH},
    ),
    "compose --base": (
        patch,
        ["compose", "PATCH", "--base", "FILE", "-o", "x.dpu"],
        MODELS,
    ),
    "report": (
        patch,
        ["report", "FILE", "--md"],
        {Kind.PATCH, Kind.BUNDLE, Kind.ZIP, Kind.RUN},
    ),
    "diff": (patch, ["diff", "WEIGHTS", "FILE"], MODELS),
    "extract": (patch, ["extract", "FILE", "-o", "x"], MODELS),
    "provenance": (
        patch,
        ["provenance", "FILE", "--key", "KEY"],
        {Kind.PATCH, Kind.BUNDLE, Kind.ZIP, *FOLDERS},
    ),
    "provenance --key": (
        patch,
        ["provenance", "PATCH", "--key", "FILE"],
        {Kind.PRIVATE_KEY, Kind.PUBLIC_KEY},
    ),
    "apply BASE": (
        patch,
        ["apply", "FILE", "PATCH", "-o", "x"],
        {Kind.WEIGHTS, Kind.SHARDS, Kind.INDEX},
    ),
    "apply PATCH": (patch, ["apply", "WEIGHTS", "FILE", "-o", "x"], {Kind.PATCH}),
    "apply --trust": (
        patch,
        ["apply", "WEIGHTS", "PATCH", "-o", "x", "--trust", "FILE"],
        {Kind.PUBLIC_KEY, Kind.KEY_LIST},
    ),
    "show": (patch, ["trust", "show", "FILE"], {Kind.KEY_LIST}),
    "pack": (pack, ["FILE"], {Kind.ROUND, Kind.RUN}),
    "base": (
        pack,
        ["--bundle", "--base", "FILE"],
        MODELS,
    ),
    "golden": (pack, ["--bundle", "--base", "WEIGHTS", "--golden", "FILE"], {Kind.NPZ}),
}


# Exit code 2, as documented: an unknown round, an input or a key file.
INPUT_OR_KEY = (
    *("trust", "infer", "pack", "golden"),
    *("verify --key", "sign --key", "provenance --key", "apply --trust"),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_file_is_called_by_its_name(
    name, files, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    group, given, welcome = COMMANDS[name]
    known = {"WEIGHTS": Kind.WEIGHTS, "BUNDLE": Kind.BUNDLE, "PATCH": Kind.PATCH}
    known |= {"KEY": Kind.PRIVATE_KEY}
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for kind, path in files.items():
        if kind in welcome:
            continue
        names = {word: files[k] for word, k in known.items()} | {"FILE": path}
        arguments = [names.get(word, word) for word in given]
        if group is main:
            store = tmp_path / ("new" if "init" in given else "store")
            arguments = ["--store", store, *arguments]
        code, out, err = command(group, *arguments)
        assert (code, out) == (2 if name in INPUT_OR_KEY else 3, ""), (kind, err)
        assert f"{path} is {kind.words}, expected " in err
        assert kind.taker in err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["init", "apply", "trust", "sign --key", "diff"])
def test_an_empty_file_is_called_empty(name, files, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    group, given, _ = COMMANDS[name]
    (tmp_path / "empty").touch()
    names = {"FILE": "empty", "BUNDLE": files[Kind.BUNDLE]}
    names |= {"PATCH": files[Kind.PATCH], "WEIGHTS": files[Kind.WEIGHTS]}
    words = ["--store", "new"] if group is main else []
    code, _, err = command(group, *words, *(names.get(word, word) for word in given))
    assert (code, "empty is empty (0 bytes), expected a" in err) == (
        2 if name in INPUT_OR_KEY else 3,
        True,
    )


def test_a_round_below_runs_is_no_run_to_report_on(files, command, run, monkeypatch):
    monkeypatch.setenv("DPU_RUNS", str(run.path.parent))
    for words in (["tiny/round_01"], ["tiny", "--beside", "tiny/round_01"]):
        err = command(patch, "report", *words)[2]
        assert "is a round folder, expected a run's folder" in err


def test_a_checkpoint_beside_a_folder_called_model_is_no_run(command, run, tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "model").mkdir(parents=True)
    weights = run.path / "round_01" / "weights.safetensors"
    (folder / "weights.safetensors").write_bytes(weights.read_bytes())
    assert command(patch, "diff", folder, weights)[0] == 0
    (run.path / "weights.safetensors").write_bytes(weights.read_bytes())
    code, _, err = command(patch, "diff", run.path, weights)
    assert (code, "is a run's folder, expected a weight file" in err) == (3, True)


def test_a_bundle_is_shown_with_its_members_and_its_patch(files, command, run):
    command(patch, "sign", files[Kind.BUNDLE], "--key", plain_key(run.path))
    code, out, _ = command(patch, "info", files[Kind.BUNDLE])
    assert code == 0
    assert out.startswith("Bundle round_00.bundle.zip\n")
    assert "graph.onnx" in out
    assert "Patch: Where the bytes go" in out
    code, out, _ = command(patch, "info", files[Kind.BUNDLE], "--json")
    record = json.loads(out)
    with zipfile.ZipFile(files[Kind.BUNDLE]) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    assert {m["name"]: m["bytes"] for m in record["members"]} == sizes
    assert (record["kind"], record["round"]) == ("bundle", 0)
    assert record["patch"]["bytes"] == sizes["patch.dpu"]
    assert record["patch"]["target"] == record["target"]
    assert len(record["signed_by"]) == 1


def test_a_damaged_bundle_is_not_shown(files, command):
    data = bytearray(files[Kind.BUNDLE].read_bytes())
    data[len(data) // 2] ^= 1
    files[Kind.BUNDLE].write_bytes(data)
    code, out, err = command(patch, "info", files[Kind.BUNDLE])
    assert (code, out) == (3, "")
    assert "damaged" in err


def plain_key(folder):
    write_key_pair(folder / "plain.pem")
    return folder / "plain.pem"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("1.root.json", lambda data: data[: len(data) // 2]),
        ("1.root.json", lambda data: b"\0" + data[1:]),
        ("keys", lambda data: data[:-9]),
        ("1.root.json", lambda _data: b""),
    ],
)
def test_a_damaged_key_list_is_called_one(name, damage, files, command, tmp_path):
    damaged = tmp_path / name
    damaged.write_bytes(damage(files[Kind.KEY_LIST].read_bytes()))
    code, _, err = command(
        main,
        "--store",
        tmp_path / "new",
        "init",
        files[Kind.BUNDLE],
        "--trust",
        damaged,
    )
    assert code == 3
    assert f"{damaged}: the key list is malformed" in err
    assert not (tmp_path / "new").exists()


def test_a_pipe_is_not_read_before_its_reader(files, command, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    data = files[Kind.PATCH].read_bytes()
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    assert kind_of(pipe) is None
    code, out, _ = command(main, "--store", files[Kind.STORE], "apply", pipe)
    writer.join()
    assert (code, "applied" in out) == (0, True)


def test_a_bundle_whose_members_another_tool_reordered_is_taken(
    files, command, tmp_path
):
    other = tmp_path / "reordered.zip"
    with zipfile.ZipFile(files[Kind.BUNDLE]) as old, zipfile.ZipFile(other, "w") as new:
        new.writestr("README.txt", "ours")
        for name in reversed(old.namelist()):
            new.writestr(name, old.read(name))
    assert kind_of(other) is Kind.ZIP
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert command(main, "--store", tmp_path / "new", "init", other)[0] == 0
    assert command(patch, "info", other)[0] == 0


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
@pytest.mark.parametrize(
    "words",
    [
        ("sign", "PATH", "--key", "own.pem"),
        ("diff", "PATH", "PATH"),
        ("info", "PATH"),
        ("verify", "PATH"),
    ],
)
def test_a_device_is_no_file_and_is_not_read(
    words, device, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_key_pair(tmp_path / "own.pem", "secret")
    code, out, err = command(patch, *(device if w == "PATH" else w for w in words))
    assert (code, out) == (2, "")
    assert f"{device} is a device, expected a file" in err


def test_golden_inputs_are_not_read_from_a_device(command):
    words = ("--golden", "/dev/zero", "--base", "m.onnx", "--bundle")
    code, _, err = command(pack, *words)
    assert (code, "/dev/zero is a device, expected a file" in err) == (2, True)
