# SPDX-License-Identifier: Apache-2.0
"""Contracts as people give them: an object, its fields, or a JSON file of these."""

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

from edge_runtime.errors import ContractError
from edge_runtime.formats.contract import WIDE_SCHEMA, Contract, parse_contract
from edge_runtime.formats.json_file import read_record

GivenContract = Contract | Mapping[str, Any] | str | PathLike[str]


def as_contract(given: GivenContract) -> Contract:
    """Return a contract, however it is given.

    Args:
        given: A contract; its fields as ``contract.json`` has them, of which only
            ``inputs`` are needed; or the path of a JSON file with such fields.

    Raises:
        OSError: The file cannot be read.
        ContractError: The fields are malformed.
    """
    if isinstance(given, Contract):
        return given
    if isinstance(given, Mapping):
        fields: Mapping[str, Any] = given
    else:
        what = f"the contract {given}"
        fields = read_record(given, "contract_bytes", what, ContractError).values
    try:
        text = json.dumps({"schema": WIDE_SCHEMA} | dict(fields))
    except (TypeError, ValueError) as err:
        raise ContractError(
            f"the contract holds what JSON has no word for ({err}); give texts, "
            "numbers, lists and None"
        ) from err
    return parse_contract(text)
