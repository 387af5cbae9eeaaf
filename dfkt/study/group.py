"""A run on a group of Ray Train's workers: data-parallel, over one machine or several, fewer or more as machines come and go.

Where the number of workers may change, a group starts with what the cluster has free. Its first worker then asks for the rest, by
placement groups of one worker each: asked for before, they would take the place of the group itself. When one of these is there,
the workers end at the next checkpoint and a larger group goes on; when a machine was lost, Tune starts the run again, with what
is left. A batch is shared out among the workers that are there, so the result stays what one worker gives, within rounding. (Ray
Train's own elastic groups reserve their workers elsewhere: those of a trial that was stopped early stay reserved for three
minutes, and the next one waits for them.)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray import tune
from ray.train.backend import Backend
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.placement_group import PlacementGroup

from dfkt.store.files import Storage
from dfkt.study.capacity import asked_for, withdraw
from dfkt.study.cluster import NETWORK_INTERFACE
from dfkt.study.driver import Run, Workers, warned
from dfkt.study.failures import CodeError, code_error, may_pass
from dfkt.study.host import interface_of
from dfkt.training.parallel import Group
from dfkt.training.run import Job, Payload, run_job

RESIZE_SECONDS = 60.0
"""A group trains at least so long before it makes room for a larger one: each change costs a start of the workers."""
SETTLED = 3.0
"""Seconds without further free workers after which a group starts with those that are there."""
FREE_SECONDS = 120.0
"""That workers may take to start which were seen to be free."""


def run_group(run: Run, workers: Workers, max_failures: int, patience: float) -> None:
    """Do a run on a group of data-parallel workers, under Ray Train; what they report reaches Tune.

    Args:
        run: The run.
        workers: What it spans.
        max_failures: Tries to get the workers together.
        patience: Seconds that a try takes at most.

    Raises:
        TimeoutError: If fewer workers than the fewest came in time.
    """
    if workers.most == workers.count:
        _set_up_train(patience)
        _train(run, workers, max_failures, missing=0)
        return
    _set_up_train(FREE_SECONDS)
    failures, over = 0, False
    while not over:
        withdraw(run.unique_name)  # a worker that was killed could not
        count = _count_free(workers, patience)
        try:
            over = _train(run, replace(workers, count=count), 0, missing=workers.most - count)
        except ray.train.ControllerError:  # a machine was lost before all workers had begun: there may be fewer now
            failures += 1
            if failures > max_failures:
                raise


def _count_free(workers: Workers, patience: float) -> int:
    """Return how many workers the cluster has free, once it has the fewest; no more than the most.

    They are reserved for a moment: what the cluster lists may lie on a machine that has just died.

    Raises:
        TimeoutError: If it has not the fewest in time.
    """
    with asked_for(workers, [workers.count, *[1] * (workers.most - workers.count)]) as (fewest, *rest):
        if not fewest.wait(timeout_seconds=patience):
            raise TimeoutError(f"{workers.count} workers were not free within {patience / 60:g} min")
        found, since = 0, time.monotonic()
        while found < len(rest) and time.monotonic() - since < SETTLED:
            if (there := sum(map(_is_there, rest))) > found:
                found, since = there, time.monotonic()
            time.sleep(0.1)
        return workers.count + found


def _is_there(group: PlacementGroup) -> bool:
    return bool(group.wait(timeout_seconds=0.01))


def _train(run: Run, workers: Workers, max_failures: int, *, missing: int) -> bool:
    """Train on a group; return whether the run is over, or makes room for a larger one."""
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"job": run.job, "workers": workers, "missing": missing, "name": run.unique_name},
        torch_config=_Torch(backend=None if workers.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count,
            use_gpu=bool(workers.gpus),
            resources_per_worker=workers.resources,
            placement_strategy=workers.strategy,
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
        return trainer.fit().return_value is not False
    except ray.train.TrainingFailedError as error:
        raised = code_error(error)
        if raised is None:
            raise  # Tune starts the group again
        tune.report(raised.payload)
        return True


def _set_up_train(seconds: float) -> None:
    """Tell Ray Train, which reads it from this process's environment, how long to wait, and whether to watch for warnings."""
    several = sum(node["Alive"] for node in ray.nodes()) > 1  # on a single machine nothing is taken away
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1" if several else "0"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{max(seconds, 60.0):g}"


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


def _work(settings: dict[str, Any]) -> bool:
    """Do a run as one of Ray Train's workers; return whether it is over, or shall go on with more workers."""
    job: Job = settings["job"]
    os.environ["OMP_NUM_THREADS"] = str(job.placement.threads)
    device = str(ray.train.torch.get_device()) if job.placement.device == "cuda" else job.placement.device
    context = ray.train.get_context()
    job = replace(job, placement=replace(job.placement, device=device))
    group = Group(context.get_world_rank(), context.get_world_size())
    missing: int = settings["missing"]
    try:
        with asked_for(settings["workers"], [1] * missing if group.rank == 0 else [], settings["name"]) as more:
            come = partial(_has_come, more, time.monotonic())
            yields = partial(_agree, group, torch.device(device), come) if missing else None
            return run_job(job, _report, group, warned=warned, yields=yields)
    except Exception as error:
        raise (error if may_pass(error) else CodeError.of(error)) from None


def _has_come(more: list[PlacementGroup], began: float) -> bool:
    """Whether another worker may be had, and the group has trained for long enough to make room."""
    return time.monotonic() - began >= RESIZE_SECONDS and any(map(_is_there, more))


def _agree(group: Group, device: torch.device, ask: Callable[[], bool]) -> bool:
    """Return what the first worker says, on all of them."""
    said = torch.tensor([float(group.rank == 0 and ask())], device=device)
    return bool(group.mean(said) > 0)


def _report(payload: Payload) -> None:
    ray.train.report(payload)
