"""The driver: one run, in the Tune process itself or on a group of Ray Train's workers.

A run that spans one worker runs where Tune put it: with reused actors that costs 0.02 s, a group of Ray Train's workers
13-20 s. Trials and final runs take the same workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray.train
import ray.train.torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from dfkt.config import Placement, check_rule, is_finite
from dfkt.store.files import Storage
from dfkt.study.failures import CodeError, code_error, may_pass
from dfkt.training.parallel import Group
from dfkt.training.run import Job, Payload, run_job

Kind = Literal["trial", "confirmation", "final"]
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
"""Set before Ray Train is used: fewer seconds until the first step, no doubled lines."""


@dataclass(frozen=True)
class Workers:
    """What one run spans.

    Args:
        count: Data-parallel workers.
        cpus: CPUs (threads) of each.
        gpus: GPUs of each; a fraction lets several runs share one, ``None`` leaves it to the cluster.
    """

    count: int = 1
    cpus: int = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        check_rule(self.count >= 1, "workers per run >= 1", count=self.count)
        check_rule(self.cpus >= 1, "cpus per worker >= 1", cpus=self.cpus)
        check_rule(
            self.gpus is None or (is_finite(self.gpus) and self.gpus >= 0), "gpus per worker >= 0", gpus=self.gpus
        )

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


@dataclass(frozen=True)
class Driver:
    """Tune's trainable: does the run that the searcher handed out.

    Args:
        workers: What one run spans.
        max_failures: Tries of Ray Train to get a group of workers together.
    """

    workers: Workers
    max_failures: int

    def __call__(self, run: Run) -> None:
        """Do a run inside a Tune trial: in its process, or on a group of workers."""
        if self.workers.count == 1:
            _run_alone(run)
        else:
            _run_group(run, self.workers, self.max_failures)


def trainable(driver: Callable[[Run], None], workers: Workers) -> Callable[..., Any]:
    """Return a function of a trial's configuration as Tune takes it, with the resources that it takes itself."""

    def train(config: dict[str, Any]) -> None:
        driver(config["run"])

    return tune.with_resources(train, workers.resources if workers.count == 1 else {"node:__internal_head__": 0.001})


def _run_alone(run: Run) -> None:
    """Do a run in this process; what its code raises ends it, what may pass reaches Tune, which starts it again."""
    try:
        run_job(run.job, tune.report)
    except Exception as error:
        if may_pass(error):
            raise
        tune.report(CodeError.of(error).payload)


def _run_group(run: Run, workers: Workers, max_failures: int) -> None:
    """Do a run on a group of data-parallel workers, under Ray Train; what they report reaches Tune."""
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"job": run.job},
        torch_config=ray.train.torch.TorchConfig(backend=None if workers.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count, use_gpu=bool(workers.gpus), resources_per_worker=workers.resources
        ),
        run_config=ray.train.RunConfig(
            name=run.folder_name,
            storage_path=Storage(run.study).sub("ray").path,
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raised = code_error(error)
        if raised is None:
            raise  # Tune starts the group again
        tune.report(raised.payload)


def _work(settings: dict[str, Any]) -> None:
    """Do a run as one of Ray Train's workers."""
    job: Job = settings["job"]
    os.environ["OMP_NUM_THREADS"] = str(job.placement.threads)
    device = str(ray.train.torch.get_device()) if job.placement.device == "cuda" else job.placement.device
    context = ray.train.get_context()
    job = replace(job, placement=replace(job.placement, device=device))
    try:
        run_job(job, _report, Group(context.get_world_rank(), context.get_world_size()))
    except Exception as error:
        raise (error if may_pass(error) else CodeError.of(error)) from None


def _report(payload: Payload) -> None:
    ray.train.report(payload)
