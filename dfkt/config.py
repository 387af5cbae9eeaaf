"""The leaf settings, as frozen keyword-only dataclasses that are checked when built, and how settings become JSON and keys.

What a result depends on is a setting and counts in :func:`config_key`; where things lie and how fast they run is
:class:`Placement`, and counts in no key. This module imports neither torch nor ray.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal, TypeVar

from dfkt.errors import ConfigError
from dfkt.rules import check_choice as check_choice
from dfkt.rules import check_rule as check_rule
from dfkt.rules import is_finite as is_finite

T = TypeVar("T")

KNOWN_SETS = ("cifar10", "cifar100", "mnist", "svhn", "digits")
Crop = Literal["padded", "resized", "none"]
RateSchedule = Literal["cosine", "step", "constant"]
Precision = Literal["auto", "float32", "bfloat16", "float64"]
CudaGraphs = Literal["auto", "on", "off"]
AS_KEY = "as_key"
"""Metadata of a field whose value counts otherwise in a key than it stands: a function of the value."""
NO_KEY = {AS_KEY: lambda value: None}
"""Metadata of a field that counts in no key."""
IF_GIVEN = {"if_given": True}
"""Metadata of a field that counts in a key unless it is ``None``: it came later, and earlier keys stay what they were."""
PRETRAINED_OWN = "own"
"""What ``TeacherConfig.pretrained`` says for the weights of the network's library."""


