"""Search space <-> one trial's configuration; every range is stated once, here.

Every method has a space of its own settings (:data:`METHOD_PARAMS`). That of ``dfkt`` is conditional: one weight per span
(or, on request, per pair) is searched only where a pattern has several, since a single one is the same as the flow's
learning rate; likewise a stage's length only where there are several stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dfkt.config import FlowConfig, Method, RunConfig
from dfkt.methods.builders import baseline
from dfkt.methods.patterns import SPANNED, FlowPair, flow_pairs, pattern_name

FAMILIES = ("dense", "sliding", "from-bottom", "to-top", "adjacent")
ORDERS = ("cumulative", "local")
MAX_ROUNDS = 3
STAGE_LENGTH = (1 / 3, 3.0)
WEIGHT = (0.1, 10.0)
RANGES: dict[str, tuple[float, float, bool]] = {
    "task_lr": (0.02, 0.5, True),
    "flow_share": (0.1, 0.6, False),
    "flow_lr": (0.01, 1.0, True),
    "hint_share": (0.1, 0.6, False),
    "hint_lr": (0.01, 1.0, True),
    "kd_weight": (0.1, 0.95, False),
    "temperature": (1.0, 10.0, True),
    "soft_weight": (1.0, 16.0, True),
    "attention_weight": (100.0, 10_000.0, True),
    "similarity_weight": (300.0, 30_000.0, True),
    "other_weight": (0.5, 16.0, True),
}
"""Lowest and highest value, and whether they are drawn evenly in their logarithm."""
METHOD_PARAMS: dict[Method, tuple[str, ...]] = {
    "scratch": ("task_lr",),
    "kd": ("task_lr", "kd_weight", "temperature"),
    "fitnets": ("hint_share", "hint_lr", "task_lr", "soft_weight", "temperature"),
    "attention": ("task_lr", "attention_weight"),
    "layerwise-hint": ("hint_share", "hint_lr", "task_lr", "soft_weight", "temperature"),
    "similarity": ("task_lr", "similarity_weight"),
    "dkd": ("task_lr", "other_weight", "temperature"),
    "fsp": ("flow_share", "flow_lr", "task_lr"),
    "dfkt": ("flow_share", "flow_lr", "task_lr"),
}
"""What is searched for every trial of a method; ``dfkt`` has conditional ones beside them."""

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
        method: Whose settings.
    """

    num_taps: int
    weights: str = "span"
    method: Method = "dfkt"

    def __call__(self, trial: Sampler) -> Params:
        """Sample one trial's parameters (Optuna's define-by-run form)."""
        params = self._sample_stages(trial) if self.method == "dfkt" else {}
        params |= {name: _suggest(trial, name) for name in METHOD_PARAMS[self.method]}
        if self.method == "dfkt":
            params["soft_targets"] = trial.suggest_categorical("soft_targets", (False, True))
            if params["soft_targets"]:
                params |= {name: _suggest(trial, name) for name in ("kd_weight", "temperature")}
        return params

    def _sample_stages(self, trial: Sampler) -> Params:
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
        common: dict[str, type] = dict.fromkeys(METHOD_PARAMS[self.method], float)
        if self.method != "dfkt":
            return common
        top = self.num_taps - 1
        every = flow_pairs("dense" if top > 1 else "adjacent", self.num_taps)
        names: dict[str, type] = {"pattern": str, "family": str, "dense_span": int, "sliding_span": int}
        names |= dict.fromkeys(self._weight_names(every), float)
        names |= {"order": str, "freeze_below": bool, "rounds": int}
        names |= {f"length_{k}": float for k in range(1, top + 1)}
        return names | common | {"soft_targets": bool, "kd_weight": float, "temperature": float}

    def start(self) -> Params:
        """Return the parameters that a study tries first: the method's reference settings.

        For ``dfkt`` every pair, bottom-up, one round, equal weights.
        """
        reference = _read(baseline(RunConfig(), self.method))
        common = {name: reference[name] for name in METHOD_PARAMS[self.method]}
        if self.method != "dfkt":
            return common
        top = self.num_taps - 1
        params: Params = {"family": "dense", "dense_span": top} if top > 1 else {"family": "adjacent"}
        if top > 1:
            params |= {"order": "cumulative", "rounds": 1} | {f"length_{k}": 1.0 for k in range(1, top + 1)}
            params |= dict.fromkeys(self._weight_names(flow_pairs("dense", self.num_taps)), 1.0)
        return params | common | {"soft_targets": False}

    def starts(self) -> tuple[Params, ...]:
        """Return what a study tries before it samples: :meth:`start`; for ``dfkt`` also that with KD's soft targets."""
        if self.method != "dfkt":
            return (self.start(),)
        return self.start(), self.start() | {"soft_targets": True, "kd_weight": 0.9, "temperature": 4.0}


