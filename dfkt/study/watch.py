"""What is watched while Tune works: that runs begin as machines come, that none hangs, that the cluster can go on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune.search import ConcurrencyLimiter, Searcher

from dfkt.errors import RunError
from dfkt.study.capacity import Capacity, autoscaler_says, withdraw
from dfkt.study.driver import Run
from dfkt.study.queue import Queue
from dfkt.study.recorder import ending

GONE_FOR = 10.0
"""Seconds that a cluster holds no run before that is said."""


class Growing(ConcurrencyLimiter):
    """A searcher whose runs at once follow the cluster; Ray's own limit is a number that stays.

    Args:
        searcher: Hands out the runs.
        capacity: Says how many there shall be.
    """

    def __init__(self, searcher: Searcher, capacity: Capacity) -> None:
        self.capacity = capacity
        super().__init__(searcher, max_concurrent=1)

    @property
    def max_concurrent(self) -> int:
        """Runs that shall be there at once."""
        return self.capacity.wanted

    @max_concurrent.setter
    def max_concurrent(self, value: int) -> None:
        """Ray sets its own; the cluster decides."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out: Tune pickles its searcher."""
        return {}


class Watch(tune.Callback):
    """Ends the processes of runs that hang, and a study whose cluster holds no run for too long.

    Args:
        queue: Whose runs they are; its log receives a line for either.
        capacity: Of the cluster.
        clock: Returns seconds.
        end: Ends a run's process.
    """

    def __init__(
        self,
        queue: Queue,
        capacity: Capacity,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[Any], None] = ray.kill,
    ) -> None:
        self.queue, self.capacity, self.clock, self.end = queue, capacity, clock, end
        self.heard: dict[str, tuple[Any, float]] = {}
        self.gone_since: float | None = None
        self.said = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out: Tune pickles its callbacks."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, result: Any = None, **info: Any) -> None:
        """Note that a run's process began, or reported."""
        self.heard[trial.trial_id] = (trial, self.clock())

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a run's process ended, in whatever way; what it asked the cluster for is taken back."""
        self.heard.pop(trial.trial_id, None)
        if self.capacity.workers.most > self.capacity.workers.count:
            with contextlib.suppress(Exception):  # the cluster may have gone
                withdraw(trial.config["run"].unique_name)

    on_trial_result = on_trial_start
    on_trial_error = on_trial_recover = on_trial_complete

    @ending
    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look; Tune calls this several times a second."""
        self._end_hanging()
        self._await_machines()

    def _end_hanging(self) -> None:
        limit = self.capacity.demand.silence * 60
        for name, (trial, since) in list(self.heard.items()):
            if limit and self.clock() - since > limit and trial.temporary_state.ray_actor is not None:
                run: Run = trial.config["run"]
                self.queue.log(f"{run.folder_name}: no report for {limit / 60:g} min (--silence); its process is ended")
                del self.heard[name]
                self.end(trial.temporary_state.ray_actor)  # Tune takes it for one that died

    def _await_machines(self) -> None:
        """Say that the cluster holds no run any more, and end the study if that stays so."""
        now, wait = self.clock(), self.capacity.demand.wait * 60
        if self.capacity.holds:
            if self.said:
                self.queue.log("the cluster holds runs again")
            self.gone_since, self.said = None, False
            return
        self.gone_since = now if self.gone_since is None else self.gone_since
        if not self.said and now - self.gone_since >= GONE_FOR:
            self.queue.log(f"no machines are left that hold a run: waiting up to {wait / 60:g} min for others (--wait)")
            self.said = True
        if self.said and now - self.gone_since >= max(wait, GONE_FOR):
            says = autoscaler_says()
            raise RunError(
                f"the cluster has held no run for {wait / 60:g} min{f' (the autoscaler says: {says})' if says else ''}; "
                "what was finished is kept, and the same command goes on"
            )
