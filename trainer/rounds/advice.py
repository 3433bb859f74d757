# SPDX-License-Identifier: Apache-2.0
"""Recommends a method and settings for a byte budget, before anything is trained.

A recipe with a budget keeps to it in any case, as the trainer packs what it is about
to send.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn

from edge_runtime.errors import ConfigError, TrainingError
from trainer.config import as_dict, as_toml, make_config
from trainer.export.subspace_size import coefficients_within, subspace_bytes
from trainer.export.tensors import deployed_tensors
from trainer.method.selectable import is_weight
from trainer.recipe.rules import AUTO
from trainer.recipe.schema import Config, TrainConfig, UpdateConfig
from trainer.recipe.task import loss_name
from trainer.rounds.patch_estimate import (
    ERROR,
    LEAST_SHARE,
    MEASURED,
    NetworkSizes,
    patch_bytes,
    share_within,
)

FIRST_SHARE = 0.03  # of the weights, where a round leads from the init weights
# A subspace begins anew with so many times a round's bytes, or what a share would take.
ANEW_TIMES, ANEW_SHARE = 3, 0.01
# Coefficients a weight, up to which going on, taught, was the best of what was tried.
FEW = 0.06
MIXED = {"teacher": "full", "teacher_weight": 1.0, "teacher_mix": 1.0}
CROSS_ENTROPY = "cross_entropy"
SUBSPACE_KNOWN = (
    "MNIST MLP, taught by full updating, first 20 kB: level with it at 4.4 kB (three "
    "seeds, rounds 0-59), 0.6 points below at 1.4 kB (likewise); far behind on large "
    "pretrained networks (docs/subspace.md)"
)
LEAST_WEIGHTS = 4  # a coefficient; fewer have not been tried
DENSE_GRID = 0.03125
SUBSPACE_LR = 2e-3
# What a candidate leaves as the recipe has it.
_KEPT = ("lambda", "reinit", "chain")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to stay within a budget.

    Attributes:
        name: Of the method.
        patch: Bytes of a patch, at most; about, where it is estimated.
        first: Likewise of one that leads from the init weights.
        how: What it changes, in words.
        known: What is known of its accuracy, and of which network.
        update: Its section ``[update]``, whole.
        train: Keys of ``[train]`` that it changes.
        sets: The same as arguments of ``--set``.
        links: How long a patch takes, where that is known.
        untried: Whether nobody tried the like: it comes last.
        estimated: Whether both sizes are what all weights may take, below the budget.
    """

    name: str
    patch: int
    first: int
    how: str
    known: str
    update: Mapping[str, Any]
    train: Mapping[str, Any]
    sets: tuple[str, ...] = ()
    links: list[Any] = field(default_factory=list)
    untried: bool = False
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class Advice:
    """What suits a budget, best first, and why the rest does not."""

    network: NetworkSizes
    budget: int
    candidates: tuple[Candidate, ...]
    refused: Mapping[str, str]


def advise(
    config: Config,
    model: nn.Module,
    budget: int,
    links: Callable[[int, int], list[Any]] | None = None,
) -> Advice:
    """Say which methods keep a recipe's patches within a budget.

    Args:
        config: The recipe.
        model: Its network.
        budget: Bytes of a patch.
        links: From the bytes of a patch and of all weights to how long they take,
            such as ``packager.report.links.link_records``.

    Raises:
        ConfigError: Nothing fits; the message says what each method needs.
    """
    network = NetworkSizes.of(model, int8=config.model.deploy == "int8")
    # The weight file itself takes no more.
    most = min(budget, network.full)
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    # Best first, as far as was measured: where there is BatchNorm, lean updates.
    order = ("lean", "subspace") if network.normed else ("subspace", "lean")
    makers = {
        "lean": lambda: _lean(config, network, most),
        "subspace": lambda: _subspace(config, model, network, most),
        "dpu": lambda: _plain(network, most),
    }
    for name in (*order, "dpu"):
        try:
            found.append(_complete(makers[name](), config, network, links))
        except (ConfigError, TrainingError) as err:
            refused[name] = str(err)
    if not found:
        raise ConfigError(
            f"no method sends this network's updates in {budget} bytes:",
            problems=[f"{name}: {why}" for name, why in refused.items()],
        )
    found.sort(key=lambda candidate: candidate.untried)
    return Advice(network, budget, tuple(found), refused)


def _lean(config: Config, network: NetworkSizes, budget: int) -> Candidate:
    share = share_within(network, budget, lean=True)
    least = patch_bytes(network, LEAST_SHARE, lean=True)
    if share < LEAST_SHARE:
        raise ConfigError(
            f"below some {least} bytes fewer than {LEAST_SHARE:.1%} of the weights "
            "are left, which nobody tried; allow more, or take a subspace"
        )
    # With all weights on the grid it may still be far below the budget.
    largest = round(patch_bytes(network, 1.0, lean=True) * (1 + ERROR))
    first = max(budget, patch_bytes(network, max(share, FIRST_SHARE), lean=True))
    folded = {"fold_batchnorm": True} if network.normed else {}
    taught = loss_name(config.data, config.train) == CROSS_ENTROPY
    return Candidate(
        "lean",
        min(budget, largest),
        min(first, largest),
        f"{_about(network, share)}, on a grid; the number is found by packing in every "
        "round",
        "MNIST MLP: 0.2 points below full updating at 3.4 kB a round and 20 kB from "
        "init (k = 0.0025, two seeds, rounds 0-23); small VGG on CIFAR-10: 1.0 at "
        "8.1 kB (two seeds, rounds 0-3)",
        {
            "method": "dpu",
            "ratio": _short(share),
            "budget": str(budget),
            "first_budget": str(first),
            "narrow": True,
            "grid": AUTO,
            "dense_grid": DENSE_GRID,
            "mantissa_bits": 7,
            **folded,
        },
        {"teacher": "self"} if taught else {},
        estimated=largest < budget,
    )


