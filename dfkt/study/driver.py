"""The driver: one run, in the Tune process itself or on a group of Ray Train's workers (``group.py``).

A run that spans one worker runs where Tune put it: with reused actors that costs 0.02 s, a group of Ray Train's workers
13-20 s. Trials and final runs take the same workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray import tune

from dfkt.config import Placement, check_rule, is_finite
from dfkt.study.failures import CodeError, may_pass
from dfkt.training.run import Job, run_job

Kind = Literal["trial", "confirmation", "final"]
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
"""Set before Ray Train is used: fewer seconds until the first step, no doubled lines."""


@dataclass(frozen=True)
class Workers:
    """What one run spans.

    Args:
        count: Data-parallel workers; the fewest, where it may be more.
        cpus: CPUs (threads) of each.
        gpus: GPUs of each; a fraction lets several runs share one, ``None`` leaves it to the cluster.
        up_to: The most workers, where their number follows what the cluster has: a run goes on with fewer when a machine is
            lost, and with more when one comes. ``None``: always ``count``.
        spread: Put a run's workers on as many machines as possible, not on as few.
    """

    count: int = 1
    cpus: int = 1
    gpus: float | None = None
    up_to: int | None = None
    spread: bool = False

    def __post_init__(self) -> None:
        check_rule(self.count >= 1, "workers per run >= 1", count=self.count)
        check_rule(self.most >= self.count, "most workers per run >= fewest", count=self.count, up_to=self.up_to)
        check_rule(self.cpus >= 1, "cpus per worker >= 1", cpus=self.cpus)
        check_rule(
            self.gpus is None or (is_finite(self.gpus) and self.gpus >= 0), "gpus per worker >= 0", gpus=self.gpus
        )

    @property
    def most(self) -> int:
        """The most workers that a run may span."""
        return self.count if self.up_to is None else self.up_to

    @property
    def alone(self) -> bool:
        """Whether a run is one process, which is then Tune's own."""
        return self.most == 1

    @property
    def strategy(self) -> str:
        """How Ray places a run's workers."""
        return "SPREAD" if self.spread else "PACK"

    @property
    def resources(self) -> dict[str, float]:
        """Resources of one worker, as Ray takes them."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def place(self, placement: Placement) -> Placement:
        """Return a placement with what a worker is given: its device and threads."""
        return replace(placement, device="cuda" if self.gpus else "cpu", threads=self.cpus)


@dataclass(frozen=True)
class Run:
    """One training of one configuration with one seed, as it travels to whoever trains it.

    Attributes:
        study: Its study's folder.
        arm: Its arm.
        number: Its number in the arm's trials, or in its final runs.
        kind: A trial of the search; its confirmation, by another seed; or a final run, one of the winner's over seeds.
        params: What the search drew.
        job: What to run.
    """

    study: str
    arm: str
    number: int
    kind: Kind
    params: dict[str, Any]
    job: Job

    @property
    def final(self) -> bool:
        """Whether it is a final run: it opens ``test``, and its student is kept."""
        return self.kind == "final"

    @property
    def id(self) -> tuple[str, str, Kind, int]:
        """What tells it from all others in a queue."""
        return self.study, self.arm, self.kind, self.number

    @property
    def folder_name(self) -> str:
        """A name that is the same whenever the run is taken up again."""
        return f"{self.arm}-{self.kind}-{self.number:05d}"

    @property
    def unique_name(self) -> str:
        """A name that no other run of the queue has."""
        return f"{self.study}/{self.folder_name}"


@dataclass(frozen=True)
class Driver:
    """Tune's trainable: does the run that the searcher handed out.

    Args:
        workers: What one run spans.
        max_failures: Tries of Ray Train to get a group of workers together.
        patience: Seconds that a try takes at most: machines may have to come first.
    """

    workers: Workers
    max_failures: int
    patience: float = 900.0

    def __call__(self, run: Run) -> None:
        """Do a run inside a Tune trial: in its process, or on a group of workers."""
        if self.workers.alone:
            _run_alone(run)
            return
        from dfkt.study.group import run_group  # which imports this file

        run_group(run, self.workers, self.max_failures, self.patience)


def trainable(driver: Callable[[Run], None], workers: Workers) -> Callable[..., Any]:
    """Return a function of a trial's configuration as Tune takes it, with the resources that it takes itself."""

    def train(config: dict[str, Any]) -> None:
        driver(config["run"])

    return tune.with_resources(train, workers.resources if workers.alone else {"node:__internal_head__": 0.001})


def warned() -> bool:
    """Whether a machine of the cluster is about to be taken away, as spot instances are; Ray is asked."""
    try:
        return bool(ray._private.state.state.get_draining_nodes())
    except Exception:  # the interface is Ray's private one, and not knowing is no reason to end a run
        return False


def _run_alone(run: Run) -> None:
    """Do a run in this process; what its code raises ends it, what may pass reaches Tune, which starts it again."""
    try:
        run_job(run.job, tune.report, warned=warned)
    except Exception as error:
        if may_pass(error):
            raise
        tune.report(CodeError.of(error).payload)
