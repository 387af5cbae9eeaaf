"""Every method, ours and the baselines, as a schedule: stages with their loss terms, trainable set, optimizer, length.

A method is nothing but what :func:`build_schedule` returns for it. A new baseline is a new function in ``_BUILDERS``
and, if its loss is new, a term in :mod:`dfkt.methods.terms`. The loop in :mod:`dfkt.training.loop` runs them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from dfkt.config import FlowConfig, HintConfig, Method, OptimizerConfig, RunConfig, TaskConfig
from dfkt.methods.patterns import FlowPair, flow_pairs
from dfkt.methods.terms import (
    AttentionTerm,
    DecoupledTerm,
    FlowTerm,
    HintTerm,
    Ramp,
    SimilarityTerm,
    SoftTerm,
    TaskTerm,
    Term,
    describe_term,
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A phase of training with one loss, one trainable set and one optimizer."""

    phase: str
    """``flow`` or ``hint``: the student cannot classify yet; ``task``: it is trained to."""
    epochs: float
    terms: tuple[Term, ...]
    optimizer: OptimizerConfig
    round: int | None = None
    tap: int | None = None
    """Highest tap of a flow or hint stage."""
    clip_norm: float | None = None
    """Clips the gradient's norm."""
    frozen_below: int | None = None
    """Layers that produce this tap are frozen."""

    @property
    def name(self) -> str:
        """How messages call the stage, such as ``round 1, stage 2``, ``hint stage 3`` or ``task stage``."""
        if self.phase == "flow":
            return f"round {self.round}, stage {self.tap}"
        return f"hint stage {self.tap}" if self.phase == "hint" else "task stage"

    @property
    def taps(self) -> tuple[int, ...]:
        """Student taps that any term reads."""
        return tuple(sorted({tap for term in self.terms for tap in term.taps}))

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


Schedule = tuple[Stage, ...]


