"""Every setting, as frozen keyword-only dataclasses that are checked when built.

A :class:`RunConfig` holds everything that one training run depends on; :func:`config_key` names it by
content. A study adds what it searches: :class:`StudyConfig`. This module imports neither torch nor ray.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from dfkt.errors import ConfigError

T = TypeVar("T")

Method = Literal["scratch", "kd", "fitnets", "attention", "layerwise-hint", "similarity", "dkd", "fsp", "dfkt"]
METHODS: tuple[Method, ...] = typing.get_args(Method)
FlowNorm = Literal["relative", "unit", "mean", "sum"]
HintNorm = Literal["relative", "mean", "sum"]
KNOWN_SETS = ("cifar10", "cifar100", "mnist", "svhn", "digits")
StageOrder = Literal["cumulative", "local", "joint"]
RateSchedule = Literal["cosine", "step", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]


def _rule(holds: bool, rule: str, remedy: str = "", **values: Any) -> None:
    """Raise :class:`ConfigError` with rule, value and remedy unless the rule holds."""
    if not holds:
        got = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ConfigError(f"`{rule}` must hold, but got {got}." + (f" {remedy}" if remedy else ""))


def _finite(value: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _choice(name: str, value: str, kind: Any) -> None:
    choices = typing.get_args(kind)
    if value not in choices:
        raise ConfigError(f"`{name}` must be one of {', '.join(choices)}, but got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, how they are split and how they are augmented."""

    name: str = "digits"
    """``cifar10``, ``cifar100``, ``mnist``, ``svhn``, ``digits``, or a folder with one sub-folder per class."""
    root: str = "~/.cache/dfkt/data"
    """Where torchvision's sets are kept, and where decoded folders are cached."""
    image_size: int | None = None
    """Height and width in pixels; ``None`` keeps the set's own (a folder takes its first image's)."""
    val_fraction: float = 0.1
    """Share of the training split held out as ``val``, stratified by class."""
    split_seed: int = 0
    """Seed of the held-out choice; teacher and students must share it."""
    limit_train: int | None = None
    """At most so many training images (stratified, chosen before ``val`` is held out)."""
    limit_test: int | None = None
    """At most so many test images."""
    padding: int | None = None
    """Pixels of zero padding before the random crop; ``None`` takes the set's default."""
    flip: bool | None = None
    """Random horizontal flips; ``None`` takes the set's default."""

    def __post_init__(self) -> None:
        _rule(bool(self.name), "data name is not empty", name=self.name)
        _rule(0 < self.val_fraction < 1, "0 < val_fraction < 1", val_fraction=self.val_fraction)
        for name in ("image_size", "limit_train", "limit_test"):
            value = getattr(self, name)
            _rule(value is None or value >= 1, f"{name} >= 1", **{name: value})
        _rule(self.padding is None or self.padding >= 0, "padding >= 0", padding=self.padding)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A network, by name, with the places where its features are read."""

    name: str = "resnet8"
    """``resnet8`` … ``resnet110`` (6n+2), a torchvision name such as ``torchvision:resnet18``, or ``package.module:function``."""
    width: float = 1.0
    """Multiplies the 6n+2 ResNets' channels (16, 32, 64)."""
    taps: tuple[str, ...] | None = None
    """Module paths of the taps, from bottom to top; ``None`` takes the network's own."""

    def __post_init__(self) -> None:
        _rule(bool(self.name), "network name is not empty", name=self.name)
        _rule(_finite(self.width) and self.width > 0, "width > 0", width=self.width)
        if self.taps is not None:
            _rule(len(self.taps) >= 2, "len(taps) >= 2", "A flow pair needs two taps.", taps=self.taps)
            _rule(len(set(self.taps)) == len(self.taps), "taps differ from each other", taps=self.taps)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD with momentum, and how its rate falls over one stage (restarting with every stage)."""

    lr: float = 0.1
    """Learning rate at the start of the stage."""
    schedule: RateSchedule = "cosine"
    """``cosine`` to zero; ``step``: divided by 10 at 1/2 and 3/4 of the stage; ``constant``."""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        _rule(_finite(self.lr) and self.lr > 0, "lr > 0", lr=self.lr)
        _rule(0 <= self.momentum < 1, "0 <= momentum < 1", momentum=self.momentum)
        _rule(
            _finite(self.weight_decay) and self.weight_decay >= 0, "weight_decay >= 0", weight_decay=self.weight_decay
        )
        _rule(not self.nesterov or self.momentum > 0, "nesterov needs momentum > 0", momentum=self.momentum)
        _choice("schedule", self.schedule, RateSchedule)


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The flow stages: which pairs, in which order, how long, how weighted."""

    pattern: str = "dense-3"
    """Overlap pattern by family and span, as :mod:`dfkt.methods.patterns` names it."""
    span_weights: tuple[float, ...] = ()
    """Weight of every pair of span 1, 2, …; spans beyond the end weigh 1."""
    pair_weights: tuple[tuple[int, int, float], ...] = ()
    """(lower tap, upper tap, weight) for single pairs; overrides ``span_weights``."""
    norm: FlowNorm = "relative"
    """``sum``: squared Frobenius norm (literal); ``mean`` over the entries; ``relative`` to the teacher's squared norm;
    ``unit``: of the two matrices, each over its own norm."""
    order: StageOrder = "cumulative"
    """``local``: stage k trains the pairs whose upper tap is k; ``cumulative``: <= k; ``joint``: one stage for all pairs."""
    freeze_below: bool = False
    """Freeze the layers below the stage's lowest tap (never the stem: no flow pair ends there)."""
    rounds: int = 1
    """How often the stages are gone through from bottom to top."""
    share: float = 1 / 3
    """Share of the run's epochs spent in flow stages."""
    stage_lengths: tuple[float, ...] = ()
    """Relative length of the stage that ends at tap 1, 2, …; missing ones count 1."""
    clip_norm: float | None = 1.0
    """Clips the gradient's norm in flow stages: the loss is of fourth degree in the activations, and explodes otherwise."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=0.1))

    def __post_init__(self) -> None:
        _rule(self.clip_norm is None or self.clip_norm > 0, "clip_norm > 0", clip_norm=self.clip_norm)
        _choice("norm", self.norm, FlowNorm)
        _choice("order", self.order, StageOrder)
        _rule(self.rounds >= 1, "rounds >= 1", rounds=self.rounds)
        _rule(0 < self.share < 1, "0 < share < 1", share=self.share)
        _rule(
            all(_finite(w) and w >= 0 for w in self.span_weights), "span_weights >= 0", span_weights=self.span_weights
        )
        _rule(
            all(_finite(w) and w >= 0 for *_, w in self.pair_weights),
            "pair_weights >= 0",
            pair_weights=self.pair_weights,
        )
        _rule(
            all(_finite(s) and s > 0 for s in self.stage_lengths), "stage_lengths > 0", stage_lengths=self.stage_lengths
        )


@dataclass(frozen=True, kw_only=True)
class HintConfig:
    """The hint stages of ``fitnets`` and ``layerwise-hint``; the other methods have none."""

    norm: HintNorm = "relative"
    """As for flow; ``sum`` is the literal squared distance."""
    share: float = 1 / 3
    """Share of the run's epochs spent in hint stages."""
    soft_weights: tuple[float, ...] = (4.0, 1.0)
    """Weight of the soft targets beside cross-entropy at the task stage's start and end, linear in between."""
    clip_norm: float | None = 1.0
    """Clips the gradient's norm in hint stages, as in flow stages."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=0.1))

    def __post_init__(self) -> None:
        _choice("norm", self.norm, HintNorm)
        _rule(0 < self.share < 1, "0 < share < 1", share=self.share)
        ok = len(self.soft_weights) == 2 and all(_finite(w) and w >= 0 for w in self.soft_weights)
        _rule(ok, "soft_weights are two numbers >= 0", soft_weights=self.soft_weights)
        _rule(self.clip_norm is None or self.clip_norm > 0, "clip_norm > 0", clip_norm=self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The task stage: cross-entropy, and what a method adds to it."""

    kd_weight: float = 0.0
    """``kd``, ``dfkt``: weight of the soft targets; cross-entropy weighs ``1 - kd_weight``."""
    temperature: float = 4.0
    """Softens both networks' logits, wherever a loss compares them."""
    attention_weight: float = 1000.0
    """``attention``: beta, the weight of the attention loss beside cross-entropy."""
    similarity_weight: float = 3000.0
    """``similarity``: gamma, the weight of the similarity loss beside cross-entropy."""
    decoupled_weights: tuple[float, ...] = (1.0, 8.0)
    """``dkd``: alpha and beta, the weights of the target class and of the other classes."""
    warmup: float = 1 / 12
    """``dkd``: share of the stage in which its loss grows linearly from nothing to its weight."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _rule(0 <= self.kd_weight <= 1, "0 <= kd_weight <= 1", kd_weight=self.kd_weight)
        _rule(_finite(self.temperature) and self.temperature > 0, "temperature > 0", temperature=self.temperature)
        for name in ("attention_weight", "similarity_weight"):
            value = getattr(self, name)
            _rule(_finite(value) and value >= 0, f"{name} >= 0", **{name: value})
        ok = len(self.decoupled_weights) == 2 and all(_finite(w) and w >= 0 for w in self.decoupled_weights)
        _rule(ok, "decoupled_weights are two numbers >= 0", decoupled_weights=self.decoupled_weights)
        _rule(0 <= self.warmup <= 1, "0 <= warmup <= 1", warmup=self.warmup)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every stage of a run shares."""

    epochs: float = 60
    """Length of the whole run in epochs of the training split, flow stages counted in."""
    batch_size: int = 128
    """Images per step, over all workers together."""
    seed: int = 0
    """Initial weights, order of images, augmentation."""
    clip_norm: float | None = None
    """Clips the gradient's norm in the task stage; ``None`` does not."""
    precision: Precision = "auto"
    """``auto``: bfloat16 on GPUs that have it, float32 elsewhere. FSP matrices are float32 always."""
    compile: bool = False
    """Run the networks through torch.compile."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""

    def __post_init__(self) -> None:
        _rule(_finite(self.epochs) and self.epochs > 0, "epochs > 0", epochs=self.epochs)
        _rule(self.batch_size >= 1, "batch_size >= 1", batch_size=self.batch_size)
        _rule(0 <= self.seed < 2**63, "0 <= seed < 2**63", seed=self.seed)
        _rule(self.clip_norm is None or self.clip_norm > 0, "clip_norm > 0", clip_norm=self.clip_norm)
        _rule(self.checkpoint_every >= 1, "checkpoint_every >= 1", checkpoint_every=self.checkpoint_every)
        _choice("precision", self.precision, Precision)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher: trained once and kept, or a checkpoint that the user has."""

    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(name="resnet26"))
    checkpoint: str | None = None
    """File with a state dict; ``None`` trains the teacher or finds the one trained before."""
    root: str = "~/.cache/dfkt/teachers"
    """Where trained teachers are kept."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=60))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that one training run of a student depends on."""

    method: Method = "dfkt"
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: NetworkConfig = field(default_factory=NetworkConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    hint: HintConfig = field(default_factory=HintConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _choice("method", self.method, Method)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study: the run it starts from, how much is searched, and what stands beside the winner."""

    name: str
    """Names the study's folder; running the same name again resumes or extends it."""
    base: RunConfig = field(default_factory=RunConfig)
    """What every trial shares; the search replaces ``flow``, ``hint`` and ``task``: what its method reads of them."""
    trials: int = 40
    """Trials of the whole study, those of earlier runs counted in; 0 makes the final runs with ``base`` as it is."""
    seeds: int = 5
    """Repetitions of each final run."""
    baselines: tuple[Method, ...] = ("scratch", "kd", "fsp")
    """Methods that stand beside the winner at their reference settings, with the same number of epochs."""
    weights: Literal["span", "pair"] = "span"
    """Search one flow weight per span, or one per flow pair."""
    early_stopping: bool = True
    """ASHA stops trials that fall behind."""
    reduction_factor: int = 3
    """ASHA keeps the best 1/reduction_factor at every rung."""
    search_seed: int = 0
    """Seed of Optuna's sampler."""
    max_failures: int = 2
    """Restarts of a trial whose process died, from its last checkpoint."""

    def __post_init__(self) -> None:
        ok = bool(self.name) and not self.name.startswith(".") and all(c.isalnum() or c in "._-" for c in self.name)
        _rule(ok, "study name holds letters, digits, '.', '_' and '-' only", "Choose one with --name.", name=self.name)
        _rule(self.trials >= 0, "trials >= 0", trials=self.trials)
        _rule(self.seeds >= 1, "seeds >= 1", seeds=self.seeds)
        _rule(self.search_seed >= 0, "search_seed >= 0", search_seed=self.search_seed)
        _rule(self.reduction_factor >= 2, "reduction_factor >= 2", reduction_factor=self.reduction_factor)
        _rule(self.max_failures >= 0, "max_failures >= 0", max_failures=self.max_failures)
        _choice("weights", self.weights, Literal["span", "pair"])
        for method in self.baselines:
            _choice("baselines", method, Method)
        _rule(
            self.base.method not in self.baselines,
            "baselines leave out the method that is searched",
            baselines=self.baselines,
        )
        _rule(
            len(set(self.baselines)) == len(self.baselines),
            "baselines differ from each other",
            baselines=self.baselines,
        )


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dicts of plain JSON values."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """Build a configuration from nested dicts, as :func:`to_dict` returns them.

    Raises:
        ConfigError: If a name is unknown or a value is outside its rule.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"Unknown setting {', '.join(unknown)} in {kind.__name__}; known: {', '.join(sorted(known))}."
        )
    return kind(**{name: _restore(hints[name], value) for name, value in values.items()})


def _restore(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value)
    if isinstance(hint, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return None if value is None else _restore(inner[0], value)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        inner_hint = typing.get_args(hint)[0]
        return tuple(_restore(inner_hint, v) for v in value)
    return value


def config_key(config: Any) -> str:
    """Return 12 hexadecimal digits that name a configuration by its content."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return a configuration as one flat dict with dotted names.

    Example:
        >>> flatten(OptimizerConfig(lr=0.5))["lr"]
        0.5
    """
    flat: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else to_dict(config)).items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
