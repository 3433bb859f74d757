# SPDX-License-Identifier: Apache-2.0
"""Predictions go on while the weights change, and come from one version each."""

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_runtime import Device, RunOptions
from edge_runtime.errors import (
    BackendError,
    ContractError,
    DpuError,
    StoreError,
)
from edge_runtime.formats.contract import Contract, InputSpec
from edge_runtime.formats.model_folder import WEIGHTS_NAME
from edge_runtime.formats.weights import pack_weights
from edge_runtime.inference.bench import bench
from edge_runtime.inference.predictor import Predictor, available_memory
from edge_runtime.inference.session import Backend, SwapPolicy, open_session
from edge_runtime.live.entries import read_entries
from edge_runtime.live.store_predictor import LONGEST_S
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round

ROOT = Path(__file__).parents[3]
POLICIES = [SwapPolicy.AVAILABILITY, SwapPolicy.FRUGAL]


def no_trial(*_, **__):
    """These tests are about what comes after it."""


@pytest.fixture
def device(run, tmp_path):
    bundle = build_bundle(read_round(run.path / "round_00")).data
    return Device.install(tmp_path / "store", bundle, trial=no_trial)


def patch_of(run, number):
    folder = run.path / f"round_{number:02d}"
    return pack_round(read_round(folder if folder.exists() else run.add(number))).data


def update(device, run, number):
    device.update(patch_of(run, number))


# A network whose answer names its version twice: early and late ---------------------

SIZE = 1024
CONTRACT = Contract((InputSpec("x", "float32", (None, SIZE)),))


