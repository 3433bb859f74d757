# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from edge_runtime.errors import ContractError
from edge_runtime.formats.contract import InputSpec
from edge_runtime.formats.contract_file import parse_contract
from packager.bundles.derived_contract import make_contract
from packager.models.read import read_model


def test_the_contract_is_derived_from_the_graph(old):
    contract = parse_contract(make_contract(read_model(old)))
    assert contract.inputs == (InputSpec("x", "float32", (None, 6)),)
    assert contract.outputs[0].shape == (None, 3)
    assert (contract.classes, contract.accuracy_floor) == ((), 0.0)


def test_what_is_stated_replaces_what_is_derived(old, tmp_path):
    stated = {"classes": ["a", "b", "c"], "inputs": [{"scale": 0.5}]}
    (tmp_path / "c.json").write_text(json.dumps(stated))
    contract = parse_contract(make_contract(read_model(old), tmp_path / "c.json"))
    assert contract.classes == ("a", "b", "c")
    assert contract.inputs == (InputSpec("x", "float32", (None, 6), 0.5),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ('{"inputs": [{"name": "image"}]}', "an input 'image', the graph takes x"),
        ('{"inputs": [{"scale": "a"}]}', "malformed"),
        ('{"inputs": [{"scale": 0}]}', "'scale' is .*other than 0"),
        ('{"inputs": [{"std": [1, 1e-50, 1, 1, 1, 1]}]}', "a std of 0, by which"),
        ('{"output_tolerance": -1}', "'output_tolerance' is -1"),
        ('{"inputs": [{}, {"name": "x"}]}', "the input 'x' twice"),
        ('{"outputs": [{"name": "z"}]}', "the outputs z; the graph .* y"),
        ('{"inputs": [{"shape": [0, 6]}]}', "'shape' is .* whole numbers from 1 on"),
        ('{"inputs": [{"shape": [null, 7]}]}', r"\[None, 7\], and the graph takes"),
        ('{"inputs": [{"shape": [null, null]}]}', r"takes float32 \[None, 6\]"),
        ('{"inputs": [{"shape": [6]}]}', r"\[6\], and the graph takes"),
        ('{"inputs": [{"dtype": "uint8"}]}', "is uint8 .* takes float32 .*'scale'"),
        ('{"schema": 9}', "c.json: .*schema 9"),
        ('{"clases": []}', "c.json: 'clases' is no field; there are .*classes"),
        ('{"inputs": [{"sclae": 1}]}', "'sclae' is no field; there are .*scale"),
        ('{"inputs": [5]}', "c.json is malformed: 'inputs' .* a list of objects"),
        ('{"inputs": [{}, null]}', "a list of objects"),
        ('{"inputs": [""]}', "a list of objects"),
        ('{"inputs": {"name": "x"}}', "a list of objects"),
        ('{"inputs": [{"name": []}]}', r"an input \[\], the graph takes x"),
    ],
)
def test_a_contract_that_does_not_fit_is_refused(old, tmp_path, text, words):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ContractError, match=words):
        make_contract(read_model(old), tmp_path / "c.json")
