"""A study: one image set, one teacher, one student network, and the arms that are held against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dfkt.config import (
    NO_KEY,
    DataConfig,
    NetworkConfig,
    TeacherConfig,
    TrainConfig,
    build,
    check_rule,
    is_finite,
    to_dict,
)
from dfkt.methods.base import Method, Schedule
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.kd import Kd
from dfkt.methods.registry import METHODS
from dfkt.methods.scratch import Scratch
from dfkt.methods.space import Space
from dfkt.training.config import RunConfig

ABLATIONS: dict[str, dict[str, Any]] = {
    "adjacent": {"pattern": "adjacent"},
    "sliding": {"pattern": "sliding-2"},
    "dense": {"pattern": "dense"},
    "joint": {"order": "joint", "rounds": 1, "freeze_below": False},
    "sequential": {"order": "cumulative", "freeze_below": False},
    "one-round": {"rounds": 1},
    "two-rounds": {"rounds": 2},
    "equal-weights": {"span_weights": (), "pair_weights": ()},
    "unit-norm": {"norm": "unit"},
    "labels-only": {"weight": 0.0},
    "no-flow": {"rounds": 0},
}
"""One change each to the searched ``dfkt``; one that changes nothing there is left out."""
_NAME = "at most 100 letters, digits, '.', '_' and '-' only, no '.' first"


def is_name(text: str) -> bool:
    """Whether a text can name a study or an arm: it is a folder's name on every file system."""
    return (
        0 < len(text) <= 100
        and not text.startswith(".")
        and all(c.isascii() and (c.isalnum() or c in "._-") for c in text)
    )


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One side of a study: a method that is searched or stands as it is, or an ablation of another arm's winner."""

    name: str
    """Its row in tables, and its partition in the store."""
    method: Method
    """Where the search starts; with 0 trials, what is trained over seeds."""
    trials: int = field(default=0, metadata=NO_KEY)
    """Trials of its search, those of earlier runs counted in."""
    space: Space = field(default_factory=lambda: Space({}))
    """What is searched otherwise than the method does."""
    epochs: float | None = None
    """Length of its runs; ``None`` is the study's."""
    parent: str | None = None
    """The arm before it whose winner it takes, changed."""
    change: Mapping[str, Any] = field(default_factory=dict)
    """The settings that differ from the parent's winner."""

    def __post_init__(self) -> None:
        check_rule(is_name(self.name), f"arm name holds {_NAME}", name=self.name)
        check_rule(isinstance(self.trials, int) and self.trials >= 0, "trials >= 0", trials=self.trials)
        check_rule(self.parent is None or not self.trials, "an ablation has no trials", trials=self.trials)
        check_rule(self.parent is not None or not self.change, "a change needs a parent", change=dict(self.change))
        check_rule(self.epochs is None or 0 < self.epochs <= 1e6, "0 < epochs <= 1e6", epochs=self.epochs)

    def of(self, winner: Method) -> Method:
        """Return an ablation's method: its parent's winner with the change.

        Raises:
            ConfigError: If the method has no such setting, or a value is outside its rule.
        """
        values = {n: v for n, v in to_dict(winner).items() if n != "name"} | to_dict_of(self.change)
        return build(type(winner), values)


