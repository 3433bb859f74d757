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
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_type_hints

from edge_runtime.errors import ConfigError

# Those that rank what a full phase did; a budget needs them.
RANKED_METHODS = ("dpu", "gcpu", "lcpu", "magnitude")
PARTIAL_METHODS = (*RANKED_METHODS, "fisher", "rpu")
METHODS = (*PARTIAL_METHODS, "fu", "pruning")
SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DATA_SETS = ("digits", "mnist", "cifar10", "cifar100", "folder")


Rule = tuple[str, Callable[[Any], bool]]  # what is expected, and whether a value is so


def _from(low: float, high: float = float("inf")) -> Rule:
    span = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
    return span, lambda value: low <= value <= high


def _one_of(*choices: str) -> Rule:
    return "one of " + ", ".join(choices), lambda value: value in choices


_ANY: Rule = ("", lambda _value: True)
_ABOVE_0: Rule = ("above 0", lambda value: value > 0)
_SHARE: Rule = ("above 0, at most 1", lambda value: 0 < value <= 1)
_SIZE: Rule = (
    "a size such as 64KB (1000 each) or 64KiB (1024 each)",
    lambda value: value == "" or parse_size(value) is not None,
)
_FACTORY: Rule = (
    "package.module:function",
    lambda value: not value or re.fullmatch(r"[\w.]+:\w+", value) is not None,
)
_REINIT: Rule = (
    "auto, never, or a number of rounds",
    lambda value: value in ("auto", "never") or (type(value) is int and value > 0),
)


