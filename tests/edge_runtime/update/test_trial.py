# SPDX-License-Identifier: Apache-2.0
"""A trial on a real device: what blames the weights, what blames the device.

The trial's process is the real one. Where a fault must arise inside of it, a few words
are put before those that it starts with.
"""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from edge_runtime import Device, UpdateResult
from edge_runtime.cli.main import main
from edge_runtime.errors import (
    BlockedError,
    ContractError,
    HeldError,
    StoreError,
    TrialCutOffError,
    TrialError,
    TrustError,
)
from edge_runtime.formats.arrays import encode_npz
from edge_runtime.formats.contract import Contract, OutputSpec
from edge_runtime.limits import VARIABLE, limits
from edge_runtime.store.state import MAX_TRIES
from edge_runtime.update import programs, trial_ends
from edge_runtime.update.golden import check_outputs, first_tensor, read_golden
from edge_runtime.update.trial import PROCESS, Expected, run_trial
from edge_runtime.update.trial_process import left_to_the_group
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round
from tests.processes import is_running, wait_for

LONG_S = 60


@pytest.fixture
def device(run, tmp_path):
    bundle = build_bundle(read_round(run.path / "round_00")).data
    return Device.install(tmp_path / "store", bundle)


@pytest.fixture
def patch(run):
    return pack_round(read_round(run.path / "round_01")).data


@pytest.fixture
def in_the_trial(monkeypatch):
    """Let every trial's process run some statements before anything of ours."""

    paths, rest = programs._START.split("from importlib", 1)

    def put(statements):
        added = f"{paths}\n{statements}\nfrom importlib{rest}"
        monkeypatch.setattr(programs, "_START", added)

    return put


def model_does(action):
    """Statements that let an action take the place of the model's run."""
    return (
        "import os, signal, time, edge_runtime.update.trial as t\n"
        "class Model:\n"
        f"    def __init__(self, *a): {action}\n"
        "t.Predictor = Model"
    )


def reap(*_):
    """Wait for any child, as some programs do when one ends."""
    with suppress(ChildProcessError):
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
            pass


@contextmanager
def children(waited_for):
    """Let a handler of SIGCHLD take how children end."""
    former = signal.signal(signal.SIGCHLD, waited_for)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, former)


def refused_for(device):
    """What the store believes of releases: tries, and those that are refused."""
    state = device.store.reload()
    return state.tries, state.skipped


# Faults of the device ----------------------------------------------------------------

FAIL = """
import errno, os, sys
def fail(event, args):
    if event == "open" and {name!r} in os.path.basename(str(args[0])):
        raise OSError(errno.{error}, os.strerror(errno.{error}), str(args[0]))
sys.addaudithook(fail)
"""


@pytest.mark.parametrize(
    ("name", "error", "times"),
    [
        ("contract.json", "EIO", MAX_TRIES + 1),
        ("golden.npz", "EMFILE", 1),
        ("graph.onnx", "EACCES", 1),
        ("weights.safetensors", "ENOMEM", 1),
        ("predictor.", "EIO", 1),  # or what it was compiled to
    ],
)
def test_a_file_that_cannot_be_read_now_is_no_verdict(
    device, patch, in_the_trial, name, error, times
):
    in_the_trial(FAIL.format(name=name, error=error))
    for _ in range(times):
        with pytest.raises(BlockedError, match="nothing changed"):
            device.update(patch)
    assert refused_for(device) == ({}, [])
    status = device.status()
    assert len(status["history"]) == 2  # once, however often
    assert status["blocked"]["round"] == 1
    in_the_trial("")
    assert device.update(patch) is UpdateResult.APPLIED
    assert device.status()["blocked"] is None


