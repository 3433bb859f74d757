# SPDX-License-Identifier: Apache-2.0
"""Recipes: TOML files that say everything about a run.

A recipe is read into frozen dataclasses, one a section. Unknown keys are errors, and
all problems are reported at once. What a run was made with is saved in full, defaults
included, in every round folder.

::

    config = load_config("digits.toml", ["update.ratio=0.02"])
    config.update.ratio    # 0.02
"""

import copy
import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_type_hints

from edge_runtime.errors import ConfigError
from edge_runtime.formats.kinds import kind_of
from trainer.recipe.factory import function_problems
from trainer.recipe.rules import AUTO
from trainer.recipe.schema import (
    METHODS,
    PARTIAL_METHODS,
    RANKED_METHODS,
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UpdateConfig,
)
from trainer.recipe.task import loss_name, task_problems


def load_config(
    recipe: str | PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    name: str = "",
    model: str = "",
    data: str = "",
    functions: bool = False,
) -> Config:
    """Read a recipe from a file.

    Args:
        recipe: The TOML file, or its tables.
        overrides: Changes such as ``"train.epochs=5"``; the value is TOML, or text.
        name: Name of the run; default: the recipe's ``run.name``, or its file name.
        model: ``package.module:function``, in place of the section ``[model]``.
        data: ``package.module:function``, in place of ``data.set``.
        functions: Whether to look at the functions of your own that it names: they are
            imported, and none is called.

    Raises:
        ConfigError: Not TOML, or with problems; the error lists all of them.
        OSError: The file cannot be read.
    """
    if isinstance(recipe, Mapping):
        source, tables = "recipe", copy.deepcopy(dict(recipe))
    else:
        source, tables = str(recipe), _read_toml(Path(recipe))
    if model:
        tables["model"] = {"factory": model}
    if data and isinstance(section := tables.setdefault("data", {}), dict):
        section.pop("set", None)
        section["factory"] = data
    problems = [p for text in overrides if (p := _override(tables, text))]
    run = tables.setdefault("run", {})
    if isinstance(run, dict):
        run["name"] = name or run.get("name", Path(source).stem)
    return make_config(tables, problems, source=source, functions=functions)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        if kind := kind_of(path):
            raise ConfigError(
                f"{path} is {kind.words}, expected a recipe (TOML); {kind.taker}"
            ) from err
        raise ConfigError(f"{path} is not a TOML file: {err}") from err


def make_config(
    tables: Mapping[str, Any],
    problems: Sequence[str] = (),
    *,
    source: str = "recipe",
    functions: bool = False,
) -> Config:
    """Check the tables of a recipe and put them into dataclasses.

    Args:
        tables: Sections as :func:`tomllib.load` or :func:`as_dict` give them.
        problems: Problems found before; reported together with the new ones.
        source: What to call the recipe in the error.
        functions: As for :func:`load_config`.

    Raises:
        ConfigError: With problems; the error lists all of them.
    """
    problems = list(problems)
    sections = get_type_hints(Config)
    problems += _unknown(tables, sections, "section [{}]")
    made: dict[str, Any] = {
        name: _section(name, kind, tables.get(name, {}), problems)
        for name, kind in sections.items()
    }
    for name, section in made.items():
        problems += _disagreements(section)
        problems += _unrecordable(name, section)
    parts = made["run"], made["data"], made["train"]
    if all(parts):
        problems += task_problems(*parts)
    if made["update"] and made["train"] and made["data"]:
        problems += _teacher_problems(made["update"], made["train"], made["data"])
    if made["model"] and made["update"] and made["model"].deploy == "int8":
        problems += _int8_problems(made["update"])
    if functions:
        problems += function_problems(made["model"], made["data"], made["train"])
    if problems:
        raise ConfigError(f"{source}, {len(problems)} to mend:", problems=problems)
    return Config(**made)


