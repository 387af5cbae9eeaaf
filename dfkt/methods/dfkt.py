"""Densely distilled flow: overlapping flow pairs, bottom-up stages in rounds, then the task stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, get_args

from torch import Tensor

from dfkt.config import NO_KEY, check_choice, check_rule, is_finite
from dfkt.methods.base import Features, Method, Params, Schedule, Stage, Term, searched, task_stage
from dfkt.methods.flow import FLOW_NORMS, FlowLoss, FlowNorm
from dfkt.methods.kd import mixed
from dfkt.methods.patterns import SPANNED, FlowPair, flow_pairs, pattern_name, pattern_names
from dfkt.methods.space import Draw
from dfkt.networks.taps import StudentTaps

StageOrder = Literal["cumulative", "local", "joint"]
FAMILIES = ("dense", "sliding", "from-bottom", "to-top", "adjacent")
"""Families of overlap patterns that a search tries."""
ORDERS = ("cumulative", "local")
MOST_ROUNDS = 3
"""That a search tries."""
LIMIT_ROUNDS = 1000
"""That a schedule may have."""
STAGE_LENGTH = (1 / 3, 3.0)
WEIGHT = (0.1, 10.0)
MOST_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class FlowTerm(Term):
    """The flow loss over some flow pairs (:class:`dfkt.methods.flow.FlowLoss`)."""

    name = "flow"
    adapted = True
    pairs: tuple[FlowPair, ...]
    weights: tuple[float, ...]
    norm: FlowNorm
    loss: FlowLoss = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        loss = FlowLoss(self.pairs, self.weights, self.norm)
        object.__setattr__(self, "loss", loss)  # planned once for all steps of a stage
        object.__setattr__(self, "taps", loss.taps)

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return the flow loss; labels are not read."""
        return self.loss(teacher.taps, student.taps, teacher.matrices)

    @property
    def flow_pairs(self) -> tuple[FlowPair, ...]:
        """All of its pairs."""
        return self.pairs

    def describe(self) -> str:
        """Return the term with its norm, pairs and their weights."""
        pairs = " ".join(f"({i},{j})x{w:g}" for (i, j), w in zip(self.pairs, self.weights, strict=True))
        return f"flow[{self.norm}] {pairs}"


def left_out(method: Method, epochs: float, taps: StudentTaps) -> set[FlowPair]:
    """Return the flow pairs that a method's schedule leaves out since both taps meet one tap of the teacher."""
    if taps.matched is None or len(set(taps.matched)) == taps.count:
        return set()

    def pairs(known: StudentTaps) -> set[FlowPair]:
        terms = (term for stage in method.schedule(epochs, known) for term in stage.terms)
        return {pair for term in terms if isinstance(term, FlowTerm) for pair in term.pairs}

    return pairs(replace(taps, matched=None)) - pairs(taps)


def describe_left_out(pairs: Iterable[FlowPair]) -> str:
    """Say on one line which flow pairs are left out, and why.

    Example:
        >>> describe_left_out({(3, 4), (1, 2)})
        'a student deeper than its teacher: flow pairs (1,2) (3,4) are left out, both taps meet one tap of the teacher'
    """
    every = sorted(pairs)
    shown = " ".join(f"({i},{j})" for i, j in every[:MOST_SHOWN])
    more = f" … ({len(every)} in all)" if len(every) > MOST_SHOWN else ""
    return f"a student deeper than its teacher: flow pairs {shown}{more} are left out, both taps meet one tap of the teacher"


