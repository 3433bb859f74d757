# SPDX-License-Identifier: Apache-2.0
"""Every place of a command that takes a file, with every malformed file: words and a
documented exit code, never a traceback."""

import json
import struct
import zipfile

import numpy as np
import pytest
import torch

from edge_runtime.cli.main import main
from edge_runtime.live.shared import public_key
from packager.cli.pack import pack, patch
from packager.key_lists import make_list, sign_list
from packager.keys import generate_key, write_key_pair

# Where a command takes a file (FILE), beside what it needs of good ones.
PLACES = {
    "dpu-edge init": (main, "init FILE"),
    "dpu-edge init --trust": (main, "init BUNDLE --trust FILE"),
    "dpu-edge apply": (main, "apply FILE"),
    "dpu-edge infer": (main, "infer FILE"),
    "dpu-edge verify --expect": (main, "verify --expect FILE"),
    "dpu-edge trust add": (main, "trust add FILE"),
    "dpu-patch info": (patch, "info FILE"),
    "dpu-patch info --base": (patch, "info PATCH --base FILE"),
    "dpu-patch verify": (patch, "verify FILE"),
    "dpu-patch verify --base": (patch, "verify PATCH --base FILE"),
    "dpu-patch verify --key": (patch, "verify PATCH --key FILE"),
    "dpu-patch sign": (patch, "sign FILE --key KEY"),
    "dpu-patch sign --key": (patch, "sign PATCH --key FILE"),
    "dpu-patch check-proof": (patch, "check-proof FILE --nonce n --weights WEIGHTS"),
    "dpu-patch check-proof --weights": (
        patch,
        "check-proof PROOF --nonce n --weights FILE",
    ),
    "dpu-patch check-proof --key": (
        patch,
        "check-proof PROOF --nonce n --weights WEIGHTS --key FILE",
    ),
    "dpu-patch compose": (patch, "compose FILE --base WEIGHTS -o x.dpu"),
    "dpu-patch compose --base": (patch, "compose PATCH --base FILE -o x.dpu"),
    "dpu-patch report": (patch, "report FILE --md"),
    "dpu-patch diff A": (patch, "diff FILE WEIGHTS"),
    "dpu-patch diff B": (patch, "diff WEIGHTS FILE"),
    "dpu-patch extract": (patch, "extract FILE -o extracted"),
    "dpu-patch apply BASE": (patch, "apply FILE PATCH -o applied"),
    "dpu-patch apply PATCH": (patch, "apply WEIGHTS FILE -o applied"),
    "dpu-patch apply --trust": (patch, "apply WEIGHTS PATCH -o applied --trust FILE"),
    "dpu-patch provenance": (patch, "provenance FILE --key KEY -o made"),
    "dpu-patch provenance --key": (patch, "provenance PATCH --key FILE -o made"),
    "dpu-patch trust show": (patch, "trust show FILE"),
    "dpu-patch trust sign": (patch, "trust sign FILE --key KEY"),
    "dpu-patch trust rotate": (patch, "trust rotate FILE --expires 9d"),
    "dpu-patch releases": (patch, "releases FILE"),
    "dpu-pack": (pack, "FILE --dry-run"),
    "dpu-pack --base": (pack, "--base FILE --bundle --dry-run"),
    "dpu-pack --target": (pack, "--base WEIGHTS --target FILE --dry-run"),
    "dpu-pack --graph": (pack, "--base WEIGHTS --graph FILE --bundle --dry-run"),
    "dpu-pack --contract": (
        pack,
        "--base WEIGHTS --graph ONNX --contract FILE --bundle --dry-run",
    ),
    "dpu-pack --golden": (
        pack,
        "--base WEIGHTS --graph ONNX --golden FILE --bundle --dry-run",
    ),
    "dpu-pack --sign": (pack, "ROUND --sign FILE --dry-run"),
}


def good_files(run, command, folder):
    """One good file of each kind that can be damaged."""
    store, runs = folder / "store", run.path.parent
    command(pack, "round_00", "--bundle", "-q", "--runs", runs)
    command(pack, "round_01", "-q", "--runs", runs)
    command(main, "--store", store, "init", run.path / "round_00.bundle.zip")
    write_key_pair(folder / "own.pem")
    owner = generate_key()
    times = "2026-01-01T00:00:00Z", "2099-01-01T00:00:00Z"
    listed = make_list([public_key(owner)], [public_key(owner)], times)
    (folder / "1.root.json").write_bytes(sign_list(listed, [owner]))
    proof = command(main, "--store", store, "proof", "--nonce", "n")[1]
    (folder / "proof.json").write_text(proof)
    torch.save({"w": torch.ones(2, 3)}, folder / "state.pt")
    np.save(folder / "one.npy", np.zeros((1, 12), np.uint8))
    index = {"metadata": {}, "weight_map": {"w": "a.safetensors"}}
    (folder / "index.json").write_text(json.dumps(index))
    return {
        "PATCH": run.path / "round_01.dpu",
        "BUNDLE": run.path / "round_00.bundle.zip",
        "WEIGHTS": run.path / "round_00" / "weights.safetensors",
        "ONNX": run.path / "model" / "graph.onnx",
        "NPZ": run.path / "model" / "golden.npz",
        "NPY": folder / "one.npy",
        "CONTRACT": run.path / "model" / "contract.json",
        "KEY": folder / "own.pem",
        "PUBLIC": folder / "own.pub.pem",
        "LIST": folder / "1.root.json",
        "PROOF": folder / "proof.json",
        "TORCH": folder / "state.pt",
        "INDEX": folder / "index.json",
        "ROUND": run.path / "round_01",
    }


