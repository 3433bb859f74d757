# SPDX-License-Identifier: Apache-2.0
"""Options and arguments that several commands share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.errors import ConfigError
from edge_runtime.formats.frames import LEVEL
from edge_runtime.formats.kinds import Kind
from edge_runtime.parameters import FileOf
from edge_runtime.sizes import parse_size

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MODEL = FileOf(
    *(Kind.WEIGHTS, Kind.ONNX, Kind.TORCH, Kind.INDEX, Kind.SHARDS), dir_okay=True
)
PATCH, RELEASE = FileOf(Kind.PATCH), FileOf(Kind.PATCH, Kind.BUNDLE)
PRIVATE_KEY, PUBLIC_KEY = FileOf(Kind.PRIVATE_KEY), FileOf(Kind.PUBLIC_KEY)
KEY_LIST = FileOf(Kind.KEY_LIST)


class Size(click.ParamType[int]):
    """A number of bytes, as people write it."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the bytes that a text stands for."""
        try:
            return parse_size(str(value))
        except ValueError as err:
            self.fail(str(err), param, ctx)


runs_option = click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="DPU_RUNS",
    show_envvar=True,
    default=Path("runs"),
    show_default=True,
    is_eager=True,  # known when a ROUND is completed in the shell
    help="Where names of runs and rounds are looked up.",
)
single_publisher_option = click.option(
    "--single-publisher",
    is_flag=True,
    help="Go on though the object store has no conditional writes: nobody else writes.",
)
level_option = click.option(
    "--level",
    type=click.IntRange(1, 22),
    default=LEVEL,
    show_default=True,
    help="zstd level.",
)


def insist_apart(output: Path | None, *inputs: Path | None) -> None:
    """Insist that a command does not write over what it reads.

    Raises:
        ConfigError: It would.
    """
    if output is None or not output.exists():
        return
    if any(p and p.exists() and output.samefile(p) for p in inputs):
        raise ConfigError(
            f"{output} is what this command reads, and the result would replace it; "
            "give another name with -o"
        )


def insist_ending(path: Path, *known: str) -> None:
    """Insist that a page's name ends as what is written; without an ending it may."""
    if path.suffix and path.suffix not in known:
        raise click.BadParameter(
            f"found {path.name!r}, expected a name that ends with {', '.join(known)}",
            param_hint="'-o'",
        )


@dataclass(frozen=True, slots=True)
class PackOptions:
    """How ``dpu-pack`` is to pack, whatever it packs.

    Attributes:
        level: zstd level, 1 to 22.
        max_size: Largest file in bytes; None for any.
        counter: Release counter; None for the next one that is free.
        signers: The keys that sign.
        signed_by: Their ids.
        expect_outputs: For how many golden inputs the patch carries outputs.
        bundle: Make what a new device is installed from, not a patch.
        force: Take a counter that is far ahead or another round's; replace a signed
            file by an unsigned one.
    """

    level: int = LEVEL
    max_size: int | None = None
    counter: int | None = None
    signers: "Sequence[Ed25519PrivateKey]" = ()
    signed_by: Sequence[str] = ()
    expect_outputs: int = 0
    bundle: bool = False
    force: bool = False
