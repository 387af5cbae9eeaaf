"""What a method is: its settings with their ranges, and the stages that it makes of a run.

A method is one class in one file. Its fields are its settings, their defaults the reference settings, and
:func:`searched` the only place where a range stands. :meth:`Method.schedule` says what is trained, in which order, by
which :class:`Term`; the loop in :mod:`dfkt.training` runs whatever it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from dfkt.config import build, check_rule, is_finite
from dfkt.errors import ConfigError
from dfkt.methods.patterns import FlowPair
from dfkt.methods.ramp import Ramp as Ramp
from dfkt.methods.space import Draw, Range
from dfkt.networks.taps import StudentTaps

_SEARCHED = "searched"
Params = dict[str, Any]


def searched(default: float, low: float, high: float, *, log: bool = False) -> Any:
    """Return the field of a setting that a search draws between two ends; whole numbers where the default is one.

    Args:
        default: The reference setting.
        low, high: Both ends, included.
        log: Draw evenly in the logarithm.

    Raises:
        ConfigError: If the default lies outside, or is a whole number and an end is not.
    """
    check_rule(low <= default <= high, "low <= default <= high", low=low, default=default, high=high)
    ok = isinstance(default, float) or (low == int(low) and high == int(high))
    check_rule(
        ok, "both ends of a whole number are whole", "Write 1.0 for a fraction.", low=low, default=default, high=high
    )
    return field(default=default, metadata={_SEARCHED: Range(low, high, log)})


@dataclass(frozen=True)
class Features:
    """What one network computed for a batch: activations by student tap number, and logits where asked for.

    A teacher's FSP matrices, by flow pair, may stand in the place of activations.
    """

    taps: Mapping[int, Tensor]
    logits: Tensor | None = None
    matrices: Mapping[FlowPair, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Term(ABC):
    """One summand of a stage's loss: what it reads in the two networks, and how its weight changes over the stage."""

    name: ClassVar[str]
    """Its column in the epoch records is ``NAME_loss``."""
    adapted: ClassVar[bool] = False
    """Whether the channels must agree at its taps, by a 1x1 convolution where they do not."""
    student_logits: ClassVar[bool] = False
    teacher_logits: ClassVar[bool] = False
    whole_batch: ClassVar[bool] = False
    """Whether it sets a batch's images against each other: several workers then gather what it reads."""
    weight: float | Ramp = 1.0
    """Factor in the stage's loss."""
    taps: tuple[int, ...] = ()
    """Student taps that it reads in both networks."""

    @abstractmethod
    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the loss, a scalar averaged over images; no gradient reaches the teacher."""

    @property
    def flow_pairs(self) -> tuple[FlowPair, ...]:
        """Flow pairs whose FSP matrices are all that it reads of the teacher's features."""
        return ()

    def weight_at(self, done: float) -> float:
        """Return the weight when a share of the stage is done."""
        return self.weight.at(done) if isinstance(self.weight, Ramp) else self.weight

    def describe(self) -> str:
        """Return the term in one short phrase, without its weight."""
        return self.name + (f" at {' '.join(map(str, self.taps))}" if self.taps else "")


@dataclass(frozen=True, kw_only=True)
class TaskTerm(Term):
    """Cross-entropy with the labels."""

    name = "task"
    student_logits = True

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the cross-entropy; the teacher is not read."""
        assert student.logits is not None
        logits = student.logits
        return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A phase of training with one loss, one trainable set and one optimizer."""

    phase: str
    """``task``: the student is trained to classify; ``flow``, ``hint`` or another word: it cannot yet."""
    epochs: float
    terms: tuple[Term, ...]
    rate: float
    """Learning rate at the stage's start."""
    round: int | None = None
    tap: int | None = None
    """Highest tap of a stage that does not classify."""
    clip_norm: float | None = None
    """Clips the gradient's norm; ``None`` leaves it to the run's configuration."""
    frozen_below: int | None = None
    """Layers that produce this tap are frozen."""

    @property
    def name(self) -> str:
        """How messages call the stage, such as ``round 1, stage 2``, ``hint stage 3`` or ``task stage``."""
        if self.phase == "task":
            return "task stage"
        return f"{self.phase} stage {self.tap}" if self.round is None else f"round {self.round}, stage {self.tap}"

    @property
    def taps(self) -> tuple[int, ...]:
        """Student taps that any term reads."""
        return tuple(sorted({tap for term in self.terms for tap in term.taps}))

    @property
    def flow_pairs(self) -> tuple[FlowPair, ...]:
        """Flow pairs of which some term reads the teacher's FSP matrices."""
        return tuple(sorted({pair for term in self.terms for pair in term.flow_pairs}))

    @property
    def reads_maps(self) -> bool:
        """Whether any term reads the teacher's activations themselves."""
        return any(term.taps and not term.flow_pairs for term in self.terms)

    @property
    def adapted_taps(self) -> tuple[int, ...]:
        """Student taps at which the channels must agree."""
        return tuple(sorted({tap for term in self.terms if term.adapted for tap in term.taps}))

    def needs(self, what: str) -> bool:
        """Whether any term reads ``student_logits`` or ``teacher_logits``."""
        return any(getattr(term, what) for term in self.terms)

    @property
    def reads_teacher(self) -> bool:
        """Whether the stage runs the teacher at all."""
        return bool(self.taps) or self.needs("teacher_logits")

    def describe(self) -> str:
        """Return the stage on one line."""
        terms = " + ".join(
            f"{t.weight if isinstance(t.weight, Ramp) else f'{t.weight:g}'} {t.describe()}" for t in self.terms
        )
        frozen = "" if self.frozen_below is None else f", frozen below tap {self.frozen_below}"
        return f"{self.name}: {self.epochs:.3g} epochs at {self.rate:g}{frozen}: {terms}"


