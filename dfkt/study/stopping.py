"""Early stopping: ASHA, one for each arm, so that methods are not judged by one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from dfkt.study.driver import Run
from dfkt.study.search import CLOCK, METRIC

Earlier = Iterable[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
"""Rows of earlier trials with their epoch records."""


class Stopping(FIFOScheduler):
    """Tune's scheduler: hands every trial to the ASHA of its arm; final runs are never stopped.

    Args:
        arms: By (study folder, arm): those that are stopped early.
    """

    def __init__(self, arms: Mapping[tuple[str, str], ASHAScheduler]) -> None:
        super().__init__()
        self.arms = dict(arms)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Note a new trial."""
        if (asha := self._of(trial)) is not None:
            asha.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on; one in a flow stage always does."""
        asha = self._of(trial)
        if asha is None or METRIC not in result or result.get(CLOCK) is None:
            return str(TrialScheduler.CONTINUE)
        return str(asha.on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Take in a trial's last report."""
        asha = self._of(trial)
        if asha is not None and METRIC in result and result.get(CLOCK) is not None:
            asha.on_trial_complete(tune_controller, trial, result)

    def _of(self, trial: Trial) -> ASHAScheduler | None:
        run: Run = trial.config["run"]
        return None if run.final else self.arms.get((run.study, run.arm))


def asha(longest: float, reduction_factor: int, earlier: Earlier) -> ASHAScheduler:
    """Return an arm's ASHA, with the rungs that earlier trials reached.

    Args:
        longest: Epochs of a run; the clock's end.
        reduction_factor: It keeps the best 1/reduction_factor at every rung.
        earlier: Trials of earlier runs of the study.
    """
    scheduler = ASHAScheduler(
        time_attr=CLOCK,
        metric=METRIC,
        mode="max",
        max_t=longest,
        grace_period=longest / reduction_factor**2,
        reduction_factor=reduction_factor,
        stop_last_trials=False,
    )
    for row, records in earlier:
        past = SimpleNamespace(trial_id=f"stored-{row['number']}")
        if row["state"] in ("COMPLETE", "PRUNED"):
            scheduler.on_trial_add(None, past)
            for record in records:
                if record["rung_epoch"] is not None:
                    scheduler.on_trial_result(None, past, {METRIC: record[METRIC], CLOCK: record["rung_epoch"]})
    return scheduler
