# SPDX-License-Identifier: Apache-2.0
"""``dpu-pack --base FILE``: two files of one network, or one for a new device."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import say
from edge_runtime.formats.kinds import Kind
from edge_runtime.parameters import FileOf
from packager.cli.options import MODEL, PackOptions, insist_apart

if TYPE_CHECKING:
    from edge_runtime.formats.header import PatchHeader
    from edge_runtime.formats.identity import Run
    from packager.build import PackedPatch
    from packager.bundles.from_round import PackedBundle
    from packager.models.read import Model
    from packager.report.packed import Made

GRAPH = FileOf(Kind.ONNX)
GRAPH_HELP = "For a checkpoint: the graph.onnx that devices have."


@dataclass(frozen=True, slots=True)
class FileOptions:
    """The values of :func:`file_options`; None where an option was not given.

    Attributes:
        base: The file that devices hold.
        target: What they shall hold.
        graph: For a checkpoint: the graph that devices have.
        contract: For a bundle: what goes in and comes out.
        golden: For a bundle: inputs, and labels if there are any.
        name: What tells this model from others of the same network.
    """

    base: Path | None
    target: Path | None
    graph: Path | None
    contract: Path | None
    golden: Path | None
    name: str | None

    @property
    def is_given(self) -> bool:
        """Whether files are to be packed, and not rounds."""
        paths = self.base, self.target, self.graph, self.contract, self.golden
        return any((*paths, self.name))


def file_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that pack files instead of rounds to a command."""
    options = [
        ("--base", MODEL, "ONNX file or checkpoint that devices hold."),
        ("--target", MODEL, "Of the same network: what they shall hold."),
        ("--graph", GRAPH, GRAPH_HELP),
        (
            "--contract",
            FileOf(Kind.CONTRACT),
            "With --base --bundle: JSON with what goes in and comes out.",
        ),
        (
            "--golden",
            FileOf(Kind.NPZ),
            "With --base --bundle: .npz with inputs, and labels if any.",
        ),
    ]
    command = click.option(
        "--name",
        metavar="NAME",
        help="With --base: tells this model from others of the same network; devices "
        "installed under a name take patches of that name only.",
    )(command)
    for name, kind, words in reversed(options):
        command = click.option(name, type=kind, metavar="FILE", help=words)(command)
    return command


def read_any(path: Path, graph: Path | None = None) -> "Model":
    """Read a weight file, an ONNX file or a checkpoint, and say what was left out."""
    from packager.models.read import read_model

    model = read_model(path, graph)
    for note in model.notes:
        say(note)
    return model


def like(model: "Model", other: "Model") -> "Model":
    """Leave out counters of BatchNorm that another model lacks, and say so."""
    from packager.models.read import without_counters

    found = without_counters(model, other.weights.layout.by_name)
    for note in found.notes[len(model.notes) :]:
        say(note)
    return found


def read_parent(path: Path, header: "PatchHeader") -> "Model":
    """Read the weights that a patch leads from.

    Devices that were installed with a graph hold no counters of BatchNorm; those of a
    checkpoint are left out where the patch is for weights without them.
    """
    from packager.models.read import without_counters

    model = read_any(path)
    bare = without_counters(model, ())
    if bare.weights.layout.file_size != header.file_size:
        return model
    for note in bare.notes[len(model.notes) :]:
        say(note)
    return bare


def pack_files(
    files: FileOptions, output: str | None, options: PackOptions
) -> "Generator[Made]":
    """Pack what :func:`file_options` name.

    Args:
        files: Their values.
        output: File or folder to write to; by default beside the newer file.
        options: How to pack.

    Yields:
        What is to be written.
    """
    base, target = _check_usage(files, bundle=options.bundle)
    from packager.release_counter import check_counter
    from packager.report.packed import Made, files_record, files_text

    if not options.force:
        check_counter(options.counter or 0, 0)  # nothing is known of other releases
    run = _named_run(files.name)
    model = replace(read_any(base, files.graph), run=run)
    newer = model
    if target is not None:
        newer = replace(like(read_any(target, files.graph), model), run=run)
    bundle: PackedBundle | None = None
    if target is None:
        bundle = _bundle(model, files, options)
    packed, data = (
        (bundle.patch, bundle.data) if bundle else _patch(model, newer, options)
    )
    path = _place(newer, output, ".bundle.zip" if options.bundle else ".dpu")
    given = files.graph, files.contract, files.golden
    insist_apart(path, *model.files, *newer.files, *given, *options.keys)
    record = files_record((model, newer), packed, path, len(data), options.signed_by)
    record["golden"] = "given" if files.golden else "made up"
    if bundle:
        record["task"], record["remarks"] = bundle.task, list(bundle.remarks)
    write = partial(_write, force=options.force)
    yield Made(path, data, record, files_text(record), write)


def _write(data: bytes, path: Path, *, force: bool) -> bool:
    from packager.ledger import publish_file

    return publish_file(data, path, force=force, say=say)


def _named_run(name: str | None) -> "Run | None":
    from edge_runtime.formats.identity import Run, run_id

    return Run(run_id(name), name) if name else None


def _check_usage(files: FileOptions, *, bundle: bool) -> tuple[Path, Path | None]:
    base, target = files.base, files.target
    if base is None:
        raise click.UsageError("give --base too: the file that devices hold")
    if bundle == (target is not None):
        raise click.UsageError(
            "give --base with --target for a patch, or --base with --bundle for what a "
            "new device is installed from"
        )
    if not bundle and (files.contract or files.golden):
        raise click.UsageError("--contract and --golden are for --bundle")
    return base, target


def _patch(
    base: "Model", target: "Model", options: PackOptions
) -> "tuple[PackedPatch | None, bytes]":
    from packager.models.read import pack_models

    packed = pack_models(
        base,
        target,
        counter=1 if options.counter is None else options.counter,
        level=options.level,
        max_size=options.max_size,
        signers=options.signers,
    )
    if packed and target.graph:
        from packager.bundles.check_answers import check_answers

        if reason := check_answers(base, target):
            say(f"its answers were not looked at: {reason}")
    return packed, packed.data if packed else b""


def _bundle(model: "Model", files: FileOptions, options: PackOptions) -> "PackedBundle":
    from packager.bundles.from_model import adopt_model
    from packager.models.onnx_words import what_stays

    if not model.graph:
        raise click.UsageError(
            f"a bundle needs a graph: give the ONNX file, or {model.path} with --graph"
        )
    for words in what_stays(model.graph):
        say(f"note: {words}")
    bundle = adopt_model(
        model,
        contract=files.contract,
        golden=files.golden,
        counter=options.counter or 0,
        level=options.level,
        max_size=options.max_size,
        signers=options.signers,
    )
    for remark in bundle.remarks:
        say(remark)
    return bundle


def _place(source: "Model", output: str | None, suffix: str) -> Path:
    name = source.name + suffix
    if output is None:
        path = source.path
        return (path.resolve() if path.is_dir() else path).with_name(name)
    if output.endswith("/") or Path(output).is_dir():
        return Path(output) / name
    return Path(output)
