# SPDX-License-Identifier: Apache-2.0
"""Small files that would take the machine, and files that are not what they seem."""

import hashlib
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest

from edge_runtime.agent.agent import Agent
from edge_runtime.agent.status import read_status
from edge_runtime.errors import (
    BlockedError,
    BundleError,
    ContractError,
    PatchFormatError,
    RoundError,
    StoreError,
    WeightsError,
)
from edge_runtime.formats.bundle import list_members, read_bundle
from edge_runtime.formats.contract import Contract, InputSpec
from edge_runtime.formats.frames import frame_size
from edge_runtime.formats.init_weights import InitSpec, TensorInit, write_init_spec
from edge_runtime.formats.layout import make_layout, parse_layout
from edge_runtime.formats.weights import read_chunks, read_weights
from edge_runtime.inference.inputs import read_calls
from edge_runtime.limits import Limits, limits
from edge_runtime.live.entries import Entry, Status, read_entries
from edge_runtime.store.state import decode_state, encode_state
from edge_runtime.update.device import Device
from edge_runtime.update.trial import try_slot
from packager.keys import generate_key
from packager.ledger import read_ledger
from packager.models import safetensors_file
from packager.models.read import read_model
from packager.packed_file import read_facts
from packager.report import patch_record
from packager.report.patch_record import check_shown
from packager.signing import sign
from packager.zip_file import encode_members
from tests.crash.world import no_trial
from tests.hostile.test_attacks import bundle_of, members_of


@pytest.fixture
def store(tmp_path):
    return Device.install(tmp_path / "store", bundle_of(tmp_path), trial=no_trial).store


def test_an_init_recipe_that_would_be_hashed_for_ever_is_refused_first(tmp_path):
    huge = InitSpec(0, {"w": TensorInit("F32", (1 << 19, 1 << 19), "uniform", 1)}, {})
    folder = tmp_path / "huge"
    folder.mkdir()
    write_init_spec(huge, folder)
    recipe = {"init.json": (folder / "init.json").read_bytes()}
    with pytest.raises(WeightsError, match="gives a weight file of 10995116"):
        Device.install(tmp_path / "s", bundle_of(tmp_path, **recipe), trial=no_trial)
    assert not (tmp_path / "s" / "state.json").exists()


def test_an_init_recipe_without_a_layout_is_the_bundles_fault(tmp_path):
    write_init_spec(
        InitSpec(0, {"w": TensorInit("U8", (1 << 60, 8), "constant")}, {}), tmp_path
    )
    recipe = {"init.json": (tmp_path / "init.json").read_bytes()}
    with pytest.raises(WeightsError, match="too large"):
        Device.install(tmp_path / "s", bundle_of(tmp_path, **recipe), trial=no_trial)


def test_more_tensors_than_any_network_has_are_refused():
    specs = {f"t{n}": ("U8", (1,)) for n in range(limits().tensors + 1)}
    with pytest.raises(WeightsError, match="DPU_LIMITS=tensors=100001"):
        make_layout(specs)


@pytest.mark.parametrize(
    "text", [b"[]," * 600_000, b"{}," * 600_000, b"1," * 1_100_000]
)
def test_a_header_of_many_small_values_is_refused_unparsed(text, monkeypatch):
    monkeypatch.setattr(json, "loads", None)
    header = b'{"a":[' + text + b"1]}"
    with pytest.raises(WeightsError, match="json_values"):
        parse_layout(len(header).to_bytes(8, "little") + header)


def header_of(folder, record):
    """A safetensors file without tensors' bytes, whatever its header says."""
    text = json.dumps(record).encode()
    path = folder / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def entries(count):
    return {
        f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        for n in range(count)
    }


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (entries(201), "201 tensors, 200 are accepted.*=checkpoint_tensors=201"),
        ({"__metadata__": {f"{n}": "" for n in range(303)}}, "=metadata_values=304"),
        (entries(100) | {"": [0] * 800}, "=metadata_values="),
        ({"__metadata__": {"": "x" * 40_000}}, "=checkpoint_header_bytes=400"),
    ],
)
def test_a_file_to_pack_that_says_too_much_is_refused_unparsed(
    record, words, tmp_path, monkeypatch
):
    path = header_of(tmp_path, record)
    small = Limits(
        checkpoint_tensors=200, metadata_values=300, checkpoint_header_bytes=40_000
    )
    monkeypatch.setattr(safetensors_file, "limits", lambda: small)
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(WeightsError, match=words):
        read_model(path)


