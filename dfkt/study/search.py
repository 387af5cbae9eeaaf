"""Optuna through Ray Tune: the searcher that takes up interrupted trials, and the scheduler that knows earlier ones.

A trial keeps its Optuna number for life: number 7 is row 7 of the trial store. The store decides what is finished;
whatever else Optuna knows of is handed out again, with the same parameters, before new ones are asked for.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from dfkt.config import StudyConfig
from dfkt.store.rows import trial_params
from dfkt.methods.space import SearchSpace

METRIC = "val_accuracy"
CLOCK = "rung_epoch"
STATES = {"COMPLETE": TrialState.COMPLETE, "PRUNED": TrialState.PRUNED, "FAIL": TrialState.FAIL}


class ResumingSearch(OptunaSearch):
    """OptunaSearch that hands out unfinished trials of earlier runs first, and tells stopped trials as pruned.

    Args:
        space: The search space, define-by-run; its sample gets the trial's ``number``.
        unfinished: Optuna numbers to hand out before any new one.
        kwargs: As OptunaSearch takes them.
    """

    def __init__(self, space: SearchSpace, unfinished: Sequence[int], **kwargs: Any) -> None:
        self._unfinished = list(unfinished)
        super().__init__(space=_Numbered(space), metric=METRIC, mode="max", **kwargs)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return an unfinished trial's parameters, or new ones."""
        if trial_id not in self._ot_trials and self._unfinished:
            frozen = self._ot_study.trials[self._unfinished.pop(0)]
            self._ot_trials[trial_id] = optuna.trial.Trial(self._ot_study, frozen._trial_id)
        params: dict[str, Any] | None = super().suggest(trial_id)
        return params

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass on what a student that can classify reports."""
        if METRIC in result and trial_id not in self._completed_trials:
            self._report(self._ot_trials[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended: complete, pruned by the scheduler, or failed."""
        if trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        trial, result = self._ot_trials[trial_id], result or {}
        if METRIC in result:
            self._report(trial, result)
        if error or "failure" in result or METRIC not in result:
            tell(self._ot_study, trial.number, "FAIL")
        elif result.get("complete"):
            tell(self._ot_study, trial.number, "COMPLETE", result[METRIC])
        else:
            tell(self._ot_study, trial.number, "PRUNED")

    def _report(self, trial: optuna.trial.Trial, result: Mapping[str, Any]) -> None:
        with warnings.catch_warnings(), contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            warnings.simplefilter("ignore")  # a resumed trial may report again what it had reported
            trial.report(result[METRIC], round(result[CLOCK]))


class _Numbered:
    """A search space whose sample carries the trial's number."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space

    def __call__(self, trial: Any) -> dict[str, Any]:
        """Sample the parameters and the pattern they name."""
        return self.space(trial) | {"number": trial.number}


def tell(study: optuna.Study, number: int, state: str, value: float | None = None) -> None:
    """Tell Optuna how a trial ended, unless it knows."""
    study.tell(number, value, state=STATES[state], skip_if_finished=True)


def open_optuna(
    config: StudyConfig, journal: Path, space: SearchSpace, rows: Iterable[Mapping[str, Any]] = ()
) -> optuna.Study:
    """Open the study's journal, with every trial that the store has; a new one begins with the space's starts.

    A journal that was deleted, or whose remote copy is older than the store, would number new trials like stored ones.
    """
    silence_optuna()
    journal.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{journal}.lock").unlink(missing_ok=True)  # a killed process left it; the study's folder is ours alone
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name=config.name,
        direction="maximize",
        load_if_exists=True,
    )
    _add_missing(study, {row["number"]: row for row in rows}, space)
    if not study.trials:
        for params in space.starts():
            study.enqueue_trial(params)
    return study


def _add_missing(study: optuna.Study, rows: Mapping[int, Mapping[str, Any]], space: SearchSpace) -> None:
    for number in range(len(study.trials), max(rows, default=-1) + 1):
        row = rows.get(number)
        if row is None:  # asked for, but never started: to be asked for again
            study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING))
            continue
        sample = optuna.trial.FixedTrial(trial_params(dict(row)), number)
        space(sample)
        state = STATES.get(row["state"], TrialState.RUNNING)
        value = row["last_val_accuracy"] if state == TrialState.COMPLETE else None
        study.add_trial(
            optuna.trial.create_trial(
                state=state, value=value, params=sample.params, distributions=sample.distributions
            )
        )


def reconcile(study: optuna.Study, rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """Tell Optuna what the store knows to be finished; return the numbers that are still to be done.

    A kill between the store's write and Optuna's, in either order, leaves nothing lost and nothing doubled.
    """
    finished = {row["number"]: row for row in rows if row["state"] in STATES}
    for number, row in finished.items():
        value = row["last_val_accuracy"] if row["state"] == "COMPLETE" else None
        tell(study, number, row["state"], value)
    return [t.number for t in study.trials if t.number not in finished and t.state != TrialState.WAITING]


def build_search(config: StudyConfig, journal: Path, space: SearchSpace, unfinished: Sequence[int]) -> ResumingSearch:
    """Return the searcher; its sampler's seed varies with what is stored, since the same seed proposes the same points again."""
    storage = JournalStorage(JournalFileBackend(str(journal)))
    stored = len(optuna.load_study(study_name=config.name, storage=storage).trials)
    seed = (config.search_seed * 100_003 + stored) % 2**32  # NumPy takes no larger one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
    return ResumingSearch(space, unfinished, sampler=sampler, storage=storage, study_name=config.name)


def build_scheduler(config: StudyConfig, rows: Iterable[Mapping[str, Any]], epochs: Mapping[int, Any]) -> Any:
    """Return ASHA with the rungs that earlier trials of the study reached, or ``None`` without early stopping.

    Args:
        config: The study.
        rows: Trials of earlier runs.
        epochs: Their epoch records, by number.
    """
    if not config.early_stopping:
        return None
    longest = config.base.train.epochs
    scheduler = ASHAScheduler(
        time_attr=CLOCK,
        metric=METRIC,
        mode="max",
        max_t=longest,
        grace_period=longest / config.reduction_factor**2,
        reduction_factor=config.reduction_factor,
        stop_last_trials=False,
    )
    for row in rows:
        past = SimpleNamespace(trial_id=f"stored-{row['number']}")
        if row["state"] in ("COMPLETE", "PRUNED"):
            scheduler.on_trial_add(None, past)
            for record in epochs[row["number"]]:
                if record["rung_epoch"] is not None:
                    scheduler.on_trial_result(None, past, {METRIC: record[METRIC], CLOCK: record["rung_epoch"]})
    return scheduler


def silence_optuna() -> None:
    """Keep Optuna and OptunaSearch from printing a line per trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)
