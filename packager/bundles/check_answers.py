# SPDX-License-Identifier: Apache-2.0
"""Before a patch between two models leaves: does the new one answer as devices ask?"""

from typing import Any

import onnx
from numpy.typing import NDArray

from edge_runtime.errors import (
    BackendError,
    BlockedError,
    ContractError,
    StoreError,
    TrialError,
)
from edge_runtime.formats.contract import Contract
from edge_runtime.formats.contract_file import parse_contract
from packager.bundles.derived_contract import make_contract
from packager.bundles.golden_inputs import candidates, made_up, problem_with
from packager.models.read import Model
from packager.rounds.golden import loaded


def check_answers(base: Model, target: Model) -> str:
    """Run a patch's target on made-up inputs, as a trial runs it on golden ones.

    Args:
        base: What devices hold; where its own answers are no good, they tell nothing.
        target: What they shall hold.

    Returns:
        Why nothing could be told; empty if it was run and is good.

    Raises:
        TrialError: Devices would refuse the target.
    """
    graph = onnx.load_model_from_string(target.graph).graph
    try:
        contract = parse_contract(make_contract(target))
        inputs = next(candidates(contract, graph), {})
        problem = _problem(target, contract, inputs) if inputs else None
        if inputs and problem is None:
            return ""
        with loaded(base.graph, contract, base.weights) as predictor:
            inputs = made_up(predictor, contract, graph)
    except (ContractError, StoreError, BackendError, BlockedError) as err:
        return str(err)
    except TrialError:
        return f"{problem}; so does {base.path.name}"
    problem = _problem(target, contract, inputs)
    if isinstance(problem, TrialError):
        raise problem
    return str(problem or "")


def _problem(
    model: Model, contract: Contract, inputs: dict[str, NDArray[Any]]
) -> TrialError | StoreError | BlockedError | None:
    with loaded(model.graph, contract, model.weights) as predictor:
        return problem_with(predictor, contract, inputs)
