"""Which run is next: the arms of one or several studies in one queue.

Every arm hands out the trials of its search, then the best of them once more with another seed, then its winner's final
runs; an ablation waits for its parent's winner. Trials of any arm come before other runs of any, so that no machine waits
for the last trial of a search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import pandas as pd

from dfkt.config import to_dict
from dfkt.errors import InputError
from dfkt.methods.base import Method
from dfkt.store.rows import best_trials, row_settings, trial_params
from dfkt.study.config import ArmConfig
from dfkt.study.driver import Kind, Run
from dfkt.study.opened import OpenStudy
from dfkt.study.search import ArmSearch

Log = Callable[[str], None]
CONFIRMING_SEED = 1_000_000
"""What a confirmation's seed is more than a trial's: far from the seeds of final runs."""


class Arm:
    """One arm on its way.

    Args:
        study: Whose it is.
        config: What it is.
        parent: The arm whose winner it takes, changed.
        log: Receives a line where the arm has nothing to train.
    """

    def __init__(self, study: OpenStudy, config: ArmConfig, parent: Arm | None, log: Log) -> None:
        self.study, self.config, self.parent, self.log = study, config, parent, log
        found: dict[Kind, list[dict[str, Any]]] = {kind: study.store.rows(kind, config.name) for kind in get_args(Kind)}
        self.interrupted: dict[tuple[Kind, int], dict[str, Any]] = {
            (kind, row["number"]): row for kind, rows in found.items() for row in rows if row["state"] == "RUNNING"
        }
        rows = found["trial"]
        self.done_before = sum(row["state"] != "RUNNING" for row in rows)
        self.searched = bool(config.trials or self.done_before)
        self.trials_left = max(config.trials - self.done_before, 0)
        self.search: ArmSearch | None = None
        if self.trials_left:
            seed = study.config.search_seed
            self.search = ArmSearch(config, study.taps, study.open_journal(), rows, seed)
        self.rungs = study.config.rungs_in(self._schedule(config.method)) if self.search else ()
        if self.searched and not config.trials:
            log(f"{config.name}: the {self.done_before} trials of its search count on, so 0 trials change nothing")
        if self.search and study.config.early_stopping and not self.rungs:
            self._say_unstopped()
        self.winner: Method | None = None
        self.confirmations: list[Run] | None = None
        self.finals: list[Run] | None = None
        self.running: set[tuple[str, str, Kind, int]] = set()
        self.lost = 0

    def next_trial(self) -> Run | None:
        """Return the next trial of the search, an unfinished one first; ``None`` when all have begun."""
        if self.search is None or not self.trials_left:
            return None
        self.trials_left -= 1
        number, method, params = self.search.ask()
        run, folder = self.study.config.run(self.config, method), f"{self.config.name}-{number:05d}"
        rungs = self.study.config.rungs_in(self._schedule(method)) if self.rungs else ()
        job = self.study.job("trial", run, "runs", folder, rungs=rungs)
        return self._begun(Run(self.study.store.storage.path, self.config.name, number, "trial", params, job))

    def next_confirmation(self) -> Run | None:
        """Return the next of the best trials that is to be trained again; ``None`` before and after that."""
        self.plan()
        return self._begun(self.confirmations.pop(0)) if self.confirmations else None

    def next_final(self) -> Run | None:
        """Return the next final run; ``None`` while the winner is not known, and when all have begun."""
        self.plan()
        return self._begun(self.finals.pop(0)) if self.finals else None

    def plan(self) -> None:
        """Find which trials are to be confirmed, then the winner and its final runs, as soon as no run can change them."""
        if self.trials_left or self.running or not self._parent_known:
            return
        if self.confirmations is None:
            self.confirmations = list(self._plan_confirmations())
        if self.finals is None and not self.confirmations:
            self.finals = list(self._plan_finals())

    @property
    def over(self) -> bool:
        """Whether nothing is left to begin or running."""
        return self.finals == [] and not self.running

    @property
    def count(self) -> int:
        """How many runs it may still hand out; which earlier final runs stay good is known with the winner."""
        config = self.study.config
        trials = self.trials_left + self.done_before
        expected = min(config.confirm, trials) if self.confirmations is None else len(self.confirmations)
        return self.trials_left + expected + (config.seeds if self.finals is None else len(self.finals))

    @property
    def failures(self) -> int:
        """Runs that failed, in this session or earlier."""
        return self.lost + sum(row["state"] == "FAIL" for row in self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of all its runs."""
        return [row for kind in get_args(Kind) for row in self.study.store.rows(kind, self.config.name)]

    @property
    def _parent_known(self) -> bool:
        return self.parent is None or self.parent.finals is not None

    def _begun(self, run: Run) -> Run:
        self.running.add(run.id)
        return run

    def _plan_confirmations(self) -> Iterator[Run]:
        """Yield a run with another seed for each of the best trials that has none yet; a single one has nothing to win."""
        study, name = self.study, self.config.name
        best = self._best(study.config.confirm) if self.searched else pd.DataFrame()
        known = {row["number"] for row in study.store.rows("confirmation", name) if row["state"] != "RUNNING"}
        rows = self._trials()
        for number in best.number if len(best) > 1 else ():
            if number not in known:
                row, method = rows[number], Method.from_json(row_settings(rows[number]))
                run = study.config.run(self.config, method, study.config.train.seed + CONFIRMING_SEED)
                job = study.job("confirmation", run, "runs", f"{name}-{number:05d}-again")
                yield Run(study.store.storage.path, name, number, "confirmation", trial_params(row), job)

    def _trials(self) -> dict[int, dict[str, Any]]:
        """Return its trials' rows by number, with values of the types that they were drawn with."""
        return {row["number"]: row for row in self.study.store.rows("trial", self.config.name)}

    def _best(self, count: int, *, confirmed: bool = False) -> pd.DataFrame:
        store, name = self.study.store, self.config.name
        again = pd.DataFrame(store.rows("confirmation", name)) if confirmed else None
        return best_trials(pd.DataFrame(store.rows("trial", name)), count, again)

    def _plan_finals(self) -> Iterator[Run]:
        """Yield the final runs that are still to be done, numbered for good: one that was listed before keeps its number."""
        self.winner = self._find_winner()
        if self.winner is None:
            self.study.note(self.config.name, present=[])
            return
        store, name = self.study.store, self.config.name
        listed: list[str] = list(store.meta.get("arms", {}).get(name, {}).get("finals", []))
        runs = [self.study.config.run(self.config, self.winner, seed + 1) for seed in range(self.study.config.seeds)]
        listed += [run.key for run in runs if run.key not in listed]
        numbers = [listed.index(run.key) for run in runs]
        self.study.note(name, finals=listed, present=numbers, skipped=None)
        best = (store.meta["arms"][name].get("best") or {}).get("trial")
        params = {} if best is None else trial_params(self._trials()[best])
        known = {row["number"] for row in store.rows("final", name) if row["state"] != "RUNNING"}
        for number, run in zip(numbers, runs, strict=True):
            if number not in known:
                job = self.study.job("final", run, "students", f"{name}-seed{run.train.seed}")
                yield Run(store.storage.path, name, number, "final", params, job)

    def _find_winner(self) -> Method | None:
        """Return the method that is trained over seeds; ``None``, with a line that says why, where there is none."""
        number, winner = None, self.config.method
        if self.searched:
            best = self._best(1, confirmed=True)
            if best.empty:
                self._skip("no trial was completed, so there is nothing to train again")
                return None
            number, winner = int(best.iloc[0].number), Method.from_json(row_settings(best.iloc[0]))
        elif self.parent is not None:
            if self.parent.winner is None:
                self._skip(f"{self.parent.config.name} has no complete trial")
                return None
            try:
                winner = self.config.of(self.parent.winner)
                same = self._schedule(winner) == self.parent._schedule(self.parent.winner)
            except InputError as error:  # all other arms go on
                self._skip(f"the change does not fit {self.parent.config.name}'s winner: {error}")
                return None
            if same:
                self._skip(f"{self.parent.config.name} is that already")
                return None
        key = self.study.config.run(self.config, winner).key
        self.study.note(self.config.name, best={"trial": number, "key": key, "method": to_dict(winner)})
        return winner

    def _schedule(self, method: Method) -> Any:
        return method.schedule(self.study.config.run(self.config, method).train.epochs, self.study.taps)

    def _say_unstopped(self) -> None:
        """Say why no trial of the arm is stopped early."""
        config, epochs = self.study.config, self._schedule(self.config.method)[-1].epochs
        last = max(config.rungs, default=0)
        self.log(
            f"early stopping is off for {self.config.name}: its task stage of {epochs:.3g} epochs has no rung "
            f"at or behind epoch {config.least_epochs:g} (the last one is at {last * epochs:.3g})"
        )

    def _skip(self, why: str) -> None:
        self.study.note(self.config.name, skipped=why)
        self.log(f"{self.config.name}: {why}")


