"""Every method, ours and the baselines, as a schedule: stages with their loss terms, trainable set, optimizer, length.

A method is nothing but what :func:`build_schedule` returns for it. A new baseline is a new function in ``_BUILDERS``
and, if its loss is new, a term: an object with the attributes of :class:`Term`. The loop in :mod:`dfkt.train` runs them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from dfkt.config import FlowConfig, FlowNorm, Method, OptimizerConfig, RunConfig
from dfkt.flow import flow_loss
from dfkt.losses import soft_target_loss
from dfkt.patterns import FlowPair, flow_pairs


@dataclass(frozen=True)
class Features:
    """What one network computed for a batch: activations by student tap number, and logits where asked for."""

    taps: Mapping[int, Tensor]
    logits: Tensor | None = None


class Term(Protocol):
    """One summand of a stage's loss; ``name`` is its column in the epoch records."""

    @property
    def name(self) -> str:
        """``flow``, ``task``, ``soft``, …."""

    @property
    def weight(self) -> float:
        """Factor in the stage's loss."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Student taps that it reads in both networks; channels are made to agree there."""

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
    """The flow loss over some flow pairs (:func:`dfkt.flow.flow_loss`)."""

    pairs: tuple[FlowPair, ...]
    weights: tuple[float, ...]
    norm: FlowNorm
    weight: float = 1.0
    name = "flow"
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

    weight: float = 1.0
    name = "task"
    taps = ()
    student_logits, teacher_logits = True, False

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the cross-entropy; the teacher is not read."""
        assert student.logits is not None
        return F.cross_entropy(student.logits.float(), labels)


@dataclass(frozen=True, kw_only=True)
class SoftTerm:
    """Soft targets (:func:`dfkt.losses.soft_target_loss`)."""

    temperature: float
    weight: float = 1.0
    name = "soft"
    taps = ()
    student_logits = teacher_logits = True

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the soft-target loss; labels are not read."""
        assert student.logits is not None
        assert teacher.logits is not None
        return soft_target_loss(student.logits, teacher.logits, self.temperature)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A phase of training with one loss, one trainable set and one optimizer."""

    phase: str
    """``flow``: the student cannot classify yet; ``task``: it is trained to."""
    epochs: float
    terms: tuple[Term, ...]
    optimizer: OptimizerConfig
    round: int | None = None
    tap: int | None = None
    """Highest tap of a flow stage."""
    clip_norm: float | None = None
    """Clips the gradient's norm."""
    frozen_below: int | None = None
    """Layers that produce this tap are frozen."""

    @property
    def name(self) -> str:
        """How messages call the stage, such as ``round 1, stage 2`` or ``task stage``."""
        return f"round {self.round}, stage {self.tap}" if self.phase == "flow" else "task stage"

    @property
    def taps(self) -> tuple[int, ...]:
        """Student taps that any term reads."""
        return tuple(sorted({tap for term in self.terms for tap in term.taps}))

    def needs(self, what: str) -> bool:
        """Whether any term reads ``student_logits`` or ``teacher_logits``."""
        return any(getattr(term, what) for term in self.terms)

    @property
    def reads_teacher(self) -> bool:
        """Whether the stage runs the teacher at all."""
        return bool(self.taps) or self.needs("teacher_logits")


Schedule = tuple[Stage, ...]


def build_schedule(config: RunConfig, num_taps: int, group_ends: Sequence[int]) -> Schedule:
    """Return a method's stages, bottom first.

    Args:
        config: The run; ``config.method`` chooses, ``config.train.epochs`` is shared among the stages.
        num_taps: How many taps the student has.
        group_ends: Taps at the ends of groups, tap 0 among them (:func:`dfkt.taps.group_ends`).

    Raises:
        PatternError: If the overlap pattern does not fit the taps.
    """
    return _BUILDERS[config.method](config, num_taps, group_ends)


def needs_teacher(config: RunConfig) -> bool:
    """Whether a method reads a teacher at all."""
    return config.method != "scratch"


def describe(schedule: Schedule) -> str:
    """Return a schedule as a readable listing, a line per stage."""
    lines = []
    for stage in schedule:
        terms = " + ".join(f"{term.weight:g} {_describe_term(term)}" for term in stage.terms)
        frozen = "" if stage.frozen_below is None else f", frozen below tap {stage.frozen_below}"
        opt = stage.optimizer
        lines.append(f"{stage.name}: {stage.epochs:.2f} epochs, {terms}, rate {opt.lr:g} {opt.schedule}{frozen}")
    return "\n".join(lines)