def make_slot(folder, version, size=SIZE):
    """Write a slot of 8 MB; its answer is (version, version) for an input of ones."""
    first = np.zeros((size, size), "f4")
    first[:, 0] = version / size
    second = np.zeros((size, size), "f4")
    second[0, 0] = 1.0
    last = np.zeros(size, "f4")
    last[1] = version
    weights = pack_weights({"first": first, "second": second, "last": last})
    stored = []
    for tensor in weights.layout.tensors:
        entry = TensorProto(name=tensor.name, data_type=TensorProto.FLOAT)
        entry.dims.extend(tensor.shape)
        entry.data_location = TensorProto.EXTERNAL
        place = {"location": WEIGHTS_NAME, "offset": tensor.start}
        place["length"] = tensor.stop - tensor.start
        for key, value in place.items():
            entry.external_data.add(key=key, value=str(value))
        stored.append(entry)
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"]),
        helper.make_node("Gemm", ["h", "second", "last"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "versioned",
        [value("x", TensorProto.FLOAT, ["batch", size])],
        [value("y", TensorProto.FLOAT, ["batch", size])],
        stored,
    )
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    folder.mkdir()
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    (folder / WEIGHTS_NAME).write_bytes(weights.data)
    return folder


ONES = np.ones((1, SIZE), "f4")


def version_of(answer):
    early, late = answer[0, :2].tolist()
    assert early == late, "an answer of two versions"
    return int(early)


@pytest.fixture(scope="module")
def slots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slots")
    return [make_slot(folder / str(n), n) for n in range(3)]


class Callers:
    """Threads that call all the time and keep what came back."""

    def __init__(self, ask, count=3):
        self.answers = [[] for _ in range(count)]
        self.failures = []
        self._ask, self._stop = ask, threading.Event()
        self._threads = [
            threading.Thread(target=self._call, args=(kept,)) for kept in self.answers
        ]

    def _call(self, kept):
        while not self._stop.is_set():
            try:
                kept.append(self._ask())
            except Exception as err:  # noqa: BLE001 - whatever it is, it is a failure
                self.failures.append(err)
            time.sleep(0.001)  # else they hardly let Python do anything else

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", [Backend.ONNXRUNTIME, Backend.NUMPY])
def test_every_answer_is_of_one_version_while_sessions_swap(slots, policy, backend):
    options = RunOptions(policy=policy, backend=backend)
    predictor = Predictor(slots[0], CONTRACT, options)
    with Callers(lambda: version_of(predictor.predict(ONES))) as callers:
        for number in range(12):
            predictor.swap(slots[(number + 1) % 3])
    assert callers.failures == []
    assert {version for kept in callers.answers for version in kept} <= {0, 1, 2}
    assert version_of(predictor.predict(ONES)) == 0


def test_no_call_is_dropped_through_100_updates(device, run):
    """Real patches, applied to a real store; versions only ever go forward."""
    inputs = np.full((1, 12), 7, np.uint8)
    patches = [patch_of(run, number) for number in range(1, 101)]
    predictors = [device.predictor(RunOptions(policy=policy)) for policy in POLICIES]
    asks = [lambda p=p: p.predict(inputs).tobytes() for p in predictors]
    known = {asks[0](): 0}
    with Callers(asks[0], 2) as available, Callers(asks[1], 2) as frugal:
        for number, patch in enumerate(patches, start=1):
            device.update(patch)
            known[device.predictor().predict(inputs).tobytes()] = number
            assert all(predictor.refresh() for predictor in predictors)
    assert available.failures + frugal.failures == []
    assert len(known) == 101
    for kept in (*available.answers, *frugal.answers):
        versions = [known[answer] for answer in kept]
        assert versions == sorted(versions)
        assert len(set(versions)) > 50
    assert [known[ask()] for ask in asks] == [100, 100]


def test_a_call_that_has_begun_ends_with_its_own_version(slots):
    predictor = Predictor(slots[0], CONTRACT)
    session = predictor._session
    predictor._session = Slow(session)
    answers = []
    caller = threading.Thread(
        target=lambda: answers.append(version_of(predictor.predict(ONES)))
    )
    caller.start()
    predictor._session.begun.wait()
    predictor.swap(slots[1])
    caller.join()
    answers.append(version_of(predictor.predict(ONES)))
    assert answers == [0, 1]


class Slow:
    """A session whose calls take a while."""

    def __init__(self, session):
        self._session, self.begun = session, threading.Event()

    def run(self, names, feed):
        self.begun.set()
        time.sleep(0.1)
        return self._session.run(names, feed)


# Policies --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "free", "remade"),
    [
        (SwapPolicy.AVAILABILITY, False, False),
        (SwapPolicy.FRUGAL, True, True),
        (SwapPolicy.AUTO, True, False),
        (SwapPolicy.AUTO, False, True),
    ],
)
def test_a_swap_that_fails_leaves_the_old_version(
    slots, tmp_path, policy, free, remade
):
    predictor = Predictor(slots[1], CONTRACT, RunOptions(policy=policy))
    if not free:  # a model larger than any memory
        predictor._needed = 1 << 60
    old = weakref.ref(predictor._session)
    with pytest.raises(StoreError, match="cannot load"):
        predictor.swap(tmp_path)
    # Frugal: the old session had gone, so this is another one with the same weights.
    assert (old() is None) == remade
    assert predictor.folder == slots[1]
    assert version_of(predictor.predict(ONES)) == 1
    predictor.swap(slots[2])
    assert version_of(predictor.predict(ONES)) == 2


def test_where_the_old_slot_is_gone_it_is_kept_in_memory(tmp_path):
    predictor = Predictor(make_slot(tmp_path / "a", 1), CONTRACT)
    predictor._needed = 1 << 60
    (tmp_path / "a").rename(tmp_path / "moved")
    with pytest.raises(StoreError, match="cannot load"):
        predictor.swap(tmp_path / "nothing")
    assert version_of(predictor.predict(ONES)) == 1


