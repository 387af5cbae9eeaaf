"""Early stopping: trials of an arm are compared where the same share of their task stage is done.

Asynchronous successive halving (Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020) with rungs
of our own: they lie on the task stage, whose learning rate says how far a trial is, not on the epochs of the whole run, and
judge a running average of the weights, which tells sooner how a run will end than the weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from dfkt.study.config import StudyConfig
from dfkt.study.driver import Run
from dfkt.study.queue import Queue
from dfkt.study.search import JUDGED

Earlier = Iterable[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
"""Rows of earlier trials with their epoch records."""


class Rungs:
    """What the trials of one arm reached at every rung.

    Args:
        config: Of the study: who goes on at a rung, and which trials are never stopped.
        earlier: Trials of earlier runs of the study.
    """

    def __init__(self, config: StudyConfig, earlier: Earlier = ()) -> None:
        self.config = config
        self.reached: dict[float, dict[int, float]] = {}
        for row, records in earlier:
            if row["state"] in ("COMPLETE", "PRUNED"):
                self.note(row["number"], records)

    def note(self, number: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Take in what a trial reached at the rungs among its records."""
        for record in records:
            if record.get("rung") is not None:
                self.reached.setdefault(record["rung"], {})[number] = record[JUDGED]

    def stops(self, number: int, rung: float) -> bool:
        """Whether a trial ends at a rung: it is not among the best of those that have passed it, itself counted in."""
        values = self.reached[rung]
        better = sum(value > values[number] for value in values.values())
        return not self.config.is_spared(number) and better >= max(len(values) / self.config.reduction_factor, 1)


class Stopping(FIFOScheduler):
    """Tune's scheduler: holds every trial against the others of its arm; no other run is ever stopped.

    Args:
        arms: By (study folder, arm): those that are stopped early.
    """

    def __init__(self, arms: Mapping[tuple[str, str], Rungs]) -> None:
        super().__init__()
        self.arms = dict(arms)

    @classmethod
    def of(cls, queue: Queue) -> Stopping:
        """Return what stops the trials of a queue, with the rungs that earlier trials reached."""
        found = {}
        for key, arm in queue.arms.items():
            store, name = arm.study.store, arm.config.name
            if arm.study.config.early_stopping and arm.trials_left:
                rows = [row for row in store.rows("trial", name) if row["state"] != "RUNNING"]
                records: dict[int, list[dict[str, Any]]] = {row["number"]: [] for row in rows}
                for record in store.rung_records(name):
                    records.get(record["number"], []).append(record)
                found[key] = Rungs(arm.study.config, ((row, records[row["number"]]) for row in rows))
        return cls(found)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on; only one that is at a rung right now may have to stop."""
        run: Run = trial.config["run"]
        rungs, records = self.arms.get((run.study, run.arm)), result.get("records", ())
        if run.kind != "trial" or rungs is None or not records:
            return str(TrialScheduler.CONTINUE)
        rungs.note(run.number, records)
        rung = records[-1].get("rung")
        stops = rung is not None and rungs.stops(run.number, rung)
        return str(TrialScheduler.STOP if stops else TrialScheduler.CONTINUE)
