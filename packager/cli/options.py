# SPDX-License-Identifier: Apache-2.0
"""Options and arguments that several commands share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.errors import ConfigError
from edge_runtime.formats.frames import LEVEL
from edge_runtime.formats.kinds import Kind, kind_of
from edge_runtime.formats.model_folder import MODEL_NAME, list_rounds
from edge_runtime.parameters import FileOf
from edge_runtime.sizes import parse_size
from edge_runtime.streams import utf8

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
former_option = click.option(
    "--former",
    metavar="KEY.pub.pem",
    multiple=True,
    type=PUBLIC_KEY,
    help="Go on from a head that this key signed, now that others sign (repeatable).",
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
    """Insist that a command does not write over what it reads, nor into a run.

    Nothing has its only copy elsewhere of what a round folder, the run's folder of the
    model and its ledger hold.

    Raises:
        ConfigError: It would.
    """
    if output is None or not output.exists():
        return
    if _is_of_a_run(output.resolve()):
        raise ConfigError(
            f"{output} is a part of a run, and the result would replace it; give "
            "another name with -o"
        )
    if any(p and p.exists() and output.samefile(p) for p in inputs):
        raise ConfigError(
            f"{output} is what this command reads, and the result would replace it; "
            "give another name with -o"
        )


def _is_of_a_run(path: Path) -> bool:
    from packager.ledger import LEDGER_NAME

    folder = path.parent
    is_model = folder.name == MODEL_NAME and bool(list_rounds(folder.parent))
    is_ledger = path.name == LEDGER_NAME and (folder / MODEL_NAME).is_dir()
    return kind_of(folder) is Kind.ROUND or is_model or is_ledger


def write_page(text: str, path: Path) -> None:
    """Write a page, or what else tells of something; never over a file of a known kind.

    Raises:
        ConfigError: A patch, a key or the like has that name.
        OSError: The disk refuses.
    """
    from packager.build import write_file

    if found := kind_of(path):
        raise ConfigError(
            f"{path} is {found.short}, and a page would replace it; give another name "
            "with -o"
        )
    write_file(utf8(text), path)


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
        keys: The files that they were read from.
        expect_outputs: For how many golden inputs the patch carries outputs.
        bundle: Make what a new device is installed from, not a patch.
        force: Take a counter that is far ahead or another round's; replace a file that
            is signed, or of another kind.
    """

    level: int = LEVEL
    max_size: int | None = None
    counter: int | None = None
    signers: "Sequence[Ed25519PrivateKey]" = ()
    signed_by: Sequence[str] = ()
    keys: Sequence[Path] = ()
    expect_outputs: int = 0
    bundle: bool = False
    force: bool = False