def test_when_not_even_the_old_version_returns_calls_say_so_until_one_loads(tmp_path):
    predictor = Predictor(
        make_slot(tmp_path / "a", 1), CONTRACT, RunOptions(policy=SwapPolicy.FRUGAL)
    )
    (tmp_path / "a").rename(tmp_path / "moved")
    with pytest.raises(StoreError, match="cannot load"):
        predictor.swap(tmp_path / "nothing")
    with pytest.raises(StoreError, match="no weights are loaded"):
        predictor.predict(ONES)
    predictor.swap(tmp_path / "moved")
    assert version_of(predictor.predict(ONES)) == 1


def test_the_system_says_how_much_memory_is_free():
    assert 1 << 20 < available_memory() < 1 << 50


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_predictor import CONTRACT, ONES, POLICIES, Predictor, RunOptions

slots = [Path(path) for path in {slots!r}]
for policy in POLICIES:
    predictor = Predictor(slots[0], CONTRACT, RunOptions(policy=policy))
    sizes = []
    for number in range(20):
        predictor.swap(slots[number % 3])
        predictor.predict(ONES)
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    print(sizes[-1] - sizes[2])
"""


def test_memory_returns_to_where_it_was(slots):
    """In a process of its own; a lost session would be 8 MB, 17 of them 136 MB."""
    paths = [str(slot) for slot in slots]
    code = MEMORY.format(tests=str(Path(__file__).parent), slots=paths)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    grown = [int(text) for text in done.stdout.split()]
    assert len(grown) == 2
    assert max(grown) < 8 << 20


# Following a store -----------------------------------------------------------------


def test_refresh_moves_to_what_another_process_installed(device, run):
    inputs = np.ones((1, 12), np.uint8)
    predictor = Device.open(device.store.root).predictor()
    before = predictor.predict(inputs)
    assert not predictor.refresh()
    update(device, run, 1)
    assert np.array_equal(predictor.predict(inputs), before)
    assert predictor.refresh()
    assert not np.array_equal(predictor.predict(inputs), before)
    assert predictor.folder == device.store.slot_folder(device.verify())
    device.rollback()
    assert predictor.refresh()
    assert np.array_equal(predictor.predict(inputs), before)


def test_a_commit_that_changes_no_weights_makes_no_new_session(device):
    predictor = device.predictor()
    session = predictor._session
    device.store.commit(device.store.state)
    assert not predictor.refresh()
    assert predictor._session is session


def test_a_refresh_that_fails_is_tried_again(device, run):
    inputs = np.ones((1, 12), np.uint8)
    predictor = device.predictor()
    before = predictor.predict(inputs)
    update(device, run, 1)
    slot = device.store.slot_folder(device.verify())
    slot.rename(slot.with_name("away"))
    for _ in range(2):
        with pytest.raises(StoreError, match="cannot be read"):
            predictor.refresh()
        assert np.array_equal(predictor.predict(inputs), before)
    slot.with_name("away").rename(slot)
    assert predictor.refresh()
    assert predictor.folder == slot


@pytest.mark.parametrize("backend", [Backend.ONNXRUNTIME, Backend.NUMPY])
def test_weights_cut_short_are_named_and_not_the_graph(device, backend):
    path = device.store.slot_folder(device.verify()) / WEIGHTS_NAME
    path.with_suffix(".new").write_bytes(path.read_bytes()[:-40])
    path.with_suffix(".new").replace(path)
    with pytest.raises(StoreError, match=f"{WEIGHTS_NAME} is damaged.*dpu-edge repair"):
        device.predictor(RunOptions(backend=backend))


def test_another_model_at_the_same_place_is_not_answered_with(device, new_run):
    predictor = device.predictor()
    other = build_bundle(read_round(new_run("other", run_id="cd" * 16).add(0))).data
    shutil.rmtree(device.store.root)
    Device.install(device.store.root, other, trial=no_trial)
    for _ in range(2):
        with pytest.raises(StoreError, match="another model was installed"):
            predictor.refresh()


SERVE = """
import sys
import numpy as np
from edge_runtime import Device

inputs = np.ones((1, 12), np.uint8)
predictor = Device.open(sys.argv[1]).predictor(follow=0.05)
last = None
while True:
    answer = predictor.predict(inputs).tobytes().hex()
    if answer != last:
        print(answer, flush=True)
        last = answer