def build_schedule(config: RunConfig, num_taps: int, group_ends: Sequence[int]) -> Schedule:
    """Return a method's stages, bottom first.

    Args:
        config: The run; ``config.method`` chooses, ``config.train.epochs`` is shared among the stages.
        num_taps: How many taps the student has.
        group_ends: Taps at the ends of groups, tap 0 among them (:func:`dfkt.networks.taps.group_ends`).

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
        terms = " + ".join(describe_term(term) for term in stage.terms)
        frozen = "" if stage.frozen_below is None else f", frozen below tap {stage.frozen_below}"
        opt = stage.optimizer
        lines.append(f"{stage.name}: {stage.epochs:.2f} epochs, {terms}, rate {opt.lr:g} {opt.schedule}{frozen}")
    return "\n".join(lines)


def _task_stage(config: RunConfig, epochs: float, *terms: Term) -> Stage:
    return Stage(
        phase="task",
        epochs=epochs,
        terms=terms or (TaskTerm(),),
        optimizer=config.task.optimizer,
        clip_norm=config.train.clip_norm,
    )


def _mixed(task: TaskConfig) -> tuple[Term, ...]:
    """Return cross-entropy and soft targets whose weights add up to 1; one of weight 0 is left out."""
    terms = (
        TaskTerm(weight=1 - task.kd_weight),
        SoftTerm(temperature=task.temperature, weight=task.kd_weight),
    )
    return tuple(term for term in terms if term.weight)


def _scratch(config: RunConfig, num_taps: int, group_ends: Sequence[int]) -> Schedule:
    return (_task_stage(config, config.train.epochs),)


def _kd(config: RunConfig, num_taps: int, group_ends: Sequence[int]) -> Schedule:
    """Hinton et al. 2015: soft targets from the first epoch."""
    return (_task_stage(config, config.train.epochs, *_mixed(config.task)),)


def _attention(config: RunConfig, num_taps: int, group_ends: Sequence[int]) -> Schedule:
    """Zagoruyko & Komodakis 2017: attention maps at the group ends, beside the labels from the first epoch."""
    term = AttentionTerm(taps=tuple(group_ends[1:]), weight=config.task.attention_weight)
    return (_task_stage(config, config.train.epochs, TaskTerm(), term),)


def _similarity(config: RunConfig, num_taps: int, group_ends: Sequence[int]) -> Schedule:
    """Tung & Mori 2019, beside the labels from the first epoch.

    The paper's definition leaves the pairs of layers open and names the ends of blocks of the same place: here the group
    ends, whose losses are summed, so the weight is over all of them. Widely used public code takes the last one only.
    """
    term = SimilarityTerm(taps=tuple(group_ends[1:]), weight=config.task.similarity_weight)
    return (_task_stage(config, config.train.epochs, TaskTerm(), term),)


def _dkd(config: RunConfig, num_taps: int, group_ends: Sequence[int]) -> Schedule:
    """Zhao et al. 2022, beside the labels; its weight grows from nothing in the first twelfth (20 of 240 epochs there)."""
    target, other = config.task.decoupled_weights
    weight = Ramp(0.0, 1.0, config.task.warmup)
    term = DecoupledTerm(temperature=config.task.temperature, target_weight=target, other_weight=other, weight=weight)
    return (_task_stage(config, config.train.epochs, TaskTerm(), term),)


def _fitnets(config: RunConfig, num_taps: int, group_ends: Sequence[int]) -> Schedule:
    """Romero et al. 2015: one hint at the middle tap, then KD with a falling weight."""
    return _hinted(config, [(num_taps // 2,)])


def _layerwise(config: RunConfig, num_taps: int, group_ends: Sequence[int]) -> Schedule:
    """Bae et al. 2019: hints at the group ends, added one by one from the bottom, then KD as for FitNets."""
    ends = group_ends[1:]
    return _hinted(config, [tuple(ends[: k + 1]) for k in range(len(ends))])


def _hinted(config: RunConfig, taps: Sequence[tuple[int, ...]]) -> Schedule:
    hint, epochs = config.hint, config.train.epochs
    stages = [_hint_stage(hint, chosen, hint.share * epochs / len(taps)) for chosen in taps]
    start, end = (weight / config.task.temperature**2 for weight in hint.soft_weights)  # Romero: without Hinton's T^2
    soft = SoftTerm(temperature=config.task.temperature, weight=Ramp(start, end))
    return (*stages, _task_stage(config, epochs * (1 - hint.share), TaskTerm(), soft))


def _hint_stage(hint: HintConfig, taps: tuple[int, ...], epochs: float) -> Stage:
    return Stage(
        phase="hint",
        epochs=epochs,
        terms=(HintTerm(taps=taps, norm=hint.norm),),
        optimizer=hint.optimizer,
        clip_norm=hint.clip_norm,
        tap=max(taps),
    )


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
    return (*stages, _task_stage(config, epochs - flow_epochs, *_mixed(config.task)))


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
    "fitnets": _fitnets,
    "attention": _attention,
    "layerwise-hint": _layerwise,
    "similarity": _similarity,
    "dkd": _dkd,
    "fsp": _dfkt,
    "dfkt": _dfkt,
}


def baseline(config: RunConfig, method: Method) -> RunConfig:
    """Return a method's run at its reference settings beside ``config``: same data, networks and number of epochs.

    ========================  ==================================================================================
    kd                        temperature 4, weight 0.9
    fitnets, layerwise-hint   a third of the epochs in hint stages; soft targets of temperature 3, weight 4 to 1
    attention                 beta 1000
    similarity                gamma 3000
    dkd                       temperature 4, alpha 1, beta 8
    fsp                       group ends, one joint flow stage of a third of the epochs, no soft targets (Yim et al.)
    dfkt                      every pair up to span 3, bottom-up, one round of a third of the epochs, equal weights
    ========================  ==================================================================================

    Flow and hint losses are ``relative`` at rate 0.1: the literal sums at the published rates did worse than no such
    stage at all (docs/log.md).
    """
    base = replace(config, method=method, flow=FlowConfig(), hint=HintConfig(), task=TaskConfig())
    if method == "kd":
        return replace(base, task=TaskConfig(kd_weight=0.9, temperature=4.0))
    if method in ("fitnets", "layerwise-hint"):
        return replace(base, task=TaskConfig(temperature=3.0))
    if method == "fsp":
        return replace(base, flow=FlowConfig(pattern="group-ends", order="joint"))
    return base
