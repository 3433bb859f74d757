"""``dpu-pack --base FILE``: two files of one network, or one for a new device."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from packager.foreign import Model
    from packager.report import Made

_file = click.Path(exists=True, dir_okay=False, path_type=Path)


def file_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that pack files instead of rounds to a command."""
    options = [
        ("--base", "ONNX or safetensors file that devices hold."),
        ("--target", "Of the same network: what they shall hold."),
        ("--graph", "For safetensors: the graph.onnx that devices have."),
        ("--contract", "With --base --bundle: JSON with what goes in and comes out."),
        ("--golden", "With --base --bundle: .npz with inputs, and labels if any."),
    ]
    for name, words in reversed(options):
        command = click.option(name, type=_file, metavar="FILE", help=words)(command)
    return command


@contextmanager
def pack_extra(what: str) -> Iterator[None]:
    """Turn a missing package into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as err:
        raise click.ClickException(
            f"{what} needs {err.name}: pip install 'dpu-edge[pack]'"
        ) from err


def pack_files(
    files: Mapping[str, Path | None],
    output: str | None,
    *,
    bundle: bool,
    options: dict[str, Any],
) -> "Iterator[Made]":
    """Pack what :func:`file_options` name.

    Args:
        files: Their values.
        output: File or folder to write to; by default beside the newer file.
        bundle: Whether a bundle is asked for.
        options: ``level``, ``max_size`` and ``counter``, as for rounds.

    Yields:
        What is to be written.
    """
    base, target = _check_usage(files, bundle=bundle)
    from packager.foreign import read_model

    with pack_extra("an ONNX file"):
        model = read_model(base, files["graph"])
        if bundle:
            yield _bundle(model, files, output, options)
        elif target is not None:
            yield _patch(model, read_model(target, files["graph"]), output, options)


def _check_usage(
    files: Mapping[str, Path | None], *, bundle: bool
) -> tuple[Path, Path | None]:
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
    base: "Model", target: "Model", output: str | None, options: dict[str, Any]
) -> "Made":
    from packager.foreign import pack_models
    from packager.report import Made, files_record, files_text

    counter = 1 if options["counter"] is None else options["counter"]
    packed = pack_models(base, target, **options | {"counter": counter})
    path = _place(target.path, output, ".dpu")
    data = packed.data if packed else b""
    record = files_record(base, target, packed, path, len(data))
    return Made(path, data, record, files_text(record))


def _bundle(
    model: "Model",
    files: Mapping[str, Path | None],
    output: str | None,
    options: dict[str, Any],
) -> "Made":
    from packager.adopt import adopt_model
    from packager.report import Made, files_record, files_text

    if not model.graph:
        raise click.UsageError(
            f"a bundle needs a graph: give the ONNX file, or {model.path} with --graph"
        )
    counter = options["counter"] or 0
    made = adopt_model(
        model,
        contract=files["contract"],
        golden=files["golden"],
        **options | {"counter": counter},
    )
    path = _place(model.path, output, ".bundle.zip")
    record = files_record(model, model, made.patch, path, len(made.data))
    record["golden"] = "given" if files["golden"] else "made up"
    return Made(path, made.data, record, files_text(record))


def _place(source: Path, output: str | None, suffix: str) -> Path:
    name = source.stem + suffix
    if output is None:
        return source.with_name(name)
    if output.endswith("/") or Path(output).is_dir():
        return Path(output) / name
    return Path(output)
