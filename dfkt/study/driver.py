"""The driver: one trial, in the Tune process itself or under Ray Train; and the final runs, under Ray Train.

A trial that spans one worker runs where Tune put it: with reused actors that costs 0.02 s,
a group of Ray Train's workers 13-20 s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from dfkt.config import RunConfig
from dfkt.methods.space import resolve
from dfkt.store.files import Storage
from dfkt.training.run import Job, Payload, pick_device, run_job, set_threads

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

    @property
    def resources(self) -> dict[str, float]:
        """Resources of one worker, as Ray takes them."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


@dataclass(frozen=True)
class Driver:
    """Tune's trainable: runs the trial that sampled parameters stand for.

    Args:
        base: What every trial shares.
        storage: The study's folder, with the teacher's weights.
        workers: What one trial spans.
        max_failures: Restarts of a group of workers that died.
    """

    base: RunConfig
    storage: str
    workers: Workers
    max_failures: int

    def __call__(self, params: Mapping[str, Any]) -> None:
        """Run one trial; ``params`` are a sample of the space, with the trial's ``number``."""
        number = params["number"]
        folder = Storage(self.storage).sub("runs", f"trial-{number:05d}")
        self.run(Job(config=resolve(params, self.base), storage=folder.path, teacher=self.storage, number=number))

    def run(self, job: Job) -> None:
        """Run a job inside a Tune trial: in its process, or on a group of workers."""
        if self.workers.count == 1:
            set_threads(self.workers.cpus)
            run_job(job, tune.report, device=pick_device())
        else:
            name = f"{'final' if job.test else 'trial'}-{job.number:05d}"
            run_jobs([job], self.workers, self.storage, name, self.max_failures, [TuneReportCallback()])


def trainable(run: Callable[[dict[str, Any]], None], workers: Workers) -> Callable[..., Any]:
    """Return a function of a trial's parameters as Tune takes it, with the resources that it takes itself."""

    def train(config: dict[str, Any]) -> None:
        run(config)

    return tune.with_resources(train, workers.resources if workers.count == 1 else {"node:__internal_head__": 0.001})


def run_jobs(
    jobs: Sequence[Job], workers: Workers, storage: str, name: str, max_failures: int, callbacks: Sequence[Any] = ()
) -> None:
    """Run jobs one after another on one group of data-parallel workers, under Ray Train.

    Every job's last report is kept in its folder as ``result.json``, so a job that is done is not done again.

    Raises:
        ray.train.TrainingFailedError: If the group failed more often than allowed.
    """
    trainer = ray.train.torch.TorchTrainer(
        _run_worker,
        train_loop_config={"jobs": list(jobs), "threads": workers.cpus},
        torch_config=ray.train.torch.TorchConfig(backend=None if workers.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count, use_gpu=bool(workers.gpus), resources_per_worker=workers.resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=Storage(storage).sub("ray").path,
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(max_failures=max_failures, controller_failure_limit=max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    trainer.fit()


def _run_worker(settings: dict[str, Any]) -> None:
    """Run every job as one of Ray Train's workers."""
    os.environ["OMP_NUM_THREADS"] = str(settings["threads"])
    set_threads(settings["threads"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    for job in settings["jobs"]:
        run_job(job, _report, device=device, rank=context.get_world_rank(), world=context.get_world_size())


def _report(payload: Payload) -> None:
    ray.train.report(payload)
