# SPDX-License-Identifier: Apache-2.0
"""What else is fuzzed: bundles, weight files, proofs, reports, state and so on.

Each takes any bytes; it raises only if a reader raises what is none of our errors. Some
inputs are files as they are, most are edits of a good file with mended checksums.
"""

import hashlib
import json
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.agent import status
from edge_runtime.errors import DpuError
from edge_runtime.formats.bundle import read_bundle
from edge_runtime.formats.contract_file import encode_contract, parse_contract
from edge_runtime.formats.init_weights import (
    InitSpec,
    TensorInit,
    read_init_spec,
    write_init_spec,
)
from edge_runtime.formats.json_file import parse_record
from edge_runtime.formats.patch import open_patch
from edge_runtime.formats.signing import framed, key_id
from edge_runtime.formats.weights import read_weights
from edge_runtime.live import entries, proof, report
from edge_runtime.live.shared import canonical, public_key
from edge_runtime.store.admission import refusal
from edge_runtime.store.state import Slot, State, decode_state, encode_state
from edge_runtime.sync.head_file import encode_head, read_head
from edge_runtime.sync.route import cheapest
from packager.fleet.reports import Known, read_report, row_of, signer
from packager.read_proof import check_origin, read_proof
from packager.zip_file import encode_members
from tests.fuzz.edits import Edits
from tests.fuzz.target import BASE, seal