def as_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the resolved recipe, defaults included, as JSON-able tables."""
    return {name: _table(getattr(config, name)) for name in get_type_hints(Config)}


def as_lines(config: Config) -> Iterator[str]:
    """Yield the resolved recipe as lines of TOML, with what its defaults stand for."""
    for name, table in as_dict(config).items():
        keys = _keys(type(getattr(config, name)))
        for key, value in table.items():
            words = ""
            if key in keys and value == keys[key].default:
                words = keys[key].metadata["help"].partition("default: ")[2]
            if other := table.get(words):  # another key, and it says something
                words = f"{words}, here {as_toml(other)}"
            line = f"{name}.{key} = {as_toml(value)}"
            if value is None:  # which TOML lacks
                yield f"# {name}.{key}, default: {words}"
            else:
                yield f"{line}  # default: {words}" if words else line


def as_toml(value: Any) -> str:
    """Return a value of a recipe as TOML has it."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return f"[{', '.join(map(as_toml, value))}]"
        case dict():
            pairs = (f"{as_toml(k)} = {as_toml(v)}" for k, v in value.items())
            return f"{{{', '.join(pairs)}}}"
    return str(value)


def _table(section: Any) -> dict[str, Any]:
    """Return a section as a recipe has it, defaults included."""
    keys = _keys(type(section)).items()
    found = {key: getattr(section, f.name) for key, f in keys}
    return found | getattr(section, "options", {})


def _keys(section: type) -> dict[str, Any]:
    """Return the fields of a section by their name in TOML."""
    return {f.metadata["toml"] or f.name: f for f in fields(section) if f.metadata}


def _section(name: str, kind: type, table: Any, problems: list[str]) -> Any | None:
    """Build one section, or add to ``problems`` and return None."""
    if not isinstance(table, Mapping):
        problems.append(f"[{name}] should be a section, found {table!r}")
        return None
    hints, keys, values, before = get_type_hints(kind), _keys(kind), {}, len(problems)
    if kind is ModelConfig:
        values["options"] = {k: v for k, v in table.items() if k not in keys}
    else:
        problems += _unknown(table, keys, f"[{name}] {{}}")
    for key, spec in keys.items():
        if key not in table:
            if spec.default is MISSING:
                problems.append(f"[{name}] {key} is missing: {spec.metadata['help']}")
            continue
        value, wanted = table[key], get_args(hints[spec.name]) or (hints[spec.name],)
        if float in wanted and type(value) is int:
            value = float(value)
        expected, holds = spec.metadata["rule"]
        if type(value) not in wanted:
            types = " or ".join(t.__name__ for t in wanted if t is not type(None))
            problems.append(f"[{name}] {key} should be {types}, found {value!r}")
        elif not holds(value):
            problems.append(f"[{name}] {key} should be {expected}, found {value!r}")
        values[spec.name] = value
    return kind(**values) if len(problems) == before else None


def _disagreements(section: Any) -> Iterable[str]:
    """Yield what is wrong between keys that are right one by one."""
    match section:
        case TrainConfig(optimizer="adam") if section.momentum or section.nesterov:
            yield "[train] momentum and nesterov are for optimizer sgd only"
        case TrainConfig(nesterov=True, momentum=0.0):
            yield "[train] nesterov needs momentum above 0"
        case DataConfig(size=size, set=name) if size and name != "folder":
            yield "[data] size is for set folder only"
        case UpdateConfig():
            yield from _update_disagreements(section)
        case RunConfig(name=name) if not name or Path(name).name != name:
            yield f"[run] name should be a plain folder name, found {name!r}"
        case DataConfig(set=name, factory=own) if bool(name) == bool(own):
            yield "[data] set, or factory for your own: expected one of the two"
        case ModelConfig(name=name, factory=own) if bool(name) == bool(own):
            yield "[model] name, or factory for your own: expected one of the two"
        case ModelConfig(name=name) if name:
            from trainer.networks.models import option_problems  # late: it brings torch

            yield from option_problems(section.name, section.options)


def _unrecordable(name: str, section: Any | None) -> Iterable[str]:
    """Yield which keys hold what the record of a round, which is JSON, cannot hold."""
    for key, value in _table(section).items() if section else ():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            yield (
                f"[{name}] {key} should be what a round's record (JSON) can hold: "
                f"texts, finite numbers and lists of them, found {value!r}"
            )