def flipped(data):
    return (
        data[: len(data) // 2]
        + bytes([data[len(data) // 2] ^ 255])
        + data[len(data) // 2 + 1 :]
    )


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "flipped": flipped,
    "longer": lambda data: data + b"\0more",
}


def odd_values(record):
    """Return a JSON record with every value of another type."""
    return {
        name: {"x": [value]} if not isinstance(value, dict) else [0, None, -1e300]
        for name, value in record.items()
    }


def malformed_files(good, folder):
    """Files that are nearly something, and some that are nothing."""
    folder.mkdir()
    made = {}
    for path in good.values():
        if path.is_dir():
            continue
        data = path.read_bytes()
        for how, damage in DAMAGE.items():
            made[f"{how} {path.name}"] = damage(data)
        if data.lstrip().startswith(b"{"):
            record = json.loads(data)
            made[f"odd {path.name}"] = json.dumps(odd_values(record)).encode()
            made[f"null {path.name}"] = json.dumps(dict.fromkeys(record)).encode()
    header = b'{"w\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    made |= {
        "empty": b"",
        "zeros": bytes(300),
        "deep.json": b'{"nonce":' * 99_999,
        "surrogate.json": b'{"nonce": "\\ud800", "accuracy_floor": "\\udfff"}',
        "digits.json": b'{"weight_map": {"w": ' + b"9" * 5000 + b"}}",
        "utf16.json": '{"signed": {}}'.encode("utf-16"),
        "surrogate.safetensors": struct.pack("<Q", len(header)) + header + bytes(4),
        "no header.safetensors": struct.pack("<Q", 2) + b"{}",
        "endless.safetensors": struct.pack("<Q", 1 << 62) + b"{",
        "odd.onnx": b"\x08\x0a\x12\xff\xff\xff\xff\x0f",
        "pickle.pt": b"\x80\x02}q\x00.",
        "image.png": b"\x89PNG\r\n\x1a\n" + bytes(40),
        "image.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(40),
        "open.npy": b"\x93NUMPY\1\0\x06\0((((((",
        "key.pem": b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        "secret.pem": b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    with zipfile.ZipFile(folder / "odd.zip", "w") as archive:
        for member in ("bundle.json", "patch.dpu", "../out", "x/data.pkl", "a.npy"):
            archive.writestr(member, b"\xff")
    for number in (1, 2):
        (folder / f"loop{number}").symlink_to(f"loop{3 - number}")
    (folder / "hollow").mkdir()
    (folder / "hollow" / "model.safetensors").symlink_to("nowhere")
    (folder / "hollow round").mkdir()
    (folder / "hollow round" / "round.json").write_text("{}")
    (folder / "hollow run" / "model").mkdir(parents=True)
    return sorted(folder.iterdir())


@pytest.fixture
def world(run, command, tmp_path, monkeypatch):
    good = good_files(run, command, tmp_path)
    monkeypatch.chdir(tmp_path)
    return good, malformed_files(good, tmp_path / "bad")


# Taken (a flipped bit of a weight is another weight), and every refusal of a file.
ANSWERS = (0, 2, 3, 4, 5, 8)


def test_no_command_fails_to_say_what_is_wrong(world, command, tmp_path):
    good, bad = world
    wrong = []
    for place, (group, words) in PLACES.items():
        for path in bad:
            named = {name: str(found) for name, found in good.items()}
            named["FILE"] = str(path)
            arguments = [named.get(word, word) for word in words.split()]
            if group is main:
                new = "init" in arguments
                store = tmp_path / ("new" if new else "store")
                arguments = ["--store", str(store), *arguments]
            content = path.read_bytes() if path.is_file() else b""
            code, out, err = command(group, *arguments)
            words_are_there = bool((out + err).strip()) and "Traceback" not in err
            if code not in ANSWERS or not words_are_there:
                wrong.append((place, path.name, code, err[-2000:]))
            if path.is_file() and path.read_bytes() != content:
                path.write_bytes(content)
    assert not wrong, "\n\n".join(map(str, wrong))
