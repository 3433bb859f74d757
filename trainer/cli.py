# SPDX-License-Identifier: Apache-2.0
"""``dpu-train``: run recipes, list them, check them.

torch is imported inside the commands, so that ``--help`` and completion answer at once.
"""

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.commandline import CONTEXT, Command, Group, emit, json_option, say
from edge_runtime.errors import ConfigError
from edge_runtime.exit_codes import EXIT_CODE_HELP
from edge_runtime.files import Files
from edge_runtime.parameters import NewFile
from edge_runtime.sizes import SIZE_WORDS, is_size, parse_size
from trainer.progress import round_table, shown_progress
from trainer.recipe_argument import (
    STARTER,
    built_in_recipes,
    find_recipe,
    read_recipe,
    recipe_options,
)

if TYPE_CHECKING:
    from trainer.folder.record import RoundRecord
    from trainer.recipe.schema import Config
    from trainer.rounds.round import Progress

STEPS = 8  # rounds whose names are printed in commands


@click.group(cls=Group, context_settings=CONTEXT, epilog=EXIT_CODE_HELP)
@click.version_option(package_name="dpu-edge")
def main() -> None:
    """Train a network round by round, changing few weights in each."""


@main.command(cls=Command, epilog=EXIT_CODE_HELP)
@recipe_options
@click.option(
    "--pack",
    metavar="MODULE:FUNCTION",
    default="packager.size:patch_size",
    show_default=True,
    help="What says how large a patch is, for update.budget.",
)
@click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="DPU_RUNS",
    show_envvar=True,
    default=Path("runs"),
    show_default=True,
    help="Folder of all runs.",
)
@click.option("--name", help="Name of the run.  [default: the recipe's name]")
@click.option(
    "--tensorboard",
    "board",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write curves for TensorBoard to DIR/NAME.",
)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def run(
    recipe: str | None,
    overrides: tuple[str, ...],
    runs: Path,
    name: str | None,
    board: Path | None,
    as_json: bool,
    quiet: bool,
    **own: str,
) -> None:
    """Run RECIPE, a built-in name or a TOML file; write its round folders.

    An interrupted run goes on after its last complete round. RECIPE may be left out
    where --model and --data are given: 5 rounds of 2 x 10 epochs, 1000 samples more in
    each, DPU.
    """
    size = own.pop("pack")
    is_first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    with (
        _kept_interrupts(),
        shown_progress(quiet=quiet or not is_first) as progress,
    ):
        config = read_recipe(recipe, overrides, own, name=name or "")
        records = _run(config, runs, progress, size, board if is_first else None)
    if not is_first:
        return
    folder = runs / config.run.name
    emit(
        {"run": str(folder), "rounds": [asdict(record) for record in records]},
        as_json=as_json,
        text="\n".join(round_table(records)),
    )
    steps = list(_next_steps(records, runs, config.run.name))
    if steps and not quiet:
        say("\n  ".join(["next, in this order:", *map(shlex.join, steps)]))


def _run(
    config: "Config",
    runs: Path,
    progress: "Callable[[Progress], None]",
    size: str,
    board: Path | None,
) -> "list[RoundRecord]":
    from trainer.recipe.factory import load_factory, own_code_named
    from trainer.rounds.schedule import run_rounds

    with (
        own_code_named(config.model.factory, config.data.factory, size),
        ExitStack() as stack,
    ):
        pack = load_factory(size) if config.update.budget else None
        if board is None:
            return run_rounds(config, runs, progress=progress, pack=pack)
        from trainer.board import BoardLog

        log = stack.enter_context(BoardLog(board / config.run.name))
        return run_rounds(
            config,
            runs,
            progress=progress,
            pack=pack,
            on_epoch=log.epoch,
            on_round=log.round,
        )


def _next_steps(
    records: "list[RoundRecord]", runs: Path, name: str
) -> Iterator[list[str]]:
    """Yield commands from a trained run to a device that has its newest weights."""
    from edge_runtime.formats.model_folder import round_name

    sent = [round_name(r.round) for r in records if r.outcome == "updated"]
    if not sent:
        return
    is_default = Path(os.environ.get("DPU_RUNS", "runs")) == runs
    where = [] if is_default else ["--runs", str(runs)]
    if not all(record.packable for record in records):
        yield ["dpu-patch", "report", *where, name]
        return
    first, *later = sent
    later, folder = later[:STEPS], runs / name
    yield ["dpu-pack", *where, f"{name}/{first}", "--bundle"]
    if later:
        yield ["dpu-pack", *where, *(f"{name}/{round_}" for round_ in later)]
    store = ["--store", "device"]
    yield ["dpu-edge", *store, "init", str(folder / f"{first}.bundle.zip")]
    if later:
        yield ["dpu-edge", *store, "apply", *(str(folder / f"{r}.dpu") for r in later)]