def _base_name(name: str) -> str:
    """Return what an image set counts as in a key: moved images are the same images."""
    return name if name in KNOWN_SETS else f"folder {PurePath(name).name}"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, how they are split and how they are augmented."""

    name: str = field(default="digits", metadata={AS_KEY: _base_name})
    """``cifar10``, ``cifar100``, ``mnist``, ``svhn``, ``digits``, or a folder with one sub-folder per class."""
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
    crop: Crop | None = None
    """``padded``: zeros around the image, then a crop of its size; ``resized``: an area of 8 to 100 % and a side ratio of 3/4 to
    4/3, resized (as networks for ImageNet are trained); ``none``; ``None`` takes ``resized`` above 64 pixels, else ``padded``."""
    padding: int | None = None
    """Pixels of zero padding before a ``padded`` crop; ``None`` takes the set's default."""
    flip: bool | None = None
    """Random horizontal flips; ``None`` takes the set's default: yes for CIFAR, no elsewhere: a mirrored letter is another."""

    def __post_init__(self) -> None:
        check_rule(bool(self.name), "data name is not empty", name=self.name)
        check_rule(0 < self.val_fraction < 1, "0 < val_fraction < 1", val_fraction=self.val_fraction)
        limits = {"limit_train": (1, 10**9), "limit_test": (1, 10**9), "image_size": (1, 4096), "padding": (0, 4096)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            check_rule(value is None or least <= value <= most, f"{least} <= {name} <= {most}", **{name: value})
        check_choice("crop", self.crop, (None, *typing.get_args(Crop)))
        ok = self.padding is None or self.crop in (None, "padded")
        check_rule(ok, "padding belongs to a padded crop", crop=self.crop, padding=self.padding)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A network, by name, with the places where its features are read."""

    name: str = "resnet8"
    """``resnet8`` … ``resnet110`` (6n+2), ``torchvision:NAME``, ``timm:NAME``, or ``package.module:function``."""
    width: float = 1.0
    """Multiplies the 6n+2 ResNets' channels (16, 32, 64)."""
    taps: tuple[str, ...] | None = None
    """Module paths of the taps, from bottom to top; ``None`` takes the network's own."""

    def __post_init__(self) -> None:
        check_rule(bool(self.name), "network name is not empty", name=self.name)
        check_rule(is_finite(self.width) and 0 < self.width <= 64, "0 < width <= 64", width=self.width)
        if self.taps is not None:
            check_rule(len(self.taps) >= 2, "len(taps) >= 2", "A flow pair needs two taps.", taps=self.taps)
            check_rule(len(set(self.taps)) == len(self.taps), "taps differ from each other", taps=self.taps)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD with momentum, and how its rate falls over a stage (restarting with every stage); stages say where it starts."""

    schedule: RateSchedule = "cosine"
    """``cosine`` to zero; ``step``: divided by 10 at 1/2 and 3/4 of the stage; ``constant``."""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, typing.get_args(RateSchedule))
        check_rule(0 <= self.momentum < 1, "0 <= momentum < 1", momentum=self.momentum)
        ok = is_finite(self.weight_decay) and self.weight_decay >= 0
        check_rule(ok, "weight_decay >= 0", weight_decay=self.weight_decay)
        check_rule(not self.nesterov or self.momentum > 0, "nesterov needs momentum > 0", momentum=self.momentum)


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
    """Clips the gradient's norm in stages that set no limit of their own; ``None`` does not."""
    precision: Precision = "auto"
    """``auto``: bfloat16 on GPUs and CPUs that compute it, float32 elsewhere, decided when a study or a single run is created;
    FSP matrices are float32 then. ``float64`` is for checks."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sync_batch_norm: bool = True
    """Several workers normalise by the whole batch's statistics, as one worker does; without it each by its share's."""

    def __post_init__(self) -> None:
        check_rule(is_finite(self.epochs) and 0 < self.epochs <= 1e6, "0 < epochs <= 1e6", epochs=self.epochs)
        check_rule(self.batch_size >= 1, "batch_size >= 1", batch_size=self.batch_size)
        check_rule(0 <= self.seed < 2**63, "0 <= seed < 2**63", seed=self.seed)
        check_rule(self.clip_norm is None or self.clip_norm > 0, "clip_norm > 0", clip_norm=self.clip_norm)
        check_choice("precision", self.precision, typing.get_args(Precision))


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher: trained once and kept, or a checkpoint that the user has."""

    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(name="resnet26"))
    checkpoint: str | None = field(default=None, metadata=NO_KEY)
    """File with a state dict; ``None`` trains the teacher or finds the one trained before."""
    pretrained: str | None = field(default=None, metadata=IF_GIVEN)
    """What its training begins with: ``own``, torchvision's or timm's weights, or a file with a state dict; ``None``: nothing."""
    rate: float = 0.1
    """Learning rate at the start of its training."""
    train: TrainConfig = field(default_factory=TrainConfig)
    mean: tuple[float, ...] | None = field(default=None, metadata=IF_GIVEN)
    """What normalised the images of its weights, in units of 0..1: a number per channel, or one; ``None``: a library's weights
    know it, for others it is the image set's."""
    std: tuple[float, ...] | None = field(default=None, metadata=IF_GIVEN)
    """As ``mean``."""

    def __post_init__(self) -> None:
        check_rule(is_finite(self.rate) and self.rate > 0, "rate > 0", rate=self.rate)
        both = self.checkpoint is not None and self.pretrained is not None
        check_rule(not both, "a teacher has a checkpoint or begins with one", pretrained=self.pretrained)
        mean, std = self.mean, self.std
        check_rule((mean is None) == (std is None), "a teacher's mean and std come together", mean=mean, std=std)
        if mean is not None and std is not None:
            given = bool(self.checkpoint or self.pretrained)
            check_rule(given, "a teacher's mean and std need a checkpoint", checkpoint=self.checkpoint)
            ok = bool(mean) and all(is_finite(value) and 0 <= value <= 1 for value in mean)
            check_rule(ok, "0 <= mean <= 1", "Of images in 0..255, divide mean and std by 255.", mean=mean)
            check_rule(bool(std) and all(is_finite(value) and value > 0 for value in std), "std > 0", std=std)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where things lie and how fast they run; no result depends on it, and no key holds it."""

    data_root: str = "~/.cache/dfkt/data"
    """Where torchvision's sets are kept, and where decoded folders are cached."""
    teacher_root: str = "~/.cache/dfkt/teachers"
    """Where trained teachers are kept."""
    target_root: str = "~/.cache/dfkt/targets"
    """Where each host of a study keeps what the teacher said, for the study's later runs: on a disk of its own."""
    keep_targets: int | None = None
    """Bytes that may lie there, of all studies; ``None`` takes a quarter of what is free, 0 keeps nothing."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    device: str = "cpu"
    """``cpu``, ``cuda`` or ``cuda:N``: what a run trains on; its driver says so."""
    threads: int = 1
    """CPU threads of each process that trains."""
    cuda_graphs: CudaGraphs = "auto"
    """Whether steps are recorded as CUDA graphs: of one worker; ``auto``: of ``resnetN`` and this package's methods."""

    def __post_init__(self) -> None:
        check_rule(self.checkpoint_every >= 1, "checkpoint_every >= 1", checkpoint_every=self.checkpoint_every)
        check_rule(self.threads >= 1, "threads >= 1", threads=self.threads)
        kept, device = self.keep_targets, self.device
        check_rule(kept is None or kept >= 0, "keep_targets >= 0", keep_targets=kept)
        check_rule(device.partition(":")[0] in ("cpu", "cuda"), "device is cpu, cuda or cuda:N", device=device)
        check_choice("cuda_graphs", self.cuda_graphs, typing.get_args(CudaGraphs))


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dicts of plain JSON values.

    A class with ``to_json`` says itself how it looks; one with ``json_head`` what stands before its fields.
    """
    return typing.cast(dict[str, Any], _to_json(config, keyed=False))


def key_dict(config: Any) -> dict[str, Any]:
    """Return what of a configuration counts in keys and makes two of them differ, as :func:`to_dict` does."""
    return typing.cast(dict[str, Any], _to_json(config, keyed=True))


def _to_json(value: Any, *, keyed: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if hasattr(value, "to_json"):
            return value.to_json()
        found = value.json_head() if hasattr(value, "json_head") else {}
        for f in dataclasses.fields(value):
            stands = getattr(value, f.name)
            if keyed and AS_KEY in f.metadata:
                stands = f.metadata[AS_KEY](stands)
            if not (keyed and stands is None and "if_given" in f.metadata):
                found[f.name] = _to_json(stands, keyed=keyed)
        return found
    if isinstance(value, Mapping):
        return {str(name): _to_json(v, keyed=keyed) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_json(v, keyed=keyed) for v in value]
    if keyed and isinstance(value, float) and value.is_integer():
        return int(value)  # 60 epochs and 60.0 epochs are the same
    return value


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a configuration from nested dicts, as :func:`to_dict` returns them; ``from_json`` of a class comes first.

    Raises:
        ConfigError: If the values are no mapping, a name is unknown or a value is outside its rule.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{kind.__name__} must be given by its settings, but got {values!r}.")
    if hasattr(kind, "from_json"):
        return typing.cast(T, typing.cast(Any, kind).from_json(values))
    return build(kind, values)


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass from nested dicts of its fields.

    Raises:
        ConfigError: If a name is unknown, or a value is outside its rule or of another type.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := ", ".join(sorted(set(values) - known)):
        raise ConfigError(f"Unknown setting {unknown} in {kind.__name__}; known: {', '.join(sorted(known))}.")
    try:
        return kind(**{name: _restore(hints[name], value) for name, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"A setting of {kind.__name__} has a value of another type: {error}.") from error


def _restore(hint: Any, value: Any) -> Any:
    known = isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "from_json"))
    if known and isinstance(value, Mapping):
        return from_dict(hint, value)
    if isinstance(hint, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return None if value is None else _restore(inner[0], value)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_restore(typing.get_args(hint)[0], v) for v in value)
    return value


def config_key(config: Any) -> str:
    """Return 12 hexadecimal digits that name a configuration by what a result depends on."""
    text = json.dumps(key_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return a configuration as one flat dict with dotted names.

    Example:
        >>> flatten(OptimizerConfig(momentum=0.5))["momentum"]
        0.5
    """
    flat: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else to_dict(config)).items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