"""


def test_a_serving_process_notices_what_another_process_installs(device, run):
    """Two real processes: one answers all the time, this one updates the store."""
    inputs = np.ones((1, 12), np.uint8)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(device.store.root)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        for number in range(4):
            if number:
                update(device, run, number)
            # Blocks until the other process answers with other weights.
            told = server.stdout.readline().strip()
            assert told == device.predictor().predict(inputs).tobytes().hex()
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_following_says_what_went_wrong_and_goes_on(device, run, caplog):
    predictor = device.predictor(follow=0.02)
    update(device, run, 1)
    update(device, run, 2)
    wait_until(lambda: predictor.folder == device.store.slot_folder(device.verify()))
    state = device.store.root / "state.json"
    good = state.read_bytes()
    state.with_suffix(".copy").write_text("damaged too")
    state.with_suffix(".new").write_text("damaged")
    state.with_suffix(".new").replace(state)
    wait_until(lambda: "state.json is damaged" in caplog.text)
    run.add(3)
    state.with_suffix(".new").write_bytes(good)
    state.with_suffix(".new").replace(state)
    update(device, run, 3)
    wait_until(lambda: predictor.folder == device.store.slot_folder(device.verify()))


@pytest.mark.parametrize(
    ("fault", "words"), [(MemoryError, "MemoryError"), (RuntimeError, "odd")]
)
def test_no_fault_of_a_look_ends_following(
    device, run, caplog, monkeypatch, fault, words
):
    predictor = device.predictor(follow=0.02)
    with monkeypatch.context() as patched:

        def fail(*_):  # an exception of its own: it holds what it went through
            raise fault("odd") if words == "odd" else fault

        patched.setattr(Predictor, "_load", fail)
        update(device, run, 1)
        wait_until(lambda: f": {words}" in caplog.text)
    wait_until(lambda: predictor.folder == device.store.slot_folder(device.verify()))


@pytest.mark.parametrize("follow", [-1, float("nan"), float("inf")])
def test_what_is_no_time_between_two_looks_is_refused(device, follow):
    with pytest.raises(DpuError, match="expected the seconds between two looks"):
        device.predictor(follow=follow)


def test_looks_as_rare_as_can_be_said_are_made(device, monkeypatch):
    asked, is_over = queue.SimpleQueue(), threading.Event()

    def wait(seconds):
        asked.put(seconds)
        is_over.wait()

    monkeypatch.setattr("edge_runtime.live.store_predictor.time.sleep", wait)
    predictor = device.predictor(follow=1e12)
    assert asked.get(timeout=60) == LONGEST_S
    del predictor
    is_over.set()


# A slot of one's choice ---------------------------------------------------------------


def entry_of(device):
    (entry,) = read_entries(device.store)
    return entry["status"], entry.get("fingerprint")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_link_to_a_slot_may_be_chosen_and_is_told_as_the_slot(device, run, kind):
    predictor = device.predictor()
    update(device, run, 1)
    predictor.swap(kind(device.store.root / "current"))
    active = device.store.state.active
    assert predictor.folder.name == active
    assert entry_of(device) == ("loaded", active)


def test_a_choice_stays_until_other_weights_become_active(device, run):
    update(device, run, 1)
    predictor = device.predictor()
    old = device.store.slot_folder(device.store.state.slots[1].target)
    predictor.swap(old)
    device.pin()
    assert predictor.refresh() is False
    assert predictor.folder == old
    device.pin(held=False)
    update(device, run, 2)
    assert predictor.refresh() is True
    assert predictor.folder.name == device.store.state.active


def test_a_predictor_that_nobody_holds_ends_its_thread(device):
    before = set(threading.enumerate())  # of earlier tests, and may end at any time
    predictor = device.predictor(follow=0.02)
    (thread,) = set(threading.enumerate()) - before
    gone = weakref.ref(predictor)
    del predictor
    wait_until(lambda: gone() is None and not thread.is_alive())


def wait_until(what, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


# Bench -----------------------------------------------------------------------------


def test_bench_measures_us_and_onnx_runtime_in_turn(slots):
    found = bench(slots[0], CONTRACT, ONES.repeat(2, 0), seconds=0.05)
    assert (found["backend"], found["batch"]) == ("onnxruntime", 2)
    for latency in (found["latency_s"], found["raw"]["latency_s"]):
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
    raw = found["raw"]
    assert raw["ratio"] == 1 + raw["overhead_s"] / raw["latency_s"]["p50"]
    assert found["memory_bytes"] > 10 << 20
    json.dumps(found)


@pytest.mark.parametrize("backend", [Backend.ONNXRUNTIME, Backend.NUMPY])
def test_what_the_graph_cannot_be_run_on_is_an_error_of_ours(slots, backend):
    predictor = Predictor(slots[0], CONTRACT, RunOptions(backend=backend))
    with pytest.raises(ContractError, match="cannot be run on it") as caught:
        predictor.run({"x": np.zeros((1, 1), np.float32)})
    assert caught.value.__cause__ is not None


STARVED = """
import resource, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {tests!r})
from edge_runtime.errors import BlockedError
from test_predictor import CONTRACT, SIZE, Predictor, RunOptions, open_session

