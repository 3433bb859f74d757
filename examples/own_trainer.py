# SPDX-License-Identifier: Apache-2.0
"""A trainer of one's own: round folders from NumPy, without ours and without torch.

    python examples/own_trainer.py --runs runs

A network of two layers learns by plain gradient descent; in each round the 2 % of the
weights that moved furthest stay, and the others go back. What the packager wants from a
trainer is all here: ``model/`` once, then one folder a round.
docs/round-folder.md has the rules.
"""

import argparse
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from edge_runtime.formats.identity import Run, encode_run, identify, run_id
from edge_runtime.formats.init_weights import InitSpec, TensorInit, write_init_spec
from edge_runtime.formats.weights import pack_weights, write_weights

FEATURES, HIDDEN, CLASSES = 16, 64, 4
WEIGHTS = ("first.weight", "second.weight")  # selected one by one
SHAPES = {
    "first.weight": (HIDDEN, FEATURES),
    "first.bias": (HIDDEN,),  # biases are the dense part: they may change freely
    "second.weight": (CLASSES, HIDDEN),
    "second.bias": (CLASSES,),
}
CENTRES = np.random.default_rng(5).normal(size=(CLASSES, FEATURES))


def samples(count, seed):
    """Four clouds of points; yours come from somewhere real."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    points = CENTRES[labels] + random.normal(0, 1.2, (count, FEATURES))
    return points.astype(np.float32), labels


def answers(weights, points):
    hidden = points @ weights["first.weight"].T + weights["first.bias"]
    active = np.maximum(hidden, 0)
    return active, active @ weights["second.weight"].T + weights["second.bias"]


def descend(weights, points, labels, *, masks=None, steps=200, rate=0.05):
    """Train in place; weights outside of ``masks`` stay where they are."""
    for _ in range(steps):
        active, scores = answers(weights, points)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        error = scores / scores.sum(1, keepdims=True)
        error[np.arange(len(labels)), labels] -= 1
        error /= len(labels)
        back = (error @ weights["second.weight"]) * (active > 0)
        gradient = {
            "first.weight": back.T @ points,
            "first.bias": back.sum(0),
            "second.weight": error.T @ active,
            "second.bias": error.sum(0),
        }
        for name, step in gradient.items():
            if masks and name in masks:
                step = step * masks[name]
            weights[name] -= (rate * step).astype(np.float32)


def select(base, trained, ratio):
    """Keep the weights that moved furthest: a mask for each matrix."""
    moved = {name: np.abs(trained[name] - base[name]) for name in WEIGHTS}
    every = np.concatenate([moved[name].ravel() for name in WEIGHTS])
    least = np.sort(every)[-int(ratio * every.size)]
    return {name: moved[name] >= least for name in WEIGHTS}


def graph_for(layout):
    """Describe the network without weights: they are where the weight file has them."""
    stored = []
    for tensor in layout.tensors:
        entry = TensorProto(name=tensor.name, data_type=TensorProto.FLOAT)
        entry.dims.extend(tensor.shape)
        entry.data_location = TensorProto.EXTERNAL
        place = {
            "location": "weights.safetensors",
            "offset": str(tensor.start),
            "length": str(tensor.stop - tensor.start),
        }
        for key, value in place.items():
            entry.external_data.add(key=key, value=value)
        stored.append(entry)
    nodes = [
        helper.make_node(
            "Gemm", ["input", "first.weight", "first.bias"], ["hidden"], transB=1
        ),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node(
            "Gemm", ["active", "second.weight", "second.bias"], ["output"], transB=1
        ),
    ]
    tensor_of = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "own",
        [tensor_of("input", TensorProto.FLOAT, ["batch", FEATURES])],
        [tensor_of("output", TensorProto.FLOAT, ["batch", CLASSES])],
        stored,
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    return model.SerializeToString(deterministic=True)


@contextmanager
def whole(folder):
    """Let a folder be filled under another name, then rename it: complete or absent."""
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was cut off
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.rename(folder)


def write_model(run):
    """Write ``model/``, and return the init weights and the graph."""
    spec = InitSpec(
        seed=1,
        tensors={
            name: TensorInit("F32", shape, "uniform", 0.3)
            if name in WEIGHTS
            else TensorInit("F32", shape, "constant", 0.0)
            for name, shape in SHAPES.items()
        },
        stored={},
    )
    init = spec.generate()
    graph = graph_for(init.layout)
    one = {"scale": 1.0, "mean": [0.0], "std": [1.0]}  # points go in as they are
    contract = {
        "schema": 1,
        "inputs": [
            {"name": "input", "dtype": "float32", "shape": [None, FEATURES], **one}
        ],
        "outputs": [{"name": "output", "dtype": "float32", "shape": [None, CLASSES]}],
        "classes": ["north", "east", "south", "west"],
        "accuracy_floor": 0.5,
        "output_tolerance": 1e-4,
    }
    points, labels = samples(32, seed=99)
    golden = {"inputs": points, "labels": labels.astype(np.int64)}
    with whole(run / "model") as folder:
        write_init_spec(spec, folder)
        (folder / "graph.onnx").write_bytes(graph)
        # Drawn once: devices of this run refuse patches of another one.
        (folder / "run.json").write_bytes(encode_run(Run(run_id(), run.name)))
        (folder / "contract.json").write_text(json.dumps(contract))
        np.savez(folder / "golden.npz", **golden)
    return init, graph


def write_round(run, number, weights, masks, *, parent, graph):
    """Write one round's folder, and return its weights."""
    target = pack_weights(weights)
    packed = {
        name: np.packbits(mask.ravel(), bitorder="little")
        for name, mask in masks.items()
    }
    record = {
        "schema": 2,  # because the run has an id
        "run": run.name,
        "round": number,
        "counter": number,
        "outcome": "updated",
        "model": identify(target.layout.header, graph, run / "model").model,
        "parent": parent.fingerprint,
        "target": target.fingerprint,
        "packable": True,
    }
    with whole(run / f"round_{number:02d}") as folder:
        write_weights(target, folder / "weights.safetensors")
        write_weights(pack_weights(packed), folder / "selection.safetensors")
        (folder / "round.json").write_text(json.dumps(record, indent=1))
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    run = parser.parse_args().runs / "numpy"
    if (run / "model").exists():
        parser.error(f"{run} is there already; remove it, or give another --runs")
    parent, graph = write_model(run)
    for number, count in enumerate((100, 200, 400)):
        points, labels = samples(count, seed=number)
        base = {name: array.copy() for name, array in parent.items()}
        weights = {name: array.copy() for name, array in parent.items()}
        descend(weights, points, labels)  # every weight moves
        masks = select(base, weights, ratio=0.1 if number == 0 else 0.02)
        for name, mask in masks.items():  # the others go back
            weights[name] = np.where(mask, weights[name], base[name])
        descend(weights, points, labels, masks=masks)  # only those move
        parent = write_round(run, number, weights, masks, parent=parent, graph=graph)
        test_points, test_labels = samples(500, seed=77)
        right = (answers(weights, test_points)[1].argmax(1) == test_labels).mean()
        print(f"round {number}: {right:.1%} right")


if __name__ == "__main__":
    main()
