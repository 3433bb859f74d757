# SPDX-License-Identifier: Apache-2.0
"""The first head of a channel, and what a person is told to do after it."""

import json
import shlex

import pytest

from edge_runtime.sync.head_file import read_head
from edge_runtime.update.device import Device
from packager.cli.fleet import fleet
from packager.keys import write_key_pair


@pytest.fixture
def begun(run, tmp_path, command):
    write_key_pair(tmp_path / "ops.pem")
    signed = ("--sign", tmp_path / "ops.pem")
    return command(fleet, "init", tmp_path / "www", run.path, *signed, "--json")


def test_a_new_place_gets_version_1_with_the_first_round_and_its_bundle(
    begun, run, tmp_path
):
    code, out, err = begun
    assert code == 0, err
    head = read_head((tmp_path / "www/stable.head").read_bytes()).head
    assert (head.version, head.round) == (1, 0)
    assert json.loads(out)["version"] == 1
    (bundle,) = (tmp_path / "www/bundles").iterdir()
    assert Device.install(tmp_path / "store", bundle).store.state.active_slot.round == 0


def test_what_comes_next_is_a_command_that_works(begun, run, tmp_path, command):
    line = next(x for x in begun[2].splitlines() if "dpu-fleet publish" in x)
    words = shlex.split(line.replace("round_NN", "round_01"))
    code, _, err = command(fleet, *words[words.index("publish") :])
    assert code == 0, err
    head = read_head((tmp_path / "www/stable.head").read_bytes()).head
    assert (head.version, head.round) == (2, 1)
    assert "init URL --trust ops.pub.pem" in begun[2]


def test_a_channel_that_is_there_stays_as_it_is(begun, run, tmp_path, command):
    before = (tmp_path / "www/stable.head").read_bytes()
    code, _, err = command(fleet, "init", tmp_path / "www", run.path)
    assert code == 2  # as wherever a name is taken
    assert "has the channel stable already, at version 1 (round 0)" in err
    assert (tmp_path / "www/stable.head").read_bytes() == before
    other = ("--channel", "beta")
    assert command(fleet, "init", tmp_path / "www", run.path, *other)[0] == 0


def test_a_run_is_found_by_its_name_and_what_is_none_is_named(run, tmp_path, command):
    runs = ("--runs", run.path.parent)
    code, out, _ = command(
        fleet, "init", tmp_path / "www", run.path.name, *runs, "--json"
    )
    assert (code, json.loads(out)["round"]) == (0, 0)
    code, _, err = command(fleet, "init", tmp_path / "other", "nothing", *runs)
    assert code == 2
    assert f"no run nothing, neither here nor in {run.path.parent}" in err
    assert not (tmp_path / "other").exists()
