"""``dpu-train``: run recipes, list them, check them.

torch is imported inside the commands, so that ``--help`` and completion answer at once.
"""

import difflib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.commandline import (
    CONTEXT,
    EXIT_CODE_HELP,
    Command,
    Group,
    emit,
    json_option,
    say,
)
from edge_runtime.errors import ConfigError
from edge_runtime.files import Files

if TYPE_CHECKING:
    from trainer.folder.record import RoundRecord
    from trainer.recipe.schema import Config
    from trainer.rounds.schedule import Progress

SUFFIX = ".toml"


def _recipes() -> dict[str, Path]:
    """Return the built-in recipes by name."""
    folder = Path(str(files("trainer") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def _recipe(text: str) -> Path:
    """Find a recipe: a built-in name, or a file."""
    recipes, path = _recipes(), Path(text)
    if text in recipes:
        return recipes[text]
    if path.exists():
        return path
    near = difflib.get_close_matches(text, recipes, 1)
    hint = f"did you mean {near[0]}?" if near else "built in: " + ", ".join(recipes)
    raise ConfigError(f"{text} is neither a file nor a built-in recipe; {hint}")


def _complete(_ctx: click.Context, _param: click.Parameter, start: str) -> list[str]:
    return [name for name in _recipes() if name.startswith(start)]


_recipe_argument = click.argument("recipe", required=False, shell_complete=_complete)
_model_option = click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    default="",
    help="Your own network: a function of an input's shape and the number of classes, "
    "or of nothing; in place of section [model].",
)
_data_option = click.option(
    "--data",
    metavar="MODULE:FUNCTION",
    default="",
    help="Your own data: a function that returns training samples, test samples and "
    "class names; in place of data.set.",
)
# What a run of somebody's own network and data needs, where no recipe says it.
OWN = {
    "run": {"name": "own", "rounds": 5},
    "data": {"initial": 1000, "growth": 1000},
    "train": {"epochs": 10},
}
_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Change a key of the recipe; may be repeated.",
)


@click.group(cls=Group, context_settings=CONTEXT, epilog=EXIT_CODE_HELP)
@click.version_option(package_name="dpu-edge")
def main() -> None:
    """Train a network round by round, changing few weights in each."""


@main.command(cls=Command, epilog=EXIT_CODE_HELP)
@_recipe_argument
@_set_option
@_model_option
@_data_option
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
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def run(
    recipe: str | None,
    overrides: tuple[str, ...],
    runs: Path,
    name: str | None,
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
    config = _load(recipe, overrides, name=name or "", **own)
    own_code = (config.model.factory, config.data.factory, size)
    from trainer.recipe.factory import load_factory, own_code_named

    with _interrupted_as_such(), own_code_named(*own_code):
        from trainer.parallel import is_first
        from trainer.rounds.schedule import run_rounds

        pack = load_factory(size) if config.update.budget else None
        silent = quiet or not is_first()
        with shown_progress(config.run.rounds, quiet=silent) as progress:
            records = run_rounds(config, runs, progress=progress, pack=pack)
    if not is_first():
        return
    folder = runs / config.run.name
    emit(
        {"run": str(folder), "rounds": [asdict(record) for record in records]},
        as_json=as_json,
        text="\n".join(_table(records)),
    )
    updated = [record.round for record in records if record.outcome == "updated"]
    if updated and not quiet:
        round_ = f"{config.run.name}/round_{updated[-1]:02d}"
        say(f"next: {shlex.join(['dpu-pack', '--runs', str(runs), round_])}")


@main.command(cls=Command, epilog=EXIT_CODE_HELP)
@click.option(
    "--copy",
    nargs=2,
    type=(str, click.Path(dir_okay=False, path_type=Path)),
    metavar="NAME FILE",
    help="Copy a recipe out, to be changed.",
)
@json_option
def recipes(copy: tuple[str, Path] | None, as_json: bool) -> None:
    """List the built-in recipes, or copy one to a file."""
    if copy:
        name, target = copy
        source = _recipe(name)
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
        for name, path in _recipes().items()
    }
    text = "\n".join(f"{name:<18} {line}" for name, line in about.items())
    emit({"recipes": about}, as_json=as_json, text=text)


@main.command(cls=Command, epilog=EXIT_CODE_HELP)
@_recipe_argument
@_set_option
@_model_option
@_data_option
@json_option
def check(
    recipe: str | None, overrides: tuple[str, ...], as_json: bool, **own: str
) -> None:
    """Check RECIPE and print all its keys, defaults included; train nothing."""
    config = _load(recipe, overrides, **own)
    from trainer.config import as_dict

    tables = as_dict(config)
    lines = [
        f"{section}.{key} = {_toml(value)}"
        for section, table in tables.items()
        for key, value in table.items()
        if value is not None
    ]
    emit({"recipe": recipe, "config": tables}, as_json=as_json, text="\n".join(lines))


def _load(
    recipe: str | None,
    overrides: tuple[str, ...],
    *,
    model: str,
    data: str,
    name: str = "",
) -> "Config":
    """Read the recipe that a command's arguments describe."""
    if recipe is None and not (model and data):
        raise ConfigError("name a RECIPE, or give both --model and --data")
    path = _recipe(recipe) if recipe else None
    # Where python -m looks as well: your functions are seldom installed.
    sys.path.insert(0, str(Path.cwd()))
    from trainer.config import load_config

    return load_config(path or OWN, overrides, name=name, model=model, data=data)


@contextmanager
def _interrupted_as_such() -> Iterator[None]:
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


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


@contextmanager
def shown_progress(
    rounds: int, *, quiet: bool
) -> Iterator[Callable[["Progress"], None]]:
    """Show progress on standard error: a bar on a terminal, else a line a round."""
    if quiet or not sys.stderr.isatty():
        yield lambda p: None if quiet or not p.record else say(_line(p.record))
        return
    with click.progressbar(length=rounds, file=sys.stderr) as bar:

        def show(progress: "Progress") -> None:
            # Rounds that were there already count as well.
            bar.length = rounds * progress.epochs
            bar.label = f"round_{progress.round:02d} {progress.phase}"
            bar.update(progress.round * progress.epochs + progress.epoch - bar.pos)

        yield show


def _line(record: "RoundRecord") -> str:
    metrics = record.metrics
    outcome = str(record.outcome) + (" (re-init)" if record.reinitialised else "")
    return (
        f"round_{record.round:02d}  {outcome:<17} {metrics['changed']:>9} "
        f"{metrics['val_accuracy']:>7.2%} {metrics['test_accuracy']:>7.2%}"
    )


def _table(records: "list[RoundRecord]") -> Iterator[str]:
    yield f"{'round':<9} {'outcome':<17} {'changed':>9} {'val':>7} {'test':>7}"
    yield from map(_line, records)
