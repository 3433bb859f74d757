# SPDX-License-Identifier: Apache-2.0
"""``dpu-edge infer`` and ``dpu-edge bench``."""

import functools
import io
import json
import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import Answer, emit, json_option, on_device, say
from edge_runtime.errors import ContractError, prefix_errors
from edge_runtime.formats.kinds import Kind
from edge_runtime.formats.model_folder import GOLDEN_NAME
from edge_runtime.parameters import FileOf, NewFile, Seconds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_runtime.formats.contract import Contract
    from edge_runtime.inference.inputs import Sample, Values
    from edge_runtime.inference.predictor import Predictor
    from edge_runtime.inference.session import RunOptions
    from edge_runtime.update.device import Device
    from edge_runtime.update.golden import Golden


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``options`` and ``batch``: how the model runs."""

    @click.option(
        "--threads", type=click.IntRange(0, 512), default=1, help="CPU threads; 0: all."
    )
    @click.option(
        "--batch",
        type=click.IntRange(1),
        help="Samples a call; by default 1, or all of a file (task free).",
    )
    @click.option("--spin", is_flag=True, help="Let idle threads spin for speed.")
    @click.option(
        "--backend",
        type=click.Choice(["auto", "onnxruntime", "numpy"]),
        default="auto",
        help="What runs the model. NumPy is slower, but needs nothing else.",
    )
    @functools.wraps(command)
    def with_options(
        *args: Any, threads: int, spin: bool, backend: str, **others: Any
    ) -> None:
        from edge_runtime.inference.session import Backend, RunOptions, choose_backend

        chosen = choose_backend(Backend(backend))
        if backend == "auto" and chosen is Backend.NUMPY:
            say("onnxruntime cannot be imported: NumPy computes")
        command(*args, options=RunOptions(threads, spin, chosen), **others)

    return with_options


@click.command()
@click.argument(
    "inputs",
    metavar="INPUT...",
    nargs=-1,
    type=FileOf(Kind.IMAGE, Kind.NPY, Kind.NPZ, dir_okay=True, allow_dash=True),
)
@click.option("--golden", is_flag=True, help="Use the golden inputs of the bundle.")
@click.option(
    "--top", type=click.IntRange(1), default=1, help="Classes to name per sample."
)
@_run_options
@click.option(
    "-o",
    "--output",
    type=NewFile(),
    help="Write raw outputs too: to a .npz file all by name, else the first as .npy.",
)
@json_option
@click.pass_obj
def infer(  # noqa: PLR0913 - one for each option
    root: Path,
    inputs: tuple[Path, ...],
    *,
    golden: bool,
    top: int,
    batch: int | None,
    options: "RunOptions",
    output: Path | None,
    as_json: bool,
) -> None:
    """Run the model on images, .npy and .npz files, JSON lines, or folders of these.

    A model of several inputs takes .npz files with an array for each input, by its
    name, or lines of JSON with an object of them. INPUT may be - for standard input.
    Prints one JSON object a sample, as soon as it is computed; with --json one object
    for all of them. A model that does not answer sample by sample (task "free") is
    asked once for each file or line, and everything that it gives is printed by name.
    --golden says at the end how many of the bundle's labels the answers are.
    """
    from edge_runtime.files import Files
    from edge_runtime.inference.inputs import read_calls
    from edge_runtime.update.device import Device

    if bool(inputs) == golden:
        raise click.UsageError("give INPUT files, or --golden")
    _insist_writable(output)
    device = Device.open(root)
    contract = device.store.contract
    predictor = device.predictor(options)
    number = predictor.store.state.active_slot.round
    _name_what_is_not_shown(predictor)
    calls = _golden_calls(device) if golden else read_calls(inputs, contract)
    samples, records = 0, list[dict[str, Any]]()
    found: list[tuple[int, dict[str, NDArray[Any]]]] = []
    for names, values in _in_turn(calls, contract, batch):
        outputs = _answers(predictor, values, names[0])
        if output is not None or golden:  # else they need not stay in memory
            found.append((len(names) if contract.by_rows else 0, outputs))
        for record in _records(outputs, names, contract, top):
            place = {"sample": samples, "input": record.pop("input")}
            line = place | {"round": number} | record
            samples += 1
            if as_json:
                records.append(line)
            else:
                print(json.dumps(line), flush=True)
    if not samples:
        raise ContractError("the inputs hold no sample; give at least one")
    if output is not None:
        data = _encoded(found, predictor.tensors[0], output)
        Files().replace(output, data, durable=False)
        say(f"wrote {output}")
    told = {"round": number, "backend": predictor.backend, "samples": records}
    if golden:
        told |= _score(device, [outputs for _, outputs in found])
    if as_json:
        emit(told, as_json=True, text="")


def _insist_writable(output: Path | None) -> None:
    """Insist on a place for the output before the work, which would be lost else."""
    # With a slash in the end, what is no folder has no such right.
    if output and not os.access(f"{output.parent}/", os.W_OK | os.X_OK):
        raise click.BadParameter(
            f"{output.parent} is no folder that this user may write to; make it, or "
            "give another",
            param_hint="--output",
        )


def _name_what_is_not_shown(predictor: "Predictor") -> None:
    for name, kind in predictor.outputs.items():
        if name not in predictor.tensors:
            say(
                f"output {name!r} is {kind}: it is not shown; export the model with "
                "tensors of numbers (scikit-learn: options={'zipmap': False})"
            )


def _golden_calls(device: "Device") -> "Iterator[Sample]":
    """Yield the golden inputs, as one call."""
    path = device.store.model_folder / GOLDEN_NAME
    contract = device.store.contract
    given = _golden(device).by_name(contract)
    yield str(path), {s.name: s.batch(given[s.name]) for s in contract.inputs}


def _golden(device: "Device") -> "Golden":
    from edge_runtime.reading import read_bounded
    from edge_runtime.update.golden import read_golden

    path = device.store.model_folder / GOLDEN_NAME
    with device.store.own():
        data = read_bounded(path, "golden_bytes", GOLDEN_NAME, ContractError)
        return read_golden(data)


def _in_turn(
    calls: "Iterator[Sample]", contract: "Contract", batch: int | None
) -> "Iterator[tuple[list[str], Values]]":
    """Yield what the model is asked at a time, and where each sample comes from."""
    from edge_runtime.inference.inputs import in_batches, in_samples

    if contract.by_rows or batch:
        size = batch or usual_batch(contract)
        yield from in_batches(in_samples(calls, contract), size, contract)
    else:
        for name, values in calls:
            yield [name], values


def usual_batch(contract: "Contract") -> int:
    """Return the number of samples that a model takes: 1 where it takes any."""
    from edge_runtime.inference.inputs import rows_of

    rows = rows_of(contract)  # what knows no batch may come first
    sizes = [spec.shape[0] for spec in contract.inputs if spec.name in rows]
    return next(filter(None, sizes), 1)


def _answers(
    predictor: "Predictor", values: "Values", name: str
) -> "dict[str, NDArray[Any]]":
    """Return all tensors by name; they are finite."""
    import numpy as np

    if not predictor.tensors:
        raise ContractError(
            "the model gives no tensor of numbers; export one that does"
        )
    with prefix_errors(name):
        outputs = predictor.predict_named(values)
    if not all(np.isfinite(values).all() for values in outputs.values()):
        raise ContractError(
            f"{name}: the model's answer is not finite; look for values that "
            "are not, or that are too large"
        )
    return outputs


def _records(
    outputs: "dict[str, NDArray[Any]]",
    names: list[str],
    contract: "Contract",
    top: int,
) -> "Iterator[dict[str, Any]]":
    """Yield what is printed: for each sample, or for the call as a whole."""
    first = next(iter(outputs.values()))
    if not contract.by_rows:
        whole = {name: values.tolist() for name, values in outputs.items()}
        where = names[0] if len(set(names)) == 1 else names
        yield {"input": where, "outputs": whole}
        return
    for name, values in outputs.items():
        if values.shape[:1] != (len(names),) and (values is first or len(names) > 1):
            raise ContractError(
                f"{names[0]}: the model gives {name!r} of shape {list(values.shape)} "
                f"for {len(names)} samples, expected a row for each; use --batch 1, or "
                "a bundle of task 'free'"
            )
    for row, name in enumerate(names):
        record = {"input": name} | _answer(first[row].ravel(), contract, top)
        if len(outputs) > 1:
            several = len(names) > 1
            record["outputs"] = {
                key: (values[row : row + 1] if several else values).tolist()
                for key, values in outputs.items()
            }
        yield record


def _encoded(
    found: "list[tuple[int, dict[str, NDArray[Any]]]]", first: str, path: Path
) -> bytes:
    """Return raw outputs as a file: rows are joined, what has none stays apart."""
    import numpy as np

    from edge_runtime.formats.arrays import encode_npz

    def joined(name: str) -> "dict[str, NDArray[Any]]":
        parts = [outputs[name] for _, outputs in found]
        if len(parts) == 1:
            return {name: parts[0]}
        counts = [(count,) for count, _ in found]
        if all(p.shape[:1] == n for p, n in zip(parts, counts, strict=True)):
            return {name: np.concatenate(parts)}
        return {f"{name}.{number}": part for number, part in enumerate(parts)}

    if path.suffix.lower() == ".npz":
        return encode_npz(
            {k: v for name in found[0][1] for k, v in joined(name).items()}
        )
    array, *others = joined(first).values()
    if others:
        raise ContractError(
            f"{len(found)} answers have no row for each sample and cannot be joined in "
            f"{path}; give a .npz file: -o {path.with_suffix('.npz')}"
        )
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def _score(
    device: "Device", outputs: "list[dict[str, NDArray[Any]]]"
) -> dict[str, Any]:
    """Hold answers to the golden inputs against the labels, and say what came out."""
    import numpy as np

    from edge_runtime.update.metrics import METRICS

    contract, labels = device.store.contract, _golden(device).labels
    metric = METRICS.get(contract.label_metric)
    firsts = [next(iter(each.values())) for each in outputs]
    flat = contract.label_metric == "top1" and firsts[0].ndim != 2
    if labels is None or metric is None or flat or not contract.by_rows:
        return {}
    with prefix_errors(GOLDEN_NAME):
        sums = metric.sums(np.concatenate(firsts), labels, contract.threshold)
    if metric.name != "top1":
        say(metric.shown(sums))
        return {metric.name: metric.value(sums)}
    right, count = map(int, sums)
    say(f"{right} of {count} right")
    return {"right": right, "labels": count}


@click.command()
@_run_options
@click.option(
    "--seconds",
    type=Seconds(0.01, 3600),
    default=3.0,
    help="How long to measure.",
)
@on_device
def bench(
    device: "Device", *, batch: int | None, options: "RunOptions", seconds: float
) -> Answer:
    """Measure load time, latency and memory on this device.

    With the active weights and golden inputs, beside ONNX Runtime alone.
    """
    from edge_runtime.inference.bench import bench as measure
    from edge_runtime.inference.inputs import in_batches, in_samples

    store = device.store
    contract = store.contract
    _, inputs = next(_golden_calls(device))
    if contract.by_rows or batch:
        golden = cycle(in_samples([("golden", inputs)], contract))
        size = batch or usual_batch(contract)
        _, inputs = next(in_batches(golden, size, contract))
    folder = store.slot_folder(store.state.active)
    with prefix_errors(f"{GOLDEN_NAME}, a call of the size that was asked for"):
        result = measure(folder, contract, inputs, options, seconds=seconds)
    return result, "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    def times(latency: dict[str, float]) -> str:
        return "  ".join(f"{k} {1e3 * s:.3f}" for k, s in latency.items()) + " ms"

    yield (
        f"{result['calls']} calls of {result['batch']} sample(s): {result['backend']}"
    )
    yield f"load         {result['load_s']:.3f} s, with the first answer"
    yield f"latency      {times(result['latency_s'])}"
    yield f"throughput   {result['samples_per_s']:.1f} samples/s"
    yield f"peak memory  {result['memory_bytes'] / 1e6:.0f} MB of this process"
    if raw := result["raw"]:
        overhead_us, ratio = 1e6 * raw["overhead_s"], raw["ratio"]
        yield f"onnxruntime  {times(raw['latency_s'])}"
        yield f"beside it    {overhead_us:+.1f} us a call, {ratio:.3f}x"


def _answer(row: "NDArray[Any]", contract: "Contract", count: int) -> dict[str, Any]:
    """Return the likeliest classes, or which labels are true; else the plain output."""
    import numpy as np

    classes = contract.classes
    if contract.task == "multilabel" and len(classes) == len(row):
        true = [classes[i] for i in np.flatnonzero(row > contract.threshold)]
        return {"labels": true, "output": row.tolist()}
    if contract.task != "classification" or len(classes) != len(row):
        return {"output": row.tolist()}
    shares = outputs = row.astype(np.float64)
    if not contract.probabilities:  # a softmax of logits, of whatever type
        shares = np.exp(outputs - outputs.max())
        shares /= shares.sum()
    best = np.argsort(-outputs, kind="stable")[:count]
    likely = [(classes[i], round(float(shares[i]), 6)) for i in best]
    return {"top": [{"class": name, "probability": share} for name, share in likely]}