_WORK = Path(tempfile.mkdtemp(prefix="dpu-fuzz-readers-"))
_HEX = "5f" * 32
_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
_KEY_ID = key_id(public_key(_KEY))
SLOTS = tuple(Slot(digit * 64, number, number) for number, digit in enumerate("ab"))
STATE = State(_HEX, _HEX, SLOTS[0].target, 1, SLOTS[1].target, SLOTS)
STATE = STATE.tried("c" * 64).noted("refused", SLOTS[1], "why")
LIVE = {
    "pid": 7,
    "started": "2026-01-01T00:00:00Z",
    "slot": "ab" * 32,
    "status": "loaded",
    "loaded": "2026-01-01T00:00:00Z",
    "fingerprint": _HEX,
    "graph": _HEX,
    "bytes": 9,
    "device": 1,
    "inode": 2,
    "changed_ns": 3,
}
FILE = {"identity": [1, 2, 3, 4], "verdict": "refused", "reason": "r", "error": "E"}
AGENT = {
    "schema": status.SCHEMA,
    "at": "2026-01-01T00:00:00Z",
    "installed": STATE.summary(),
    "last_success": 1,
    "failing": "",
    "basis": [1],
    "files": {"a.dpu": FILE},
}
PROOF = STATE.summary() | {
    "schema": 1,
    "time": "2026-01-01T00:00:00Z",
    "nonce": "n",
    "untold": [3],
    "disk": {
        "fingerprint": _HEX,
        "graph": _HEX,
        "bytes": 9,
        "header": _HEX,
        "tensors": {"w": _HEX},
    },
    "live": [LIVE | {"file_now": _HEX}],
}
REPORT = {
    "schema": 1,
    "device": "board7",
    "n": 3,
    "at": 1796169600,
    "since": "2026-01-01T00:00:00Z",
    "outcome": "refused",
    "reason": "why",
    "head": {"sha256": _HEX, "version": 17},
    "release": {"counter": 5, "round": 5, "target": _HEX},
    "name": "digits",
    "group": "lab",
    "runtime": "1.0",
    "month_bytes": 9,
    "proof": PROOF | {"nonce": _HEX},
    "signature": {"key_id": "5f" * 8, "value": "5f" * 64},
}
RECIPE = InitSpec(
    7,
    {
        "w": TensorInit("F32", (2, 3), "uniform", 0.5),
        "b": TensorInit("F32", (3,), "constant"),
    },
    {},
)
write_init_spec(RECIPE, _WORK)
_GOOD = json.loads((_WORK / "init.json").read_bytes())
_INPUT = {"name": "x", "dtype": "float32", "shape": [None, 2], "mean": [0.5]}
CONTRACT = {
    "schema": 2,
    "inputs": [_INPUT, _INPUT | {"name": "n", "layout": "NHWC"}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": [None, 2]}],
    "classes": ["a", "b"],
    "task": "multilabel",
    "metric": "element_accuracy",
    "bound": 0.5,
    "threshold": 0.1,
    "random_outputs": ["y"],
}


HEAD = {
    "signatures": {"5f" * 8: "A" * 85 + "Q"},
    "signed": {
        "schema": 1,
        "model": "A" * 43,
        "channel": "stable",
        "version": 17,
        "at": 1796169600,
        "expires": 1798761600,
        "counter": 5,
        "round": 5,
        "target": "A" * 43,
        "ways": [["AAAAAAAA", 9, "A" * 43], ["AAAAAAAA", 9, "A" * 43, "BBBBBBBB"]],
        "bundle": [9, "A" * 43],
        "keys": 2,
        "pausers": ["A" * 43],
        "rollout": {"id": "5", "steps": [[10, 1798700000]], "groups": ["lab"]},
    },
    "pause": {"at": 1, "key": "5f" * 8, "signature": "A" * 85 + "Q"},
}


def dump(record):
    """Encode a record as Python does it, with NaN and lone surrogates as they come."""
    return json.dumps(record).encode()


def _state(data):
    edits = Edits(data)
    record = json.loads(encode_state(STATE))
    record.pop("sha256")
    record = edits.record(record)
    sealed = record | {"sha256": hashlib.sha256(dump(record)).hexdigest()}
    file = dump(sealed) if edits.pick(4) else edits.bytes(dump(sealed))
    state = decode_state(file)
    # Whatever is accepted can be used, shown and written again.
    state.summary(), state.reachable, state.earlier(), state.trust.ids, state.skipped
    with open_patch(seal(b"\0")) as patch:
        refusal(state, patch.header)
    if decode_state(encode_state(state)) != state:
        raise AssertionError("a state does not come back")


def _json(good, parse):
    def attempt(data):
        edits = Edits(data)
        file = dump(edits.record(good))
        return parse(file if edits.pick(4) else edits.bytes(file))

    return attempt


def _parse_agent(file):
    record = parse_record(file, "agent_bytes", "it", DpuError, encodable=False)
    found = status._parse(record)
    list(status.status_lines(found)), list(status.metric_lines(found))
    json.dumps(found)


def _parse_live(file):
    told = entries._parse(parse_record(file, "live_bytes", "it", DpuError))
    canonical(told)
    Path("/", told["slot"])


def _parse_contract(file):
    contract = parse_contract(file)
    if parse_contract(encode_contract(contract)) != contract:
        raise AssertionError("a contract does not come back")


def _parse_head(file):
    signed = read_head(file)
    # Whatever is accepted can be used, and is written again as it was.
    data = encode_head(signed.head, signed.signatures, signed.pause)
    if read_head(data) != signed:
        raise AssertionError("a head does not come back")
    signed.is_paused()
    cheapest({"00" * 6}, signed.head.target[:12], signed.head.ways)
    if signed.head.rollout:
        signed.head.rollout.includes("device", "lab", 1)


def _proof(data):
    edits = Edits(data)
    record = edits.record(PROOF)
    file = canonical(record) if edits.pick(4) else edits.bytes(canonical(record))
    check_origin(read_proof(file), "n", {})


def _report(data):
    edits = Edits(data)
    record = edits.record(REPORT)
    if edits.pick(4):
        if isinstance(record.get("proof"), dict):
            record["proof"] = _signed(proof.CONTEXT, record["proof"])
        record = _signed(report.CONTEXT, record)
    file = canonical(record) if edits.pick(4) else edits.bytes(dump(record))
    return _judge_report(file)


def _signed(context, record):
    """Mend the signature, so that what lies behind it is reached."""
    message = {name: value for name, value in record.items() if name != "signature"}
    value = _KEY.sign(framed(context, canonical(message))).hex()
    return message | {"signature": {"key_id": _KEY_ID, "value": value}}


def _judge_report(data):
    found = read_report(data)
    heads, counters = {_HEX: Known(17, 1796169600)}, {_HEX: [(5, 17)]}
    for keys in ({}, {_KEY_ID: (public_key(_KEY), "board7")}):
        name = signer(found, keys)
        row = row_of(found, name, heads=heads, counters=counters, now=1796169700)
    return row


def _weights(data):
    edits = Edits(data)
    layout = {
        t.name: {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [
                t.start - len(BASE.layout.header),
                t.stop - len(BASE.layout.header),
            ],
        }
        for t in BASE.layout.tensors
    }
    text = json.dumps(edits.record(layout), separators=(",", ":")).encode()
    text = text if edits.pick(4) else edits.bytes(text)
    text += b" " * (-len(text) % 8)
    file = (
        len(text).to_bytes(8, "little")
        + text
        + bytes(BASE.data[len(BASE.layout.header) :])
    )
    weights = read_weights(file)
    for name in weights:
        weights[name].sum()


def _recipe(data):
    edits = Edits(data)
    path = _WORK / "init.json"
    record = edits.record(_GOOD)
    path.write_bytes(dump(record) if edits.pick(4) else edits.bytes(dump(record)))
    recipe = read_init_spec(_WORK)
    if recipe.layout().file_size < 1 << 20:
        recipe.generate()


def _bundle(data):
    edits = Edits(data)
    files = {
        "graph.onnx": b"graph",
        "init.json": b"{}",
        "contract.json": dump(CONTRACT),
        "golden.npz": b"golden",
        "patch.dpu": seal(b"\0"),
        "keys/0.pem": b"key",
    }
    digests = {name: hashlib.sha256(file).hexdigest() for name, file in files.items()}
    manifest = {"schema": 1, "model": _HEX, "target": _HEX, "files": digests}
    file = encode_members({"bundle.json": dump(edits.record(manifest))} | files)
    read_bundle(file if edits.pick(2) else edits.bytes(file))


READERS = {
    "bundle": (_bundle, read_bundle),
    "weights": (_weights, read_weights),
    "recipe": (_recipe, None),
    "contract": (_json(CONTRACT, _parse_contract), parse_contract),
    "proof": (_proof, read_proof),
    "report": (_report, _judge_report),
    "state": (_state, decode_state),
    "agent": (_json(AGENT, _parse_agent), _parse_agent),
    "live": (_json(LIVE, _parse_live), _parse_live),
    "head": (_json(HEAD, _parse_head), _parse_head),
}


def reader(name):
    """Return what takes any bytes for a target."""
    edited, whole = READERS[name]

    def attempt(data):
        if not data:
            return
        work = whole if whole and data[0] % 8 == 0 else edited
        try:
            work(data[1:])
        except DpuError as err:
            str(err).encode("utf-8", "surrogateescape")

    return attempt
