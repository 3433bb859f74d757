# SPDX-License-Identifier: Apache-2.0
"""The sections of a recipe: every key with its default, its rule and what it means."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from edge_runtime.formats.contract import METRICS, TASKS
from trainer.recipe.rules import (
    ABOVE_0,
    ANY,
    AUTO,
    FACTORY,
    GRID,
    MULTIPLE_OF_64,
    REINIT,
    SHARE,
    SIZE,
    Rule,
    at_least,
    between,
    named_or_own,
    one_of,
)

# Those that rank what a full phase did; a budget needs them.
RANKED_METHODS = ("dpu", "gcpu", "lcpu", "magnitude")
PARTIAL_METHODS = (*RANKED_METHODS, "fisher", "rpu", "named", "subspace")
METHODS = (*PARTIAL_METHODS, "fu", "pruning")
DATA_SETS = ("digits", "mnist", "cifar10", "cifar100", "folder")
LOSSES = ("cross_entropy", "bce", "mse", "l1")


def _key(
    help_text: str, rule: Rule = ANY, *, default: Any = MISSING, toml: str = ""
) -> Any:
    metadata = {"help": help_text, "rule": rule, "toml": toml}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Section ``[run]``."""

    name: str = _key("folder below --runs; default: the recipe's name")
    rounds: int = _key("number of rounds, round_00 included", at_least(1))
    id: str = _key(
        "tells devices this run from others of the same network, any text; default: "
        "drawn when the run is started",
        default="",
    )
    seed: int = _key("keys every random stream of the run", default=0)
    accuracy_floor: float | None = _key(
        "share of golden labels that a device must get right before it takes new "
        "weights; default: halfway between chance and round_00's share",
        ("from 0 to 1", lambda value: value is None or 0 <= value <= 1),
        default=None,
    )
    bound: float | None = _key(
        "what a device asks of the metric on golden labels before it takes new "
        "weights: at least, or at most for mae; default: halfway between the best "
        "answer that is the same for every sample and round_00's",
        default=None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Section ``[data]``."""

    set: str = _key(
        "the data set",
        (one_of(*DATA_SETS)[0], lambda value: value in ("", *DATA_SETS)),
        default="",
    )
    factory: str = _key(
        "in place of set: package.module:function that returns your own data",
        FACTORY,
        default="",
    )
    task: str = _key(
        "what the network is for; all but classification with data of your own",
        one_of(*TASKS),
        default="classification",
    )
    initial: int = _key("training samples in round_00", at_least(2))
    growth: int = _key("training samples that every later round adds", at_least(0))
    root: str = _key(
        "where the data set lies or is downloaded to; for folder: the directory with "
        "train/CLASS/* and test/CLASS/* (or val/)",
        default="~/.cache/dpu-edge/data",
    )
    size: int = _key(
        "folder only: resize and crop to this many pixels; 0: images are equal already",
        at_least(0),
        default=0,
    )
    memory: str = _key(
        "folder and factory: what is larger is read batch by batch",
        SIZE,
        default="4GB",
    )
    validation: int = _key("samples that choose the epoch", at_least(1), default=1000)
    validation_from: str = _key(
        "train, or test (the paper's protocol, which leaves fewer test samples)",
        one_of("train", "test"),
        default="train",
    )
    normalise: bool = _key(
        "subtract the data set's mean, divide by its deviation, per channel",
        default=True,
    )
    augment: str = _key(
        "shift: moved by up to a fourteenth of the side (digits); crop: random crop "
        "after padding by 4 pixels; crop_flip: and a random horizontal flip",
        one_of("none", "shift", "crop", "crop_flip"),
        default="none",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Section ``[model]``: a name, and that model's own options."""

    name: str = _key(
        "mlp, small_cnn, vgg, resnet20, resnet56 or a torchvision classifier",
        default="",
    )
    factory: str = _key(
        "in place of name: package.module:function that builds your own network, given "
        "the shape of an input and the number of classes, or nothing",
        FACTORY,
        default="",
    )
    weights: str = _key(
        "file with pretrained weights: safetensors, or a torch state dict", default=""
    )
    deploy: str = _key(
        "what devices compute in; int8: weights are int8 there, a quarter of the file, "
        "and so is what is computed",
        one_of("float32", "int8"),
        default="float32",
    )
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """Section ``[update]``."""

    method: str = _key("how weights are selected", one_of(*METHODS), default="dpu")
    ratio: float = _key("share of the weights that may change", SHARE, default=0.01)
    tensors: str = _key(
        "named only: which tensors train, whole: names or shell patterns, with commas "
        "between; default: none, the dense part alone",
        default="",
    )
    coefficients: int = _key(
        "subspace only: how many move all weights; with a budget it says how many",
        MULTIPLE_OF_64,
        default=8192,
    )
    bits: int = _key("subspace only: of a coefficient", between(1, 8), default=1)
    taps: int = _key(
        "subspace only: how many coefficients move a weight", between(1, 4), default=2
    )
    first_ratio: float = _key(
        "share where a round starts from the init weights (round_00, after "
        "re-initialisation); default: ratio",
        between(0, 1),
        default=0.0,
    )
    narrow: bool = _key(
        "first keep four times as many weights, train these for half of the second "
        "phase, rank them again, and keep the best",
        default=False,
    )
    lam: float = _key(
        "dpu only: 1 is the global contribution alone, 0 the local one alone",
        between(0, 1),
        default=0.5,
        toml="lambda",
    )
    reinit: int | str = _key(
        "when to start from the init weights again; auto: the data grew more than "
        "reinit_growth times since the last time (fu and pruning: every round; "
        "subspace: only with first_budget or anew_budget), never, or every so many "
        "rounds",
        REINIT,
        default="auto",
    )
    reinit_growth: float = _key(
        "with reinit auto: how many times the data has to grow",
        ("more than 1", lambda value: value > 1),
        default=2.0,
    )
    gradual: bool = _key(
        "pruning only: ever fewer weights are left through the first phase, at its "
        "first learning rate; otherwise all at once at its end",
        default=False,
    )
    first: str = _key(
        "how round_00 is made: partial, as every other round (the paper), or full: "
        "every weight trains, and the bundle carries them all",
        one_of("partial", "full"),
        default="partial",
    )
    chain: str = _key(
        "what becomes of a re-initialised model that validates worse than the deployed "
        "one; shadow: it is trained on unseen and deployed once it is no worse (fu, "
        "pruning, and subspace with a budget: as deployed); deployed: nothing, it is "
        "tried again in the next one; paper: the run goes on with it, for "
        "reproduction; cannot be packed",
        one_of("deployed", "shadow", "paper"),
        default="shadow",
    )
    budget: str = _key(
        "largest patch, such as 64KB; how many weights that allows is found by "
        "packing, and ratio is only where the search starts; default: none",
        SIZE,
        default="",
    )
    first_budget: str = _key(
        "largest patch of round_00, and of what was trained on unseen (chain shadow); "
        "default: budget",
        SIZE,
        default="",
    )
    anew_budget: str = _key(
        "subspace only: largest patch of a later round from the init weights; default: "
        "first_budget",
        SIZE,
        default="",
    )
    dense: str = _key(
        "biases and normalisation: train (the paper), freeze (unless a round starts "
        "from the init weights; with subspace always), or budget: selected, or moved, "
        "like any other weight",
        one_of("train", "freeze", "budget"),
        default="train",
    )
    mantissa_bits: int = _key(
        "what is deployed is rounded to so many mantissa bits: 23 (float32 as it is), "
        "10 or 7",
        ("23, 10 or 7", lambda value: value in (23, 10, 7)),
        default=23,
    )
    grid: float | str = _key(
        "new values of selected weights are multiples of this power of two; auto: of "
        "one for each tensor and round, half of how far its selected weights moved. "
        "With deploy int8 of int8 steps, from 1 to 64; default: none",
        GRID,
        default="",
    )
    dense_grid: float | str = _key(
        "likewise for biases, scales and shifts; default: none", GRID, default=""
    )
    fold_batchnorm: bool = _key(
        "deploy BatchNorm as scale and shift, with statistics that stay as they are",
        default=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Section ``[train]``."""

    epochs: int = _key("epochs of one phase; a round has two phases", at_least(1))
    batch: int = _key("samples of one step", at_least(2), default=128)
    loss: str = _key(
        "what is minimised; auto: the task's (cross_entropy, bce of logits, mse)",
        named_or_own(*LOSSES),
        default=AUTO,
    )
    metric: str = _key(
        "what the best epoch is chosen by; auto: the task's (top1, element_accuracy, "
        "mae, iou)",
        named_or_own(*METRICS),
        default=AUTO,
    )
    better: str = _key(
        "for a metric of your own: which values are better, higher or lower ones",
        one_of(AUTO, "higher", "lower"),
        default=AUTO,
    )
    optimizer: str = _key("the optimizer", one_of("adam", "sgd"), default="adam")
    lr: float = _key("learning rate at the start of a phase", ABOVE_0, default=5e-3)
    deployed_lr: float = _key(
        "likewise, in rounds that go on from deployed weights; default: lr",
        ("at least 0, and finite", lambda value: 0 <= value < float("inf")),
        default=0.0,
    )
    teacher: str = _key(
        "whose answers the selected weights learn beside the labels; self: the round's "
        "own network after its first phase; full: one that full updating gives",
        one_of("none", "self", "full"),
        default="none",
    )
    teacher_weight: float = _key(
        "share of the teacher's part of the loss", between(0, 1), default=0.7
    )
    teacher_temperature: float = _key(
        "softens the answers of both", ABOVE_0, default=3.0
    )
    teacher_mix: float = _key(
        "the teacher answers for mixtures of two samples, of shares from Beta(a, a), "
        "and nothing else is learnt: a; 0: for the samples themselves",
        at_least(0),
        default=0.0,
    )
    momentum: float = _key("sgd only", between(0, 1), default=0.0)
    nesterov: bool = _key("sgd only; needs momentum", default=False)
    weight_decay: float = _key("L2 penalty", at_least(0), default=0.0)
    schedule: str = _key(
        "step: times factor after each third of a phase; cosine: down to 0; constant",
        one_of("step", "cosine", "constant"),
        default="step",
    )
    factor: float = _key("of schedule step", SHARE, default=0.1)
    precision: str = _key(
        "of the steps; float32, tf32 (GPUs alone), or bf16: mixed, where what "
        "multiplies is in bfloat16. Weights, scores and accuracies stay float32",
        one_of("float32", "tf32", "bf16"),
        default="float32",
    )
    channels_last: bool = _key(
        "the channels of a pixel lie side by side: faster convolutions on GPUs",
        default=False,
    )
    compile: bool = _key(
        "compile forward and backward passes: seconds to minutes a round, then faster",
        default=False,
    )
    deterministic: bool = _key(
        "GPUs: only algorithms that give the same bits every time; slower",
        default=False,
    )
    device: str = _key(
        "auto: a GPU where there is one",
        one_of("auto", "cpu", "cuda"),
        default="auto",
    )
    threads: int = _key(
        "CPU threads; part of what decides the bits", at_least(1), default=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole recipe, checked."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    update: UpdateConfig
    train: TrainConfig
