"""A run on a group of Ray Train's workers; Ray's parts are replaced here."""

import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train.torch

from dfkt.study import group as group_module
from dfkt.study.driver import Driver, Run, Workers
from dfkt.study.host import interface_of

Given = dict[str, Any]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    """What Ray Train is given, which then trains nothing."""
    found: list[Given] = []

    def trainer(loop: Any, **given: Any) -> Any:
        found.append(given)
        return SimpleNamespace(fit=lambda: None)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", trainer)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": False}])
    monkeypatch.setattr(
        group_module, "TuneReportCallback", ray.train.UserCallback
    )  # Tune's own wants to be inside Tune
    for name in ("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"):
        monkeypatch.setenv(name, "")  # and taken back at the end
    return found


def test_trials_and_final_runs_take_the_same_workers_and_the_same_batch(runs: list[Run], made: list[Given]) -> None:
    trial, final = runs[0], next(run for run in runs if run.final and run.arm == runs[0].arm)
    drive = Driver(Workers(2, 3, 0), 1)
    drive(trial)
    drive(final)
    scales = [given["scaling_config"] for given in made]
    assert scales[0] == scales[1]
    assert (scales[0].num_workers, scales[0].resources_per_worker, scales[0].use_gpu) == (2, {"CPU": 3}, False)
    jobs = [given["train_loop_config"]["job"] for given in made]
    assert jobs[0].config.train == replace(jobs[1].config.train, seed=jobs[0].config.train.seed)
    assert jobs[0].placement == jobs[1].placement
    assert [job.test for job in jobs] == [False, True]
    assert len({given["run_config"].name for given in made}) == 2
    assert all(Path(given["run_config"].storage_path) == Path(trial.study) / "ray" for given in made)


def test_a_group_of_a_fixed_size_has_that_size_and_one_that_may_change_has_both(
    runs: list[Run], made: list[Given]
) -> None:
    for workers in (Workers(3, 1, 0), Workers(2, 1, 0, up_to=8, spread=True), Workers(2, 1, 0, up_to=2)):
        Driver(workers, 1)(runs[0])
    scales = [given["scaling_config"] for given in made]
    assert [scale.num_workers for scale in scales] == [3, (2, 8), 2]
    assert [scale.placement_strategy for scale in scales] == ["PACK", "SPREAD", "PACK"]


def test_machines_are_waited_for_and_a_warning_is_watched_for_where_there_are_several(
    runs: list[Run], made: list[Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    Driver(Workers(2, 1, 0), 1, patience=1200.0)(runs[0])
    names = ("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S")
    assert [os.environ[name] for name in names] == ["0", "1200"]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": True}])
    Driver(Workers(2, 1, 0), 1, patience=0.0)(runs[0])
    assert [os.environ[name] for name in names] == ["1", "60"]
    failures = [given["run_config"].failure_config for given in made]
    assert {(one.max_failures, one.controller_failure_limit, one.max_preemption_failures) for one in failures} == {
        (0, 1, -1)
    }


def test_workers_name_the_interface_of_their_own_address_before_they_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    config, order = group_module._Torch(backend="gloo"), list[Any]()
    backend = config.backend_cls
    before = backend.__mro__[1]
    monkeypatch.setattr(before, "on_start", lambda self, *given: order.append("connected"))
    backend().on_start(SimpleNamespace(execute=order.append), config)
    assert order == [group_module._name_interface, "connected"]

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "theirs")  # what a user says counts
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    group_module._name_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "theirs"
    assert os.environ["NCCL_SOCKET_IFNAME"] == interface_of("127.0.0.1") == "lo"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    assert "lo" in [name for _, name in socket.if_nameindex()]


def test_a_worker_of_a_group_does_its_share_on_the_device_it_is_given(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: "cuda:1")
    monkeypatch.setattr(group_module, "run_job", lambda job, report, group, warned: seen.append((job, group)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = runs[0].job
    for device in ("cpu", "cuda"):
        group_module._work({"job": replace(job, placement=replace(job.placement, device=device))})
    assert [done.placement.device for done, _ in seen] == ["cpu", "cuda:1"]
    assert [(group.rank, group.world) for _, group in seen] == [(1, 2)] * 2
