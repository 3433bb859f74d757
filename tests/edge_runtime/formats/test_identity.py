# SPDX-License-Identifier: Apache-2.0
"""Two runs of one network are two models, and refusals say which is which."""

import json

import pytest

from edge_runtime.errors import WeightsError
from edge_runtime.formats.identity import (
    Identity,
    Run,
    encode_run,
    parse_run,
    read_run,
    run_id,
    same_network,
)

NETWORK, OTHER = "ab" * 32, "cd" * 32
ONE, TWO = Run("11" * 16, "digits"), Run("22" * 16)


def test_an_identity_names_network_and_run_by_half_of_it_each():
    model = Identity(NETWORK, ONE).model
    assert len(model) == 64
    assert model == NETWORK[:32] + ONE.id
    assert same_network(model, Identity(NETWORK, TWO).model)
    assert not same_network(model, Identity(OTHER, ONE).model)


def test_without_a_run_the_network_is_the_identity_as_it_always_was():
    assert Identity(NETWORK, None).model == NETWORK


def test_an_id_is_drawn_or_made_from_any_text_or_given_as_it_is():
    assert run_id() != run_id()
    assert run_id("blue") == run_id("blue") != run_id("red")
    assert run_id(ONE.id) == ONE.id
    assert run_id("AB" * 16) == "ab" * 16
    for text in ("", "blue", "\udcff", "00"):
        assert parse_run(encode_run(Run(run_id(text)))).id


@pytest.mark.parametrize(
    ("own", "model", "words"),
    [
        (ONE, NETWORK[:32] + TWO.id, "another run of this network (run 222222222222)"),
        (ONE, NETWORK[:32] + TWO.id, "this device holds run digits (111111111111)"),
        (TWO, NETWORK[:32] + ONE.id, "this device holds run 222222222222"),
        (ONE, NETWORK, "of a run without an id; this device holds run digits"),
        (None, NETWORK[:32] + ONE.id, "this device holds a model without a run's id"),
        (ONE, OTHER[:32] + ONE.id, "another network: it names model cdcdcdcdcdcd"),
    ],
)
def test_a_difference_is_said_in_words(own, model, words):
    assert words in Identity(NETWORK, own).difference(model)


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "\udcff", "\u202e"])
def test_no_name_reaches_a_terminal_that_would_act_on_it(name):
    assert parse_run(encode_run(Run(ONE.id, name))).name.isprintable()
    raw = json.dumps({"schema": 1, "id": ONE.id, "name": name}).encode()
    with pytest.raises(WeightsError, match=r"run\.json is malformed"):
        parse_run(raw)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 4000,
        b'{"schema": "1", "id": "%s"}' % ONE.id.encode(),
        b'{"schema": 1, "id": "%s", "id": "%s"}' % (ONE.id.encode(), TWO.id.encode()),
        b'{"schema": 1}',
        b'{"schema": 1, "id": 7}',
        b'{"schema": 1, "id": "../x"}',
        b'{"schema": 1, "id": "%s"}' % (b"AB" * 16),
        b'{"schema": 1, "id": "%s\\n"}' % ONE.id.encode(),
        b'{"schema": 1, "id": "%s", "name": 3}' % ONE.id.encode(),
        b'{"schema": 1, "id": "%s", "name": "%s"}' % (ONE.id.encode(), b"x" * 101),
    ],
)
def test_a_malformed_file_is_refused_by_its_name(record, tmp_path):
    (tmp_path / "run.json").write_bytes(record)
    with pytest.raises(WeightsError, match=r"run\.json is malformed"):
        read_run(tmp_path)


def test_a_huge_file_is_not_read_whole(tmp_path):
    with open(tmp_path / "run.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(WeightsError, match="4096 are accepted"):
        read_run(tmp_path)


def test_a_newer_schema_says_what_to_install():
    with pytest.raises(WeightsError, match=r"schema 2, this runtime knows 1; install"):
        parse_run(b'{"schema": 2, "id": "%s"}' % ONE.id.encode())


def test_a_folder_without_the_file_has_no_run(tmp_path):
    assert read_run(tmp_path) is None
