"""Optuna's TPE for searches of any length: of many trials it looks at the best and the newest.

Its work grows with the trials that it looks at, for every group of parameters anew: 0.1 s a proposal with 1,000 of them, a second
with 10,000. Up to :data:`NEWEST` ended trials and as many on their way, proposals are Optuna's own. Beyond, the 25 best
stay, and these are all that TPE tells the others from, whatever there is; of the others the newest stay, to which TPE gives
the most weight in any case.
"""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState

BEST = 25
"""Trials that TPE counts as good, of 250 or more."""
NEWEST = 500
"""Trials that it is shown beside the best, of those that have ended and of those that have not."""


class NewestTpe(TPESampler):
    """TPE over the best and the newest trials."""

    _params: dict[int, dict[str, Any]]

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
        """Return what is drawn at once; the first call of a proposal, so it chooses the trials for those that follow."""
        self._shown, self._params = _Shown(study), {}
        return super().infer_relative_search_space(self._shown, trial)

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """Draw what is drawn at once."""
        return super().sample_relative(self._shown, trial, search_space)

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        """Draw a parameter by itself."""
        return super().sample_independent(self._shown, trial, param_name, param_distribution)

    def _get_params(self, trial: FrozenTrial, study: Any) -> dict[str, Any]:
        """Return a trial's parameters, found once a proposal: Optuna parses those of a running trial for every group."""
        if trial.number not in self._params:
            self._params[trial.number] = super()._get_params(trial, study)
        return self._params[trial.number]


class _Shown:
    """An Optuna study with some of its trials: all else is the study's."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._trials = newest(study.get_trials(deepcopy=False))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, deepcopy: bool, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        """Return trials as TPE asks a study for them; they stay the same for one proposal."""
        return [trial for trial in self._trials if states is None or trial.state in states]


def newest(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the best and the newest of the trials that ended with a value, and the newest that run, by number."""
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    running = [trial for trial in trials if trial.state == TrialState.RUNNING][-NEWEST:]
    best = heapq.nlargest(BEST, ended[:-NEWEST], key=_rank)
    return sorted([*best, *ended[-NEWEST:], *running], key=lambda trial: trial.number)


def _rank(trial: FrozenTrial) -> tuple[bool, float]:
    value = trial.value
    return trial.state == TrialState.COMPLETE, -math.inf if value is None else value


def tpe(seed: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of an arm's search."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return NewestTpe(seed=seed, multivariate=True, group=True, constant_liar=True)
