# SPDX-License-Identifier: Apache-2.0
"""Init weights come back bit for bit from a seed."""

import json

import numpy as np
import pytest

from edge_runtime.errors import WeightsError
from edge_runtime.formats.init_weights import (
    InitSpec,
    TensorInit,
    read_init_spec,
    write_init_spec,
)

RECIPE = InitSpec(
    1,
    {
        "w": TensorInit("F32", (300, 1000), "uniform", 0.25),
        "b": TensorInit("F32", (7,), "constant", 1.5),
        "steps": TensorInit("I64", (), "constant", 3),
        "table": TensorInit("F16", (2, 2), "file"),
    },
    {"table": np.arange(4, dtype="f2").reshape(2, 2)},
)


def test_the_same_seed_gives_the_same_bits_for_ever():
    # Computed once; a change here would break every device in the field.
    assert RECIPE.generate().fingerprint == (
        "d888a8ea2803ebe0eeea44b1c1db7f15e8ecd8c2469b995c8e1ddfb80aec679f"
    )


def test_uniform_values_fill_their_interval():
    values = RECIPE.generate()["w"]
    assert values.dtype == np.float32
    assert -0.25 <= values.min() < -0.2499
    assert 0.2499 < values.max() < 0.25
    assert abs(values.mean()) < 1e-3
    assert abs(values.std() - 0.25 / 3**0.5) < 1e-3


def test_another_seed_or_name_gives_other_values():
    w = TensorInit("F32", (100,), "uniform", 1.0)
    one = InitSpec(1, {"a": w, "b": w}, {}).generate()
    two = InitSpec(2, {"a": w, "b": w}, {}).generate()
    assert not np.array_equal(one["a"], two["a"])
    assert not np.array_equal(one["a"], one["b"])


def test_constants_and_stored_tensors_come_back():
    weights = RECIPE.generate()
    assert weights["b"].tolist() == [1.5] * 7
    assert weights["steps"].shape == ()
    assert weights["steps"] == 3
    assert weights["table"].tolist() == [[0, 1], [2, 3]]


def test_a_recipe_survives_its_files(tmp_path):
    write_init_spec(RECIPE, tmp_path)
    assert read_init_spec(tmp_path).generate().data == RECIPE.generate().data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema=3), "schema 3"),
        (lambda r: r.pop("seed"), "malformed"),
        (lambda r: r["tensors"]["w"].update(dtype="F64"), "must be F32"),
        (lambda r: r["tensors"]["w"].update(kind="normal"), "not valid"),
        (lambda r: r["tensors"]["w"].update(shape=[-1]), "'shape' is .-1., expected"),
        (lambda r: r["tensors"]["table"].update(shape=[4]), "differs"),
        (lambda r: r["tensors"]["b"].update(kind="file"), "missing"),
        (lambda r: r["tensors"]["b"].update(dtype=[]), "'b', is malformed: 'dtype' is"),
        (
            lambda r: r["tensors"]["b"].update(value=10**400),
            "'value' is 1000.*, expected",
        ),
    ],
)
def test_a_malformed_recipe_is_refused(tmp_path, change, message):
    write_init_spec(RECIPE, tmp_path)
    path = tmp_path / "init.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(WeightsError, match=message):
        read_init_spec(tmp_path)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("dtype", "kind", "value"),
    [
        ("I8", "constant", NAN),
        ("I8", "constant", INF),
        ("I8", "constant", 128.0),
        ("I64", "constant", 2.0**63),
        ("U64", "constant", -1.0),
        ("BF16", "constant", NAN),  # its bits are whole numbers here
        ("F16", "constant", 65536.0),
        ("F32", "constant", 1e39),
        ("F32", "uniform", NAN),
        ("F32", "uniform", INF),
        ("F32", "uniform", 1e39),
    ],
)
def test_a_value_that_is_none_of_its_type_is_refused(tmp_path, dtype, kind, value):
    recipe = InitSpec(1, {"w": TensorInit(dtype, (3,), kind, value)}, {})
    write_init_spec(recipe, tmp_path)
    with pytest.raises(WeightsError, match="'w' is not valid"):
        read_init_spec(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("I8", -128.0), ("U8", 255.0), ("BOOL", 1.0), ("F16", 65504.0), ("F32", -INF)],
)
def test_a_value_at_the_end_of_its_type_is_taken(tmp_path, dtype, value):
    init = TensorInit(dtype, (3,), "constant", value)
    write_init_spec(InitSpec(1, {"w": init}, {}), tmp_path)
    assert read_init_spec(tmp_path).generate()["w"].tolist() == [value] * 3


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\xff"])
def test_text_that_is_no_recipe_is_refused(tmp_path, text):
    (tmp_path / "init.json").write_text(text, "latin-1")
    with pytest.raises(WeightsError, match="malformed"):
        read_init_spec(tmp_path)