slot, options = Path({slot!r}), RunOptions(backend={backend!r})
predictor = Predictor(slot, CONTRACT, options)
feed = {{"x": np.zeros((40_000, SIZE), "f4")}}
status = Path("/proc/self/status").read_text()
taken = 1024 * int(status.partition("VmData:")[2].split()[0])
# Hundreds of megabytes are asked for.
resource.setrlimit(resource.RLIMIT_DATA, (taken + (32 << 20),) * 2)
for work in (
    lambda: predictor.run(feed),
    lambda: open_session(slot, predictor.backend, options, lambda s: s.run(None, feed)),
):
    try:
        work()
    except BlockedError as err:
        print(err)
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "numpy"])
def test_memory_that_ran_out_is_no_fault_of_model_or_input(slots, backend):
    """In a process of its own: a limit holds for all threads of one."""
    tests = str(Path(__file__).parent)
    code = STARVED.format(tests=tests, slot=str(slots[0]), backend=backend)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    run, load = done.stdout.decode().splitlines()
    assert run.startswith("the model cannot be run on it: ")
    assert load.startswith("cannot load ")
    assert all("that is the system's fault" in line for line in (run, load))


def test_what_a_runtime_lacks_is_looked_for_in_bounded_time(tmp_path):
    slot = make_slot(tmp_path / "slot", 1, 4)
    graph = onnx.load(slot / "graph.onnx", load_external_data=False)
    graph.graph.node[0].op_type = "No" * 1_000_000
    (slot / "graph.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises((BackendError, StoreError), match="NoNoNo"):
        open_session(slot, Backend.ONNXRUNTIME, RunOptions())


def test_bench_measures_numpy_alone(slots):
    options = RunOptions(backend=Backend.NUMPY)
    found = bench(slots[0], CONTRACT, ONES, options, seconds=0.05)
    assert (found["backend"], found["raw"]) == ("numpy", None)
    assert found["latency_s"]["p50"] > 0


def test_onnx_runtime_writes_nothing_into_the_home_folder(device, tmp_path):
    """Its telemetry would, as soon as a fresh process makes a session."""
    home = tmp_path / "home"
    home.mkdir()
    keep = os.environ.keys() - {"ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}
    code = (
        "import sys; from edge_runtime import Device; "
        "print(Device.open(sys.argv[1]).predictor().backend)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, device.store.root],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={name: os.environ[name] for name in keep} | {"HOME": str(home)},
    )
    assert done.stdout.strip() == "onnxruntime"
    assert list(home.rglob("*")) == []
