# SPDX-License-Identifier: Apache-2.0
"""What goes into a model: raw values become what the graph takes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.errors import ContractError
from edge_runtime.formats.contract import (
    METRICS,
    TASKS,
    Contract,
    InputSpec,
    OutputSpec,
)
from edge_runtime.formats.contract_file import encode_contract, parse_contract

IMAGE = InputSpec(
    "x", "float32", (None, 3, 2, 2), 1 / 255, (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
)


def test_images_are_scaled_and_normalised_per_channel():
    raw = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    found = IMAGE.prepare(raw)
    assert found.dtype == np.float32
    for channel, (mean, std) in enumerate(zip(IMAGE.mean, IMAGE.std, strict=True)):
        wanted = (raw[:, channel] / 255 - mean) / std
        np.testing.assert_allclose(found[:, channel], wanted, rtol=1e-6)


def test_a_single_sample_becomes_a_batch_of_one():
    assert IMAGE.prepare(np.zeros((3, 2, 2), np.uint8)).shape == (1, 3, 2, 2)


def test_one_mean_serves_all_channels():
    spec = InputSpec("x", "float32", (None, 4), 0.5, (1.0,), (2.0,))
    assert spec.prepare([[4, 6, 2, 0]]).tolist() == [[0.5, 1.0, 0.0, -0.5]]


def test_scaled_values_of_whole_numbers_are_rounded():
    spec = InputSpec("x", "uint8", (None, 3), 255.0)
    assert spec.prepare([[0.999, 0.001, 1.0]]).tolist() == [[255, 0, 255]]


@pytest.mark.parametrize("value", [1.01, -0.1, math.nan, math.inf])
def test_scaled_values_out_of_the_range_of_whole_numbers_are_refused(value):
    spec = InputSpec("x", "uint8", (None, 1), 255.0)
    with pytest.raises(ContractError, match="takes uint8, which cannot hold"):
        spec.prepare([[value]])


def test_values_of_double_precision_are_scaled_in_it():
    spec = InputSpec("x", "float64", (None, 1), 0.1, (1.0,), (3.0,))
    assert spec.prepare([[0.7]])[0, 0] == (0.7 * 0.1 - 1.0) / 3.0


def test_values_of_single_precision_are_scaled_in_it():
    raw = np.arange(256, dtype=np.uint8)[:, None]
    spec = InputSpec("x", "float32", (None, 1), 1 / 255, (0.1,), (0.3,))
    single = raw.astype(np.float32) * np.float32(1 / 255)
    wanted = (single - np.float32(0.1)) / np.float32(0.3)
    assert np.array_equal(spec.prepare(raw), wanted)


@pytest.mark.parametrize("dtype", ["i4", "u4", "i8", "u8", "f8"])
def test_raw_values_that_float32_would_round_keep_their_digits(dtype):
    seconds = np.array([[1_700_000_000], [1_700_000_030]], dtype)
    spec = InputSpec("x", "float32", (None, 1), 1.0, (1.7e9,), (60.0,))
    assert spec.prepare(seconds).tolist() == [[0.0], [0.5]]
    assert spec.prepare(seconds).dtype == np.float32


def test_a_std_of_zero_is_refused():
    with pytest.raises(ContractError, match="std of 0"):
        replace(IMAGE, std=(0.5, 0.0, 0.5))


def test_rows_of_different_lengths_are_no_input():
    with pytest.raises(ContractError, match="'x' is no array"):
        IMAGE.prepare([[1, 2], [3]])


def test_names_that_are_no_text_are_told():
    with pytest.raises(ContractError, match="got 1"):
        Contract((IMAGE,)).prepare({1: np.zeros((3, 2, 2))})


def test_values_pass_untouched_where_nothing_is_asked_for():
    ids = np.array([[2**53 + 1]])
    spec = InputSpec("ids", "int64", (None, 1))
    assert spec.prepare(ids)[0, 0] == 2**53 + 1


@pytest.mark.parametrize(
    "raw",
    [
        np.zeros((1, 3, 2, 3), np.uint8),
        np.zeros((2, 2), np.uint8),
        np.zeros((1, 1, 3, 2, 2), np.uint8),
        np.array([["text"]]),
        np.zeros((1, 3, 2, 2), complex),
    ],
)
def test_what_does_not_fit_is_refused_with_both_shapes(raw):
    with pytest.raises(ContractError, match=r"shape \[batch, 3, 2, 2\], got"):
        IMAGE.prepare(raw)


def contract(**fields):
    inputs = [{"name": n, "dtype": "float32", "shape": [None, 2]} for n in "ab"]
    return parse_contract(json.dumps({"schema": 1, "inputs": inputs} | fields))


def test_several_inputs_are_given_by_name():
    feed = contract().prepare({"a": [[1, 2]], "b": [[3, 4]]})
    assert feed["b"].tolist() == [[3, 4]]
    with pytest.raises(ContractError, match="by name, a, b; got one array"):
        contract().prepare([[1, 2]])
    with pytest.raises(ContractError, match="by name, a, b; got a"):
        contract().prepare({"a": [[1, 2]]})


def test_unknown_fields_are_ignored_for_later_versions():
    assert contract(invented_later=1).inputs[0].name == "a"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 1, "inputs": [{}]}']
)
def test_a_malformed_contract_is_refused(text):
    with pytest.raises(ContractError, match="malformed"):
        parse_contract(text)


@pytest.mark.parametrize("floor", [7, -0.1, math.nan])
def test_a_floor_that_is_no_share_is_refused_before_any_trial(floor):
    with pytest.raises(
        ContractError, match=r"accuracy_floor is .*, expected a share|NaN is no number"
    ):
        contract(accuracy_floor=floor)


def test_a_newer_schema_is_refused():
    with pytest.raises(ContractError, match="newer dpu-edge"):
        contract(schema=3)


def test_a_contract_is_read_as_it_was_written():
    outputs = (OutputSpec("y", "float32", (None, 4)), OutputSpec("z", "int64", None))
    written = Contract((IMAGE,), ("a", "b"), 0.25, 1e-3, outputs)
    assert parse_contract(encode_contract(written)) == written


def test_a_contract_that_says_nothing_of_outputs_is_still_one():
    record = json.loads(encode_contract(Contract((IMAGE,))))
    del record["outputs"]
    assert parse_contract(json.dumps(record)) == Contract((IMAGE,))


ONE = InputSpec("x", "float32", (None, 4))
TWO_OUTPUTS = (OutputSpec("y", "float32", (None, 4)), OutputSpec("n", "float32", None))


@pytest.mark.parametrize(
    "wide",
    [
        Contract((ONE, InputSpec("mask", "bool", (None, None)))),
        Contract((InputSpec("temperature", "float32", ()),)),
        *(Contract((ONE,), task=task) for task in TASKS if task != "classification"),
        *(Contract((ONE,), metric=metric) for metric in METRICS),
        Contract((ONE,), task="regression", bound=3.5),
        Contract((ONE,), outputs=TWO_OUTPUTS, random_outputs=("n",)),
    ],
)
def test_what_the_first_schema_has_no_word_for_is_written_in_the_second(wide):
    text = encode_contract(wide)
    assert json.loads(text)["schema"] == 2
    assert parse_contract(text) == wide


def test_what_the_first_schema_can_say_is_written_as_ever():
    record = json.loads(encode_contract(Contract((ONE,), ("a",), 0.5)))
    assert record["schema"] == 1
    assert not record.keys() & {"task", "metric", "bound", "random_outputs"}


def test_a_first_schema_means_what_it_meant_whatever_else_it_says():
    assert contract(task="nonsense", bound="high") == contract()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "poetry"}, "'task' is 'poetry', expected one of classification, "),
        ({"metric": "f1"}, "'metric' is 'f1', expected one of top1, "),
        ({"bound": "0.5"}, "'bound' is '0.5', expected a number"),
        ({"random_outputs": ["noise"]}, r"expected names of outputs \(none stated\)"),
    ],
)
def test_a_second_schema_says_what_it_knows(fields, words):
    with pytest.raises(ContractError, match=words):
        contract(schema=2, **fields)


def test_each_task_has_its_metric_and_classifiers_their_floor():
    assert Contract((ONE,), accuracy_floor=0.5).label_bound == 0.5
    assert Contract((ONE,), task="regression").label_metric == "mae"
    assert Contract((ONE,), task="regression").label_bound is None
    assert Contract((ONE,), task="free").label_metric == ""
    assert Contract((ONE,), metric="cosine", bound=0.9).label_bound == 0.9


def test_several_inputs_may_come_in_order_too():
    feed = contract().prepare((np.zeros((1, 2)), np.ones((1, 2))))
    assert feed["b"].tolist() == [[1, 1]]


# Where the channels are --------------------------------------------------------------


def test_channels_on_the_last_axis_are_normalised_there():
    last = replace(IMAGE, shape=(None, 2, 2, 3), layout="NHWC")
    raw = np.random.default_rng(0).integers(0, 256, (2, 3, 2, 2))
    found = last.prepare(raw.transpose(0, 2, 3, 1))
    assert np.array_equal(found.transpose(0, 3, 1, 2), IMAGE.prepare(raw))


def test_a_layout_is_written_only_where_it_is_not_the_usual_one():
    usual = Contract((IMAGE,))
    last = Contract((replace(IMAGE, shape=(None, 2, 2, 3), layout="NHWC"),))
    assert b"layout" not in encode_contract(usual)
    assert json.loads(encode_contract(last))["schema"] == 2
    assert parse_contract(encode_contract(last)) == last


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((None, 1, 8, 8), "NCHW"),
        ((None, 8, 8, 3), "NCHW"),
        ((None, 3, 8, 8), "NHWC"),
        ((None, 2), "NCHW"),
        ((None,), "NCHW"),
    ],
)
@pytest.mark.parametrize("field", ["mean", "std"])
def test_values_for_other_channels_than_there_are_are_refused_at_once(
    shape, layout, field
):
    with pytest.raises(ContractError, match=f"3 values of {field}, expected 1, or one"):
        InputSpec("x", "float32", shape, layout=layout, **{field: (1, 2, 3)})
    entry = {"name": "x", "dtype": "float32", "shape": shape, "layout": layout}
    with pytest.raises(ContractError, match=f"3 values of {field}"):
        contract(inputs=[entry | {field: [1, 2, 3]}])


def test_channels_of_any_number_are_counted_when_they_come():
    spec = InputSpec("x", "float32", (None, None), mean=(1, 2, 3))
    assert spec.prepare(np.zeros((2, 3))).tolist() == [[-1, -2, -3]] * 2
    with pytest.raises(ContractError, match=r"3 values of mean, .* the 4 channels"):
        spec.prepare(np.zeros((2, 4)))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_lone_number_is_normalised_as_an_array_is(layout):
    spec = InputSpec("t", "float32", (), 2.0, (0.5,), (0.25,), layout)
    found = spec.prepare(3)
    assert (found.shape, found.dtype, float(found)) == ((), np.float32, 22.0)


def test_a_layout_that_is_none_is_refused():
    entry = {"name": "x", "dtype": "float32", "shape": [None, 2], "layout": "HWC"}
    with pytest.raises(ContractError, match="'layout' is 'HWC', expected one of NCHW"):
        contract(inputs=[entry])