def test_usual_headers_are_far_below_the_limits_of_values(tmp_path, monkeypatch):
    deep = {"dtype": "U8", "shape": [1, 0, 1, 1, 1], "data_offsets": [0, 0]}
    record = {f"t{n}": deep for n in range(100)}
    record["__metadata__"] = {"format": "pt"}
    monkeypatch.setattr(safetensors_file, "limits", lambda: Limits(metadata_values=110))
    assert len(read_model(header_of(tmp_path, record)).weights) == 100


def test_more_tensors_than_can_be_shown_are_not_compared(tmp_path, monkeypatch):
    path = header_of(tmp_path, entries(6))
    layout = read_model(path).weights.layout
    check_shown(layout)
    monkeypatch.setattr(patch_record, "limits", lambda: Limits(shown_tensors=5))
    with pytest.raises(WeightsError, match="6 tensors, 5 are accepted"):
        check_shown(layout)


@pytest.mark.parametrize("shape", [(1,) * 33, (0, 1 << 62), (1 << 31, 1 << 31, 0)])
def test_shapes_that_no_numpy_takes_are_refused(shape):
    with pytest.raises(WeightsError, match=r"dimensions|too large"):
        make_layout({"w": ("F32", shape)})


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(WeightsError, match="no text"):
        make_layout({"w\ud800": ("F32", (1,))})


def test_a_weight_file_of_another_size_is_refused_unread(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(make_layout({"w": ("F32", (1 << 40,))}).header)
    with pytest.raises(WeightsError, match="its header describes 4398046"):
        read_weights(path)


def test_an_index_of_many_members_is_refused_before_the_zip_reader_has_it(
    tmp_path, monkeypatch
):
    members = members_of(bundle_of(tmp_path))
    many = {f"{n:0100}": b"" for n in range(12_000)}
    made = []
    data = encode_members(members | many)

    class Counted(zipfile.ZipInfo):
        def __init__(self, *arguments, **options):
            made.append(arguments)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(zipfile, "ZipInfo", Counted)
    with pytest.raises(BundleError, match="bundle_index_bytes"):
        read_bundle(data)
    assert not made
    few = {f"{n}": b"" for n in range(limits().bundle_members)}
    with pytest.raises(BundleError, match="bundle_members"):
        read_bundle(encode_members(members | few))


def test_a_frame_of_empty_blocks_is_refused(tmp_path):
    # Magic, a window of 1 KiB with a stated size of one byte, then empty raw blocks.
    frame = b"\x28\xb5\x2f\xfd\x20\x01" + bytes(3) * 2_000_000 + b"\x09\0\0x"
    path = tmp_path / "frame"
    path.write_bytes(frame)
    with path.open("rb") as file, pytest.raises(PatchFormatError, match="blocks"):
        frame_size(file, 0, len(frame))


# Live files and the agent's ----------------------------------------------------------

ODD = [
    *(b"", b"[]", b"null", b"\0", b"[" * 100_000, b'{"pid": "x"}', b"\xff"),
    b'{"pid": 1, "started": 2, "slot": "../..", "status": "loaded"}',
    b'{"pid": 1, "status": [], "slot": "\\u0000"}',
]


@pytest.mark.parametrize("content", ODD)
def test_an_odd_entry_of_a_living_process_is_unknown_and_stops_nobody(store, content):
    entry = Entry(store)
    entry.declare(store.slot_folder(store.state.active), Status.EMPTY)
    os.truncate(entry._file.fileno(), 0)
    os.pwrite(entry._file.fileno(), content, 0)
    assert list(read_entries(store)) == [{"pid": 0, "status": Status.UNKNOWN}]


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_is_no_file_in_live_is_never_waited_for(store, kind):
    (store.root / "live").mkdir(exist_ok=True)
    path = store.root / "live" / "1-2.json"
    make = {
        "fifo": os.mkfifo,
        "folder": os.mkdir,
        "link": lambda p: p.symlink_to("/dev/zero"),
    }
    make[kind](path)
    assert list(read_entries(store)) == [{"pid": 0, "status": Status.UNKNOWN}]
    Entry(store)


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {"a.dpu": {"identity": 1}}},
        {"files": {"a.dpu": None}},
        {"last_success": "yesterday"},
        {"last_success": 10**30},
        {"failing": []},
        {"basis": {}},
        {"installed": []},
    ],
    ids=str,
)
def test_an_agents_file_of_odd_shape_is_none_and_stops_no_agent(
    store, tmp_path, change
):
    folder = tmp_path / "patches"
    folder.mkdir()

    def agent():
        return Agent(lambda: Device.open(store.root), folder, lambda *_, **__: None)

    agent().look()
    record = json.loads((store.root / "agent.json").read_text())
    assert read_status(store.root)
    (store.root / "agent.json").write_text(json.dumps(record | change))
    assert read_status(store.root) == {}
    agent().look()
    assert read_status(store.root)