Schedule = tuple[Stage, ...]


def task_stage(epochs: float, rate: float, *terms: Term) -> Stage:
    """Return the stage in which the student is trained to classify; without terms, by the labels alone."""
    return Stage(phase="task", epochs=epochs, terms=terms or (TaskTerm(),), rate=rate)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to train a student, with its settings; every number among them is finite and not negative.

    A subclass is a frozen keyword-only dataclass. It overrides :meth:`sample` and :meth:`columns` only where what is
    searched depends on what was drawn before.
    """

    name: ClassVar[str]
    """What tables call it."""
    losses: ClassVar[tuple[str, ...]] = ("task",)
    """Names of all terms that its stages may have: the loss columns of the epoch records."""
    taught: ClassVar[bool] = True
    """Whether it reads a teacher."""
    tapped: ClassVar[bool] = True
    """Whether it reads features at taps; without, no taps need to be known or to match."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, (int, float)):
                    ok = isinstance(number, bool) or (is_finite(number) and number >= 0)
                    check_rule(ok, f"{name} is finite and >= 0", **{name: value})
        for name, drawn in self.ranges().items():
            value = getattr(self, name)
            kind = int if isinstance(_default(type(self), name), int) else (int, float)
            rule = f"{name} is a {'whole number' if kind is int else 'number'}"
            check_rule(isinstance(value, kind) and not isinstance(value, bool), rule, **{name: value})
            check_rule(value > 0 or not drawn.log, f"{name} > 0", **{name: value})

    @abstractmethod
    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return the method's stages, bottom first, whose lengths add up to ``epochs``.

        Raises:
            PatternError: If an overlap pattern does not fit the taps.
        """

    @classmethod
    def ranges(cls) -> dict[str, Range]:
        """Return the settings that :func:`searched` marks, in the order in which they are drawn."""
        return {f.name: f.metadata[_SEARCHED] for f in fields(cls) if _SEARCHED in f.metadata}

    def sample(self, trial: Draw, taps: StudentTaps) -> Self:
        """Return the method with its searched settings drawn; all others stay.

        Args:
            trial: Where values come from: Optuna's define-by-run form, narrowed to what the study searches.
            taps: The student's.
        """
        return replace(self, **{name: self.draw(trial, name) for name in self.ranges()})

    def draw(self, trial: Draw, name: str) -> Any:
        """Return a drawn value of one searched setting."""
        drawn = self.ranges()[name]
        if isinstance(_default(type(self), name), int):
            return trial.suggest_int(name, int(drawn.low), int(drawn.high))
        return trial.suggest_float(name, drawn.low, drawn.high, log=drawn.log)

    def columns(self, taps: StudentTaps) -> dict[str, type]:
        """Return name and type of everything that :meth:`sample` may draw: the parameter columns of the trial store."""
        return {name: type(_default(type(self), name)) for name in self.ranges()}

    def starts(self, taps: StudentTaps) -> tuple[Params, ...]:
        """Return the parameters that a search tries before it samples: the settings as they stand."""
        return ({name: getattr(self, name) for name in self.ranges()},)

    def describe(self) -> str:
        """Return what is searched, with its values, in one short phrase."""
        return ", ".join(f"{name} {getattr(self, name):.4g}" for name in self.ranges())

    @classmethod
    def is_own(cls) -> bool:
        """Whether it is one of this package's methods."""
        return cls.__module__.startswith("dfkt.methods.")

    def json_head(self) -> dict[str, Any]:
        """Return what names the class in JSON, before its settings.

        Raises:
            ConfigError: If another process could not import the class.
        """
        kind = type(self)
        known = kind.__module__ != "__main__" and "<locals>" not in kind.__qualname__
        where = f"{kind.__module__}:{kind.__qualname__}"
        check_rule(known, "a method is a class of a module, known by name", "Put it into a module.", method=where)
        return {"name": kind.name if kind.is_own() else where}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Method:
        """Build a method from its name and settings.

        Raises:
            ConfigError: If the class is unknown or cannot be imported, or a setting is outside its rule.
        """
        from dfkt.methods.registry import find_method  # the registry imports every method, and they this module

        if "name" not in values:
            raise ConfigError(f"A method must have a name, but got {dict(values)!r}.")
        kind = find_method(str(values["name"]))
        return build(kind, {name: value for name, value in values.items() if name != "name"})


def _default(kind: type[Method], name: str) -> Any:
    found = next(f.default for f in fields(kind) if f.name == name)
    assert found is not MISSING
    return found
