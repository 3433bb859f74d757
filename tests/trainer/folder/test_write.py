# SPDX-License-Identifier: Apache-2.0
"""Run folders: complete or absent, and consistent with the bytes in them."""

import dataclasses
import hashlib
import json
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from edge_runtime.errors import ContractError, RoundError, TrainingError
from edge_runtime.formats.contract import InputSpec
from edge_runtime.formats.contract_file import parse_contract
from edge_runtime.formats.identity import network_id, parse_run, read_run
from edge_runtime.formats.init_weights import InitSpec, TensorInit, read_init_spec
from edge_runtime.formats.model_folder import Outcome, list_rounds
from edge_runtime.formats.weights import pack_weights, read_weights
from edge_runtime.update.golden import read_golden
from trainer.folder.contract import make_contract
from trainer.folder.record import RoundRecord, read_round_record
from trainer.folder.write import (
    read_shadow,
    read_shadow_terms,
    write_model,
    write_round,
)

GRAPH = b"a graph"
RECIPE = InitSpec(
    3,
    {
        "fc.weight": TensorInit("F32", (3, 5), "uniform", 0.5),
        "fc.bias": TensorInit("F32", (3,), "constant", 0.0),
    },
    {},
)
INIT = RECIPE.generate()
CONTRACT = make_contract((1, 2, 2), "012")
IMAGES = np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2)
MASK = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 1, 0, 0, 0]]).bool()
EPOCHS = [{"epoch": 0, "phase": "full", "loss": 1.5}, {"epoch": 1, "loss": 1.0}]


def changed(weights, by=1.0):
    tensors = {name: np.array(array) for name, array in weights.items()}
    tensors["fc.weight"][MASK.numpy()] += by
    return pack_weights(tensors)


def record(number, base, **changes):
    values = {
        "parent": base.fingerprint,
        "run": "digits",
        "round": number,
        "counter": number,
        "outcome": Outcome.UPDATED,
        "method": "dpu",
        "ratio": 0.2,
        "reinitialised": False,
        "packable": True,
        "samples": 100,
        "metrics": {"val_accuracy": 0.5, "test_accuracy": 0.25},
        "seeds": {"run": 3},
        "config": {"run": {"name": "digits"}},
    }
    return RoundRecord(**values | changes)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "digits"
    labels = np.array([0, 2], np.int32)
    write_model(
        folder,
        graph=GRAPH,
        recipe=RECIPE,
        contract=CONTRACT,
        golden_inputs=IMAGES,
        golden_labels=labels,
    )
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_model_folder_holds_what_was_given(run):
    model = run / "model"
    assert names(model) == [
        "contract.json",
        "golden.npz",
        "graph.onnx",
        "init.json",
        "run.json",
    ]
    assert read_run(model).name == "digits"
    assert (model / "graph.onnx").read_bytes() == GRAPH
    assert parse_contract((model / "contract.json").read_bytes()) == CONTRACT
    assert read_init_spec(model).generate().fingerprint == INIT.fingerprint
    with np.load(model / "golden.npz", allow_pickle=False) as golden:
        assert golden["inputs"].dtype == np.uint8
        assert golden["inputs"].tolist() == IMAGES.tolist()
        assert golden["labels"].dtype == np.int64
        assert golden["labels"].tolist() == [0, 2]


def test_a_round_states_the_identities_of_its_bytes(run):
    target = changed(INIT)
    written = write_round(run, record(0, INIT), target, {"fc.weight": MASK}, EPOCHS)
    folder = run / "round_00"
    assert names(folder) == [
        "metrics.jsonl",
        "round.json",
        "selection.safetensors",
        "weights.safetensors",
    ]
    raw = json.loads((folder / "round.json").read_text())
    assert list(raw) == [
        "schema", "run", "round", "counter", "outcome", "model", "parent", "target",
        "method", "ratio", "reinitialised", "tried_reinit", "packable", "samples",
        "metrics", "seeds",
        "versions", "config",
    ]  # fmt: skip
    file = (folder / "weights.safetensors").read_bytes()
    assert raw["target"] == hashlib.sha256(file).hexdigest()
    network = network_id(target.layout.header, GRAPH)
    assert raw["model"] == network[:32] + read_run(run / "model").id
    assert raw["schema"] == 2
    assert set(raw["versions"]) == {"python", "torch", "numpy"}
    assert "+" not in "".join(raw["versions"].values())
    assert raw["outcome"] == "updated"
    assert read_round_record(folder) == written
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == EPOCHS


def test_masks_are_packed_lowest_bit_first(run):
    write_round(run, record(0, INIT), changed(INIT), {"fc.weight": MASK}, EPOCHS)
    selection = read_weights(run / "round_00" / "selection.safetensors")
    assert selection["fc.weight"].tolist() == [0b0000_0001, 0b0000_1010]
    unpacked = np.unpackbits(selection["fc.weight"], count=15, bitorder="little")
    assert unpacked.reshape(3, 5).tolist() == MASK.int().tolist()
    assert "fc.bias" not in selection