def test_many_stray_files_are_bounded_and_told_once(store, tmp_path, monkeypatch):
    folder, log = tmp_path / "patches", []
    folder.mkdir()
    limits.cache_clear()
    monkeypatch.setenv("DPU_LIMITS", "agent_files=20,agent_bytes=2000")
    os.mkfifo(folder / "pipe.dpu")
    for number in range(70):
        (folder / f"{number}.DPU").write_bytes(b"stray")
    agent = Agent(
        lambda: Device.open(store.root), folder, lambda event, **_: log.append(event)
    )
    try:
        for _ in range(3):
            agent.look()
        assert log.count("not looked at") == 1
        assert log.count("refused") == 20
        assert (store.root / "agent.json").stat().st_size <= 2001
        assert read_status(store.root)
    finally:
        limits.cache_clear()


@pytest.mark.parametrize(
    "change",
    [{"slots": {}}, {"floor": "1"}, {"tries": []}, {"pinned": 1}, {"history": [1]}],
    ids=str,
)
def test_a_sealed_state_of_wrong_types_is_refused_by_the_fields_name(store, change):
    record = json.loads(encode_state(store.state)) | change
    record.pop("sha256")
    seal = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    with pytest.raises(StoreError, match=f"damaged.*{next(iter(change))}"):
        decode_state(json.dumps(record | {"sha256": seal}).encode())


# Inputs ------------------------------------------------------------------------------

SPEC = InputSpec("x", "float32", (None, 3, 4, 4))


def damaged_png():
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + zlib.crc32(body).to_bytes(4, "big")

    head = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"\0\0\0\xffIDAT" + b"x" * 9


@pytest.mark.parametrize("name", ["open.npy", "odd.npz", "locked.npz", "damaged.png"])
def test_damaged_inputs_are_refused_by_their_name(tmp_path, name):
    path = tmp_path / name
    np.savez(tmp_path / "good.npz", inputs=np.zeros((1, 3, 4, 4), np.uint8))
    good = (tmp_path / "good.npz").read_bytes()
    if name == "open.npy":
        head = b"{'descr': '|u1', 'shape': ((((((\n"
        path.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head)
    elif name == "damaged.png":
        path.write_bytes(damaged_png())
    else:
        data = bytearray(good)
        at = data.index(b"PK\x01\x02")
        if name == "locked.npz":
            data[at + 8] |= 1
            data[6] |= 1
        else:
            data[at + 10] = data[8] = 97
        path.write_bytes(data)
    with pytest.raises(ContractError, match=name):
        list(read_calls([path], Contract((SPEC,))))


def test_a_slot_is_read_once_for_its_hash_and_its_header(store, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "edge_runtime.store.contents.read_chunks",
        lambda path: opened.append(path) or read_chunks(path),
    )
    folder = store.check_slot(store.state.active)
    assert opened == [folder / "weights.safetensors"]
    monkeypatch.setattr(
        "edge_runtime.store.contents.read_chunks", lambda _: [memoryview(b"other")]
    )
    with pytest.raises(StoreError, match="is damaged: its SHA-256"):
        store.check_slot(store.state.active)


@pytest.mark.parametrize("name", ["contract.json", "golden.npz"])
def test_a_trial_reads_no_more_of_its_own_files_than_they_may_have(name, store):
    with open(store.root / "model" / name, "r+b") as file:
        file.truncate(1 << 40)
    slot = store.slot_folder(store.state.active)
    with pytest.raises(BlockedError, match=f"{name} has 1099511627776 bytes"):
        try_slot(slot, store.root / "model")


def test_a_ledger_is_read_within_its_limit(tmp_path):
    with open(tmp_path / "releases.jsonl", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RoundError, match="DPU_LIMITS=ledger_bytes="):
        read_ledger(tmp_path)


@pytest.mark.parametrize(
    "reader",
    [read_facts, list_members, lambda path: sign(path.read_bytes(), [generate_key()])],
)
def test_the_packager_reads_a_bundles_index_within_the_limits_too(reader, tmp_path):
    path = tmp_path / "many.bundle.zip"
    few = {"bundle.json": b"{}"}
    few |= {f"{n}": b"" for n in range(limits().bundle_members)}
    path.write_bytes(encode_members(few))
    with pytest.raises(BundleError, match="bundle_members"):
        reader(path)