def _describe_term(term: Term) -> str:
    if isinstance(term, FlowTerm):
        pairs = " ".join(f"({i},{j})x{w:g}" for (i, j), w in zip(term.pairs, term.weights, strict=True))
        return f"flow[{term.norm}] {pairs}"
    return f"{term.name}[T={term.temperature:g}]" if isinstance(term, SoftTerm) else term.name


def _task_stage(config: RunConfig, epochs: float, kd_weight: float) -> Stage:
    terms: list[Term] = []
    if kd_weight < 1:
        terms.append(TaskTerm(weight=1 - kd_weight))
    if kd_weight > 0:
        terms.append(SoftTerm(temperature=config.task.temperature, weight=kd_weight))
    return Stage(
        phase="task",
        epochs=epochs,
        terms=tuple(terms),
        optimizer=config.task.optimizer,
        clip_norm=config.train.clip_norm,
    )


def _scratch(config: RunConfig, num_taps: int, group_ends: Sequence[int]) -> Schedule:
    return (_task_stage(config, config.train.epochs, 0.0),)


def _kd(config: RunConfig, num_taps: int, group_ends: Sequence[int]) -> Schedule:
    """Hinton et al. 2015: soft targets from the first epoch."""
    return (_task_stage(config, config.train.epochs, config.task.kd_weight),)


def _dfkt(config: RunConfig, num_taps: int, group_ends: Sequence[int]) -> Schedule:
    """Rounds of flow stages from bottom to top, then the task stage with optional soft targets.

    FSP (Yim et al., CVPR 2017) is the same with the group ends' pairs in one joint stage and no soft targets.
    """
    flow, epochs = config.flow, config.train.epochs
    pairs = flow_pairs(flow.pattern, num_taps, group_ends)
    flow_epochs = flow.share * epochs
    tops = [max(j for _, j in pairs)] if flow.order == "joint" else sorted({j for _, j in pairs})
    lengths = [flow.stage_lengths[k - 1] if k <= len(flow.stage_lengths) else 1.0 for k in tops]
    stages = [
        _flow_stage(flow, pairs, number, top, flow_epochs * length / (sum(lengths) * flow.rounds))
        for number in range(1, flow.rounds + 1)
        for top, length in zip(tops, lengths, strict=True)
    ]
    return (*stages, _task_stage(config, epochs - flow_epochs, config.task.kd_weight))


def _flow_stage(flow: FlowConfig, pairs: Iterable[FlowPair], number: int, top: int, epochs: float) -> Stage:
    local = flow.order == "local"
    chosen = tuple((i, j) for i, j in pairs if (j == top if local else j <= top))
    lowest = min(i for i, _ in chosen)
    term = FlowTerm(pairs=chosen, weights=tuple(_pair_weight(flow, *pair) for pair in chosen), norm=flow.norm)
    return Stage(
        phase="flow",
        epochs=epochs,
        terms=(term,),
        optimizer=flow.optimizer,
        clip_norm=flow.clip_norm,
        round=number,
        tap=top,
        frozen_below=lowest if flow.freeze_below and lowest > 0 else None,
    )


def _pair_weight(flow: FlowConfig, lower: int, upper: int) -> float:
    for i, j, weight in flow.pair_weights:
        if (i, j) == (lower, upper):
            return weight
    span = upper - lower
    return flow.span_weights[span - 1] if span <= len(flow.span_weights) else 1.0


_BUILDERS: dict[str, Callable[[RunConfig, int, Sequence[int]], Schedule]] = {
    "scratch": _scratch,
    "kd": _kd,
    "fsp": _dfkt,
    "dfkt": _dfkt,
}


def baseline(config: RunConfig, method: Method) -> RunConfig:
    """Return the run of a baseline beside ``config``: same data, networks and number of epochs, its reference settings.

    kd: temperature 4, weight 0.9. fsp: group ends, one joint flow stage of a third of the epochs, no soft targets (Yim et al.);
    its loss is ``relative`` at rate 0.1, since the literal sum at rate 0.001 did worse than no flow at all (docs/log.md).
    """

    base = replace(
        config, method=method, flow=FlowConfig(), task=replace(config.task, kd_weight=0.0, optimizer=OptimizerConfig())
    )
    if method == "kd":
        return replace(base, task=replace(base.task, kd_weight=0.9, temperature=4.0))
    if method == "fsp":
        return replace(base, flow=FlowConfig(pattern="group-ends", order="joint"))
    return base