def test_a_file_of_the_device_that_is_lost_or_damaged_is_no_verdict(device, patch):
    path = device.store.root / "model" / "golden.npz"
    good = path.read_bytes()
    for bad in (good[:-30], b"", None):
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(BlockedError, match=r"golden\.npz"):
            device.update(patch)
    path.write_bytes(good)
    assert device.update(patch) is UpdateResult.APPLIED


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        *((resource.RLIMIT_NOFILE, n) for n in (8, 10, 12)),
        *((resource.RLIMIT_AS, n << 20) for n in (200, 400)),
    ],
)
def test_a_process_without_room_changes_nothing_for_the_next(
    device, patch, tmp_path, kind, limit
):
    """With too little to try it, and perhaps too little to start at all."""
    path, store = tmp_path / "next.dpu", str(device.store.root)
    path.write_bytes(patch)
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "--store", store, "apply", str(path)],
        preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)),
        capture_output=True,
        timeout=LONG_S,
    )
    assert done.returncode not in (5, 8), done.stderr
    assert device.store.reload().skipped == []
    if done.returncode:
        assert device.update(patch) is UpdateResult.APPLIED


def test_a_bug_of_ours_is_no_verdict(device, patch, in_the_trial):
    in_the_trial(model_does("raise ZeroDivisionError('ours')"))
    with pytest.raises(BlockedError, match="ours"):
        device.update(patch)
    assert refused_for(device) == ({}, [])


def test_status_says_what_this_device_cannot_do(device, patch, in_the_trial, command):
    in_the_trial(FAIL.format(name="golden.npz", error="EIO"))
    with pytest.raises(BlockedError):
        device.update(patch)
    code, out, _ = command(main, "--store", device.store.root, "status")
    assert code == 0
    (line,) = (li for li in out.splitlines() if li.startswith("blocked by this device"))
    assert "round 1" in line
    assert "Input/output error" in line
    assert "--force" in line


def test_a_blocked_release_ends_with_the_code_of_the_system(
    device, patch, in_the_trial, command, tmp_path
):
    path = tmp_path / "next.dpu"
    path.write_bytes(patch)
    in_the_trial(FAIL.format(name="golden.npz", error="EIO"))
    assert command(main, "--store", device.store.root, "apply", path)[0] == 10
    in_the_trial("")
    words = ("--store", device.store.root, "apply", path, "--force")
    assert command(main, *words)[0] == 0


# Ends that are no answer -------------------------------------------------------------


_LOADING = """
import onnxruntime, os, resource
_Session = onnxruntime.InferenceSession
def _session(path, *a, **k):
    graph = os.path.realpath(path)
    {meanwhile}
    return _Session(path, *a, **k)
onnxruntime.InferenceSession = _session
"""
# What the runtime says of a file that the disk gave only in part: that it is malformed.
_HALF_READ = """
    onnxruntime.InferenceSession = _Session
    whole = open(graph, "rb").read()
    os.unlink(graph)
    open(graph, "wb").write(whole[: len(whole) // 2])
    try:
        return _Session(path, *a, **k)
    finally:
        open(graph, "wb").write(whole)
"""
_NO_HANDLES = "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))"


def test_a_graph_that_the_runtime_could_not_read_once_is_read_again(
    device, patch, in_the_trial
):
    in_the_trial(_LOADING.format(meanwhile=_HALF_READ))
    assert device.update(patch) is UpdateResult.APPLIED


def test_what_the_runtime_cannot_open_while_it_loads_is_no_verdict(
    device, patch, in_the_trial
):
    in_the_trial(_LOADING.format(meanwhile=_NO_HANDLES))
    with pytest.raises(BlockedError):
        device.update(patch)
    assert device.store.state.tries == {}


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ELOOP])
def test_the_number_of_an_error_of_the_system_is_no_verdict(number):
    error = StoreError(f"cannot load graph.onnx: SystemError : {number}")
    assert trial_ends.end_code(error) == trial_ends.BLOCKED


