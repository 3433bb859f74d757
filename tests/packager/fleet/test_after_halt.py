# SPDX-License-Identifier: Apache-2.0
"""What may follow a halt, by its commands."""

import json

import pytest

from edge_runtime.formats.signing import Trust, load_public
from edge_runtime.sync.head_file import read_head
from edge_runtime.times import utc
from packager.cli.fleet import fleet
from packager.fleet import after_halt
from packager.fleet.place import FolderPlace
from packager.keys import write_key_pair
from tests.packager.fleet.reporting import Fake


class Operator:
    """Somebody with a run, a channel and its keys."""

    def __init__(self, run, path, command):
        self.run, self.www, self.command = run, path / "www", command
        self.keys = {name: path / f"{name}.pem" for name in ("release", "watch")}
        for key in self.keys.values():
            write_key_pair(key)

    def do(self, name, *args, code=0):
        sign = ["--sign", self.keys["release"]] if name != "pause" else []
        given = name, *args, *sign, "--json"
        found, out, err = self.command(fleet, *given)
        assert found == code, err
        return json.loads(out) if out else err

    def publish(self, number, *args):
        self.do("publish", f"round_{number:02d}", *self.to, *args)

    @property
    def to(self):
        return "--runs", self.run.path.parent, "--to", self.www

    @property
    def head(self):
        signed = read_head((self.www / "stable.head").read_bytes())
        pem = self.keys["release"].with_suffix(".pub.pem").read_bytes()
        signed.check(Trust((load_public(pem),)))
        return signed


@pytest.fixture
def operator(run, tmp_path, command):
    for number in (2, 3):
        run.add(number)
    return Operator(run, tmp_path, command)


def test_revert_goes_to_the_release_before_with_the_next_counter(operator):
    for number in (0, 1, 2):
        operator.publish(number)
    done = operator.do("revert", *operator.to)
    assert (done["round"], done["counter"], done["version"]) == (1, 3, 4)


def test_revert_passes_over_what_was_itself_taken_back(operator):
    for number in (0, 1, 2):
        operator.publish(number)
    operator.do("revert", "round_00", *operator.to)
    operator.publish(3)
    done = operator.do("revert", *operator.to)
    assert done["round"] == 0


def test_revert_given_twice_takes_back_one_release(operator):
    for number in (0, 1, 2):
        operator.publish(number)
    given = (), (), ("round_00",), ()
    found = [operator.do("revert", *rounds, *operator.to) for rounds in given]
    assert [done["round"] for done in found] == [1, 1, 0, 0]
    assert [done["counter"] for done in found] == [3, 3, 4, 4]


def test_what_was_halted_after_it_took_a_release_back_is_taken_back_too(operator):
    watch = operator.keys["watch"]
    for number in (0, 1, 2):
        operator.publish(number, "--pauser", watch.with_suffix(".pub.pem"))
    operator.do("revert", *operator.to)
    operator.do("pause", operator.www, "--key", watch)
    assert operator.do("revert", *operator.to)["round"] == 0


def test_a_good_release_that_comes_meanwhile_is_not_taken_back(operator, monkeypatch):
    for number in (0, 1, 2):
        operator.publish(number)
    real = after_halt.release_before

    def slow(*args):
        operator.publish(3)
        return real(*args)

    monkeypatch.setattr(after_halt, "release_before", slow)
    assert "went on to round 3" in operator.do("revert", *operator.to, code=7)
    assert operator.head.head.round == 3


def test_revert_goes_on_from_the_head_of_keys_that_sign_no_more(operator, tmp_path):
    for number in (0, 1):
        operator.publish(number)
    old, operator.keys["release"] = operator.keys["release"], tmp_path / "new.pem"
    write_key_pair(operator.keys["release"])
    assert "--former" in operator.do("revert", *operator.to, code=8)
    former = "--former", old.with_suffix(".pub.pem")
    assert operator.do("revert", *operator.to, *former)["round"] == 0
    assert operator.head.head.round == 0


def test_revert_keeps_the_groups_and_the_key_that_may_pause(operator):
    watch = operator.keys["watch"].with_suffix(".pub.pem")
    operator.publish(0)
    operator.publish(1, "--group", "lab", "--pauser", watch)
    operator.do("revert", *operator.to)
    assert operator.head.head.rollout.groups == ("lab",)
    assert len(operator.head.head.pausers) == 1


def test_revert_tries_without_writing(operator):
    operator.publish(0)
    operator.publish(1)
    before = (operator.www / "stable.head").read_bytes()
    assert operator.do("revert", *operator.to, "--dry-run")["round"] == 0
    assert (operator.www / "stable.head").read_bytes() == before


