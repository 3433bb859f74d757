# SPDX-License-Identifier: Apache-2.0
"""The commands of ``dpu-patch`` that look inside patches, runs and models.

Everything heavy is imported inside the commands.
"""

import json
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import SCHEMA, emit, finite, json_option, say
from edge_runtime.errors import ConfigError, WrongModelError
from edge_runtime.formats.kinds import Kind, kind_of, refuse_others
from edge_runtime.formats.model_folder import GRAPH_NAME, MODEL_NAME, WEIGHTS_NAME
from edge_runtime.parameters import NewFile
from edge_runtime.reading import read_key_file
from edge_runtime.text import printable
from packager.cli.files import GRAPH, GRAPH_HELP, like, read_any, read_parent
from packager.cli.options import (
    MODEL,
    PUBLIC_KEY,
    RELEASE,
    insist_apart,
    insist_ending,
    runs_option,
    write_page,
)

if TYPE_CHECKING:
    from edge_runtime.formats.patch import Patch
    from edge_runtime.formats.weights import Weights
    from packager.report.document import Document

    # What was found: as data, and as a document.
    Look = tuple[Mapping[str, object], Document]

_base_help = "A weight file of the network, its ONNX file or a checkpoint."


def shown(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json``, ``--md`` and ``-o`` to a command."""
    command = click.option(
        "-o",
        "--output",
        metavar="FILE",
        type=NewFile(),
        help="Write to a file: .html, a page with pictures, or .md, .json, .txt.",
    )(command)
    command = click.option(
        "--md", "as_markdown", is_flag=True, help="Print Markdown, for a pull request."
    )(command)
    return json_option(command)  # type: ignore[no-any-return]


def show(
    look: "Look", output: Path | None, *, as_json: bool, as_markdown: bool
) -> None:
    """Print what was found, or write it to a file."""
    from packager.report.document import to_markdown, to_text

    if output and not (as_json or as_markdown):
        insist_ending(output, ".html", ".md", ".json", ".txt")
    record, document = look
    if output is None:
        text = to_markdown(document) if as_markdown else to_text(document)
        emit(record, as_json=as_json, text=text)
        return
    from packager.report.html import to_html

    if as_json or output.suffix == ".json":
        text = json.dumps(finite({"schema": SCHEMA, **record}), indent=2) + "\n"
    elif as_markdown or output.suffix == ".md":
        text = to_markdown(document) + "\n"
    else:
        text = (
            to_text(document) + "\n" if output.suffix == ".txt" else to_html(document)
        )
    write_page(text, output)
    say(f"wrote {output}")


@click.command()
@click.argument("path", metavar="PATCH|BUNDLE", type=RELEASE)
@click.option("--base", type=MODEL, metavar="FILE", help=_base_help)
@shown
def info(path: Path, *, base: Path | None, **how: Any) -> None:
    """Say what a patch or bundle is for and where its bytes go.

    Names of tensors and the floor need a weight file of the network: --base, or the
    run in whose folder the patch lies.
    """
    insist_apart(how["output"], path, base)
    show(_look_into(path, base), **how)


@click.command()
@click.argument("base", metavar="A", type=MODEL)
@click.argument("target", metavar="B", type=MODEL)
@shown
def diff(base: Path, target: Path, **how: Any) -> None:
    """Count, tensor by tensor, which elements differ between two models.

    A and B are weight files, ONNX files or checkpoints of one network.
    """
    from packager.diff import diff as compare
    from packager.models.read import check_same_network
    from packager.report.patch_document import diff_document
    from packager.report.patch_record import check_shown, diff_record

    one = read_any(base)
    check_shown(one.weights.layout)
    other = read_any(target)
    insist_apart(how["output"], *one.files, *other.files)
    one, other = like(one, other), like(other, one)
    a, b = one.weights, other.weights
    record = diff_record(a, b, compare(a, b))
    if one.graph and other.graph:
        try:
            check_same_network(one, other)
        except WrongModelError as err:
            record["other_network"] = str(err)
            say(f"note: {err}")
    show((record, diff_document(record, (str(base), str(target)))), **how)


@click.command()
@click.argument("path", metavar="PATCH|RUN")
@click.option("--base", type=MODEL, metavar="FILE", help=_base_help)
@click.option(
    "--beside",
    multiple=True,
    metavar="RUN",
    help="For a run: another run to compare with, such as one of full updating.",
)
@runs_option
@shown
def report(
    path: str, *, base: Path | None, beside: tuple[str, ...], runs: Path, **how: Any
) -> None:
    """Make a page with pictures about a patch or a whole run.

    It is one HTML file without scripts, written beside the patch or into the run's
    folder; --md and --json print the same numbers instead.
    """
    found = Path(path)
    insist_apart(how["output"], found, base)
    refuse_others(found, (Kind.PATCH, Kind.BUNDLE, Kind.RUN))
    if found.is_file():
        if beside:
            raise click.UsageError("--beside is for runs")
        look, place = _look_into(found, base), found.with_suffix(".html")
    else:
        from packager.report.run_document import run_document
        from packager.report.run_record import run_record

        if base is not None:
            raise click.UsageError("--base is for patches")
        run = _find_run(path, runs)
        record = run_record(run, [_find_run(name, runs) for name in beside])
        look, place = (record, run_document(record)), run / "report.html"
    if how["output"] is None and not (how["as_json"] or how["as_markdown"]):
        how["output"] = place
    show(look, **how)


@click.command()
@click.argument("path", metavar="PATCH|BUNDLE", type=RELEASE)
@click.option("--base", type=MODEL, help="The parent weights: apply, prove the target.")
@click.option(
    "--key",
    "keys",
    metavar="KEY.pub.pem",
    multiple=True,
    type=PUBLIC_KEY,
    help="Insist on the signature of this public key (repeatable).",
)
@json_option
def verify(
    path: Path, *, base: Path | None, keys: tuple[Path, ...], as_json: bool
) -> None:
    """Check that a patch or bundle is whole; with --key, who signed it.

    With --base the patch is applied and its target proved.
    """
    from edge_runtime.errors import prefix_errors
    from edge_runtime.formats.apply import apply_weights
    from edge_runtime.formats.signing import trust_keys
    from packager.signing import open_release

    trust = trust_keys({str(k): read_key_file(k) for k in keys})
    trust = replace(trust, threshold=len(trust.keys) or 1)  # every one of them
    with ExitStack() as stack:
        with prefix_errors(path):
            opened = stack.enter_context(open_release(path, trust))
        if base is not None:
            weights = read_parent(base, opened.header).weights
            with prefix_errors(path):
                deque(apply_weights(weights, opened), maxlen=0)  # proves the target
        header = opened.header
    record = {
        "path": str(path),
        "bytes": path.stat().st_size,
        "parent": header.parent,
        "target": header.target,
        "applied": base is not None,
        "verified_keys": list(trust.ids),
    }
    text = f"{printable(path)}: whole, every checksum right"
    if keys:
        text += f"\n  signed by {', '.join(trust.ids)}"
    else:
        text += "\n  signatures not checked: give the public key with --key"
    if base is None:
        text += (
            "\n  not applied: give the parent weights with --base to prove the target"
        )
    else:
        text += (
            f"\n  applied to {printable(base)}: result is {header.target}, as promised"
        )
    emit(record, as_json=as_json, text=text)


@click.command()
@click.argument("source", metavar="FILE", type=MODEL)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to.",
)
@click.option("--graph", type=GRAPH, metavar="FILE", help=GRAPH_HELP)
@json_option
def extract(source: Path, *, output: Path, graph: Path | None, as_json: bool) -> None:
    """Write what a device holds for an ONNX file or a checkpoint.

    That is weights.safetensors in canonical form, whose SHA-256 is the fingerprint, and
    for an ONNX file, or with --graph, graph.onnx, which reads it.
    """
    from hashlib import sha256

    from edge_runtime.formats.weights import fingerprint_file
    from packager.build import write_file

    model = read_any(source, graph)
    files: dict[str, bytes | Weights] = {WEIGHTS_NAME: model.weights}
    digests = {WEIGHTS_NAME: model.weights.fingerprint}
    if model.graph:
        files[GRAPH_NAME] = model.graph
        digests[GRAPH_NAME] = sha256(model.graph).hexdigest()
    for name, digest in digests.items():
        path = output / name
        if path.is_file() and fingerprint_file(path) != digest:
            raise ConfigError(
                f"{path} is there already and holds something else; give another folder"
            )
    for name, data in files.items():
        write_file(data, output / name)
    record = {
        "source": str(source),
        "path": str(output / WEIGHTS_NAME),
        "graph": str(output / GRAPH_NAME) if model.graph else None,
        "model": model.model,
        "fingerprint": model.weights.fingerprint,
        "canonical": model.canonical,
    }
    same = "the same bytes as" if model.canonical else "the tensors of"
    text = f"{record['fingerprint']}  {printable(output / WEIGHTS_NAME)}: "
    text += f"{same} {printable(source)}"
    emit(record, as_json=as_json, text=text)


def _look_into(path: Path, base: Path | None) -> "Look":
    from edge_runtime.errors import prefix_errors
    from packager.report.patch_document import patch_document
    from packager.report.patch_record import patch_record
    from packager.signing import open_release

    is_bundle = kind_of(path) in (Kind.BUNDLE, Kind.ZIP)
    with prefix_errors(path), open_release(path) as patch:
        weights = _weights_for(path, patch, base)
        layout = weights.layout if weights else None
        if layout is not None:
            patch.check(layout)
        is_parent = weights and weights.fingerprint == patch.header.parent
        record = patch_record(path, patch, layout, weights if is_parent else None)
        if is_bundle:
            from packager.report.bundle_document import bundle_document, bundle_record

            whole = bundle_record(path, record)
            return whole, bundle_document(whole)
    return record, patch_document(record)


def _weights_for(path: Path, patch: "Patch", base: Path | None) -> "Weights | None":
    from packager.rounds.folder import find_weights

    if base is not None:
        return read_parent(base, patch.header).weights
    return find_weights(path.parent, patch.header)


def _find_run(name: str, runs: Path) -> Path:
    """Find a folder; what it lacks to be a run is told by who reads it."""
    from edge_runtime.errors import RoundNotFoundError

    for folder in (Path(name), runs / name):
        if folder.is_dir():
            refuse_others(folder, (Kind.RUN,))
            return folder
    known = sorted(p.parent.name for p in runs.glob(f"*/{MODEL_NAME}"))
    raise RoundNotFoundError(
        f"{name} is neither a patch nor a run; below {runs} there are: "
        f"{', '.join(known) or 'none'}"
    )
