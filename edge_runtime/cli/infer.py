# SPDX-License-Identifier: Apache-2.0
"""``dpu-edge infer`` and ``dpu-edge bench``."""

import functools
import io
import json
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import Answer, FileOf, emit, json_option, on_device, say
from edge_runtime.errors import ContractError
from edge_runtime.formats.kinds import Kind
from edge_runtime.formats.model_folder import GOLDEN_NAME

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_runtime.formats.contract import Contract, InputSpec
    from edge_runtime.inference.predictor import RunOptions
    from edge_runtime.update.device import Device


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``options`` and ``batch``: how the model runs."""

    @click.option(
        "--threads", type=click.IntRange(0, 512), default=1, help="CPU threads; 0: all."
    )
    @click.option("--batch", type=click.IntRange(1), default=1, help="Samples a call.")
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
        from edge_runtime.inference.predictor import Backend, RunOptions, choose_backend

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
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the raw outputs to this .npy file too.",
)
@json_option
@click.pass_obj
def infer(  # noqa: PLR0913 - one for each option
    root: Path,
    inputs: tuple[Path, ...],
    *,
    golden: bool,
    top: int,
    batch: int,
    options: "RunOptions",
    output: Path | None,
    as_json: bool,
) -> None:
    """Run the model on images, .npy files, or folders of both.

    INPUT may be - for standard input. Prints one JSON object a sample, as soon as it
    is computed; with --json one object for all of them. --golden says at the end how
    many of the bundle's labels the answers are.
    """
    import numpy as np

    from edge_runtime.files import Files
    from edge_runtime.inference.inputs import in_batches, read_samples
    from edge_runtime.update.device import Device

    if bool(inputs) == golden:
        raise click.UsageError("give INPUT files, or --golden")
    device = Device.open(root)
    spec = _only_input(device.store.contract)
    paths = inputs or (device.store.root / "model" / GOLDEN_NAME,)
    predictor = device.predictor(options)
    number = predictor.store.state.active_slot.round
    records: list[dict[str, Any]] = []
    found = []
    for names, values in in_batches(read_samples(paths, spec), batch):
        outputs = predictor.predict(values)
        _check_answer(outputs, names)
        found.append(outputs)
        for name, row in zip(names, outputs.reshape(len(outputs), -1), strict=True):
            record = {"sample": len(records), "input": name, "round": number}
            record |= _answer(row, device.store.contract.classes, top)
            records.append(record)
            if not as_json:
                print(json.dumps(record), flush=True)
    if not found:
        raise ContractError("the inputs hold no sample; give at least one")
    if output is not None:
        data = io.BytesIO()
        np.save(data, np.concatenate(found))
        Files().replace(output, data.getvalue(), durable=False)
        say(f"wrote {output}")
    told = {"round": number, "backend": predictor.backend, "samples": records}
    if golden and (score := _golden_right(paths[0], np.concatenate(found))):
        told |= {"right": score[0], "labels": score[1]}
        say(f"{score[0]} of {score[1]} right")
    if as_json:
        emit(told, as_json=True, text="")


def _check_answer(outputs: "NDArray[np.float32]", names: list[str]) -> None:
    """Insist on numbers, in a row for each sample."""
    import numpy as np

    if not np.isfinite(outputs).all():
        raise ContractError(
            f"{names[0]}: the model's answer is not finite; look for values that "
            "are not, or that are too large"
        )
    if outputs.shape[:1] != (len(names),):
        raise ContractError(
            f"{names[0]}: the model gives outputs of shape {list(outputs.shape)} "
            f"for {len(names)} samples, expected a row for each; use "
            "Device.predictor() from Python"
        )


def _golden_right(path: Path, outputs: "NDArray[np.float32]") -> tuple[int, int] | None:
    """Count the golden labels that are answered right; None for what has no classes."""
    import numpy as np

    if outputs.ndim != 2:
        return None
    with np.load(path, allow_pickle=False) as arrays:
        labels = arrays["labels"]
    return int(np.sum(outputs.argmax(axis=1) == labels)), len(labels)


@click.command()
@_run_options
@click.option(
    "--seconds",
    type=click.FloatRange(0.01, 3600),
    default=3.0,
    help="How long to measure.",
)
@on_device
def bench(
    device: "Device", *, batch: int, options: "RunOptions", seconds: float
) -> Answer:
    """Measure load time, latency and memory on this device.

    With the active weights and golden inputs, beside ONNX Runtime alone.
    """
    import numpy as np

    from edge_runtime.inference.bench import bench as measure
    from edge_runtime.inference.inputs import read_samples

    store = device.store
    spec = _only_input(store.contract)
    golden = read_samples([store.root / "model" / GOLDEN_NAME], spec)
    inputs = np.stack([values for _, values in islice(cycle(golden), batch)])
    folder = store.slot_folder(store.state.active)
    result = measure(folder, store.contract, inputs, options, seconds=seconds)
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


def _only_input(contract: "Contract") -> "InputSpec":
    if len(contract.inputs) != 1:
        names = ", ".join(spec.name for spec in contract.inputs)
        raise ContractError(
            f"this command feeds models of one input, this one takes {names}; use "
            "Device.predictor() from Python"
        )
    return contract.inputs[0]


def _answer(
    row: "NDArray[np.float32]", classes: tuple[str, ...], count: int
) -> dict[str, Any]:
    """Return the likeliest classes; of a model without classes, its plain output."""
    import numpy as np

    if len(classes) != len(row):
        return {"output": row.tolist()}
    # A softmax: the outputs of a classifier are logits.
    shares = np.exp(row - row.max())
    shares /= shares.sum()
    best = np.argsort(-row, kind="stable")[:count]
    likely = [(classes[i], round(float(shares[i]), 6)) for i in best]
    return {"top": [{"class": name, "probability": share} for name, share in likely]}
