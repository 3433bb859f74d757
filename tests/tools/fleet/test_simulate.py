# SPDX-License-Identifier: Apache-2.0
"""The simulated fleet: nobody is lost, nobody is early, and it would be seen."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from edge_runtime.sync.head import place
from tests.conftest import RunOnDisk
from tools import load_fleet, simulate_fleet
from tools.bench import fleet as bench_fleet
from tools.fleet import kinds
from tools.fleet.crowd import START, Crowd
from tools.fleet.picture import draw
from tools.fleet.publisher import Publisher
from tools.simulate_fleet import live, simulate, table

DAYS, DEVICES = 49, 3000


class Watched(Crowd):
    """A crowd whose floors are compared hour by hour."""

    fell = 0

    def pass_hour(self, hour):
        before = self.floors()
        super().pass_hour(hour)
        self.fell += int((self.floors() < before).sum())

    def floors(self):
        return np.array([state.floor for state in self.kinds.states])[self.kind]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    run = RunOnDisk(tmp_path_factory.mktemp("fleet") / "runs" / "tiny")
    for number in range(8):
        run.add(number)
    return run.path


@pytest.fixture(scope="module")
def crowd(rounds, tmp_path_factory):
    publisher = Publisher(rounds, tmp_path_factory.mktemp("www"), now=START)
    crowd = Watched(publisher, DEVICES, 1)
    crowd.sleep(DAYS * 24)
    live(publisher, crowd, DAYS)
    (rounds / "releases.jsonl").unlink()  # of this run alone
    return crowd


def test_no_floor_ever_falls(crowd):
    assert crowd.fell == 0
    assert crowd.counts.updates > DEVICES


def test_no_device_is_lost_and_none_takes_part_before_its_turn(crowd):
    assert (crowd.counts.stranded, crowd.counts.early) == (0, 0)


def test_a_bad_release_is_halted_and_left_by_all(crowd):
    (bad,) = (f.issue.signed.head for f in crowd.followed if f.issue.is_bad)
    whats = [issue.what for issue in crowd.publisher.issues]
    assert (whats.count("pause"), whats.count("revert")) == (1, 1)
    assert 0 < crowd.counts.exposed < DEVICES / 4
    awake = crowd.kind[crowd.awake(DAYS * 24)]
    active = {crowd.kinds.states[kind].active for kind in np.unique(awake)}
    assert bad.target not in active


def test_keys_are_exchanged_under_way(crowd):
    held = {state.key_list.root.version for state in crowd.kinds.states}
    assert held == {1, 2, 3}


def test_the_places_in_a_rollout_are_those_of_the_real_code(crowd):
    rollout = crowd.publisher.issues[-1].signed.head.rollout
    crowd.follow(crowd.publisher.issues[-1], DAYS * 24)
    now = rollout.steps[1][1]
    let_in = crowd._place < rollout.share(now)
    names = crowd.names[:300]
    assert [rollout.includes(n, "", now) for n in names] == let_in[:300].tolist()
    assert place(rollout.id, names[0]) == crowd._place[0]


def test_a_seed_gives_the_same_figures_and_another_one_others(rounds):
    def facts(seed):
        found = simulate(rounds, devices=200, days=14, seed=seed)
        return found.releases, found.counts, found.running

    first = facts(1)
    assert facts(1) == first
    assert facts(2) != first


def test_devices_that_cannot_go_on_are_counted(rounds, monkeypatch):
    # As it was before a route had one patch at least: nothing to fetch, for ever.
    monkeypatch.setattr(kinds, "route", lambda *_: ())
    found = simulate(rounds, devices=50, days=7, seed=1)
    assert any("stranded" in problem for problem in found.missed())


def test_a_run_may_be_the_folder_that_one_is_in(rounds, monkeypatch):
    monkeypatch.chdir(rounds)
    assert simulate(Path(), devices=20, days=7, seed=1).counts["updates"]


@pytest.mark.parametrize(
    ("program", "least"), [(simulate_fleet, 2), (load_fleet, 2), (bench_fleet, 5)]
)
@pytest.mark.parametrize("count", [0, 1])
def test_a_run_with_too_few_updates_is_refused_with_their_number(
    program, least, count, new_run, command
):
    run = new_run("short")
    for number in range(count):
        run.add(number)
    code, _, err = command(program.main, "--run", run.path)
    assert code == 3
    assert f"short has {count} rounds that update anything, expected" in err
    assert f"with {least} or more" in err


def test_a_folder_that_is_missing_is_told_before_the_work(tmp_path, command):
    output = tmp_path / "none" / "fleet.svg"
    code, out, err = command(simulate_fleet.main, "--run", tmp_path, "--output", output)
    assert (code, out, f"{output.parent} is no folder" in err) == (2, "", True)


def test_one_device_does_not_miss_the_share_of_a_step(rounds):
    found = simulate(rounds, devices=1, days=7, seed=1)
    assert any(release.steps for release in found.releases)
    assert found.missed() == []


@pytest.mark.parametrize(("devices", "within"), [(100_000, "1.0%"), (1000, "6.5%")])
def test_a_step_that_lets_in_too_many_is_missed(rounds, devices, within):
    found = simulate(rounds, devices=20, days=7, seed=1)
    release = replace(found.releases[0], steps=((500, 0.57),))
    (line,) = replace(found, devices=devices, releases=(release,)).missed()
    assert line.endswith(f"57.0% took part, expected 50.0% within {within}")


def test_table_and_picture_say_what_was_found(rounds):
    found = simulate(rounds, devices=500, days=28, seed=1)
    text = table(found, {"cores": 2})
    assert f"{found.counts['exposed']:,}" in text
    assert "| halted |" in text
    ElementTree.fromstring(draw(found))
    assert simulate_fleet.TIME_BAR_S == 10