def _suggest(trial: Sampler, name: str) -> float:
    low, high, log = RANGES[name]
    return trial.suggest_float(name, low, high, log=log)


def _read(run: RunConfig) -> dict[str, float]:
    """Return what the searched numbers are in a run."""
    return {
        "task_lr": run.task.optimizer.lr,
        "flow_share": run.flow.share,
        "flow_lr": run.flow.optimizer.lr,
        "hint_share": run.hint.share,
        "hint_lr": run.hint.optimizer.lr,
        "kd_weight": run.task.kd_weight,
        "temperature": run.task.temperature,
        "soft_weight": run.hint.soft_weights[0],
        "attention_weight": run.task.attention_weight,
        "similarity_weight": run.task.similarity_weight,
        "other_weight": run.task.decoupled_weights[1],
    }


def resolve(params: Mapping[str, Any], base: RunConfig) -> RunConfig:
    """Return the run of ``base.method`` that sampled parameters stand for.

    What they do not say is the method's reference setting; what no space holds comes from ``base``: how distances are
    normalised, clipping, momentum and the like.

    Raises:
        ConfigError: If a value is outside its rule.
    """
    run = baseline(base, base.method)
    values = _read(run) | dict(params)
    flow, hint, task = base.flow, base.hint, base.task
    pattern = _read_pattern(params) if base.method == "dfkt" else {"pattern": run.flow.pattern, "order": run.flow.order}
    return replace(
        run,
        flow=FlowConfig(
            norm=flow.norm,
            clip_norm=flow.clip_norm,
            share=values["flow_share"],
            optimizer=replace(flow.optimizer, lr=values["flow_lr"]),
            **pattern,
        ),
        hint=replace(
            hint,
            share=values["hint_share"],
            soft_weights=(
                values["soft_weight"],
                values["soft_weight"] * run.hint.soft_weights[1] / run.hint.soft_weights[0],
            ),
            optimizer=replace(hint.optimizer, lr=values["hint_lr"]),
        ),
        task=replace(
            task,
            kd_weight=values["kd_weight"],
            temperature=values["temperature"],
            attention_weight=values["attention_weight"],
            similarity_weight=values["similarity_weight"],
            decoupled_weights=(run.task.decoupled_weights[0], values["other_weight"]),
            optimizer=replace(task.optimizer, lr=values["task_lr"]),
        ),
    )


def _read_pattern(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of flow stages that a sample of ``dfkt`` names."""
    spans = {int(n.removeprefix("weight_span_")): v for n, v in params.items() if n.startswith("weight_span_")}
    singles = [(*map(int, n.split("_")[1:]), v) for n, v in params.items() if n[7:8].isdigit() and n[:7] == "weight_"]
    lengths = {int(n.removeprefix("length_")): v for n, v in params.items() if n.startswith("length_")}
    return {
        "pattern": params["pattern"],
        "span_weights": tuple(spans.get(s, 1.0) for s in range(1, max(spans, default=0) + 1)),
        "pair_weights": tuple((int(i), int(j), float(w)) for i, j, w in singles),
        "order": params.get("order", "cumulative"),
        "freeze_below": params.get("freeze_below", False),
        "rounds": params.get("rounds", 1),
        "stage_lengths": tuple(lengths.get(k, 1.0) for k in range(1, max(lengths, default=0) + 1)),
    }


def describe_params(params: Mapping[str, Any]) -> str:
    """Return sampled parameters in one short phrase for a trial's line."""
    if "pattern" not in params:
        return ", ".join(f"{name} {value:.3g}" for name, value in params.items())
    freeze = " frozen" if params.get("freeze_below") else ""
    soft = f", kd {params['kd_weight']:.2f} at T={params['temperature']:.1f}" if params.get("soft_targets") else ""
    order = f" {params['order']}" if params.get("order") else ""
    return (
        f"{params['pattern']}{order}{freeze} x{params.get('rounds') or 1}, flow {params['flow_share']:.2f} "
        f"at {params['flow_lr']:.3g}, task at {params['task_lr']:.3g}{soft}"
    )