def parse_size(text: str) -> int | None:
    """Return a size such as ``64KB`` or ``1.5MiB`` in bytes; None if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Z]*)", text.strip().upper())
    if not match or match[2] not in SIZE_UNITS:
        return None
    return int(float(match[1]) * SIZE_UNITS[match[2]]) or None


def _key(
    help_text: str, rule: Rule = _ANY, *, default: Any = MISSING, toml: str = ""
) -> Any:
    metadata = {"help": help_text, "rule": rule, "toml": toml}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Section ``[run]``."""

    name: str = _key("folder below --runs; default: the recipe's name")
    rounds: int = _key("number of rounds, round_00 included", _from(1))
    seed: int = _key("keys every random stream of the run", default=0)
    accuracy_floor: float | None = _key(
        "share of golden labels that a device must get right before it takes new "
        "weights; default: halfway between chance and round_00's share",
        ("from 0 to 1", lambda value: value is None or 0 <= value <= 1),
        default=None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Section ``[data]``."""

    set: str = _key(
        "the data set",
        (_one_of(*DATA_SETS)[0], lambda value: value in ("", *DATA_SETS)),
        default="",
    )
    factory: str = _key(
        "in place of set: package.module:function that returns your own data",
        _FACTORY,
        default="",
    )
    initial: int = _key("training samples in round_00", _from(2))
    growth: int = _key("training samples that every later round adds", _from(0))
    root: str = _key(
        "where the data set lies or is downloaded to; for folder: the directory with "
        "train/CLASS/* and test/CLASS/* (or val/)",
        default="~/.cache/dpu-edge/data",
    )
    size: int = _key(
        "folder only: resize and crop to this many pixels; 0: images are equal already",
        _from(0),
        default=0,
    )
    memory: str = _key(
        "folder and factory: what is larger is read batch by batch",
        _SIZE,
        default="4GB",
    )
    validation: int = _key("samples that choose the epoch", _from(1), default=1000)
    validation_from: str = _key(
        "train, or test (the paper's protocol, which leaves fewer test samples)",
        _one_of("train", "test"),
        default="train",
    )
    normalise: bool = _key(
        "subtract the data set's mean, divide by its deviation, per channel",
        default=True,
    )
    augment: str = _key(
        "crop_flip: random crop after padding by 4 pixels, random horizontal flip",
        _one_of("none", "crop_flip"),
        default="none",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Section ``[model]``: a name, and that model's own options."""

    name: str = _key(
        "mlp, small_cnn, vgg, resnet56 or a torchvision classifier", default=""
    )
    factory: str = _key(
        "in place of name: package.module:function that builds your own network, given "
        "the shape of an input and the number of classes, or nothing",
        _FACTORY,
        default="",
    )
    weights: str = _key(
        "file with pretrained weights: safetensors, or a torch state dict", default=""
    )
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """Section ``[update]``."""

    method: str = _key("how weights are selected", _one_of(*METHODS), default="dpu")
    ratio: float = _key("share of the weights that may change", _SHARE, default=0.01)
    lam: float = _key(
        "dpu only: 1 is the global contribution alone, 0 the local one alone",
        _from(0, 1),
        default=0.5,
        toml="lambda",
    )
    reinit: int | str = _key(
        "when to start from the init weights again; auto: the data grew more than "
        "twofold since the last time (fu and pruning: every round), never, or every "
        "so many rounds",
        _REINIT,
        default="auto",
    )
    first: str = _key(
        "how round_00 is made: partial, as every other round (the paper), or full: "
        "every weight trains, and the bundle carries them all",
        _one_of("partial", "full"),
        default="partial",
    )
    chain: str = _key(
        "what the next round starts from: deployed, or paper: a re-initialised model "
        "goes on even where it is worse; for reproduction, cannot be packed",
        _one_of("deployed", "paper"),
        default="deployed",
    )
    budget: str = _key(
        "largest patch, such as 64KB; how many weights that allows is found by "
        "packing, and ratio is only where the search starts",
        _SIZE,
        default="",
    )
    dense: str = _key(
        "biases and normalisation: train (the paper), freeze (unless a round starts "
        "from the init weights), or budget: selected like any other weight",
        _one_of("train", "freeze", "budget"),
        default="train",
    )
    mantissa_bits: int = _key(
        "what is deployed is rounded to so many mantissa bits: 23 (float32 as it is), "
        "10 or 7",
        ("23, 10 or 7", lambda value: value in (23, 10, 7)),
        default=23,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Section ``[train]``."""

    epochs: int = _key("epochs of one phase; a round has two phases", _from(1))
    batch: int = _key("samples of one step", _from(2), default=128)
    optimizer: str = _key("the optimizer", _one_of("adam", "sgd"), default="adam")
    lr: float = _key("learning rate at the start of a phase", _ABOVE_0, default=5e-3)
    momentum: float = _key("sgd only", _from(0, 1), default=0.0)
    nesterov: bool = _key("sgd only; needs momentum", default=False)
    weight_decay: float = _key("L2 penalty", _from(0), default=0.0)
    schedule: str = _key(
        "step: times factor after each third of a phase; cosine: down to 0; constant",
        _one_of("step", "cosine", "constant"),
        default="step",
    )
    factor: float = _key("of schedule step", _SHARE, default=0.1)
    device: str = _key(
        "auto: a GPU where there is one",
        _one_of("auto", "cpu", "cuda"),
        default="auto",
    )
    threads: int = _key(
        "CPU threads; part of what decides the bits", _from(1), default=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole recipe, checked."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    update: UpdateConfig
    train: TrainConfig


def load_config(
    recipe: str | PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    name: str = "",
    model: str = "",
    data: str = "",
) -> Config:
    """Read a recipe from a file.

    Args:
        recipe: The TOML file, or its tables.
        overrides: Changes such as ``"train.epochs=5"``; the value is TOML, or text.
        name: Name of the run; default: the recipe's ``run.name``, or its file name.
        model: ``package.module:function``, in place of the section ``[model]``.
        data: ``package.module:function``, in place of ``data.set``.

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
    return make_config(tables, problems, source=source)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} is not a TOML file: {err}") from err


def make_config(
    tables: Mapping[str, Any], problems: Sequence[str] = (), *, source: str = "recipe"
) -> Config:
    """Check the tables of a recipe and put them into dataclasses.

    Args:
        tables: Sections as :func:`tomllib.load` or :func:`as_dict` give them.
        problems: Problems found before; reported together with the new ones.
        source: What to call the recipe in the error.

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
    for section in made.values():
        problems += _disagreements(section)
    if problems:
        raise ConfigError(f"{source}, {len(problems)} to mend:", problems=problems)
    return Config(**made)


def as_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the resolved recipe, defaults included, as JSON-able tables."""
    tables: dict[str, dict[str, Any]] = {}
    for name in get_type_hints(Config):
        section = getattr(config, name)
        keys = _keys(type(section)).items()
        tables[name] = {key: getattr(section, f.name) for key, f in keys}
    tables["model"] |= config.model.options
    return tables


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
        case UpdateConfig(method=method) if (
            section.budget and method not in RANKED_METHODS
        ):
            yield f"[update] budget is for methods {', '.join(RANKED_METHODS)} only"
        case UpdateConfig(method="fu" | "pruning", dense="freeze" | "budget"):
            yield "[update] dense other than train is for methods that select only"
        case RunConfig(name=name) if not name or Path(name).name != name:
            yield f"[run] name should be a plain folder name, found {name!r}"
        case DataConfig(set=name, factory=own) if bool(name) == bool(own):
            yield "[data] set, or factory for your own: expected one of the two"
        case ModelConfig(name=name, factory=own) if bool(name) == bool(own):
            yield "[model] name, or factory for your own: expected one of the two"
        case ModelConfig(name=name) if name:
            from trainer.models import option_problems  # late: it brings torch

            yield from option_problems(section.name, section.options)


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
        table[key] = tomllib.loads(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError:
        table[key] = literal.strip()
    return None
