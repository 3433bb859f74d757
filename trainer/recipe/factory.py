# SPDX-License-Identifier: Apache-2.0
"""Your own networks and data sets in recipes: ``package.module:function``.

What your code raises is told with your file and line (:func:`own_code_named`): it is no
bug of this project.
"""

import difflib
import importlib
import inspect
import linecache
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import edge_runtime
from edge_runtime.errors import ConfigError, DpuError, TrainingError
from trainer.recipe.schema import DataConfig, ModelConfig, TrainConfig

_PROJECT = Path(edge_runtime.__file__).parents[1]
_LIBRARIES = {"site-packages", "dist-packages"}
# torchvision of PyPI is built for CUDA; see trainer.data.vision.
_NO_OPERATOR = "operator torchvision::nms does not exist"
_VISION_HINT = (
    "\n  PyPI's torchvision does not load beside a CPU-only torch; import it with "
    "'from trainer.data.vision import torchvision', or install both from one index"
)


def load_factory(text: str) -> Callable[..., Any]:
    """Import the function that a recipe names.

    Raises:
        ConfigError: There is no such module or function, or it is no Python.
    """
    module, _, name = text.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as err:
        raise ConfigError(
            f"cannot import {module!r} for {text!r}: {err}; install it, or start where "
            "python -c 'import ...' finds it"
        ) from err
    except SyntaxError as err:
        raise ConfigError(
            f"cannot import {module!r} for {text!r}: {err.filename}, line "
            f"{err.lineno}: {err.msg}"
        ) from err
    except SystemExit as err:
        raise ConfigError(
            f"{module} ends the program while it is imported; put what it runs under "
            "if __name__ == '__main__'"
        ) from err
    function = getattr(found, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, dir(found), 1)
        hint = f"did you mean {near[0]}?" if near else f"check {text!r}"
        raise ConfigError(f"{module} has no function {name!r}; {hint}")
    return function  # type: ignore[no-any-return]


def call_factory(text: str, *arguments: Any, **options: Any) -> Any:
    """Call the function that a recipe names, with the arguments or without them.

    Raises:
        ConfigError: There is no such function, or it takes neither.
    """
    return bind_factory(text, *arguments, **options)()


def bind_factory(text: str, *arguments: Any, **options: Any) -> Callable[[], Any]:
    """Return the call that :func:`call_factory` makes, without making it.

    Raises:
        ConfigError: As there.
    """
    function = load_factory(text)
    try:
        signature = inspect.signature(function)
    except ValueError as err:
        raise ConfigError(f"{text} is no function of Python: {err}") from err
    for positional in (arguments, ()):
        try:
            signature.bind(*positional, **options)
        except TypeError:
            continue
        return partial(function, *positional, **options)
    raise ConfigError(
        f"{text} takes {signature}; expected to call it with {len(arguments)} "
        f"arguments or none, and the options {sorted(options)}"
    )


def function_problems(
    model: ModelConfig | None, data: DataConfig | None, train: TrainConfig | None
) -> Iterator[str]:
    """Yield what is wrong with functions of your own; they are imported, not called."""
    calls: dict[str, Callable[[], Any]] = {}
    if model and (own := model.factory):
        # Whatever shape and number of classes the data will have.
        calls[own] = partial(bind_factory, own, (), 0, **model.options)
    if data and (own := data.factory):
        calls[own] = partial(bind_factory, own)
    for own in (train.loss, train.metric) if train else ():
        if ":" in own:
            calls[own] = partial(load_factory, own)
    for own, call in calls.items():
        try:
            with own_code_named(own):
                call()
        except (ConfigError, TrainingError) as err:
            yield str(err)


@contextmanager
def own_code_named(*factories: str) -> Iterator[None]:
    """Name file and line of your own code where it raises.

    Args:
        *factories: What the recipe names; empty ones count for nothing.

    Raises:
        TrainingError: Code of yours raised: in one of the functions, or in a module,
            layer or data set that they lead to.
    """
    try:
        yield
    except (DpuError, MemoryError):
        raise
    # Whatever somebody else's code may raise.
    except Exception as err:
        place = own_place(err, *factories)
        if place is None:
            raise
        frame, line = place
        code = frame.f_code
        source = linecache.getline(code.co_filename, line).strip()
        hint = _VISION_HINT if _NO_OPERATOR in str(err) else ""
        raise TrainingError(
            f"{code.co_filename}, line {line}, in {code.co_name}: "
            f"{type(err).__name__}: {err}"
            + (f"\n    {source}" if source else "")
            + hint
        ) from err


def own_place(error: BaseException, *factories: str) -> tuple[FrameType, int] | None:
    """Return the innermost frame of your own code that an error went through."""
    homes = [home for text in factories if text and (home := _home(text))]
    if not homes:
        return None
    places = traceback.walk_tb(error.__traceback__)
    return next(
        (place for place in reversed([*places]) if _is_own(place[0], homes)), None
    )


def _home(text: str) -> Path | None:
    """Return the folder of the package, or the file of the module, that is named."""
    top = text.partition(":")[0].partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None:
        # It failed while it was imported; its folder is on the path like any other.
        return Path(top)
    path = Path(file)
    return path.parent if path.name == "__init__.py" else path


def _is_own(frame: FrameType, homes: list[Path]) -> bool:
    name = frame.f_code.co_filename
    if name.startswith("<"):
        return False
    path = Path(name)
    if any(path.is_relative_to(home) for home in homes):
        return True
    installed = not _LIBRARIES.isdisjoint(path.parts)
    ours = [_PROJECT / package for package in ("edge_runtime", "packager", "trainer")]
    others = (Path(sysconfig.get_path("stdlib")), *ours)
    return not installed and not any(path.is_relative_to(home) for home in others)
