"""Search space <-> one trial's configuration; every range is stated once, here.

One weight per span (or, on request, per pair) is searched only where a pattern has several: a single one is the same
as the flow's learning rate. Likewise a stage's length only where there are several stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dfkt.config import FlowConfig, RunConfig, TaskConfig
from dfkt.patterns import SPANNED, FlowPair, flow_pairs, pattern_name

FAMILIES = ("dense", "sliding", "from-bottom", "to-top", "adjacent")
ORDERS = ("cumulative", "local")
MAX_ROUNDS = 3
FLOW_SHARE = (0.1, 0.6)
STAGE_LENGTH = (1 / 3, 3.0)
FLOW_LR = (0.01, 1.0)
TASK_LR = (0.02, 0.5)
WEIGHT = (0.1, 10.0)
KD_WEIGHT = (0.1, 0.95)
TEMPERATURE = (1.0, 10.0)

Params = dict[str, Any]


class Sampler(Protocol):
    """What a space asks for a value: an Optuna trial, or anything with these three."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Return one of the choices."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """Return a whole number, both ends included."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number, drawn evenly or evenly in its logarithm."""


@dataclass(frozen=True)
class SearchSpace:
    """What a study searches for a student with some number of taps.

    Args:
        num_taps: The student's taps.
        weights: ``span`` or ``pair``: what has a flow weight of its own.
    """

    num_taps: int
    weights: str = "span"

    def __call__(self, trial: Sampler) -> Params:
        """Sample one trial's parameters (Optuna's define-by-run form)."""
        params = self._sample_pattern(trial)
        pairs = flow_pairs(params["pattern"], self.num_taps)
        for name in self._weight_names(pairs):
            params[name] = trial.suggest_float(name, *WEIGHT, log=True)
        tops = sorted({j for _, j in pairs})
        if len(tops) > 1:
            params["order"] = trial.suggest_categorical("order", ORDERS)
            lowest = [min(i for i, j in pairs if j == top) for top in tops]
            if params["order"] == "local" and max(lowest) > 0:
                params["freeze_below"] = trial.suggest_categorical("freeze_below", (False, True))
            for top in tops:
                params[f"length_{top}"] = trial.suggest_float(f"length_{top}", *STAGE_LENGTH, log=True)
            params["rounds"] = trial.suggest_int("rounds", 1, MAX_ROUNDS)
        params["flow_share"] = trial.suggest_float("flow_share", *FLOW_SHARE)
        params["flow_lr"] = trial.suggest_float("flow_lr", *FLOW_LR, log=True)
        params["task_lr"] = trial.suggest_float("task_lr", *TASK_LR, log=True)
        params["soft_targets"] = trial.suggest_categorical("soft_targets", (False, True))
        if params["soft_targets"]:
            params["kd_weight"] = trial.suggest_float("kd_weight", *KD_WEIGHT)
            params["temperature"] = trial.suggest_float("temperature", *TEMPERATURE, log=True)
        return params

    def _sample_pattern(self, trial: Sampler) -> Params:
        top = self.num_taps - 1
        families = [f for f in FAMILIES if top > 1 or f == "adjacent"]
        params: Params = {"family": trial.suggest_categorical("family", families)}
        if params["family"] in SPANNED:
            name = f"{params['family']}_span"
            params[name] = trial.suggest_int(name, 2, top)
        params["pattern"] = pattern_name(params["family"], params.get(f"{params['family']}_span"))
        return params

    def _weight_names(self, pairs: tuple[FlowPair, ...]) -> list[str]:
        if self.weights == "pair":
            names = [f"weight_{i}_{j}" for i, j in pairs]
        else:
            names = [f"weight_span_{s}" for s in sorted({j - i for i, j in pairs})]
        return names if len(names) > 1 else []

    def types(self) -> dict[str, type]:
        """Return every parameter's name and type, in the order of the store's columns."""
        top = self.num_taps - 1
        every = flow_pairs("dense" if top > 1 else "adjacent", self.num_taps)
        names: dict[str, type] = {"pattern": str, "family": str, "dense_span": int, "sliding_span": int}
        names |= dict.fromkeys(self._weight_names(every), float)
        names |= {"order": str, "freeze_below": bool, "rounds": int}
        names |= {f"length_{k}": float for k in range(1, top + 1)}
        names |= {"flow_share": float, "flow_lr": float, "task_lr": float}
        return names | {"soft_targets": bool, "kd_weight": float, "temperature": float}

    def start(self) -> Params:
        """Return the parameters that a study tries first: every pair, bottom-up, one round, equal weights."""
        top = self.num_taps - 1
        params: Params = {"family": "dense", "dense_span": top} if top > 1 else {"family": "adjacent"}
        params |= {"flow_share": 1 / 3, "flow_lr": 0.1, "task_lr": 0.1, "soft_targets": False}
        if top > 1:
            params |= {"order": "cumulative", "rounds": 1} | {f"length_{k}": 1.0 for k in range(1, top + 1)}
            params |= dict.fromkeys(self._weight_names(flow_pairs("dense", self.num_taps)), 1.0)
        return params

    def starts(self) -> tuple[Params, ...]:
        """Return what a study tries before it samples: :meth:`start`, and the same with KD's reference soft targets."""
        return self.start(), self.start() | {"soft_targets": True, "kd_weight": 0.9, "temperature": 4.0}


def resolve(params: Mapping[str, Any], base: RunConfig) -> RunConfig:
    """Return the run that sampled parameters stand for; what they do not say comes from ``base``.

    Raises:
        ConfigError: If a value is outside its rule.
    """
    flow, task = base.flow, base.task
    spans = {int(n.removeprefix("weight_span_")): v for n, v in params.items() if n.startswith("weight_span_")}
    singles = [(*map(int, n.split("_")[1:]), v) for n, v in params.items() if n[7:8].isdigit() and n[:7] == "weight_"]
    lengths = {int(n.removeprefix("length_")): v for n, v in params.items() if n.startswith("length_")}
    searched_flow = FlowConfig(
        pattern=params["pattern"],
        span_weights=tuple(spans.get(s, 1.0) for s in range(1, max(spans, default=0) + 1)),
        pair_weights=tuple((int(i), int(j), float(w)) for i, j, w in singles),
        norm=flow.norm,
        clip_norm=flow.clip_norm,
        order=params.get("order", "cumulative"),
        freeze_below=params.get("freeze_below", False),
        rounds=params.get("rounds", 1),
        share=params["flow_share"],
        stage_lengths=tuple(lengths.get(k, 1.0) for k in range(1, max(lengths, default=0) + 1)),
        optimizer=replace(flow.optimizer, lr=params["flow_lr"]),
    )
    searched_task = TaskConfig(
        kd_weight=params.get("kd_weight", 0.0),
        temperature=params.get("temperature", task.temperature),
        optimizer=replace(task.optimizer, lr=params["task_lr"]),
    )
    return replace(base, method="dfkt", flow=searched_flow, task=searched_task)


def describe_params(params: Mapping[str, Any]) -> str:
    """Return sampled parameters in one short phrase for a trial's line."""
    freeze = " frozen" if params.get("freeze_below") else ""
    soft = f", kd {params['kd_weight']:.2f} at T={params['temperature']:.1f}" if params.get("soft_targets") else ""
    order = f" {params['order']}" if params.get("order") else ""
    return (
        f"{params['pattern']}{order}{freeze} x{params.get('rounds') or 1}, flow {params['flow_share']:.2f} "
        f"at {params['flow_lr']:.3g}, task at {params['task_lr']:.3g}{soft}"
    )