def _subspace(
    config: Config, model: nn.Module, network: NetworkSizes, budget: int
) -> Candidate:
    still = set() if network.normed else _dense_names(model)
    try:
        count = coefficients_within(str(budget), model, still=still)
    except TrainingError as err:
        if network.normed:
            raise ConfigError(
                "statistics of BatchNorm have to follow the weights, and the dense "
                f"part alone has {network.dense} bytes; allow more"
            ) from err
        raise
    train = config.train
    slower = train.optimizer == "adam" and train.lr > SUBSPACE_LR
    rate = {"lr": SUBSPACE_LR} if slower else {}
    pictures = bool(config.data.set) and loss_name(config.data, train) == CROSS_ENTROPY
    few = count < FEW * network.weights and pictures
    share = FIRST_SHARE if few else ANEW_SHARE
    first = max(ANEW_TIMES * budget, patch_bytes(network, share, lean=True))
    first = min(first, network.full)
    untried = count * LEAST_WEIGHTS > network.weights
    how = "taught by full updating" if few else "anew when the data has doubled"
    if untried:
        how += f"; fewer than {LEAST_WEIGHTS} weights a coefficient: nobody tried that"
    exact = "never above it" if network.int8 else "exact"
    return Candidate(
        "subspace",
        subspace_bytes(count, model, still=still),
        first,
        f"{count} coefficients of 1 bit move all weights; the size is known before "
        f"training ({exact}); {how}",
        SUBSPACE_KNOWN,
        {
            "method": "subspace",
            "budget": str(budget),
            "first_budget": str(first),
            "dense": "train" if network.normed else "freeze",
            "reinit": "never" if few else "auto",
        },
        rate | (MIXED if few else {}),
        untried=untried,
    )


def _plain(network: NetworkSizes, budget: int) -> Candidate:
    share = share_within(network, budget, lean=False)
    if share < LEAST_SHARE:
        raise ConfigError(
            f"the dense part alone has {network.dense} bytes, and with it "
            f"{LEAST_SHARE:.1%} of the weights take some "
            f"{patch_bytes(network, LEAST_SHARE, lean=False)}; allow more"
        )
    return Candidate(
        "dpu",
        budget,
        budget,
        f"{_about(network, share)}, in {'int8' if network.int8 else 'float32'}, as in "
        "the paper; the number is found by packing in every round",
        "MNIST MLP: 0.3 points below full updating at 17 kB a round (k = 0.005, seed "
        "1, rounds 0-59); small VGG on CIFAR-10: 7.0 at 34 kB (two seeds, rounds 0-3)",
        {"method": "dpu", "ratio": _short(share), "budget": str(budget)},
        {},
    )


def _complete(
    candidate: Candidate,
    config: Config,
    network: NetworkSizes,
    links: Callable[[int, int], list[Any]] | None,
) -> Candidate:
    """Check a candidate as a recipe, and say how to take the given one there."""
    tables = as_dict(config)
    was, defaults = tables["update"], _defaults(UpdateConfig)
    update = {k: was[k] for k in _KEPT if was[k] != defaults[k]} | dict(
        candidate.update
    )
    # What it does not say of a teacher is as it was measured, whatever the recipe has.
    untaught, found = _defaults(TrainConfig), tables["train"]
    train = {k: untaught[k] for k in MIXED if untaught[k] != found[k]}
    train |= candidate.train
    make_config(tables | {"update": update, "train": tables["train"] | train})
    # A subspace has no use for the recipe's share, and leaves it.
    wanted = defaults | {"ratio": was["ratio"]} | update
    sets = [f"update.{k}={as_toml(v)}" for k, v in wanted.items() if v != was[k]]
    sets += [
        f"train.{k}={as_toml(v)}" for k, v in train.items() if v != tables["train"][k]
    ]
    return replace(
        candidate,
        update=update,
        train=train,
        sets=tuple(sets),
        links=links(candidate.patch, network.full) if links else [],
    )


def block(candidate: Candidate) -> list[str]:
    """Return the lines of a recipe that a candidate is."""
    lines = ["[update]  # in place of the recipe's own section"]
    lines += [*(f"{k} = {as_toml(v)}" for k, v in candidate.update.items())]
    if candidate.train:
        lines += ["", "[train]  # set these keys in the recipe's own; its others stay"]
        lines += [f"{k} = {as_toml(v)}" for k, v in candidate.train.items()]
    return lines


def _defaults(section: type[UpdateConfig | TrainConfig]) -> dict[str, Any]:
    known = {}
    for key in fields(section):
        if key.default is not MISSING:
            known[key.metadata["toml"] or key.name] = key.default
    return known


def _dense_names(model: nn.Module) -> set[str]:
    named: Mapping[str, Tensor] = dict(model.named_parameters())
    return {
        n
        for n in deployed_tensors(model)
        if n not in named or not is_weight(n, named[n])
    }


def _about(network: NetworkSizes, share: float) -> str:
    """Say how many weights are selected, and how well that is known."""
    known = (
        f"by up to {ERROR:.0%}" if share <= MEASURED and not network.int8 else "rough"
    )
    count = round(share * network.weights)
    return f"about {share:.2%} of the weights, {count} ({known})"


def _short(share: float) -> float:
    return float(f"{share:.2g}")