class Queue:
    """All runs of some studies, in the order in which they shall begin.

    Args:
        studies: In their order.
        log: Receives a line where an arm has nothing to train.
    """

    def __init__(self, studies: Sequence[OpenStudy], log: Log = print) -> None:
        self.studies, self.log = list(studies), log
        self.broken: Exception | None = None  # what ended it before its end; no run begins any more
        self.arms: dict[tuple[str, str], Arm] = {}
        for study in studies:
            path = study.store.storage.path
            for config in study.config.arms:
                parent = None if config.parent is None else self.arms[path, config.parent]
                self.arms[path, config.name] = arm = Arm(study, config, parent, lambda line: self.log(line))
                arm.plan()  # so that what is finished counts as done, and starts nothing
        self.begun = 0
        """Runs that were handed out."""
        self._again: list[Run] = []

    def next(self) -> Run | None:
        """Return the next run: a trial of the first arm that has one, else a confirmation, else a final run; ``None`` without."""
        if self._again:
            return self._again.pop(0)
        for take in (Arm.next_trial, Arm.next_confirmation, Arm.next_final):
            for arm in self.arms.values():
                if (run := take(arm)) is not None:
                    self.begun += 1
                    return run
        return None

    def hand_back(self, run: Run) -> None:
        """Take back a run that was not done, to be handed out again before all others."""
        self._again.append(run)

    @property
    def total(self) -> int:
        """Runs of this queue in all, those included that were handed out; fewer as arms turn out to have nothing to train."""
        return self.begun + sum(arm.count for arm in self.arms.values())

    def arm_of(self, run: Run) -> Arm:
        """Return the arm that handed a run out."""
        return self.arms[run.study, run.arm]

    @property
    def over(self) -> bool:
        """Whether every arm is; a final run that was lost stays to be done when the study is run again."""
        return all(arm.over for arm in self.arms.values())

    @property
    def failures(self) -> int:
        """How many trials and final runs failed, in this run or earlier."""
        return sum(arm.failures for arm in self.arms.values())

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out: Tune pickles its searcher and callbacks, and nothing is restored from there."""
        return {}
