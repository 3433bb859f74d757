# SPDX-License-Identifier: Apache-2.0
"""The one reader of JSON: bounded, and refuses by field name."""

import json
import sys
import time
import tracemalloc

import pytest

from edge_runtime.errors import ContractError, LimitError
from edge_runtime.formats.json_file import MAX_DEPTH, parse_record, read_record
from edge_runtime.limits import Limits, limits


def parse(text):
    return parse_record(text, "contract_bytes", "the contract", ContractError)


GOOD = {
    "text": "a",
    "flag": True,
    "whole": 3,
    "number": 0.5,
    "digest": "0f" * 32,
    "texts": ["a"],
    "numbers": [1, 2.5],
    "wholes": [1, 2],
    "record": {"inner": 1},
    "records": [{"inner": 1}, {"inner": 2}],
}
READERS = {
    "text": lambda r: r.text("text"),
    "flag": lambda r: r.flag("flag"),
    "whole": lambda r: r.integer("whole", most=9),
    "number": lambda r: r.number("number"),
    "digest": lambda r: r.digest("digest"),
    "texts": lambda r: r.texts("texts"),
    "numbers": lambda r: r.numbers("numbers"),
    "wholes": lambda r: r.integers("wholes"),
    "record": lambda r: r.record("record").integer("inner"),
    "records": lambda r: [entry.integer("inner") for entry in r.records("records")],
}
WRONG = (None, [], {}, "", -1, 1e300, 10, True, ["a", 1], [True], [[]], [-1], "0F" * 32)


@pytest.mark.parametrize("name", READERS)
def test_a_field_of_its_type_is_read(name):
    found = READERS[name](parse(json.dumps(GOOD)))
    assert found == {"record": 1, "records": [1, 2]}.get(name, GOOD[name])


@pytest.mark.parametrize("name", READERS)
def test_a_field_of_another_type_is_refused_by_its_name(name):
    refused = 0
    for wrong in WRONG:
        try:
            found = READERS[name](parse(json.dumps(GOOD | {name: wrong})))
        except ContractError as err:
            assert f"{name!r}" in str(err)
            assert "expected" in str(err)
            refused += 1
        else:
            assert type(found) in (type(GOOD[name]), type(wrong))
            assert not isinstance(found, bool) or name == "flag"
    assert refused >= len(WRONG) - 3
    with pytest.raises(ContractError, match="is nothing, expected"):
        READERS[name](parse(json.dumps({})))


def test_a_name_given_twice_behind_many_others_is_found_in_no_time():
    names = [*map(str, range(60_000)), "59999"]
    text = "{" + ",".join(f'"{name}":0' for name in names) + "}"
    begin = time.process_time()
    with pytest.raises(ContractError, match="'59999' is given twice"):
        parse(text)
    assert time.process_time() - begin < 5


def test_a_field_inside_is_named_with_what_is_around_it():
    record = parse(json.dumps(GOOD | {"records": [{"inner": 1}, {"inner": "x"}]}))
    words = r"the contract, 'records\[1\]', is malformed: 'inner' is 'x', expected"
    with pytest.raises(ContractError, match=words):
        READERS["records"](record)
    record = parse(json.dumps({"outer": {"inner": {"value": "x"}}}))
    with pytest.raises(ContractError, match="the contract, 'outer', 'inner', is"):
        record.record("outer").record("inner").integer("value")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "malformed"),
        ("[]", "no JSON object"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is given twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' is given twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is no number"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"\\udc80": 1}', "surrogates not allowed"),
        ('{"a": [{"\\udfff": 1}]}', "surrogates not allowed"),
        (b'{"a": "\xff"}', "utf-8"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        ('{"a": ' + "9" * 5000 + "}", "malformed"),
        ('{"a":' + "[" * (MAX_DEPTH + 1), "levels"),
        ("[" * 100_000, "levels"),
        ('{"a":' * 100_000, "levels"),
        ('{"a": "' + "[" * 50 + '", "b": 1', "malformed"),
    ],
)
def test_what_no_writer_of_ours_writes_is_refused(text, words):
    with pytest.raises(ContractError, match=words):
        parse(text)


def test_brackets_in_text_are_no_levels():
    text = "[" * 100 + '"{\\' + "]"
    assert parse(json.dumps({"a": text, "b": [[[1]]]})).text("a") == text


def test_strings_without_an_end_are_looked_at_once():
    """A pattern that tries each quote anew would not end in hours."""
    parse_bad = '{"a": ' + "[" * 20 + "{" * 20 + '"' + '\\"' * 1_500_000
    with pytest.raises(ContractError):
        parse(parse_bad)


def test_size_and_values_are_looked_at_before_anything_is_parsed(monkeypatch):
    def none(*_, **__):
        raise AssertionError("parsed")

    monkeypatch.setattr(json, "loads", none)
    for text, name in (
        ('{"a": "' + "x" * (5 << 20) + '"}', "contract_bytes"),
        ('{"a": [' + "1," * limits().json_values + "1]}", "json_values"),
        ('{"a": [' + "[],{}," * 400_000 + "1]}", "json_values"),
    ):
        with pytest.raises(ContractError, match=f"set DPU_LIMITS={name}="):
            parse(text)


def test_no_file_that_is_accepted_takes_much_memory():
    """Twenty megabytes of the worst that the limits let through."""
    worst = '{"a": [' + ",".join(['{"b":0}'] * 499_000) + "]}"
    tracemalloc.start()
    try:
        parse_record(worst.encode(), "recipe_bytes", "the recipe", ContractError)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_a_file_is_read_as_its_bytes_are(tmp_path):
    path = tmp_path / "contract.json"
    path.write_text(json.dumps(GOOD))
    found = read_record(path, "contract_bytes", "the contract", ContractError)
    assert found.values == GOOD


# Limits -------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch):
    def say(text):
        monkeypatch.setenv("DPU_LIMITS", text)
        limits.cache_clear()

    yield say
    limits.cache_clear()


def test_whoever_needs_more_gets_it(environment):
    large = json.dumps({"a": "x" * (5 << 20)})
    with pytest.raises(ContractError, match="DPU_LIMITS=contract_bytes=5242889"):
        parse(large)
    environment("contract_bytes=6000000, tensors=7")
    assert len(parse(large).text("a")) == 5 << 20
    assert limits() == Limits(contract_bytes=6_000_000, tensors=7)


@pytest.mark.parametrize("text", ["nothing=1", "tensors", "tensors=", "tensors=-1"])
def test_a_limit_that_is_none_is_refused(environment, text):
    environment(text)
    with pytest.raises(LimitError, match="expected NAME=NUMBER; the names are"):
        limits()


def test_no_limit_is_larger_than_what_a_process_may_count():
    assert max(vars_of(Limits())) < sys.maxsize


def vars_of(found):
    return [getattr(found, name) for name in found.__dataclass_fields__]