def test_a_crash_of_the_model_counts_as_one_try(device, patch, in_the_trial):
    in_the_trial(model_does("os.kill(os.getpid(), signal.SIGSEGV)"))
    for tries in range(1, MAX_TRIES + 1):
        with pytest.raises(TrialCutOffError, match="ended by SIGSEGV"):
            device.update(patch)
        assert list(device.store.reload().tries.values()) == [tries]
    in_the_trial("")
    with pytest.raises(TrustError, match="--force"):
        device.update(patch)
    assert device.update(patch, force=True) is UpdateResult.APPLIED


def test_one_crash_does_not_refuse_a_release(device, patch, in_the_trial):
    in_the_trial(model_does("os.kill(os.getpid(), signal.SIGSEGV)"))
    with pytest.raises(TrialCutOffError, match="ended by SIGSEGV"):
        device.update(patch)
    in_the_trial("")
    assert device.update(patch) is UpdateResult.APPLIED
    assert device.store.reload().tries == {}


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGUSR1"])
def test_a_signal_from_outside_never_refuses_a_release(
    device, patch, in_the_trial, name
):
    in_the_trial(model_does(f"os.kill(os.getpid(), signal.{name})"))
    for _ in range(MAX_TRIES + 1):  # where memory runs out, it does so every time
        with pytest.raises(BlockedError, match=f"ended by {name}"):
            device.update(patch)
    assert device.store.reload().tries == {}
    in_the_trial("")
    assert device.update(patch) is UpdateResult.APPLIED


def test_a_signal_before_the_models_turn_is_the_devices_fault(
    device, patch, in_the_trial
):
    in_the_trial("import os; os.kill(os.getpid(), 11)")
    with pytest.raises(BlockedError, match="SIGSEGV"):
        device.update(patch)
    assert refused_for(device) == ({}, [])


@pytest.mark.parametrize(
    "words", ["terminate called after std::bad_alloc", "cannot allocate memory"]
)
def test_a_crash_for_want_of_memory_is_the_devices_fault(
    device, patch, in_the_trial, words
):
    last = f"(os.write(2, b{words!r}), os.abort())"
    in_the_trial(model_does(last))
    with pytest.raises(BlockedError, match=words):
        device.update(patch)
    assert refused_for(device) == ({}, [])


BAD = model_does("raise StoreError('bad weights')").replace(
    "import os,", "from edge_runtime.errors import StoreError\nimport os,"
)


@pytest.mark.parametrize("waited_for", [signal.SIG_IGN, reap], ids=["ignored", "taken"])
def test_weights_are_not_good_because_nobody_learns_how_their_trial_ended(
    device, patch, in_the_trial, waited_for
):
    in_the_trial(BAD)
    with children(waited_for), pytest.raises(BlockedError, match="SIGCHLD"):
        device.update(patch)
    in_the_trial("")
    with children(waited_for):
        assert device.update(patch) is UpdateResult.APPLIED


def test_a_process_that_ends_well_and_says_nothing_has_tried_nothing(
    device, patch, in_the_trial
):
    in_the_trial("sys.exit(0)")
    with pytest.raises(BlockedError, match="without a word"):
        device.update(patch)


@pytest.mark.parametrize("waited_for", [signal.SIG_IGN, reap], ids=["ignored", "taken"])
def test_a_hook_whose_end_nobody_learns_refuses(device, patch, waited_for):
    hook = device.store.root / "hooks" / "before-apply.d" / "battery"
    hook.parent.mkdir(parents=True)
    hook.write_text("#!/bin/sh\nexit 3\n")
    hook.chmod(0o755)
    with children(waited_for), pytest.raises(HeldError, match=r"battery.*not known"):
        device.update(patch)


def test_the_command_sees_ends_though_its_parent_ignored_those(device, patch, tmp_path):
    hook = device.store.root / "hooks" / "before-apply.d" / "battery"
    hook.parent.mkdir(parents=True)
    hook.write_text("#!/bin/sh\nexit 3\n")
    hook.chmod(0o755)
    path, store = tmp_path / "next.dpu", str(device.store.root)
    path.write_bytes(patch)
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "--store", store, "apply", str(path)],
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
        capture_output=True,
        timeout=LONG_S,
    )
    assert b"battery ended with 3" in done.stderr


