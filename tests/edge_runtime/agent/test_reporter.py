# SPDX-License-Identifier: Apache-2.0
"""The agent's reports: each change once, whatever happens, and never in the way."""

import json
import mmap
import os
import socket
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime import Device
from edge_runtime.agent import reporter as module
from edge_runtime.agent.agent import Agent
from edge_runtime.agent.reporter import DAY_S, RETRY_S, Reporter
from edge_runtime.errors import BlockedError, TrialCutOffError, TrialError
from edge_runtime.files import Files
from edge_runtime.formats.signing import framed, key_id
from edge_runtime.live import shared
from edge_runtime.live.entries import undeclared_processes
from edge_runtime.live.outbox import (
    MOST_BYTES,
    MOST_FILES,
    TOLD_NAME,
    Kind,
    Outbox,
    Told,
    write_told,
)
from edge_runtime.live.proof import CONTEXT as PROOF_CONTEXT
from edge_runtime.live.proof import device_key
from edge_runtime.live.report import NO_HEAD, Change, Outcome, Report, encode_report
from edge_runtime.live.shared import canonical, public_key
from edge_runtime.store.contents import KEY_NAME
from packager.fleet.reports import read_report, runs, signer
from tests.crash import world

HEAD = "ab" * 32
GOLDEN = Path(__file__).parents[2] / "golden" / "report_v1.json"


class Board:
    """A device with a key, an agent and a clock."""

    def __init__(self, path):
        self.root, self.folder = path / "store", path / "in"
        self.folder.mkdir()
        world.install(self.root)
        self.key = device_key(self.device.store)
        public = public_key(self.key)
        self.keys = {key_id(public): (public, "board7")}
        self.now, self.said = time.time(), []
        self.start()

    @property
    def device(self):
        return Device.open(self.root, trial=self.trial)

    def trial(self, *_, **__):
        world.no_trial()

    def log(self, event, **facts):
        self.said.append(event)
        self.reason = facts.get("reason")

    def start(self):
        self.agent = Agent(lambda: self.device, self.folder, self.log)
        reporter = Reporter(self.folder, self.log, lambda: self.now)
        self.agent._reporter = reporter
        return self

    def put(self, number):
        patch = world.patch(number - 1, number)
        (self.folder / f"round_{number:02d}.dpu").write_bytes(patch)

    def look(self):
        self.agent.look()

    def tell(self, **changes):
        write_told(
            self.folder,
            Told(device="board7") if not changes else Told(**changes),
            Files(),
        )

    @property
    def outbox(self):
        return Outbox(self.root)

    @property
    def reports(self):
        found = [read_report(r.path.read_bytes()) for r in self.outbox.waiting()]
        assert all(signer(report, self.keys) == "board7" for report in found)
        return found

    @property
    def outcomes(self):
        return [(r.record["outcome"], r.record["round"]) for r in self.reports]


@pytest.fixture
def board(tmp_path):
    return Board(tmp_path)


def test_each_change_is_reported_once_and_proves_what_runs(board):
    board.look()
    board.put(1)
    board.look(), board.look()
    board.device.rollback()
    board.look(), board.look()
    assert board.outcomes == [("installed", 0), ("applied", 1), ("rolled back", 1)]
    assert [runs(r.proof) for r in board.reports] == [
        (world.weights(k).fingerprint, "") for k in (0, 1, 0)
    ]


def test_what_was_changed_by_hand_before_a_cut_is_reported_too(board):
    board.look()
    board.device.update(world.patch(0, 1))
    board.device.update(world.patch(1, 2))
    board.start().look()
    board.start().look()
    assert board.outcomes[1:] == [("applied", 1), ("applied", 2)]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (TrialError("worse"), "refused"),
        (BlockedError("no memory"), "blocked"),
        (TrialCutOffError("hung"), "cut off"),
    ],
)
def test_a_trial_that_does_not_end_well_is_reported_with_its_reason(
    board, error, outcome
):
    board.look()

    def fail(*_, **__):
        raise error

    board.trial = fail
    board.put(1)
    with suppress(BlockedError, TrialCutOffError):
        board.look()
    assert board.outcomes[1:] == [(outcome, 1)]
    assert board.reports[-1].record["reason"] == str(error)
    assert runs(board.reports[-1].proof) == (world.weights(0).fingerprint, "")


def test_a_blocked_release_that_stays_blocked_is_one_report(board):
    board.look()
    board.put(1)
    for text in ("no memory", "less memory"):

        def fail(*_, text=text, **__):
            raise BlockedError(text)

        board.trial = fail
        board.start()
        with pytest.raises(BlockedError):
            board.look()
    assert board.outcomes[1:] == [("blocked", 1)]


def test_a_day_without_news_is_reported_and_repeats_the_last_outcome(board):
    board.look()
    board.now += DAY_S - 5
    board.look()
    assert len(board.reports) == 1
    board.now += 10
    board.look(), board.start().look()
    assert board.outcomes == [("installed", 0)] * 2


