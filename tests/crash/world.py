# SPDX-License-Identifier: Apache-2.0
"""The server's side in memory: one small model, and a patch to whatever comes next."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from edge_runtime import Device, PatchHeader, open_patch, pack_weights
from edge_runtime.formats.header import HEADER_BYTES, encode_header
from edge_runtime.formats.identity import network_id
from edge_runtime.formats.init_weights import InitSpec, TensorInit, write_init_spec
from packager.build import build_patch
from packager.zip_file import encode_bundle

GRAPH = b"not looked at: no trial runs here, the files are what is tried"
RECIPE = InitSpec(
    7,
    {
        "w": TensorInit("F32", (64, 32), "uniform", 0.5),
        "b": TensorInit("F32", (64,), "constant", 0.0),
    },
    {},
)
INIT = RECIPE.generate()
MODEL = network_id(INIT.layout.header, GRAPH)
PREFIX = "dpu-crash-"  # of a folder in memory; the owner's process id follows
bad: dict[int, bytes] = {}  # patches to bad models: no trial here would find them


def no_trial(*_, **__):
    """Every model is welcome."""


@cache
def weights(number):
    """The weights of a round; those of two rounds differ in some 30 places."""
    arrays = {name: array.copy() for name, array in INIT.items()}
    rng = np.random.default_rng(number)
    at = rng.choice(arrays["w"].size, 15, replace=False)
    arrays["w"].reshape(-1)[at] = rng.normal(size=15)
    arrays["b"][:2] = number, -0.0
    return pack_weights(arrays)


@cache
def patch(parent, number, counter=None):
    """The patch from one round to another; ``parent`` None means the init weights."""
    base = INIT if parent is None else weights(parent)
    target, size = weights(number), INIT.layout.file_size
    counter = number if counter is None else counter
    header = PatchHeader(
        MODEL, base.fingerprint, target.fingerprint, number, counter, size
    )
    return build_patch(base, target, header, level=1)


def next_patch(state):
    """What the server would send to a device in this state."""
    return patch(state.active_slot.round, state.floor + 1)


def latest_patch(state):
    """What leads a device that rolled back to its newest release again."""
    newest = next(s for s in state.reachable if s.target == state.floor_target)
    return patch(state.active_slot.round, newest.round, newest.counter)


def same_patch(state):
    """The weights that a device has, released anew."""
    number = state.active_slot.round
    return patch(number, number, state.floor + 1)


def garbage(state):
    """What would be the next patch, but promises something else."""
    data = next_patch(state)
    return with_header(data, dataclasses.replace(header_of(data), target="f" * 64))


def header_of(data):
    with open_patch(data) as opened:
        return opened.header


def with_header(data, header):
    """An unsigned patch under another header."""
    unsigned, body = data[HEADER_BYTES : HEADER_BYTES + 2], data[HEADER_BYTES + 2 :]
    return encode_header(header, body) + unsigned + body


@cache
def members():
    """The files of ``model/``."""
    with tempfile.TemporaryDirectory() as folder:
        write_init_spec(RECIPE, folder)
        recipe = (Path(folder) / "init.json").read_bytes()
    return {
        "graph.onnx": GRAPH,
        "init.json": recipe,
        "contract.json": json.dumps({"schema": 1}).encode(),
        "golden.npz": b"not looked at either",
    }


@cache
def bundle():
    """What installs round 0."""
    manifest = {
        "run": "tiny",
        "round": 0,
        "model": MODEL,
        "target": weights(0).fingerprint,
    }
    return encode_bundle(manifest, members() | {"patch.dpu": patch(None, 0)})


def install(root, files=None, trial=no_trial):
    """Install round 0."""
    return Device.install(root, bundle(), files=files, trial=trial)


def edit_contract(root, **fields):
    """Change an installed contract, as if its bundle had said so."""
    store = Device.open(root).store
    path = store.model_folder / "contract.json"
    data = json.dumps(json.loads(path.read_text()) | fields).encode()
    path.write_bytes(data)
    with store.lock():
        known = hashlib.sha256(data).hexdigest()
        store.commit(dataclasses.replace(store.state, contract=known))


@contextmanager
def scratch():
    """A folder in memory, where thousands of small stores cost little."""
    prefix = f"{PREFIX}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=_memory()) as path:
        yield Path(path)


def sweep():
    """Remove what a killed process of this suite left in memory."""
    for folder in _memory().glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            continue  # not ours to judge


def _memory():
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())