def test_time_that_runs_out_counts_as_one_try(device, run):
    slot = device.store.slot_folder(device.verify())
    with pytest.raises(TrialCutOffError, match="did not end within"):
        run_trial(slot, device.store.root / "model", timeout_s=0.01)


# Limits ------------------------------------------------------------------------------


@pytest.fixture
def hungry(new_run, reload_graph):
    """A run whose graph makes 64 GB of zeros, and takes one of them."""

    def edit(model):
        graph = model.graph
        sizes = helper.make_tensor("sizes", TensorProto.INT64, [2], [1 << 17, 1 << 17])
        graph.initializer.append(sizes)
        graph.node.insert(0, helper.make_node("ConstantOfShape", ["sizes"], ["big"]))
        graph.node.insert(1, helper.make_node("ReduceMax", ["big"], ["m"], keepdims=0))
        graph.node.insert(2, helper.make_node("Add", ["x", "m"], ["z"]))
        graph.node[3].input[0] = "z"

    run = new_run("hungry")
    run.graph = reload_graph(run, edit)
    return run.add(0)


def test_a_model_that_takes_more_memory_than_it_may_is_ended_and_not_judged(
    hungry, device, tmp_path
):
    slot = tmp_path / "slot"
    slot.mkdir()
    for name, source in (
        ("graph.onnx", hungry.parent / "model" / "graph.onnx"),
        ("weights.safetensors", hungry / "weights.safetensors"),
    ):
        (slot / name).write_bytes(source.read_bytes())
    with pytest.raises(BlockedError, match="memory"):
        run_trial(slot, device.store.root / "model")


def test_the_limits_of_a_trial_follow_the_weights_and_the_memory_that_is_free():
    code = (
        "import resource as r; from edge_runtime.update import trial_process as t; "
        "from edge_runtime.inference import predictor as p; "
        "p.available_memory = lambda: {free}; t.left_to_the_group = lambda: {group}; "
        "before = t._sizes()['VmData']; "
        "t.limit_memory({weights}); t.limit_time(100.5); "
        "print(r.getrlimit(r.RLIMIT_DATA)[0] - before, r.getrlimit(r.RLIMIT_AS)[0] > 0,"
        " r.getrlimit(r.RLIMIT_CPU)[0], r.getrlimit(r.RLIMIT_CORE)[0])"
    )

    def given(weights, free, group=0):
        text = code.format(weights=weights, free=free, group=group)
        done = subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, check=True
        )
        data, *others = done.stdout.split()
        assert others == ["True", str(404), "0"]
        return int(data)

    base, slack = limits().trial_bytes, 4 << 20  # of the process's own, meanwhile
    assert abs(given(10 << 20, 0) - base - (80 << 20)) < slack
    assert abs(given(10 << 20, 64 << 30) - base - (80 << 20)) < slack
    assert abs(given(10 << 20, 800 << 20) - (700 << 20)) < slack
    assert abs(given(10 << 20, 64 << 30, 800 << 20) - (700 << 20)) < slack


