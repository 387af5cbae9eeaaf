"""A run on a group of Ray Train's workers; Ray's parts are replaced here."""

import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train.torch

from dfkt.study import capacity as capacity_module
from dfkt.study import group as group_module
from dfkt.study.driver import Driver, Run, Workers, warned
from dfkt.study.failures import may_pass
from dfkt.study.host import interface_of

Given = dict[str, Any]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    """What Ray Train is given, which then trains nothing."""
    found: list[Given] = []

    def trainer(loop: Any, **given: Any) -> Any:
        found.append(given)
        return SimpleNamespace(fit=lambda: SimpleNamespace(return_value=True))

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


class Asked:
    """A placement group that was asked for."""

    def __init__(self, bundles: list[Any], strategy: str = "PACK", name: str = "") -> None:
        self.bundles, self.strategy, self.name, self.there, self.removed = bundles, strategy, name, True, False

    def wait(self, timeout_seconds: float) -> bool:
        """Whether it is there."""
        return self.there


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A cluster with some free machines, and what it is asked for."""
    found = SimpleNamespace(groups=[], free=3)

    def ask(bundles: list[Any], strategy: str = "PACK", name: str = "") -> Asked:
        group = Asked(bundles, strategy, name)
        group.there = sum(len(g.bundles) for g in (*found.groups, group) if not g.removed) <= found.free
        found.groups.append(group)
        return group

    monkeypatch.setattr(capacity_module, "placement_group", ask)
    monkeypatch.setattr(capacity_module, "remove_placement_group", lambda group: setattr(group, "removed", True))
    monkeypatch.setattr(group_module, "SETTLED", 0.3)
    monkeypatch.setattr(group_module, "withdraw", lambda name: None)
    return found


def test_a_group_of_a_fixed_size_asks_for_that_and_nothing_else(
    runs: list[Run], made: list[Given], asked: SimpleNamespace
) -> None:
    for workers in (Workers(3, 1, 0), Workers(2, 1, 0, up_to=2, spread=True)):
        Driver(workers, 1)(runs[0])
    scales = [given["scaling_config"] for given in made]
    assert [(scale.num_workers, scale.placement_strategy) for scale in scales] == [(3, "PACK"), (2, "SPREAD")]
    assert asked.groups == []


def test_a_group_that_may_change_starts_with_what_is_free_and_asks_for_the_rest(
    runs: list[Run], made: list[Given], asked: SimpleNamespace
) -> None:
    Driver(Workers(2, 1, 0, up_to=8), 1)(runs[0])
    assert made[0]["scaling_config"].num_workers == 3
    assert [len(group.bundles) for group in asked.groups] == [2, *[1] * 6]
    assert all(group.removed for group in asked.groups)  # what was asked for before the workers would take their place
    assert made[0]["train_loop_config"]["missing"] == 5
    assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "120"

    asked.groups.clear()
    asked.free += 9
    Driver(Workers(2, 1, 0, up_to=8), 1)(runs[0])
    assert made[1]["scaling_config"].num_workers == 8
    assert made[1]["train_loop_config"]["missing"] == 0


def test_a_group_that_made_room_goes_on_with_more(
    runs: list[Run], made: list[Given], asked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter([False, False, True])

    def fit() -> Any:
        asked.free += 1
        return SimpleNamespace(return_value=next(ends))

    monkeypatch.setattr(
        ray.train.torch, "TorchTrainer", lambda loop, **given: made.append(given) or SimpleNamespace(fit=fit)
    )
    Driver(Workers(2, 1, 0, up_to=8), 1)(runs[0])
    assert [given["scaling_config"].num_workers for given in made] == [3, 4, 5]
    assert all(group.removed for group in asked.groups)


def test_a_group_that_loses_a_machine_before_it_has_begun_is_made_anew_of_what_is_left(
    runs: list[Run], made: list[Given], asked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit() -> Any:
        if asked.free == left:
            return SimpleNamespace(return_value=True)
        asked.free = left or asked.free
        raise ray.train.ControllerError(RuntimeError("timed out"))

    monkeypatch.setattr(
        ray.train.torch, "TorchTrainer", lambda loop, **given: made.append(given) or SimpleNamespace(fit=fit)
    )
    left: int | None = 2
    Driver(Workers(1, 1, 0, up_to=8), 1)(runs[0])
    assert [given["scaling_config"].num_workers for given in made] == [3, 2]
    left = None  # never
    with pytest.raises(ray.train.ControllerError):
        Driver(Workers(1, 1, 0, up_to=8), 1)(runs[0])
    assert len(made) == 4  # one more try


def test_too_few_workers_are_waited_for_and_not_for_ever(
    runs: list[Run], made: list[Given], asked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Asked, "wait", lambda self, timeout_seconds: False)
    with pytest.raises(TimeoutError, match=r"4 workers were not free within 0\.5 min") as told:
        Driver(Workers(4, 1, 0, up_to=8), 1, patience=30)(runs[0])
    assert may_pass(told.value)  # Tune tries again
    assert asked.groups[0].removed
    assert made == []


def test_a_group_makes_room_when_another_worker_may_be_had_and_it_has_trained_for_a_while() -> None:
    few: list[Any] = [Asked([]), Asked([])]
    for group in few:
        group.there = False
    long_ago = time.monotonic() - group_module.RESIZE_SECONDS
    assert not group_module._has_come(few, long_ago)
    few[1].there = True
    assert group_module._has_come(few, long_ago)
    assert not group_module._has_come(few, time.monotonic())


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
    monkeypatch.setattr(group_module, "run_job", lambda job, report, group, **more: seen.append((job, group)) or more)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = runs[0].job
    for device in ("cpu", "cuda"):
        placed = replace(job, placement=replace(job.placement, device=device))
        given = {"job": placed, "workers": Workers(2, 1, 0), "missing": 0, "name": "a run"}
        assert group_module._work(given) == {"warned": warned, "yields": None}
    assert [done.placement.device for done, _ in seen] == ["cpu", "cuda:1"]
    assert [(group.rank, group.world) for _, group in seen] == [(1, 2)] * 2


def test_the_first_worker_asks_for_those_that_are_missing_while_it_trains_and_all_heed_its_answer(
    runs: list[Run], asked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[int] = []

    def train(job: Any, report: Any, group: Any, *, yields: Any, **more: Any) -> bool:
        there.append(sum(not one.removed for one in asked.groups))
        return yields is not None

    monkeypatch.setattr(group_module, "run_job", train)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: "cpu")
    for rank in range(2):
        context = SimpleNamespace(get_world_rank=lambda rank=rank: rank, get_world_size=lambda: 2)
        monkeypatch.setattr(ray.train, "get_context", lambda context=context: context)
        given = {"job": runs[0].job, "workers": Workers(2, 1, 0, up_to=5), "missing": 3, "name": "a run"}
        assert group_module._work(given)
    assert there == [3, 0]
    assert [group.name for group in asked.groups] == ["a run +0", "a run +1", "a run +2"]
    assert all(group.removed for group in asked.groups)


def test_what_a_killed_worker_asked_for_is_withdrawn_before_its_run_starts_again(
    runs: list[Run], made: list[Given], asked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []
    monkeypatch.setattr(group_module, "withdraw", gone.append)
    Driver(Workers(2, 1, 0, up_to=8), 1)(runs[0])
    assert gone == [runs[0].unique_name] == [made[0]["train_loop_config"]["name"]]


def test_only_what_was_asked_for_under_a_name_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        f"{number:036x}": {"name": name, "state": state}
        for number, (name, state) in enumerate(
            [("s/a-trial-00001 +0", "PENDING"), ("s/a-trial-00001 +1", "REMOVED"), ("s/a-trial-000012 +0", "PENDING"),
             ("s/a-trial-00001 +2", "CREATED"), ("", "CREATED")]
        )
    }  # fmt: skip
    gone: list[str] = []
    monkeypatch.setattr(capacity_module, "placement_group_table", lambda: rows)
    monkeypatch.setattr(capacity_module, "remove_placement_group", lambda group: gone.append(group.id.hex()))
    capacity_module.withdraw("s/a-trial-00001")
    assert gone == [f"{number:036x}" for number in (0, 3)]
