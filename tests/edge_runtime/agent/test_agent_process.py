# SPDX-License-Identifier: Apache-2.0
"""The agent as a process: signals, one per store, killed, and what systemd hears."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress

import pytest

from edge_runtime import Device
from edge_runtime.agent.status import PingingFiles, sd_notify
from edge_runtime.cli.main import main
from edge_runtime.errors import BlockedError
from edge_runtime.store.state import MAX_TRIES
from edge_runtime.update.trial import run_trial
from packager.build import pack_round
from packager.bundles.from_round import build_bundle
from packager.rounds.folder import read_round

LONG_S = 60  # more than anything here takes


@pytest.fixture
def site(tmp_path, run):
    """A store at round 0 and a folder with the patches of two rounds."""
    run.add(2)
    rounds = [read_round(run.path / f"round_{n:02d}") for n in range(3)]
    Device.install(tmp_path / "store", build_bundle(rounds[0]).data)
    (tmp_path / "in").mkdir()
    for round_ in rounds[1:]:
        path = tmp_path / "in" / f"{round_.path.name}.dpu"
        path.write_bytes(pack_round(round_).data)
    return tmp_path


@pytest.fixture
def start(site):
    """Start an agent: ``start("--interval", 1)``; its standard error is a pipe."""
    with ExitStack() as stack:

        def begin(*options, **env):
            words = ["--store", site / "store", "agent", site / "in", *options]
            process = subprocess.Popen(
                [sys.executable, "-m", "edge_runtime", *map(str, words)],
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | env,
            )
            stack.callback(end, process)
            return process

        yield begin


def end(process):
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.fixture
def blocking_hook(site):
    """A hook that says that it runs, and waits to be released."""
    folder = site / "store" / "hooks" / "before-apply.d"
    folder.mkdir(parents=True)
    os.mkfifo(site / "runs-now")
    os.mkfifo(site / "go-on")
    hook = folder / "wait"
    groups = site / "groups"  # a hook leads a process group of its own
    hook.write_text(
        f"#!/bin/sh\necho $$ >> {groups}\n"
        f"echo > {site}/runs-now; read x < {site}/go-on\n"
    )
    hook.chmod(0o755)
    yield
    # One that begins now finds no pipe to wait at; those that wait told who they are.
    (site / "runs-now").unlink()
    (site / "go-on").unlink()
    for group in groups.read_text().split():  # one whose agent was killed still waits
        with suppress(ProcessLookupError):
            os.killpg(int(group), signal.SIGKILL)


def installed(site):
    device = Device.open(site / "store")
    assert device.verify()
    return device.status()["round"]


def events(text):
    return re.findall(r"event=(\w+)", text)


def test_an_agent_applies_what_is_there_and_ends_on_sigterm(site, start):
    agent = start()
    said = [agent.stderr.readline() for _ in range(3)]
    assert events("".join(said)) == ["started", "applied", "applied"]
    agent.send_signal(signal.SIGTERM)
    assert events(agent.communicate(timeout=LONG_S)[1]) == ["stopped"]
    assert (agent.returncode, installed(site)) == (0, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_never_cuts_an_update_off(site, blocking_hook, start, number):
    agent = start()
    (site / "runs-now").read_text()
    agent.send_signal(number)
    (site / "go-on").write_text("\n")
    said = agent.communicate(timeout=LONG_S)[1]
    assert events(said) == ["started", "applied", "stopped"]
    assert (agent.returncode, installed(site)) == (0, 1)


def test_a_trial_does_not_hear_the_ctrl_c_of_its_caller(tmp_path, monkeypatch):
    """Else it would end as a failed one, and the release be skipped for ever."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncut -d' ' -f5 /proc/$$/stat > {tmp_path}/group\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with suppress(BlockedError):  # a shell says no word of having passed
        run_trial(tmp_path, tmp_path)
    assert int((tmp_path / "group").read_text()) != os.getpgrp()


def test_a_store_has_one_agent(site, start):
    for path in (site / "in").iterdir():
        path.unlink()
    agent = start()
    agent.stderr.readline()
    second = start("--once")
    assert "another agent" in second.communicate(timeout=LONG_S)[1]
    assert second.returncode == 7
    agent.kill()
    agent.wait()
    assert start("--once").wait(LONG_S) == 0  # the lock died with it


def test_killed_in_the_middle_it_goes_on_where_it_was(site, blocking_hook, start):
    agent = start()
    (site / "runs-now").read_text()
    agent.kill()
    agent.wait()
    shutil.rmtree(site / "store" / "hooks")
    again = start("--once")
    said = again.communicate(timeout=LONG_S)[1]
    assert events(said) == ["applied"] * 2
    assert installed(site) == 2