@pytest.mark.parametrize(
    ("most", "taken", "left"),
    [("1000", "700", 900), ("100", "900", 1), ("max", "700", 0), (None, "700", 0)],
)
def test_what_a_group_leaves_is_its_limit_without_what_is_taken_and_not_cached(
    tmp_path, most, taken, left
):
    own, group = tmp_path / "cgroup", tmp_path / "groups" / "system.slice" / "dpu"
    own.write_text("1:cpu:/\n0::/system.slice/dpu\n")
    group.mkdir(parents=True)
    if most:
        (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{taken}\n")
    stat = "anon 100\ninactive_file 400\nactive_file 200\nunevictable 7\n"
    (group / "memory.stat").write_text(stat)
    assert left_to_the_group(own, tmp_path / "groups") == left
    assert left_to_the_group(tmp_path / "hidden", tmp_path / "groups") == 0


def test_a_limit_of_the_callers_is_not_raised():
    code = (
        "import resource as r; from edge_runtime.update import trial_process as t; "
        "r.setrlimit(r.RLIMIT_CPU, (7, 9)); t.limit_time(100); "
        "print(*r.getrlimit(r.RLIMIT_CPU))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.split() == [b"7", b"9"]


def test_whoever_needs_more_memory_for_trials_can_say_so(device, patch, monkeypatch):
    monkeypatch.setenv(VARIABLE, "trial_bytes=1")
    with pytest.raises(BlockedError):
        device.update(patch)
    monkeypatch.setenv(VARIABLE, "trial_bytes=400000000")
    assert device.update(patch) is UpdateResult.APPLIED


def test_golden_inputs_that_unpack_to_much_are_not_unpacked(device, patch):
    path = device.store.root / "model" / "golden.npz"
    zeros = np.zeros((6 << 20, 12), np.uint8)
    np.savez_compressed(path, inputs=zeros, labels=np.zeros(8))
    with pytest.raises(BlockedError, match=r"is unpacked has .* bytes"):
        device.update(patch)


def test_golden_inputs_without_a_sample_let_no_weights_pass(device, patch, run):
    """Any answers to nothing are equal, those of weights that are no numbers too."""
    nothing = np.zeros((0, 12), np.uint8)
    path = device.store.root / "model" / "golden.npz"
    np.savez(path, inputs=nothing, labels=np.zeros(0, "i8"))
    with pytest.raises(BlockedError, match=r"golden\.npz holds no sample"):
        device.update(patch)
    shutil.copy(path, run.path / "model" / "golden.npz")
    with pytest.raises(ContractError, match="holds no sample"):
        build_bundle(read_round(run.path / "round_00"))


# Its parent --------------------------------------------------------------------------


def test_a_trial_ends_with_its_parent(device, tmp_path):
    pid = tmp_path / "pid"
    statements = model_does(
        f"(open({str(pid)!r}, 'w').write(str(os.getpid())), "
        "os.rename("
        + repr(str(pid))
        + ", "
        + repr(f"{pid}.whole")
        + "), time.sleep(600))"
    )
    code = (
        "from pathlib import Path; from edge_runtime.update import programs, trial; "
        f"a, b = programs._START.split('from importlib', 1); "
        f"programs._START = a + chr(10) + {statements!r} + chr(10); "
        "programs._START += 'from importlib' + b; "
        f"trial.run_trial(Path({str(device.store.slot_folder(device.verify()))!r}), "
        f"Path({str(device.store.root / 'model')!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    whole = Path(f"{pid}.whole")
    wait_for(lambda: whole.exists() or parent.poll() is not None)
    parent.kill()
    parent.wait()
    child = int(whole.read_text())
    wait_for(lambda: not is_running(child))


def test_a_trial_whose_parent_has_ended_already_does_not_begin(device):
    model = device.store.root / "model"
    slot = device.store.slot_folder(device.verify())
    command = programs.own_command(
        PROCESS, "1" if os.getpid() != 1 else "2", "60", slot, model, ""
    )
    done = subprocess.run(list(map(str, command)), capture_output=True, input=b"")
    assert (done.returncode, done.stdout) == (trial_ends.BLOCKED, b"")


# Outputs -----------------------------------------------------------------------------


@pytest.fixture
def two_heads(new_run, reload_graph):
    """A run whose graph has a second output: the hidden layer."""

    def edit(model):
        value = helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", 16])
        model.graph.output.append(value)

    run = new_run("heads")
    run.graph = reload_graph(run, edit)
    run.add(0)
    return run


def test_a_second_output_that_is_not_finite_is_refused(two_heads, tmp_path):
    bundle = build_bundle(read_round(two_heads.path / "round_00")).data
    device = Device.install(tmp_path / "store", bundle)
    arrays = two_heads.changed(number=1)
    arrays["fc1.bias"][0] = -np.inf  # Relu makes it 0: the first output is finite
    folder = two_heads.add(1, arrays)
    with pytest.raises(TrialError, match=r"not finite \(output 2 of 2\)"):
        device.update(pack_round(read_round(folder)).data)
    assert device.status()["round"] == 0


def test_a_bundle_holds_what_every_output_should_be(two_heads, tmp_path):
    bundle = build_bundle(read_round(two_heads.path / "round_00")).data
    device = Device.install(tmp_path / "store", bundle)
    path = device.store.root / "model" / "golden.npz"
    golden = read_golden(path.read_bytes())
    assert [values.shape for values in golden.outputs] == [(8, 4), (8, 16)]
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"outputs_1": arrays["outputs_1"] + 1})
    slot, model = device.store.slot_folder(device.verify()), device.store.root / "model"
    run_trial(slot, model)
    with pytest.raises(TrialError, match=r"differ .*\(output 2\)"):
        run_trial(slot, model, expected=Expected(golden=True))


@pytest.mark.parametrize(
    "output",
    [
        [np.array([1.0, np.nan])],
        (np.float32(1), np.float32(np.inf)),
        [{0: 0.5, 1: float("nan")}, {0: 0.5, 1: 0.5}],
        np.array([np.inf], np.float16),
    ],
)
def test_numbers_in_lists_and_maps_are_looked_at_too(output):
    first = np.zeros((2, 2), "f4")
    check_outputs([first, [{0: 1.0}], np.array(["a"])], np.zeros(2), Contract(()))
    with pytest.raises(TrialError, match=r"output 3 of 3"):
        check_outputs([first, np.array([1]), output], np.zeros(2), Contract(()))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (np.array(["a"], object), r"gives text of shape \[1\]"),
        ([np.zeros(2)], "gives a sequence"),
        ({0: 1.0}, "gives a map"),
        (None, "of a type that NumPy lacks"),
    ],
)
def test_a_model_that_gives_no_tensor_of_numbers_is_refused(output, words):
    with pytest.raises(TrialError, match=words):
        first_tensor([output])
    assert first_tensor([output, np.array([True])]) == 1