def to_dict_of(change: Mapping[str, Any]) -> dict[str, Any]:
    """Return changed settings as JSON values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in change.items()}


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What a study trains and compares."""

    name: str
    """Names the study's folder; running the same name again resumes or extends it."""
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    arms: tuple[ArmConfig, ...] = field(default_factory=lambda: default_arms())
    seeds: int = field(default=5, metadata=NO_KEY)
    """Final runs of every arm: seeds 1, 2, …, the same in all."""
    early_stopping: bool = True
    """Trials that are behind the others of their arm at a rung end there (:mod:`dfkt.study.stopping`)."""
    rungs: tuple[float, ...] = (0.2, 0.4)
    """Shares of a trial's task stage at which it is held against the others."""
    least_epochs: float = 1.0
    """No trial ends before so many epochs of its task stage; an arm whose method has no rung then is not stopped at all."""
    reduction_factor: int = 3
    """The best 1/reduction_factor of those that have passed a rung go on."""
    spared: float = 0.1
    """Share of the trials that never end early: they show how well rungs predict the end."""
    confirm: int = field(default=3, metadata=NO_KEY)
    """So many of a search's best trials are trained again with another seed, and the winner is chosen by the mean of both."""
    search_seed: int = 0
    """Seed of Optuna's samplers."""
    max_failures: int = field(default=2, metadata=NO_KEY)
    """Restarts of a run whose process died, from its last checkpoint."""

    def __post_init__(self) -> None:
        check_rule(is_name(self.name), f"study name holds {_NAME}", "Choose one with --name.", name=self.name)
        check_rule(self.seeds >= 1, "seeds >= 1", seeds=self.seeds)
        check_rule(self.confirm >= 0, "confirm >= 0", confirm=self.confirm)
        check_rule(self.search_seed >= 0, "search_seed >= 0", search_seed=self.search_seed)
        ok = all(is_finite(r) and 0 < r < 1 for r in self.rungs) and list(self.rungs) == sorted(set(self.rungs))
        check_rule(ok, "rungs rise, 0 < rung < 1", rungs=self.rungs)
        ok = is_finite(self.least_epochs) and self.least_epochs >= 0
        check_rule(ok, "least_epochs >= 0", least_epochs=self.least_epochs)
        check_rule(is_finite(self.spared) and 0 <= self.spared <= 1, "0 <= spared <= 1", spared=self.spared)
        check_rule(self.reduction_factor >= 2, "reduction_factor >= 2", reduction_factor=self.reduction_factor)
        check_rule(self.max_failures >= 0, "max_failures >= 0", max_failures=self.max_failures)
        names = [arm.name for arm in self.arms]
        check_rule(bool(names), "a study has an arm", arms=names)
        check_rule(len(set(names)) == len(names), "arms have different names", arms=names)
        for k, arm in enumerate(self.arms):
            ok = arm.parent is None or arm.parent in names[:k]
            check_rule(ok, "an ablation's parent stands before it", "Add that arm.", parent=arm.parent, arms=names)

    def run(self, arm: ArmConfig, method: Method, seed: int | None = None) -> RunConfig:
        """Return an arm's run of a method; a trial has the study's seed, a final run one of its own."""
        train = self.train if arm.epochs is None else replace(self.train, epochs=arm.epochs)
        train = train if seed is None else replace(train, seed=seed)
        return RunConfig(method=method, data=self.data, teacher=self.teacher, student=self.student, train=train)

    def rungs_in(self, schedule: Schedule) -> tuple[float, ...]:
        """Return the rungs of a trial: those by which it has done the least number of epochs of its task stage."""
        epochs = schedule[-1].epochs
        return tuple(r for r in self.rungs if self.early_stopping and r * epochs >= self.least_epochs - 1e-9)

    def is_spared(self, number: int) -> bool:
        """Whether a trial never ends early: with a tenth of them trials 9, 19, 29, …, none of the first, which are no samples."""
        return math.floor((number + 1) * self.spared + 1e-9) > math.floor(number * self.spared + 1e-9)

    def describe(self) -> str:
        """Return on one line what is trained.

        Example:
            >>> StudyConfig(name="s", arms=default_arms(trials=40), seeds=3).describe()
            'search of dfkt (40 trials, the best 3 again); final runs of scratch, kd, fsp, dfkt over 3 seeds; 60 epochs each'
        """
        searches = (f"{arm.name} ({arm.trials} trials, the best {self.confirm} again)" for arm in self.searched)
        finals = f"final runs of {', '.join(arm.name for arm in self.arms)} over {self.seeds} seeds"
        lengths = sorted({arm.epochs or self.train.epochs for arm in self.arms})
        each = f"{' or '.join(f'{epochs:g}' for epochs in lengths)} epochs each"
        return "; ".join([*(f"search of {text}" for text in searches), finals, each])

    @property
    def searched(self) -> tuple[ArmConfig, ...]:
        """The arms that are searched."""
        return tuple(arm for arm in self.arms if arm.trials)


def default_arms(
    searched: Method | None = None, trials: int = 40, baselines: Sequence[Method] | None = None
) -> tuple[ArmConfig, ...]:
    """Return the arms of a study of one method: it is searched, the baselines stand at their reference settings.

    Args:
        searched: The method; ``None`` is DFKT.
        trials: Of its search; 0 takes it as it stands.
        baselines: What stands beside it; ``None`` is scratch, KD and FSP, without the searched one.
    """
    ours = searched or Dfkt()
    others = [METHODS["fsp"](), Kd(), Scratch()][::-1] if baselines is None else list(baselines)
    if baselines is None:
        others = [method for method in others if type(method) is not type(ours)]
    arms = [ArmConfig(name=method.name, method=method) for method in others]
    return (*arms, ArmConfig(name=ours.name, method=ours, trials=trials))


def ablations(parent: ArmConfig, names: Sequence[str] = tuple(ABLATIONS)) -> tuple[ArmConfig, ...]:
    """Return the arms that are a searched ``dfkt`` with one change each, such as ``dfkt-no-flow``."""
    return tuple(
        ArmConfig(
            name=f"{parent.name}-{name}", method=parent.method, epochs=parent.epochs, parent=parent.name,
            change=ABLATIONS[name],
        )
        for name in names
    )  # fmt: skip
