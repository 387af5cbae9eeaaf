"""A run on a group of Ray Train's workers: data-parallel, over one machine or several, fewer or more as machines come and go.

Where the number of workers may change, Ray Train starts a group with what the cluster has, and starts it again from the last
checkpoint when a machine was lost or has come. A batch is shared out among those that are there, so the result stays what one
worker gives, within rounding.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray import tune
from ray.train.backend import Backend
from ray.tune.integration.ray_train import TuneReportCallback

from dfkt.store.files import Storage
from dfkt.study.cluster import NETWORK_INTERFACE
from dfkt.study.driver import Run, Workers, warned
from dfkt.study.failures import CodeError, code_error, may_pass
from dfkt.study.host import interface_of
from dfkt.training.parallel import Group
from dfkt.training.run import Job, Payload, run_job

RESIZE_SECONDS = 60.0
"""Between looks at whether a group may have more workers: each change costs the epoch that is under way and a start."""


def run_group(run: Run, workers: Workers, max_failures: int, patience: float) -> None:
    """Do a run on a group of data-parallel workers, under Ray Train; what they report reaches Tune.

    Args:
        run: The run.
        workers: What it spans.
        max_failures: Tries to get the workers together.
        patience: Seconds that a try takes at most.
    """
    _set_up_train(patience)
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"job": run.job},
        torch_config=_Torch(backend=None if workers.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count if workers.most == workers.count else (workers.count, workers.most),
            use_gpu=bool(workers.gpus),
            resources_per_worker=workers.resources,
            placement_strategy=workers.strategy,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name=run.folder_name,
            storage_path=Storage(run.study).sub("ray").path,
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(  # machines that are taken away with a warning do not count
                max_failures=0, controller_failure_limit=max_failures, max_preemption_failures=-1
            ),
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


def _set_up_train(patience: float) -> None:
    """Tell Ray Train, which reads it from this process's environment, how long to wait, and whether to watch for warnings."""
    several = sum(node["Alive"] for node in ray.nodes()) > 1  # on a single machine nothing is taken away
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1" if several else "0"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{max(patience, 60.0):g}"


@dataclass
class _Torch(ray.train.torch.TorchConfig):
    """Ray's set-up of torch's process group, after each worker has named its network interface."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that sets the process group up."""

        class Named(super().backend_cls):  # type: ignore[misc]
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                worker_group.execute(_name_interface)
                super().on_start(worker_group, backend_config)

        return Named


def _name_interface() -> None:
    """Let gloo and NCCL use the interface of the address by which Ray knows this machine: its name may resolve to another."""
    interface = interface_of(ray.util.get_node_ip_address())
    for name in NETWORK_INTERFACE if interface else ():
        os.environ.setdefault(name, interface)


def _work(settings: dict[str, Any]) -> None:
    """Do a run as one of Ray Train's workers."""
    job: Job = settings["job"]
    os.environ["OMP_NUM_THREADS"] = str(job.placement.threads)
    device = str(ray.train.torch.get_device()) if job.placement.device == "cuda" else job.placement.device
    context = ray.train.get_context()
    job = replace(job, placement=replace(job.placement, device=device))
    try:
        run_job(job, _report, Group(context.get_world_rank(), context.get_world_size()), warned=warned)
    except Exception as error:
        raise (error if may_pass(error) else CodeError.of(error)) from None


def _report(payload: Payload) -> None:
    ray.train.report(payload)
