"""Arms of a comparison on their way through one run of Tune: a search first, then the final runs of its winner.

One queue serves all arms, so no machine waits for the last trial of an arm: the next arm's begin meanwhile. What an arm
leaves is an ordinary study's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from dfkt.config import StudyConfig
from dfkt.study.finals import final_jobs, save_result
from dfkt.study.recorder import Recorder, last_line
from dfkt.store.study_store import StudyStore
from dfkt.study.search import METRIC, build_search, open_optuna, reconcile
from dfkt.methods.space import SearchSpace
from dfkt.study.study import journal_of
from dfkt.study.driver import Driver
from dfkt.training.run import Job

Log = Callable[[str], None]
Params = dict[str, Any]


class RunningArm:
    """One arm: hands out its trials, then its final runs, and writes what comes back into its study.

    Args:
        study: What the arm is.
        store: Its study's store.
        space: Its search space.
        log: Receives a line per trial and run.
    """

    def __init__(self, study: StudyConfig, store: StudyStore, space: SearchSpace, log: Log) -> None:
        self.study, self.store, self.space, self.log = study, store, space, log
        rows = store.trial_rows()
        self.left = max(study.trials - sum(row["state"] != "RUNNING" for row in rows), 0)
        journal = journal_of(store.storage)
        if self.left:
            unfinished = reconcile(open_optuna(study, journal, space, rows), rows)
            self.search = build_search(study, journal, space, unfinished)
        self.recorder = Recorder(store, study, journal, log)
        self.running: set[str] = set()
        self.jobs: list[Job] | None = None
        self.lost = 0

    def suggest(self, trial_id: str) -> Params | None:
        """Return the next trial's or final run's parameters; ``None`` while there is nothing to begin."""
        params: Params | None = None
        if self.left:
            params = self.search.suggest(trial_id)
            self.left -= params is not None
        elif self.jobs is None and not self.running:
            self.jobs = final_jobs(self.study, self.store, self.log)
        if self.jobs:
            job = self.jobs.pop(0)
            params = {"number": job.number, "job": job}
        if params is not None:
            self.running.add(trial_id)
        return params

    @property
    def searched(self) -> bool:
        """Whether the winner is known."""
        return self.jobs is not None

    @property
    def over(self) -> bool:
        """Whether nothing is left to begin or running."""
        return self.jobs == [] and not self.running

    @property
    def failures(self) -> int:
        """Trials and final runs that failed, in this run or earlier."""
        rows = self.store.trial_rows() + self.store.final_rows()
        return self.lost + sum(row["state"] == "FAIL" for row in rows)

    def end(self, trial: Any, error: str | None) -> None:
        """Take in a final run's result; without one its process died too often, and it stays to be done."""
        job = trial.config["job"]
        if not save_result(self.store, job, self.log):
            self.lost += 1
            self.log(f"final {job.config.method} seed {job.config.train.seed}: failed: {error or 'no result'}")


class Skipped:
    """Stands for an arm at which nothing is to be done."""


Opener = Callable[[], RunningArm | Skipped | None]


class Arms(Searcher):
    """Tune's searcher and recorder for arms: the first one that has something to begin comes first.

    Args:
        arms: In the order in which they shall begin. A function stands for one that waits for another: it returns
            ``None`` as long as it must wait, and :class:`Skipped` where nothing is to be done.
    """

    def __init__(self, arms: Sequence[RunningArm | Opener]) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.arms: list[RunningArm | Opener | Skipped] = list(arms)
        self.owners: dict[str, tuple[int, bool]] = {}

    def suggest(self, trial_id: str) -> Params | str | None:
        """Return what is next, with the number of its ``arm``."""
        for number in range(len(self.arms)):
            arm = self._opened(number)
            params = arm.suggest(trial_id) if isinstance(arm, RunningArm) else None
            if params is not None:
                self.owners[trial_id] = (number, "job" in params)
                return {"arm": number, **params}
        return Searcher.FINISHED if self.over else None

    def _opened(self, number: int) -> RunningArm | Skipped | None:
        arm = self.arms[number]
        if isinstance(arm, RunningArm | Skipped):
            return arm
        opened = arm()
        if opened is not None:
            self.arms[number] = opened
        return opened

    @property
    def over(self) -> bool:
        """Whether every arm is; a final run that was lost stays to be done when the comparison is run again."""
        return all(isinstance(arm, Skipped) or (isinstance(arm, RunningArm) and arm.over) for arm in self.arms)

    @property
    def failures(self) -> int:
        """How many trials and final runs failed, in this run or earlier."""
        return sum(arm.failures for arm in self.arms if isinstance(arm, RunningArm))

    def on_trial_result(self, trial_id: str, result: Params) -> None:
        """Pass a trial's report to its arm's searcher."""
        arm, final = self.owner(trial_id)
        if not final:
            arm.search.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: Params | None = None, error: bool = False) -> None:
        """Tell a trial's end to its arm's searcher."""
        arm, final = self.owner(trial_id)
        if not final:
            arm.search.on_trial_complete(trial_id, result, error)

    def owner(self, trial_id: str) -> tuple[RunningArm, bool]:
        """Return whose trial it is, and whether it is a final run."""
        number, final = self.owners[trial_id]
        arm = self.arms[number]
        assert isinstance(arm, RunningArm)
        return arm, final

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out: Tune pickles its searcher, and the arms hold images."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the studies' folders are what a later run reads."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, likewise."""


class ArmRecorder(tune.Callback):
    """Passes what Tune tells to the arm that it is about."""

    def __init__(self, arms: Arms) -> None:
        self.arms = arms

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial of a search began."""
        arm, final = self.arms.owner(trial.trial_id)
        if not final:
            arm.recorder.on_trial_start(iteration, trials, _without_arm(trial))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Params, **info: Any) -> None:
        """Keep what a trial of a search reports."""
        arm, final = self.arms.owner(trial.trial_id)
        if not final:
            arm.recorder.on_trial_result(iteration, trials, _without_arm(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write a trial's row, or a final run's."""
        arm, final = self.arms.owner(trial.trial_id)
        if final:
            arm.end(trial, None)
        else:
            arm.recorder.on_trial_complete(iteration, trials, _without_arm(trial))
        arm.running.discard(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the row of a trial whose process raised, or died too often."""
        arm, final = self.arms.owner(trial.trial_id)
        if final:
            arm.end(trial, last_line(str(trial.get_pickled_error() or trial.get_error())))
        else:
            arm.recorder.on_trial_error(iteration, trials, _without_arm(trial))
        arm.running.discard(trial.trial_id)


@dataclass(frozen=True)
class ArmDriver:
    """What a process does with parameters that :class:`Arms` hands out.

    Args:
        drivers: One for each arm; that of a final run needs no more than its workers.
    """

    drivers: tuple[Driver, ...]

    def __call__(self, params: Mapping[str, Any]) -> None:
        """Run a trial or a final run."""
        driver = self.drivers[params["arm"]]
        if "job" in params:
            driver.run(params["job"])
        else:
            driver({name: value for name, value in params.items() if name != "arm"})


def _without_arm(trial: Any) -> Any:
    """Return a trial as the recorder of a single study knows it."""
    params = {name: value for name, value in trial.config.items() if name != "arm"}
    return SimpleNamespace(config=params, get_pickled_error=trial.get_pickled_error, get_error=trial.get_error)