@main.command(cls=Command, epilog=EXIT_CODE_HELP)
@click.argument(
    "folder", metavar="[DIR]", type=click.Path(path_type=Path), default=Path()
)
@json_option
def init(folder: Path, as_json: bool) -> None:
    """Write a recipe and a module with network and data to start from, into DIR.

    They train as they are, on handwritten digits. Nothing is overwritten. The run is
    called as DIR is.
    """
    from trainer.config import as_toml

    source = Path(str(files("trainer") / "starter"))
    wanted = {folder / name: (source / name).read_bytes() for name in STARTER}
    if name := folder.resolve().name:
        named = wanted[folder / STARTER[0]].replace(
            b'name = "mine"', f"name = {as_toml(name)}".encode()
        )
        wanted[folder / STARTER[0]] = named
    for target in wanted:
        if target.exists() or target.is_symlink():
            raise ConfigError(f"{target} exists; choose another DIR, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    for target, data in wanted.items():
        Files().replace(target, data)
    recipe = folder / STARTER[0]
    emit(
        {"files": [str(target) for target in wanted]},
        as_json=as_json,
        text="\n".join(f"wrote {target}" for target in wanted),
    )
    if not as_json:
        say("next: " + shlex.join(["dpu-train", "run", str(recipe)]))


@main.command(cls=Command, epilog=EXIT_CODE_HELP)
@click.option(
    "--copy",
    nargs=2,
    type=(str, NewFile()),
    metavar="NAME FILE",
    help="Copy a recipe out, to be changed.",
)
@json_option
def recipes(copy: tuple[str, Path] | None, as_json: bool) -> None:
    """List the built-in recipes, or copy one to a file."""
    if copy:
        name, target = copy
        source = find_recipe(name)
        if target.exists():
            raise ConfigError(f"{target} exists; choose another FILE")
        Files().replace(target, source.read_bytes())
        emit(
            {"recipe": name, "file": str(target)},
            as_json=as_json,
            text=f"wrote {target}",
        )
        return
    about = {
        name: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for name, path in built_in_recipes().items()
    }
    text = "\n".join(f"{name:<18} {line}" for name, line in about.items())
    emit({"recipes": about}, as_json=as_json, text=text)


@main.command(cls=Command, epilog=EXIT_CODE_HELP)
@recipe_options
@json_option
def check(
    recipe: str | None, overrides: tuple[str, ...], as_json: bool, **own: str
) -> None:
    """Check RECIPE and print all its keys, defaults included; train nothing.

    Functions of your own are imported, and none is called.
    """
    config = read_recipe(recipe, overrides, own, functions=True)
    from trainer.config import as_dict, as_lines

    emit(
        {"recipe": recipe, "config": as_dict(config)},
        as_json=as_json,
        text="\n".join(as_lines(config)),
    )
    if config.data.factory and not as_json:
        say(
            f"{config.data.factory} was not called, as that may take long: what it "
            "returns is checked at the start of a run"
        )


@main.command(cls=Command, epilog=EXIT_CODE_HELP)
@click.option(
    "--budget",
    required=True,
    metavar="SIZE",
    help="Largest patch of a round, such as 4KB.",
)
@recipe_options
@click.option(
    "--links",
    metavar="MODULE:FUNCTION",
    default="packager.report.links:link_records",
    show_default=True,
    help="What says how long a patch takes.",
)
@json_option
def advise(
    recipe: str | None,
    budget: str,
    overrides: tuple[str, ...],
    links: str,
    as_json: bool,
    **own: str,
) -> None:
    """Say which method and knobs keep RECIPE's patches within a budget.

    Nothing is trained. Best first: what changes, how large a patch is and how long it
    takes, what is known of the accuracy and of which network, and the lines to paste.
    """
    config = read_recipe(recipe, overrides, own)
    if not is_size(budget):
        raise ConfigError(f"--budget is {budget!r}, expected {SIZE_WORDS}")
    from trainer.data.sources import load_source
    from trainer.networks.models import build_model
    from trainer.recipe.factory import load_factory, own_code_named
    from trainer.rounds.advice import advise as find

    with own_code_named(config.model.factory, config.data.factory, links):
        source = load_source(config.data)
        network = build_model(config.model, source.input_shape, len(source.classes))
        found = find(config, network, parse_size(budget), load_factory(links))
    from trainer.advice_text import advice_text

    record = {"recipe": recipe, **asdict(found)}
    emit(record, as_json=as_json, text=advice_text(found))


@contextmanager
def _kept_interrupts() -> Iterator[None]:
    """Let Ctrl-C be an interruption, whatever a library makes of it on its way.

    torch's exporter turns it into errors of its own, about the model.
    """
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as err:
        if interrupted:
            raise KeyboardInterrupt from err
        raise
    finally:
        signal.signal(signal.SIGINT, before)