def test_revert_says_what_it_lacks(operator, tmp_path):
    words = operator.do("revert", *operator.to, code=3)
    assert "no channel" in str(words)
    operator.publish(0)
    words = operator.do("revert", *operator.to, code=2)
    assert "name the ROUND" in str(words)
    other = "--runs", tmp_path / "none", "--to", operator.www
    assert "give --runs" in str(operator.do("revert", *other, code=2))


def test_resume_goes_on_once(operator):
    watch = operator.keys["watch"]
    operator.publish(0, "--pauser", watch.with_suffix(".pub.pem"))
    assert operator.do("resume", operator.www)["changed"] is False
    operator.do("pause", operator.www, "--key", watch)
    assert operator.head.is_paused()
    found = operator.do("resume", operator.www)
    assert (found["changed"], found["version"]) == (True, 2)
    assert not operator.head.is_paused()


def test_resume_brings_tuf_along_though_the_head_went_on_before(operator):
    watch, tuf = operator.keys["watch"], ("--tuf", operator.www.parent / "tuf-keys")
    operator.publish(0, "--pauser", watch.with_suffix(".pub.pem"), *tuf)
    operator.do("pause", operator.www, "--key", watch)
    operator.do("resume", operator.www)  # as if killed behind the head
    found = operator.do("resume", operator.www, *tuf)
    assert (found["changed"], found["tuf"]["changed"]) == (False, True)


def test_resume_says_when_the_shares_come(operator):
    watch = operator.keys["watch"]
    steps = "--rollout", "1%,2.5%@24h,100%@48h"
    operator.publish(0, "--pauser", watch.with_suffix(".pub.pem"), *steps)
    operator.do("pause", operator.www, "--key", watch)
    given = "resume", operator.www, "--sign", operator.keys["release"]
    _, out, _ = operator.command(fleet, *given)
    (_, second), (_, third) = operator.head.head.rollout.steps[1:]
    assert out.endswith(f"version 2; 2.5% from {utc(second)}; 100% from {utc(third)}\n")


@pytest.mark.parametrize("more", [(), ("--rollout", "100%"), ("--dry-run",)])
def test_what_is_halted_is_not_published_again(operator, more):
    watch = operator.keys["watch"]
    operator.publish(0, "--pauser", watch.with_suffix(".pub.pem"))
    operator.do("pause", operator.www, "--key", watch)
    words = operator.do("publish", "round_00", *operator.to, *more, code=3)
    assert "the rollout of round_00 is paused" in words
    assert operator.head.is_paused()


def test_what_a_halted_release_lost_comes_back_though_it_stays_halted(operator):
    watch = operator.keys["watch"]
    operator.publish(1, "--pauser", watch.with_suffix(".pub.pem"))
    operator.do("pause", operator.www, "--key", watch)
    (bundle,) = (operator.www / "bundles").iterdir()
    bundle.unlink()
    tuf = operator.run.path.parent / "tuf-keys"
    operator.do("publish", "round_01", *operator.to, "--tuf", tuf, code=3)
    assert bundle.exists()
    assert (operator.www / "tuf" / "timestamp.json").exists()


@pytest.mark.parametrize(
    "args", [("--halt-at", "2%"), ("--halt-at", "200%"), ("--halt-at", "x")]
)
def test_watch_says_what_it_lacks(operator, tmp_path, command, args):
    operator.publish(0)
    given = "watch", operator.www, "--once", "--devices", tmp_path, *args
    code, _, err = command(fleet, *given)
    assert code == 2
    assert "--pause-key" in err or "expected 2%" in err


def test_watch_needs_keys_of_devices(operator, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    operator.publish(0)
    (tmp_path / "keys").mkdir()
    given = "watch", operator.www, "--once", "--devices", tmp_path / "keys"
    code, _, err = command(fleet, *given)
    assert code == 2
    assert "dpu-edge device-key" in err


def test_watch_goes_on_and_says_what_is_new_or_fails_once(
    operator, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    operator.publish(0)
    Fake("board7", FolderPlace(operator.www), tmp_path / "keys").send(operator.head)
    head, slept = operator.www / "stable.head", []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            head.rename(head.with_suffix(".away"))
        if len(slept) == 6:
            head.with_suffix(".away").rename(head)
        if len(slept) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr("packager.cli.fleet_watch.time.sleep", sleep)
    given = "watch", operator.www, "--devices", tmp_path / "keys", "--every", "5s"
    code, out, err = command(fleet, *given, "-o", tmp_path / "fleet.html")
    assert (code, set(slept)) == (130, {5})
    assert out.count("was tried by 1 devices and failed on 0") == 2
    assert err.count("no channel 'stable'") == 1
    assert (tmp_path / "fleet.html").read_text().startswith("<!doctype html>")