def _update_disagreements(section: UpdateConfig) -> Iterable[str]:
    if section.method == "subspace":
        if section.mantissa_bits != 23:
            yield "[update] mantissa_bits 23 it is with subspace: all weights move"
    elif (section.coefficients, section.bits, section.taps) != (8192, 1, 2):
        yield "[update] coefficients, bits and taps are for method subspace only"
    if section.gradual and section.method != "pruning":
        yield "[update] gradual is for method pruning only"
    if section.tensors and section.method != "named":
        yield "[update] tensors is for method named only"
    if section.method == "named" and not section.tensors and section.dense != "train":
        yield "[update] tensors names what trains: without it, the dense part has to"
    if section.dense != "train" and section.method not in PARTIAL_METHODS:
        yield "[update] dense other than train is for methods that select only"
    yield from _budget_disagreements(section)
    yield from _lean_disagreements(section)


def _budget_disagreements(section: UpdateConfig) -> Iterable[str]:
    if section.budget and section.method not in (able := (*RANKED_METHODS, "subspace")):
        yield f"[update] budget is for methods {', '.join(able)} only"
    if section.first_budget and not section.budget:
        yield "[update] first_budget is for recipes with a budget"
    if section.anew_budget and not (section.method == "subspace" and section.budget):
        yield "[update] anew_budget is for method subspace with a budget"


def _lean_disagreements(section: UpdateConfig) -> Iterable[str]:
    ranked = f"is for methods {', '.join(RANKED_METHODS)} only"
    if section.method not in RANKED_METHODS:
        for key, value in (
            ("grid auto", section.grid == AUTO),
            ("dense_grid auto", section.dense_grid == AUTO),
            ("narrow", section.narrow),
        ):
            if value:
                yield f"[update] {key} {ranked}"
    selects = section.method in PARTIAL_METHODS and section.method != "subspace"
    if not selects and (section.grid or section.first_ratio):
        yield "[update] grid and first_ratio are for methods that select weights only"
    if section.dense_grid and section.method == "fu":
        yield "[update] dense_grid is for methods other than fu, which has no grid"
    if section.fold_batchnorm and section.dense != "train":
        yield (
            "[update] fold_batchnorm needs dense train: otherwise statistics stay, and "
            "there is nothing to fold"
        )


def _teacher_problems(
    update: UpdateConfig, train: TrainConfig, data: DataConfig
) -> Iterable[str]:
    able = {"self": (*RANKED_METHODS, "subspace"), "full": (*PARTIAL_METHODS, "fu")}
    if update.method not in able.get(train.teacher, METHODS):
        yield (
            f"[train] teacher {train.teacher} is for methods "
            f"{', '.join(able[train.teacher])} only"
        )
    if train.teacher_mix and (train.teacher == "none" or train.teacher_weight != 1):
        yield (
            "[train] teacher_mix is for recipes with a teacher and teacher_weight 1: "
            "mixtures have no labels"
        )
    loss = loss_name(data, train)
    if train.teacher != "none" and loss != "cross_entropy":
        yield (
            f"[train] teacher is for loss cross_entropy, where answers are "
            f"probabilities of classes; this one is {loss}"
        )


def _int8_problems(update: UpdateConfig) -> Iterable[str]:
    if isinstance(update.grid, float) and not 1 <= update.grid <= 64:
        yield (
            "[update] grid counts int8 steps with deploy int8: expected auto, 1, 2, "
            f"4, 8, 16, 32 or 64, found {update.grid:g}"
        )


def _unknown(found: Iterable[str], known: Iterable[str], form: str) -> Iterable[str]:
    known = list(known)
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else "known: " + ", ".join(known)
            yield f"{form.format(key)} is unknown; {hint}"


def _override(tables: dict[str, Any], text: str) -> str | None:
    """Put ``section.key=value`` into the tables, or return what is wrong with it."""
    path, equals, literal = text.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (equals and dot and key):
        return f"--set {text}: write it as section.key=value"
    table = tables.setdefault(section, {})
    if not isinstance(table, dict):
        return f"--set {text}: {section} is not a section"
    try:
        value = tomllib.loads(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError:
        value = literal.strip()
    # Where text is wanted, 2024 is text too.
    is_text = _kind_of(section, key) is str and not isinstance(value, str)
    table[key] = literal.strip() if is_text else value
    return None


def _kind_of(section: str, key: str) -> Any:
    kind = get_type_hints(Config).get(section)
    spec = _keys(kind).get(key) if kind else None
    return get_type_hints(kind)[spec.name] if kind and spec else None
