"""Your own networks and data sets in recipes: ``package.module:function``."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from edge_runtime.errors import ConfigError


def load_factory(text: str) -> Callable[..., Any]:
    """Import the function that a recipe names.

    Raises:
        ConfigError: There is no such module or function.
    """
    module, _, name = text.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as err:
        raise ConfigError(
            f"cannot import {module!r} for {text!r}: {err}; install it, or start where "
            "python -c 'import ...' finds it"
        ) from err
    function = getattr(found, name, None)
    if not callable(function):
        raise ConfigError(f"{module} has no function {name!r}; check {text!r}")
    return function  # type: ignore[no-any-return]


def call_factory(text: str, *arguments: Any, **options: Any) -> Any:
    """Call the function that a recipe names, with the arguments or without them.

    Raises:
        ConfigError: There is no such function, or it takes neither.
    """
    function = load_factory(text)
    signature = inspect.signature(function)
    for positional in (arguments, ()):
        try:
            signature.bind(*positional, **options)
        except TypeError:
            continue
        return function(*positional, **options)
    raise ConfigError(
        f"{text} takes {signature}; expected to call it with {len(arguments)} "
        f"arguments or none, and the options {sorted(options)}"
    )