@dataclass(frozen=True, kw_only=True)
class Dfkt(Method):
    """Rounds of flow stages from bottom to top over dense flow pairs, then the task stage (Bae et al., TIP 2020).

    What the abstract leaves open is a setting; see docs/results.md for what each of them does.
    """

    name = "dfkt"
    losses = ("flow", "task", "soft")
    share: float = searched(1 / 3, 0.1, 0.6)
    """Share of the run's epochs spent in flow stages."""
    flow_rate: float = searched(0.1, 0.01, 1.0, log=True)
    rate: float = searched(0.1, 0.02, 0.5, log=True)
    weight: float = 0.0
    """Weight of the soft targets in the task stage; cross-entropy weighs ``1 - weight``."""
    temperature: float = 4.0
    pattern: str = "dense"
    """Overlap pattern by family and span, as :mod:`dfkt.methods.patterns` names it; ``dense`` is every pair."""
    order: StageOrder = "cumulative"
    """``local``: stage k trains the pairs whose upper tap is k; ``cumulative``: <= k; ``joint``: one stage for all pairs."""
    rounds: int = 1
    """How often the stages are gone through from bottom to top; 0 leaves the flow stages out, and their epochs too."""
    freeze_below: bool = False
    """Freeze the layers below the stage's lowest tap (never the stem: no flow pair ends there)."""
    stage_lengths: tuple[float, ...] = ()
    """Relative length of the stage that ends at tap 1, 2, …; missing ones count 1."""
    span_weights: tuple[float, ...] = ()
    """Weight of every pair of span 1, 2, …; spans beyond the end weigh 1."""
    pair_weights: tuple[tuple[int, int, float], ...] = ()
    """(lower tap, upper tap, weight) for single pairs; overrides ``span_weights``."""
    norm: FlowNorm = "relative"
    """``sum``: squared Frobenius norm (literal); ``mean`` over the entries; ``relative`` to the teacher's squared norm;
    ``unit``: of the two matrices, each over its own norm."""
    clip_norm: float | None = 1.0
    """Clips the gradient's norm in flow stages: the loss is of fourth degree in the activations, and explodes otherwise."""
    weights: Literal["span", "pair"] = field(default="span", metadata=NO_KEY)
    """What has a weight of its own in a search."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("norm", self.norm, FLOW_NORMS)
        check_choice("order", self.order, get_args(StageOrder))
        check_choice("weights", self.weights, ("span", "pair"))
        ok = isinstance(self.rounds, int) and 0 <= self.rounds <= LIMIT_ROUNDS
        check_rule(ok, f"rounds is a whole number, 0 <= rounds <= {LIMIT_ROUNDS}", rounds=self.rounds)
        check_rule(0 < self.share < 1, "0 < share < 1", share=self.share)
        check_rule(self.weight <= 1, "weight <= 1", weight=self.weight)
        check_rule(self.temperature > 0, "temperature > 0", temperature=self.temperature)
        check_rule(self.clip_norm is None or self.clip_norm > 0, "clip_norm > 0", clip_norm=self.clip_norm)
        ok = all(0 < s <= 1e6 for s in self.stage_lengths)
        check_rule(ok, "0 < stage_lengths <= 1e6", stage_lengths=self.stage_lengths)
        ok = all(is_finite(w) and w >= 0 for *_, w in self.pair_weights)
        check_rule(ok, "pair_weights are finite and >= 0", pair_weights=self.pair_weights)

    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return ``rounds`` times the flow stages, bottom first, and the task stage."""
        pairs = flow_pairs(self.pattern, taps.count, taps.group_ends, taps.matched)
        flow_epochs = self.share * epochs
        tops = [max(j for _, j in pairs)] if self.order == "joint" else sorted({j for _, j in pairs})
        lengths = [self.stage_lengths[k - 1] if k <= len(self.stage_lengths) else 1.0 for k in tops]
        stages = [
            self._flow_stage(pairs, number, top, flow_epochs * length / (sum(lengths) * self.rounds))
            for number in range(1, self.rounds + 1)
            for top, length in zip(tops, lengths, strict=True)
        ]
        return (*stages, task_stage(epochs - flow_epochs, self.rate, *mixed(self.weight, self.temperature)))

    def _flow_stage(self, pairs: Iterable[FlowPair], number: int, top: int, epochs: float) -> Stage:
        local = self.order == "local"
        chosen = tuple((i, j) for i, j in pairs if (j == top if local else j <= top))
        lowest = min(i for i, _ in chosen)
        weights = tuple(self._pair_weight(*pair) for pair in chosen)
        return Stage(
            phase="flow",
            epochs=epochs,
            terms=(FlowTerm(pairs=chosen, weights=weights, norm=self.norm),),
            rate=self.flow_rate,
            clip_norm=self.clip_norm,
            round=number,
            tap=top,
            frozen_below=lowest if self.freeze_below and lowest > 0 else None,
        )

    def _pair_weight(self, lower: int, upper: int) -> float:
        for i, j, weight in self.pair_weights:
            if (i, j) == (lower, upper):
                return weight
        span = upper - lower
        return self.span_weights[span - 1] if span <= len(self.span_weights) else 1.0

    def sample(self, trial: Draw, taps: StudentTaps) -> Self:
        """Return the method with pattern, weights, order, lengths, rounds, rates and soft targets drawn.

        What has no meaning is not drawn: a single weight, which would only scale the flow's rate; lengths, order and
        rounds where there is a single stage; freezing where every stage begins at the stem. Weights and lengths that
        the settings give stay.
        """
        pattern = self._sample_pattern(trial, taps)
        pairs = flow_pairs(pattern, taps.count, taps.group_ends, taps.matched)
        drawn: dict[str, Any] = {"pattern": pattern} | self._sample_stages(trial, pairs)
        drawn |= {name: self.draw(trial, name) for name in self.ranges()}
        return replace(self, **drawn, **self._sample_soft(trial))

    @staticmethod
    def _sample_pattern(trial: Draw, taps: StudentTaps) -> str:
        if trial.narrows("pattern"):
            return str(trial.suggest_categorical("pattern", pattern_names(taps.count)))
        top, span = taps.count - 1, None
        family = trial.suggest_categorical("family", [f for f in FAMILIES if top > 1 or f == "adjacent"])
        if family in SPANNED:
            span = trial.suggest_int(f"{family}_span", 2, top)
        return trial.note("pattern", pattern_name(family, span))

    @staticmethod
    def _sample_soft(trial: Draw) -> dict[str, Any]:
        asked = trial.narrows("soft_targets") or not trial.narrows("weight")  # a weight that is given is wanted
        if asked and not trial.suggest_categorical("soft_targets", (False, True)):
            return {"weight": 0.0}
        weight = trial.suggest_float("weight", 0.1, 0.95)
        trial.note("soft_targets", weight > 0)
        return {"weight": weight, "temperature": trial.suggest_float("temperature", 1.0, 10.0, log=True)}

    def _sample_stages(self, trial: Draw, pairs: tuple[FlowPair, ...]) -> dict[str, Any]:
        drawn: dict[str, Any] = {"rounds": self.rounds, "freeze_below": self.freeze_below, "order": self.order}
        drawn |= self._sample_weights(trial, pairs)
        tops = sorted({j for _, j in pairs})
        if len(tops) == 1:
            return drawn
        drawn["order"] = trial.suggest_categorical("order", get_args(StageOrder) if trial.narrows("order") else ORDERS)
        if drawn["order"] == "joint":
            return drawn
        lowest = [min(i for i, j in pairs if j == top) for top in tops]
        if drawn["order"] == "local" and max(lowest) > 0:
            drawn["freeze_below"] = trial.suggest_categorical("freeze_below", (False, True))
        if not self.stage_lengths:
            lengths = {top: trial.suggest_float(f"length_{top}", *STAGE_LENGTH, log=True) for top in tops}
            drawn["stage_lengths"] = tuple(lengths.get(k, 1.0) for k in range(1, tops[-1] + 1))
        drawn["rounds"] = trial.suggest_int("rounds", 1, MOST_ROUNDS)
        return drawn

    def _sample_weights(self, trial: Draw, pairs: tuple[FlowPair, ...]) -> dict[str, Any]:
        spans = sorted({j - i for i, j in pairs})
        if self._weighed:
            return {}
        if self.weights == "pair" and len(pairs) > 1:
            drawn = ((i, j, trial.suggest_float(f"weight_{i}_{j}", *WEIGHT, log=True)) for i, j in pairs)
            return {"pair_weights": tuple(drawn)}
        if self.weights == "span" and len(spans) > 1:
            found = {s: trial.suggest_float(f"weight_span_{s}", *WEIGHT, log=True) for s in spans}
            return {"span_weights": tuple(found.get(s, 1.0) for s in range(1, spans[-1] + 1))}
        return {}

    def columns(self, taps: StudentTaps) -> dict[str, type]:
        """Return every parameter that any sample has."""
        top = taps.count - 1
        found: dict[str, type] = {"pattern": str, "family": str, "dense_span": int, "sliding_span": int}
        found |= dict.fromkeys(self._weight_names(taps), float)
        found |= {"order": str, "freeze_below": bool, "rounds": int}
        found |= dict.fromkeys(self._length_names(top), float)
        return found | super().columns(taps) | {"soft_targets": bool, "weight": float, "temperature": float}

    def starts(self, taps: StudentTaps) -> tuple[Params, ...]:
        """Return every pair, bottom-up, one round, equal weights: with the labels only, and with KD's soft targets."""
        top = taps.count - 1
        params: Params = {"family": "dense", "dense_span": top} if top > 1 else {"family": "adjacent"}
        if top > 1:
            params |= {"order": "cumulative", "rounds": 1}
            params |= dict.fromkeys(self._length_names(top) + self._weight_names(taps), 1.0)
        params |= super().starts(taps)[0]
        return params | {"soft_targets": False}, params | {"soft_targets": True, "weight": 0.9, "temperature": 4.0}

    @property
    def _weighed(self) -> bool:
        """Whether the settings weigh pairs, so that a search does not."""
        return bool(self.span_weights or self.pair_weights)

    def _length_names(self, top: int) -> list[str]:
        return [] if self.stage_lengths else [f"length_{k}" for k in range(1, top + 1)]

    def _weight_names(self, taps: StudentTaps) -> list[str]:
        if self._weighed:
            return []
        if self.weights == "pair":
            return [f"weight_{i}_{j}" for i, j in flow_pairs("dense", taps.count, matched=taps.matched)]
        return [f"weight_span_{s}" for s in range(1, taps.count)]

    def describe(self) -> str:
        """Return pattern, order, rounds, flow and task in one phrase."""
        freeze = " frozen" if self.freeze_below else ""
        soft = f", kd {self.weight:.2f} at T={self.temperature:.1f}" if self.weight else ""
        return (
            f"{self.pattern} {self.order}{freeze} x{self.rounds}, flow {self.share:.2f} at {self.flow_rate:.3g}, "
            f"task at {self.rate:.3g}{soft}"
        )