@pytest.mark.parametrize(
    ("found", "wanted", "words"),
    [
        (np.zeros((3, 2)), np.zeros((2, 2)), r"shape \[3, 2\], expected is \[2, 2\]"),
        (np.array([True]), np.array([False]), "differ .* by 1 of the largest"),
        (np.array(7), np.array(8), "differ .* by 0.12 of the largest"),
        (np.array(1.5, "f2"), np.array(2.0, "f2"), "differ .* by 0.25"),
    ],
)
def test_golden_outputs_of_any_type_and_shape_are_compared(found, wanted, words):
    free = Contract((), task="free")
    check_outputs([wanted], None, free, [wanted])
    with pytest.raises(TrialError, match=words):
        check_outputs([found], None, free, [wanted])


@pytest.mark.parametrize("dtype", ["<U8", "S8", "c8", "M8[s]"])
def test_golden_outputs_that_are_no_numbers_are_refused_by_name(dtype):
    outputs = np.zeros(3, "i8").astype(dtype)
    arrays = {"inputs": np.zeros((3, 2), "f4"), "outputs": outputs}
    with pytest.raises(ContractError, match=r"golden\.npz: 'outputs' is .*of shape"):
        read_golden(encode_npz(arrays))


def test_outputs_that_are_random_by_design_must_only_be_finite():
    outputs = OutputSpec("y", "float32", None), OutputSpec("noise", "float32", None)
    contract = Contract((), outputs=outputs, task="free", random_outputs=("noise",))
    y, noise = np.ones(2), np.zeros(3)
    check_outputs([y, noise + 5], None, contract, [y, noise])
    with pytest.raises(TrialError, match=r"not finite \(output 2"):
        check_outputs([y, noise + np.nan], None, contract, [y, noise])
    with pytest.raises(TrialError, match="differ from the expected"):
        check_outputs([y + 1, noise], None, contract, [y, noise])