def test_killed_at_any_moment_it_gets_to_the_newest_release_in_the_end(site, start):
    state, rng = site / "store" / "state.json", random.Random(5)
    for _ in range(MAX_TRIES - 1):  # more would count as the fault of the model
        before, agent = state.stat().st_ino, start("--once")
        while agent.poll() is None and state.stat().st_ino == before:
            time.sleep(0.001)  # until it counts a try, and begins the trial
        time.sleep(rng.uniform(0, 0.15))
        assert agent.poll() is None
        end(agent)
        installed(site)
    agent = start("--once")
    assert (agent.wait(LONG_S), installed(site)) == (0, 2)
    counted = json.loads((site / "store" / "agent.json").read_text())["files"]
    assert {file["verdict"] for file in counted.values()} == {"applied"}


# systemd ---------------------------------------------------------------------------


class Manager:
    """Stands where systemd would be."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.address = address

    def hear(self, timeout=LONG_S):
        self.socket.settimeout(timeout)
        return self.socket.recv(4096).decode()

    def hear_until(self, message):
        heard = []
        while message not in heard:
            heard.append(self.hear())
        return heard


@pytest.fixture
def manager(tmp_path):
    manager = Manager(str(tmp_path / "notify"))
    with manager.socket:
        yield manager


def test_systemd_hears_when_the_agent_is_ready_alive_and_stopping(site, start, manager):
    agent = start(NOTIFY_SOCKET=manager.address)
    heard = manager.hear_until("READY=1")
    assert heard == ["READY=1"]
    heard = manager.hear_until("STATUS=at round 2")
    # The look; each file read, applied; and what is written for it: its try, its slot,
    # its state, each state with its copy.
    assert heard.count("WATCHDOG=1") >= 1 + 2 * (2 + 5)
    assert {manager.hear() for _ in range(2)} == {"WATCHDOG=1"}
    agent.send_signal(signal.SIGTERM)
    assert set(manager.hear_until("STOPPING=1")) <= {"WATCHDOG=1", "STOPPING=1"}
    assert agent.wait(LONG_S) == 0


def test_an_update_that_hangs_stops_the_pings(site, blocking_hook, start, manager):
    start(NOTIFY_SOCKET=manager.address)
    (site / "runs-now").read_text()
    with suppress(BlockingIOError):
        while manager.hear(timeout=0):
            pass
    with pytest.raises(TimeoutError):
        manager.hear(timeout=0.3)
    (site / "go-on").write_text("\n")
    assert manager.hear() == "WATCHDOG=1"


def test_each_piece_of_a_large_file_is_a_ping(tmp_path, manager, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)

    def pieces():
        for n in range(3):
            yield bytes([n])
            assert manager.hear(timeout=0) == "WATCHDOG=1"

    PingingFiles().write(tmp_path / "file", pieces())
    assert (tmp_path / "file").read_bytes() == b"\0\1\2"


@pytest.mark.parametrize("sign", ["/", "@"])
def test_a_manager_is_told_over_both_kinds_of_sockets(tmp_path, sign, monkeypatch):
    name = f"{tmp_path}/other"
    manager = Manager(name if sign == "/" else "\0" + name)
    monkeypatch.setenv("NOTIFY_SOCKET", name if sign == "/" else "@" + name)
    sd_notify("A=1", "B=2")
    assert manager.hear() == "A=1\nB=2"
    manager.socket.close()


def test_a_manager_that_does_not_listen_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    sd_notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    sd_notify("READY=1")


# The command line ------------------------------------------------------------------


@pytest.fixture
def edge(command, site):
    return lambda *args: command(main, "--store", site / "store", *args)


def test_decisions_are_json_lines_on_request_and_then_silence(edge, site):
    code, out, err = edge("agent", site / "in", "--once", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["event"], line["round"]) for line in lines] == [
        ("applied", 1),
        ("applied", 2),
    ]
    assert lines[1]["fingerprint"] == Device.open(site / "store").verify()
    assert (code, err) == (0, "")
    assert edge("agent", site / "in", "--once") == (0, "", "")


def test_a_line_of_the_log_has_one_line(edge, site):
    for path in (site / "in").iterdir():
        path.unlink()
    bad = site / "in" / 'a "b"\n=c.dpu'
    bad.write_bytes(b"")
    _, out, err = edge("agent", site / "in", "--once")
    (line,) = err.splitlines()
    assert r'file="a \"b\"\n=c.dpu" reason="not a whole patch, or not yet"' in line
    assert out == ""


def test_status_says_what_the_agent_found(edge, site):
    assert "\nagent " not in edge("status")[1]
    (site / "in" / "round_01.dpu").unlink()
    (site / "in" / "bad.dpu").write_bytes(b"")
    edge("agent", site / "in", "--once")
    _, out, _ = edge("status")
    assert re.search(r"^agent          all was well at 20\d\d-", out, re.M)
    assert re.search(r"^waiting        round_02.dpu: it leads from weights", out, re.M)
    record = json.loads(edge("status", "--json")[1])
    assert record["agent"]["files"]["bad.dpu"]["verdict"] == "waiting"


def test_failures_end_a_single_look_with_their_exit_codes(edge, site):
    assert edge("agent", site / "nowhere", "--once")[0] == 10
    assert json.loads((site / "store" / "agent.json").read_text())["failing"]
    with Device.open(site / "store").store.lock():
        assert edge("agent", site / "in", "--once")[0] == 7


def test_an_agent_needs_an_installed_store(command, tmp_path):
    code, _, err = command(main, "--store", tmp_path, "agent", tmp_path, "--once")
    assert (code, "nothing is installed" in err) == (7, True)


def unit_of(text):
    lines = [line for line in text.splitlines() if line and line[0] not in "#["]
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def test_a_unit_names_what_the_agent_may_write(edge, site):
    folder = site / "in"
    code, out, _ = edge("service", "--user", "pi", folder)
    unit = unit_of(out)
    assert (code, unit["User"], unit["Type"]) == (0, "pi", "notify")
    assert unit["ReadWritePaths"] == str(site / "store")
    assert unit["ExecStart"].endswith(f"--store {site / 'store'} agent {folder}")
    options = ["--metrics", site / "m m" / "dpu.prom"]
    unit = unit_of(edge("service", folder, *options)[1])
    assert unit["ReadWritePaths"] == f"{site / 'store'} '{site / 'm m'}'"
    assert unit["ExecStart"].endswith(f"--metrics '{site / 'm m'}/dpu.prom'")


def test_a_unit_closes_what_a_strict_system_leaves_open(edge, site):
    """With ProtectProc=, systemd 252 was seen to leave /run writable."""
    unit = unit_of(edge("service", site / "in")[1])
    assert (unit["ProtectSystem"], unit["ProtectProc"]) == ("strict", "invisible")
    assert unit["ReadOnlyPaths"] == "/run"
    private = [key for key in unit if key.startswith("Private") and unit[key] == "yes"]
    assert private == ["PrivateTmp", "PrivateIPC", "PrivateDevices", "PrivateNetwork"]
    assert unit["TemporaryFileSystem"].startswith("/dev/shm:")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["in"], "absolute paths"),
        (["/a$b"], "absolute paths"),
        (["/in", "--metrics", "x"], "absolute paths"),
        (["/in", "--metrics", "/run/dpu.prom"], "not to /run itself"),
        (["/srv/x/../in"], "write '/srv/x/../in' as it really is"),
        (["/in", "--metrics", "/srv/../run/dpu.prom"], "ignores paths with '..'"),
        (["//srv/in"], "ignores paths with '..' or '//'"),
        (["/in", "--once"], "cron"),
        (["/in", "--user", "pi\nExecStartPre=/bin/evil"], "no user's name"),
        (["/in", "--no-such-option"], "no such option"),
        ([], "missing argument"),
    ],
)
def test_a_unit_that_would_not_work_is_not_printed(edge, arguments, text):
    code, out, err = edge("service", *arguments)
    assert (code, out, text in err) == (2, "", True)


def test_a_store_behind_dots_is_refused_too(command, site):
    store = site / "in" / ".." / "store"
    code, out, err = command(main, "--store", store, "service", "/in")
    assert (code, out, f"for example '{site / 'store'}'" in err) == (2, "", True)


def test_what_would_not_work_on_this_machine_is_said(command, site):
    words = ("--store", "/srv/nowhere", "service", "/srv/in", "--user", "nobody-here")
    code, out, err = command(main, *words)
    assert (code, unit_of(out)["User"]) == (0, "nobody-here")
    assert "nothing is installed in /srv/nowhere" in err
    assert "no user nobody-here" in err
    assert "is below" not in err
    store = site / "store"
    words = ("--store", store, "service", "/dev/shm/in", "--user", "root")
    code, _, err = command(main, *words)
    assert "/dev/shm/in is below /dev/shm" in err
    assert ("is installed" in err, "no user" in err) == (False, False)
    if store.is_relative_to("/tmp"):
        assert f"{store} is below /tmp" in err


SYNC = ("--sync", "https://releases.example.org/digits")


def test_the_unit_of_the_network_side_reads_the_store_and_no_key(edge, site):
    folder = site / "in"
    code, out, _ = edge("service", *SYNC, folder, "--budget", "2MB/month")
    unit = unit_of(out)
    assert (code, unit["User"]) == (0, "dpu-edge-sync")
    assert unit["ExecStart"].endswith(
        f"sync {SYNC[1]} {folder} --budget 2MB/month --every 3600"
    )
    assert unit["ReadOnlyPaths"] == f"/run {site / 'store'}"
    assert unit["InaccessiblePaths"] == f"-{site / 'store'}/device.key"
    assert unit["ReadWritePaths"] == str(folder)
    assert "AF_INET6" in unit["RestrictAddressFamilies"]
    assert "PrivateNetwork" not in unit


def test_the_unit_of_the_network_side_may_write_where_reports_go(edge, site):
    report = "--report", "/mnt/stick"
    unit = unit_of(edge("service", *SYNC, site / "in", *report)[1])
    assert unit["ReadWritePaths"] == f"{site / 'in'} /mnt/stick"
    unit = unit_of(edge("service", *SYNC, "--name", "cam", *report)[1])
    assert unit["ReadWritePaths"] == "/mnt/stick"
    assert unit["StateDirectory"] == "dpu-edge-sync/cam"


def test_both_units_are_hardened_alike_but_for_the_network(edge, site):
    apart = {"PrivateNetwork", "RestrictAddressFamilies", "ReadOnlyPaths", "User"}
    apart |= {"InaccessiblePaths", "ReadWritePaths", "SyslogIdentifier", "RestartSec"}
    apart |= {"ExecStart", "Description", "After", "Wants"}
    apart |= {"Type", "NotifyAccess", "WatchdogSec", "KillMode", "TimeoutStopSec"}
    apart |= {"Environment"}  # of a runtime that it never loads
    agent, sync = (
        unit_of(edge("service", *words, site / "in")[1]) for words in ((), SYNC)
    )
    for key in (agent.keys() | sync.keys()) - apart:
        assert agent.get(key) == sync.get(key), key


def test_a_name_gives_each_model_of_a_board_its_own_places(command):
    code, out, _ = command(main, "service", "--name", "door-camera")
    unit = unit_of(out)
    assert (code, unit["ReadWritePaths"]) == (0, "/var/lib/dpu-edge/door-camera")
    store, folder = (f"/var/lib/{n}/door-camera" for n in ("dpu-edge", "dpu-edge-sync"))
    assert unit["ExecStart"].endswith(f"--store {store} agent {folder}")
    assert "systemctl edit dpu-edge-agent-door-camera\n" in out
    code, out, _ = command(main, "service", "--name", "door-camera", *SYNC)
    unit = unit_of(out)
    assert (code, unit["StateDirectory"]) == (0, "dpu-edge-sync/door-camera")
    assert unit["EnvironmentFile"] == "-/etc/dpu-edge/door-camera.env"
    assert "ReadWritePaths" not in unit


def test_a_store_that_is_given_wins_over_a_name(command, site):
    words = ("--store", site / "store", "service", "--name", "x")
    unit = unit_of(command(main, *words)[1])
    assert unit["ReadWritePaths"] == str(site / "store")


def test_one_unit_may_serve_many_models(command):
    words = ("service", "--name", "%i", "--sync", "${DPU_URL}")
    code, out, _ = command(main, *words)
    assert code == 0
    assert unit_of(out)["ExecStart"].endswith(
        "--store /var/lib/dpu-edge/%i sync ${DPU_URL} /var/lib/dpu-edge-sync/%i"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--sync", "digits", "/in"], "an absolute path or URL"),
        (["--sync", "https://a/b"], "missing argument FOLDER"),
        (["--sync", "${DPU_URL}", "/in"], "needs --name"),
        (["--sync", "https://a/'b", "/in"], "without quotes"),
        (["--sync", "https://a/b\nUser=root", "/in"], "in one line"),
        (["--sync", "https://a/b", "/in", "--ca", "ca.pem"], "absolute paths"),
        (["--sync", "https://a/b", "/in", "--report", "out"], "absolute paths"),
        (["--sync", "https://a/b", "/in", "--report", "@out"], "absolute paths"),
        (["--sync", "https://a/b", "/in", "--budget", "x"], "expected 200KB/day"),
        (["--name", "../x"], "expected letters"),
    ],
)
def test_a_unit_of_sync_that_would_not_work_is_not_printed(edge, arguments, text):
    code, out, err = edge("service", *arguments)
    assert (code, out, text in err) == (2, "", True)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
@pytest.mark.parametrize("words", [["/srv/in"], [*SYNC, "/srv/in"]])
@pytest.mark.parametrize("name", ["", "digits", "%i"])
def test_systemd_finds_nothing_wrong_with_the_unit(edge, tmp_path, words, name):
    options = ["--name", name] if name else []
    out = edge("service", *words, *options)[1]
    kind = "sync" if SYNC[0] in words else "agent"
    unit = tmp_path / f"dpu-edge-{kind}@x.service"
    unit.write_text(out)
    command = ["systemd-analyze", "verify", "--man=no", unit]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
