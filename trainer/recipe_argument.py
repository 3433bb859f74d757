# SPDX-License-Identifier: Apache-2.0
"""The recipe that a command is about: built in, a file, or functions of your own."""

import difflib
import sys
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from trainer.recipe.schema import Config

Command = TypeVar("Command", bound=Callable[..., Any])

STARTER = ("recipe.toml", "mine.py")
# What a run of somebody's own network and data needs, where no recipe says it.
OWN = {
    "run": {"name": "own", "rounds": 5},
    "data": {"initial": 1000, "growth": 1000},
    "train": {"epochs": 10},
}


def built_in_recipes() -> dict[str, Path]:
    """Return the built-in recipes by name."""
    folder = Path(str(files("trainer") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_recipe(text: str) -> Path:
    """Find a recipe: a built-in name, or a file.

    Raises:
        ConfigError: It is neither; the message has what may have been meant.
    """
    recipes, path = built_in_recipes(), Path(text)
    if text in recipes:
        return recipes[text]
    if (path / STARTER[0]).is_file():
        raise ConfigError(f"{text} is a folder; did you mean {path / STARTER[0]}?")
    if path.is_dir():
        raise ConfigError(f"{text} is a folder; name a recipe, a TOML file")
    if path.exists():
        return path
    near = difflib.get_close_matches(text, recipes, 1)
    hint = f"did you mean {near[0]}?" if near else "built in: " + ", ".join(recipes)
    raise ConfigError(f"{text} is neither a file nor a built-in recipe; {hint}")


def _complete(_ctx: click.Context, _param: click.Parameter, start: str) -> list[str]:
    return [name for name in built_in_recipes() if name.startswith(start)]


_recipe = click.argument("recipe", required=False, shell_complete=_complete)
_model = click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    default="",
    help="Your own network: a function of an input's shape and the number of classes, "
    "or of nothing; in place of section [model].",
)
_data = click.option(
    "--data",
    metavar="MODULE:FUNCTION",
    default="",
    help="Your own data: a function that returns training samples, test samples and "
    "class names; in place of data.set.",
)
_set = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Change a key of the recipe; may be repeated.",
)


def recipe_options(command: Command) -> Command:
    """Give a command RECIPE, --set, --model and --data, for :func:`read_recipe`."""
    return _recipe(_set(_model(_data(command))))


def read_recipe(
    recipe: str | None,
    overrides: tuple[str, ...],
    own: Mapping[str, str],
    *,
    name: str = "",
    functions: bool = False,
) -> "Config":
    """Read the recipe that the options of a command describe.

    Your own functions can be imported afterwards.

    Args:
        recipe: RECIPE.
        overrides: Each --set.
        own: --model and --data.
        name: As for :func:`trainer.config.load_config`.
        functions: Likewise.

    Raises:
        ConfigError: There is none, or something is wrong with it.
    """
    if recipe is None and not all(own.values()):
        raise ConfigError("name a RECIPE, or give both --model and --data")
    path = find_recipe(recipe) if recipe else None
    # Your functions are seldom installed: they lie beside the recipe, or where
    # python -m looks.
    places = [path.resolve().parent] if path else []
    sys.path[:0] = map(str, [*places, Path.cwd()])
    from trainer.config import load_config

    return load_config(path or OWN, overrides, name=name, functions=functions, **own)
