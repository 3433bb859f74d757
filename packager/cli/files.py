# SPDX-License-Identifier: Apache-2.0
"""``dpu-pack --base FILE``: two files of one network, or one for a new device."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import say
from packager.cli.options import FILE

if TYPE_CHECKING:
    from edge_runtime.formats.identity import Run
    from packager.build import PackedPatch
    from packager.models.read import Model
    from packager.report.packed import Made


def file_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that pack files instead of rounds to a command."""
    options = [
        ("--base", "ONNX or safetensors file that devices hold."),
        ("--target", "Of the same network: what they shall hold."),
        ("--graph", "For safetensors: the graph.onnx that devices have."),
        ("--contract", "With --base --bundle: JSON with what goes in and comes out."),
        ("--golden", "With --base --bundle: .npz with inputs, and labels if any."),
    ]
    command = click.option(
        "--name",
        metavar="NAME",
        help="With --base: tells this model from others of the same network; devices "
        "installed under a name take patches of that name only.",
    )(command)
    for name, words in reversed(options):
        command = click.option(name, type=FILE, metavar="FILE", help=words)(command)
    return command


def read_any(path: Path, graph: Path | None = None) -> "Model":
    """Read a weight file, or any ONNX or safetensors file."""
    from packager.models.read import read_model

    return read_model(path, graph)


def pack_files(
    files: Mapping[str, Any],
    output: str | None,
    names: Sequence[str],
    *,
    bundle: bool,
    force: bool,
    options: dict[str, Any],
) -> "Generator[Made]":
    """Pack what :func:`file_options` name.

    Args:
        files: Their values.
        output: File or folder to write to; by default beside the newer file.
        names: Ids of the keys that sign.
        bundle: Whether a bundle is asked for.
        force: Let a counter be far ahead, and a signed file be replaced.
        options: ``level``, ``max_size``, ``counter``, ``signers``, as for rounds.

    Yields:
        What is to be written.
    """
    base, target = _check_usage(files, bundle=bundle)
    from packager.build import check_counter
    from packager.report.packed import Made, files_record, files_text

    if not force:
        check_counter(options["counter"] or 0, 0)  # nothing is known of other releases
    run = _named_run(files["name"])
    model = replace(read_any(base, files["graph"]), run=run)
    newer = model
    if target is not None:
        newer = replace(read_any(target, files["graph"]), run=run)
    if target is None:
        packed, data = _bundle(model, files, options)
    else:
        packed, data = _patch(model, newer, options)
    path = _place(newer.path, output, ".bundle.zip" if bundle else ".dpu")
    record = files_record((model, newer), packed, path, len(data), names)
    record["golden"] = "given" if files["golden"] else "made up"
    yield Made(path, data, record, files_text(record), partial(_write, force=force))


def _write(data: bytes, path: Path, *, force: bool) -> bool:
    from packager.ledger import publish_file

    return publish_file(data, path, force=force, say=say)


def _named_run(name: str | None) -> "Run | None":
    from edge_runtime.formats.identity import Run, run_id

    return Run(run_id(name), name) if name else None


def _check_usage(files: Mapping[str, Any], *, bundle: bool) -> tuple[Path, Path | None]:
    base, target = files["base"], files["target"]
    if base is None:
        raise click.UsageError("give --base too: the file that devices hold")
    if bundle == (target is not None):
        raise click.UsageError(
            "give --base with --target for a patch, or --base with --bundle for what a "
            "new device is installed from"
        )
    if not bundle and (files["contract"] or files["golden"]):
        raise click.UsageError("--contract and --golden are for --bundle")
    return base, target


def _patch(
    base: "Model", target: "Model", options: dict[str, Any]
) -> "tuple[PackedPatch | None, bytes]":
    from packager.models.read import pack_models

    counter = 1 if options["counter"] is None else options["counter"]
    packed = pack_models(base, target, **options | {"counter": counter})
    if packed and target.graph:
        from packager.bundles.from_model import check_answers

        if reason := check_answers(base, target):
            say(f"its answers were not looked at: {reason}")
    return packed, packed.data if packed else b""


def _bundle(
    model: "Model", files: Mapping[str, Any], options: dict[str, Any]
) -> "tuple[PackedPatch | None, bytes]":
    from packager.bundles.from_model import adopt_model

    if not model.graph:
        raise click.UsageError(
            f"a bundle needs a graph: give the ONNX file, or {model.path} with --graph"
        )
    contract, golden = files["contract"], files["golden"]
    options = options | {"counter": options["counter"] or 0}
    bundle = adopt_model(model, contract=contract, golden=golden, **options)
    return bundle.patch, bundle.data


def _place(source: Path, output: str | None, suffix: str) -> Path:
    name = source.stem + suffix
    if output is None:
        return source.with_name(name)
    if output.endswith("/") or Path(output).is_dir():
        return Path(output) / name
    return Path(output)