def test_a_report_that_fails_as_nobody_thought_costs_no_update(board, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(module, "make_proof", fail)
    board.put(1)
    board.look()
    assert board.said == ["applied", "no report"]
    assert "MemoryError" in board.reason


def test_a_report_is_made_though_a_process_maps_a_name_that_is_no_utf8(board, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9"
    with open(path, "w+b") as file:
        file.write(b"x")
        file.flush()
        with mmap.mmap(file.fileno(), 1):
            board.look()
    assert len(board.reports) == 1


def test_slots_that_lead_to_themselves_are_told(board):
    slots = board.root / "slots"
    slots.rename(board.root / "away")
    slots.symlink_to("slots")
    assert undeclared_processes(board.device.store, set()) == []


def test_numbers_grow_even_where_the_clock_goes_back(board):
    board.look()
    board.now -= 50 * DAY_S
    board.put(1)
    board.start().look()
    first, second = [report.record["n"] for report in board.reports]
    assert second == first + 1


def test_without_a_clock_numbers_begin_at_the_newest_signed_time(board):
    """Else a board that is installed anew stays below the numbers that it had."""
    signed = int(board.now)
    board.tell(device="board7", seen=signed)
    board.now = 500
    board.look()
    board.put(1)
    board.look()
    assert [report.record["n"] for report in board.reports] == [signed, signed + 1]


def test_a_head_of_the_future_moves_no_number_of_a_board_with_a_clock(board):
    board.tell(device="board7", seen=int(board.now) + 900 * DAY_S)
    board.look()
    assert board.reports[0].record["n"] == int(board.now)


def test_a_report_answers_the_head_that_the_network_side_tells(board):
    board.look()
    assert board.reports[0].proof["nonce"] == NO_HEAD
    target = world.weights(1).fingerprint
    told = {"device": "b7", "group": "lab", "head": HEAD, "version": 3, "counter": 9}
    board.tell(**told, target=target, month_bytes=77)
    board.put(1)
    board.look()
    record = board.reports[-1].record
    assert board.reports[-1].proof["nonce"] == record["head"] == HEAD
    expected = {"device": "b7", "group": "lab", "head_version": 3, "month_bytes": 77}
    assert expected.items() <= record.items()
    assert record["counter"] == 1  # as the store has it, not as it was told


def test_a_device_without_a_key_reports_nothing(board):
    (board.root / KEY_NAME).unlink()
    board.put(1)
    board.look()
    assert not board.outbox.root.exists()
    assert "no report" not in board.said


def test_a_report_names_no_folder_of_the_machine(board):
    def fail(*_, **__):
        raise TrialError(f"{board.root}/slots/x and {board.folder}/y\x1b[2J")

    board.trial = fail
    board.put(1)
    board.look()
    reason = board.reports[-1].record["reason"]
    assert reason == r"STORE/slots/x and FOLDER/y\x1b[2J"


def test_no_report_holds_the_device_key(board):
    board.look()
    secret = (board.root / KEY_NAME).read_bytes().strip()
    assert all(secret not in r.path.read_bytes() for r in board.outbox.waiting())


# What goes wrong costs a report, and no update ----------------------------------------


def test_a_full_disk_holds_no_update_back_and_is_said_once(board, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    board.look()
    monkeypatch.setattr(Outbox, "add", full)
    made = []
    make = module.make_proof
    monkeypatch.setattr(
        module, "make_proof", lambda *a, **k: made.append(1) or make(*a, **k)
    )
    board.put(1)
    for _ in range(5):
        board.look()
    assert board.device.verify() == world.weights(1).fingerprint
    assert board.said.count("no report") == 1
    assert len(made) == 1  # each one reads all the weights
    monkeypatch.undo()
    board.now += RETRY_S
    board.look()
    assert board.outcomes == [("installed", 0), ("applied", 1)]


@pytest.mark.parametrize("damage", [b"", b"not a key", b"00" * 31])
def test_a_damaged_key_holds_no_update_back(board, damage):
    (board.root / KEY_NAME).write_bytes(damage)
    board.put(1)
    board.look()
    assert board.device.verify() == world.weights(1).fingerprint
    assert "no report" in board.said


def test_a_key_that_is_out_of_reach_is_told(board):
    (board.root / KEY_NAME).unlink()
    (board.root / KEY_NAME).symlink_to("/mnt/gone/device.key")
    board.look()
    assert "no report" in board.said
    assert "/mnt/gone/device.key" in board.reason


def test_what_the_network_side_cannot_tell_holds_no_update_back(board):
    (board.folder / ".sync.told").write_bytes(b"{half")
    board.put(1)
    board.look()
    assert board.device.verify() == world.weights(1).fingerprint
    assert "no report" in board.said


def test_a_predictor_that_has_not_followed_yet_is_waited_for(board, monkeypatch):
    board.look()
    behind = [{"fingerprint": world.weights(0).fingerprint, "pid": 1}]
    monkeypatch.setattr(module, "read_entries", lambda _: iter(behind))
    board.put(1)
    board.look()
    assert len(board.reports) == 1
    board.now += 2 * module.SETTLE_S
    board.look()
    assert board.outcomes[1:] == [("applied", 1)]


# The outbox ---------------------------------------------------------------------------


def fill(outbox, kinds, size=10):
    for n, kind in enumerate(kinds, 1):
        outbox.add(n, kind, b"x" * size)
    return [report.n for report in outbox.waiting()]


def test_the_outbox_is_bounded_and_days_without_news_go_first(tmp_path):
    kinds = [Kind.FAILURE, Kind.DAILY, Kind.CHANGE] * 30
    kept = fill(Outbox(tmp_path), kinds)
    assert len(kept) == MOST_FILES
    gone = [n for n in range(1, 91) if n not in kept]
    assert gone == [n for n in range(1, 91) if kinds[n - 1] is Kind.DAILY][:26]


def test_the_outbox_is_bounded_in_bytes_and_failures_go_last(tmp_path):
    kinds = [Kind.FAILURE] * 2 + [Kind.CHANGE] * 20
    kept = fill(Outbox(tmp_path), kinds, MOST_BYTES // 10)
    assert kept == [1, 2, *range(15, 23)]


def test_the_newest_report_stays_as_the_memory_of_what_was_reported(tmp_path):
    outbox = Outbox(tmp_path)
    fill(outbox, [Kind.CHANGE] * 3)
    outbox.forget({1, 2, 3})
    assert [report.n for report in outbox.waiting()] == [3]


def test_other_users_may_read_the_outbox_and_not_write_it(board):
    board.look()
    modes = [p.stat().st_mode & 0o777 for p in board.outbox.root.iterdir()]
    mask = os.umask(0)
    os.umask(mask)
    assert modes == [0o644 & ~mask]


def test_what_a_killed_agent_left_is_swept_away(board):
    board.look()
    left = board.outbox.root / ".5.1.json.0123456789abcdef.new"
    left.write_bytes(b"half")
    board.put(1)
    board.start().look()
    assert not left.exists()
    assert len(board.reports) == 2


def test_too_long_a_proof_is_left_out_and_the_outcome_stays(board, monkeypatch):
    make = module.make_proof

    def long_proof(store, nonce):
        proof = json.loads(make(store, nonce))
        entry = {"pid": 1, "status": "unknown", "file_now": "", "slot": "x" * 99}
        return json.dumps(proof | {"live": [entry] * 600})

    monkeypatch.setattr(module, "make_proof", long_proof)
    board.look()
    (report,) = board.reports
    assert report.proof is None
    assert report.record["outcome"] == Outcome.INSTALLED


def test_what_is_sent_is_removed_once_the_network_side_says_so(board):
    board.look()
    board.put(1)
    board.look()
    first, second = (report.n for report in board.outbox.waiting())
    board.tell(device="board7", sent=(first, second))
    board.put(2)
    board.look()
    assert [report.n for report in board.outbox.waiting()] == [second, second + 1]


def test_told_forgets_what_is_gone():
    told = Told(sent=(1, 2)).having_sent({3}, {2, 3, 4})
    assert told == replace(Told(), sent=(2, 3))


# The form -----------------------------------------------------------------------------


def golden_report():
    """A report of a fixed key."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    digest = "5a" * 32
    proof = {
        "schema": 1,
        "time": "2026-11-28T10:00:00Z",
        "nonce": HEAD,
        "round": 5,
        "fingerprint": digest,
        "live": [],
        "untold": [],
        "release_counter": 5,
        "disk": {"fingerprint": digest, "graph": digest, "bytes": 9},
    }
    value = key.sign(framed(PROOF_CONTEXT, canonical(proof))).hex()
    proof["signature"] = {"key_id": key_id(public_key(key)), "value": value}
    change = Change("2026-11-28T09:59:00Z", Outcome.REFUSED, 6, "6b" * 32, "worse")
    report = Report(
        device="board7",
        n=1795860001,
        at=1795860000,
        counter=6,
        head=(HEAD, 17),
        name="digits",
        group="lab",
        runtime="1.0",
        change=change,
        month_bytes=31337,
    )
    return encode_report(report, proof, key), {key_id(public_key(key)): public_key(key)}


def test_a_report_is_these_bytes_for_ever():
    data, keys = golden_report()
    assert data == GOLDEN.read_bytes()
    known = {name: (public, "board7") for name, public in keys.items()}
    assert signer(read_report(data), known) == "board7"


def test_a_pipe_in_the_folder_holds_no_agent(board):
    os.mkfifo(board.folder / TOLD_NAME)
    board.put(1)
    board.look()
    assert board.device.store.state.active_slot.round == 1
    assert "no ordinary file" in board.reason


@pytest.mark.parametrize("text", ["", "uninitialized\n", "A" * 32, "ab" * 16 + "cd"])
def test_a_machine_id_that_every_board_of_an_image_has_names_none(
    tmp_path, monkeypatch, text
):
    path = tmp_path / "machine-id"
    path.write_text(text)
    monkeypatch.setattr(shared, "MACHINE_ID", path)
    assert shared.device_id() == socket.gethostname()
    path.write_text("ab" * 16 + "\n")
    assert shared.device_id() == "ab" * 16
