"""The summands of a stage's loss: what each reads in the two networks, and how its weight changes over the stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from dfkt.config import FlowNorm, HintNorm
from dfkt.methods.flow import flow_loss
from dfkt.methods.losses import attention_loss, decoupled_loss, hint_loss, similarity_loss, soft_target_loss
from dfkt.methods.patterns import FlowPair


@dataclass(frozen=True)
class Features:
    """What one network computed for a batch: activations by student tap number, and logits where asked for."""

    taps: Mapping[int, Tensor]
    logits: Tensor | None = None


@dataclass(frozen=True)
class Ramp:
    """A weight that changes linearly over the first part of a stage, and then stays.

    Example:
        >>> [Ramp(4, 1).at(done) for done in (0, 0.5, 1)]
        [4.0, 2.5, 1.0]
    """

    start: float
    end: float
    until: float = 1.0
    """Share of the stage after which it stays."""

    def at(self, done: float) -> float:
        """Return the weight when a share of the stage is done."""
        return self.start + (self.end - self.start) * (min(done / self.until, 1.0) if self.until else 1.0)


Weight = float | Ramp


def weight_at(weight: Weight, done: float) -> float:
    """Return a weight when a share of the stage is done."""
    return weight.at(done) if isinstance(weight, Ramp) else weight


class Term(Protocol):
    """One summand of a stage's loss; ``name`` is its column in the epoch records."""

    @property
    def name(self) -> str:
        """``flow``, ``task``, ``soft``, …."""

    @property
    def weight(self) -> Weight:
        """Factor in the stage's loss."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Student taps that it reads in both networks."""

    @property
    def adapted(self) -> bool:
        """Whether the channels must agree at its taps, by a 1x1 convolution where they do not."""

    @property
    def student_logits(self) -> bool:
        """Whether it reads the student's logits."""

    @property
    def teacher_logits(self) -> bool:
        """Whether it reads the teacher's logits."""

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the loss, a scalar averaged over images."""


@dataclass(frozen=True, kw_only=True)
class FlowTerm:
    """The flow loss over some flow pairs (:func:`dfkt.methods.flow.flow_loss`)."""

    pairs: tuple[FlowPair, ...]
    weights: tuple[float, ...]
    norm: FlowNorm
    weight: Weight = 1.0
    name = "flow"
    adapted = True
    student_logits = teacher_logits = False

    @property
    def taps(self) -> tuple[int, ...]:
        """The taps at which a pair starts or ends."""
        return tuple(sorted({tap for pair in self.pairs for tap in pair}))

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the flow loss; labels are not read."""
        return flow_loss(teacher.taps, student.taps, self.pairs, self.weights, self.norm)


@dataclass(frozen=True, kw_only=True)
class TaskTerm:
    """Cross-entropy with the labels."""

    weight: Weight = 1.0
    name = "task"
    taps = ()
    adapted = False
    student_logits, teacher_logits = True, False

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the cross-entropy; the teacher is not read."""
        assert student.logits is not None
        return F.cross_entropy(student.logits.float(), labels)


@dataclass(frozen=True, kw_only=True)
class SoftTerm:
    """Soft targets (:func:`dfkt.methods.losses.soft_target_loss`)."""

    temperature: float
    weight: Weight = 1.0
    name = "soft"
    taps = ()
    adapted = False
    student_logits = teacher_logits = True

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the soft-target loss; labels are not read."""
        assert student.logits is not None
        assert teacher.logits is not None
        return soft_target_loss(student.logits, teacher.logits, self.temperature)


@dataclass(frozen=True, kw_only=True)
class _MapTerm(ABC):
    """A loss between the two networks' maps at one tap, summed over taps; labels and logits are not read."""

    taps: tuple[int, ...]
    weight: Weight = 1.0
    adapted = False
    student_logits = teacher_logits = False

    @abstractmethod
    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss at one tap."""

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the sum over taps."""
        return reduce(add, (self.loss(student.taps[tap], teacher.taps[tap]) for tap in self.taps))


@dataclass(frozen=True, kw_only=True)
class HintTerm(_MapTerm):
    """Hints (:func:`dfkt.methods.losses.hint_loss`); the 1x1 convolution is FitNets' regressor."""

    norm: HintNorm
    name = "hint"
    adapted = True

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the hint loss."""
        return hint_loss(student, teacher, self.norm)


@dataclass(frozen=True, kw_only=True)
class AttentionTerm(_MapTerm):
    """Attention transfer; channels need not agree."""

    name = "attention"

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return :func:`dfkt.methods.losses.attention_loss`."""
        return attention_loss(student, teacher)


@dataclass(frozen=True, kw_only=True)
class SimilarityTerm(_MapTerm):
    """Similarity between a batch's images; channels need not agree."""

    name = "similarity"

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return :func:`dfkt.methods.losses.similarity_loss`."""
        return similarity_loss(student, teacher)


@dataclass(frozen=True, kw_only=True)
class DecoupledTerm:
    """Decoupled soft targets (:func:`dfkt.methods.losses.decoupled_loss`)."""

    temperature: float
    target_weight: float
    other_weight: float
    weight: Weight = 1.0
    name = "decoupled"
    taps = ()
    adapted = False
    student_logits = teacher_logits = True

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the decoupled loss."""
        assert student.logits is not None
        assert teacher.logits is not None
        weights = (self.target_weight, self.other_weight)
        return decoupled_loss(student.logits, teacher.logits, labels, self.temperature, *weights)


def describe_term(term: Term) -> str:
    """Return a term with its weight in one short phrase, as schedules are listed."""
    return f"{_describe_weight(term.weight)} {_describe(term)}"


def _describe_weight(weight: Weight) -> str:
    if not isinstance(weight, Ramp):
        return f"{weight:g}"
    return f"{weight.start:.3g}->{weight.end:.3g}" + ("" if weight.until == 1 else f" in {weight.until:.3g} of it")


def _describe(term: Term) -> str:
    if isinstance(term, FlowTerm):
        pairs = " ".join(f"({i},{j})x{w:g}" for (i, j), w in zip(term.pairs, term.weights, strict=True))
        return f"flow[{term.norm}] {pairs}"
    if isinstance(term, DecoupledTerm):
        return f"decoupled[T={term.temperature:g}, {term.target_weight:g} target, {term.other_weight:g} others]"
    if isinstance(term, SoftTerm):
        return f"soft[T={term.temperature:g}]"
    norm = f"[{term.norm}]" if isinstance(term, HintTerm) else ""
    return f"{term.name}{norm}" + (f" at {' '.join(map(str, term.taps))}" if term.taps else "")