def test_rounds_are_listed_in_order_of_their_number(run):
    parent = INIT
    for number in (0, 9, 10, 100):
        target = changed(parent)
        write_round(run, record(number, parent), target, {}, [])
        parent = target
    (run / "round_09.dpu").touch()
    assert [path.name for path in list_rounds(run)] == [
        "round_00",
        "round_09",
        "round_10",
        "round_100",
    ]
    assert list_rounds(run / "nowhere") == []


def test_a_kept_base_is_the_parent_itself(run):
    first = changed(INIT)
    write_round(run, record(0, INIT), first, {}, [])
    kept = record(1, first, outcome=Outcome.KEPT_BASE)
    written = write_round(run, kept, first, {}, [])
    assert written.target == written.parent == first.fingerprint


@contextmanager
def full_disk():
    """Let no file grow beyond 100 bytes, as on a disk that fills up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_interrupted_write_leaves_no_round_and_is_cleared_by_the_next(run):
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write_round(run, record(0, INIT), changed(INIT), {}, [])
    assert list_rounds(run) == []
    write_round(run, record(0, INIT), changed(INIT), {}, [])
    assert names(run) == ["model", "round_00"]


def test_what_was_trained_unseen_is_named_where_it_is_damaged(run):
    write_round(run, record(0, INIT), changed(INIT), {"fc.weight": MASK}, [], INIT)
    folder = run / "round_00"
    assert read_shadow(folder) is not None
    (folder / "shadow.safetensors").write_bytes(b"nothing")
    (folder / "shadow_subspaces.bin").write_bytes(b"nothing")
    with pytest.raises(RoundError, match=r"round_00/shadow\.safetensors is damaged"):
        read_shadow(folder)
    with pytest.raises(RoundError, match=r"shadow_subspaces\.bin is damaged"):
        read_shadow_terms(folder, 2)


def test_what_json_has_no_word_for_is_refused_before_writing(run):
    odd = record(0, INIT, metrics={"iou": np.float32(0.5)})
    with pytest.raises(TrainingError, match="or not JSON"):
        write_round(run, odd, changed(INIT), {"fc.weight": MASK}, [])
    assert not list_rounds(run)


def test_folders_are_never_written_twice(run):
    write_round(run, record(0, INIT), changed(INIT), {}, [])
    before = (run / "round_00" / "round.json").read_bytes()
    with pytest.raises(TrainingError, match="round_00 exists already"):
        write_round(run, record(0, INIT), changed(INIT, by=2), {}, [])
    assert (run / "round_00" / "round.json").read_bytes() == before


OTHER = pack_weights({"fc.weight": INIT["fc.weight"]})
WRONG = {
    "parent nobody has": (
        {"parent": "ab" * 32},
        changed(INIT),
        {},
        "neither a round of .* nor its init weights",
    ),
    "updated without a change": ({}, INIT, {}, "equal means kept_base"),
    "kept base that changed": (
        {"outcome": Outcome.KEPT_BASE},
        changed(INIT),
        {},
        "equal means kept_base",
    ),
    "target of other weights": (
        {"target": "cd" * 32},
        changed(INIT),
        {},
        "states target cdcd",
    ),
    "weights of another model": ({}, OTHER, {}, "tensor 'fc.bias'"),
    "mask of no tensor": (
        {},
        changed(INIT),
        {"fc.wieght": MASK},
        "'fc.wieght', which .* does not have",
    ),
    "mask of another shape": ({}, changed(INIT), {"fc.weight": MASK.T}, "'fc.weight'"),
    "mask of numbers": ({}, changed(INIT), {"fc.weight": MASK.int()}, "int32"),
    "loss that is no number": (
        {"metrics": {"val_accuracy": float("nan")}},
        changed(INIT),
        {},
        "not finite",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_an_inconsistent_round_before_writing(run, case):
    changes, weights, masks, message = WRONG[case]
    with pytest.raises(TrainingError, match=message):
        write_round(run, record(0, INIT, **changes), weights, masks, [])
    assert names(run) == ["model"]


def test_a_round_that_is_not_for_devices_may_lead_from_anywhere(run):
    unseen = changed(INIT, by=3)
    write_round(run, record(0, unseen, packable=False), changed(INIT), {}, [])
    assert not read_round_record(run / "round_00").packable


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (IMAGES[:1], [0, 1], "do not fit"),
        (IMAGES[:, :, :1], [0, 1], "do not fit"),
        (IMAGES, [0, 3], "0 to 2"),
        (IMAGES[:0], [], "one or more"),
    ],
)
def test_refuses_golden_samples_that_do_not_fit_the_contract(
    tmp_path, inputs, labels, message
):
    with pytest.raises(TrainingError, match=message):
        write_model(
            tmp_path / "run",
            graph=GRAPH,
            recipe=RECIPE,
            contract=CONTRACT,
            golden_inputs=inputs,
            golden_labels=np.array(labels),
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "outcome": 3}'],
)
def test_refuses_a_malformed_record(tmp_path, text):
    (tmp_path / "round.json").write_text(text)
    with pytest.raises(RoundError, match=r"round\.json"):
        read_round_record(tmp_path)


def test_fields_from_a_newer_minor_version_are_passed_over(run):
    write_round(run, record(0, INIT), changed(INIT), {}, [])
    path = run / "round_00" / "round.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"new": 1}))
    again = read_round_record(run / "round_00")
    # The metric stands there only where it is no accuracy.
    known = dataclasses.asdict(again).keys() | {"schema"}
    assert known - {"metric", "better"} == raw.keys()


def model_files(folder, **options):
    write_model(
        folder,
        graph=GRAPH,
        recipe=RECIPE,
        contract=CONTRACT,
        golden_inputs=IMAGES,
        golden_labels=np.array([0, 2]),
        **options,
    )
    return {path.name: path.read_bytes() for path in (folder / "model").iterdir()}


def test_every_run_is_drawn_an_id_of_its_own_unless_one_is_given(tmp_path):
    drawn = [read_run_of(model_files(tmp_path / str(n) / "mine")) for n in range(3)]
    assert len({run.id for run in drawn}) == 3
    given = [model_files(tmp_path / n / "mine", run_id="the one") for n in ("a", "b")]
    assert given[0] == given[1]


def read_run_of(files):
    return parse_run(files["run.json"])


def test_a_run_from_before_there_were_ids_keeps_its_identity(run):
    (run / "model" / "run.json").unlink()
    target = changed(INIT)
    written = write_round(run, record(0, INIT), target, {"fc.weight": MASK}, EPOCHS)
    assert written.model == network_id(target.layout.header, GRAPH)
    assert json.loads((run / "round_00" / "round.json").read_text())["schema"] == 1


def test_a_record_of_before_kept_the_tried_re_initialisation_among_its_numbers(run):
    write_round(run, record(0, INIT), changed(INIT), {}, [])
    path = run / "round_00" / "round.json"
    raw = json.loads(path.read_text())
    del raw["tried_reinit"]
    raw["metrics"]["tried_reinit"] = 1
    path.write_text(json.dumps(raw))
    assert read_round_record(run / "round_00").tried_reinit is True


MASK_INPUT = InputSpec("mask", "bool", (None, None))
TWO = dataclasses.replace(CONTRACT, inputs=(*CONTRACT.inputs, MASK_INPUT))
MASKS = np.ones((2, 5), bool)


def with_golden(folder, contract, inputs, labels=None):
    write_model(
        folder,
        graph=GRAPH,
        recipe=RECIPE,
        contract=contract,
        golden_inputs=inputs,
        golden_labels=labels,
    )
    return read_golden((folder / "model" / "golden.npz").read_bytes())


@pytest.mark.parametrize(
    "inputs", [{"mask": MASKS, "input": IMAGES}, (IMAGES, MASKS)], ids=["names", "row"]
)
def test_golden_inputs_of_several_inputs_are_kept_in_the_contracts_order(
    tmp_path, inputs
):
    golden = with_golden(tmp_path / "run", TWO, inputs, [0, 2])
    assert [array.tolist() for array in golden.inputs] == [
        IMAGES.tolist(),
        MASKS.tolist(),
    ]
    assert golden.labels.tolist() == [0, 2]


def test_golden_inputs_need_no_labels(tmp_path):
    assert with_golden(tmp_path / "run", CONTRACT, IMAGES).labels is None


@pytest.mark.parametrize(
    ("contract", "inputs", "words"),
    [
        (TWO, IMAGES, "by name, input, mask; got one array"),
        (TWO, {"input": IMAGES}, "by name, input, mask; got input"),
        (TWO, (IMAGES, MASKS[0]), r"do not fit the contract's input 'mask'"),
        (TWO, (IMAGES, MASKS[:1]), r"do not fit the contract's input 'mask'"),
    ],
)
def test_golden_inputs_that_are_no_row_for_each_label_write_nothing(
    tmp_path, contract, inputs, words
):
    with pytest.raises(TrainingError, match=words):
        with_golden(tmp_path / "run", contract, inputs, [0, 2])
    assert not (tmp_path / "run" / "model").exists()


def test_means_of_other_channels_are_refused_before_anything_is_trained():
    with pytest.raises(ContractError, match="3 values of mean, expected 1, or one"):
        make_contract((1, 8, 8), "abcd", mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
    last = make_contract((8, 8, 3), "abcd", mean=[0.1, 0.2, 0.3], layout="NHWC")
    assert last.inputs[0].layout == "NHWC"
