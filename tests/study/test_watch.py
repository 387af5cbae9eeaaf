"""What is watched while Tune works: machines that come and go, and runs that hang."""

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from study.played import Played, toy

from dfkt.errors import RunError
from dfkt.study import watch as watch_module
from dfkt.study.capacity import Capacity, Demand
from dfkt.study.driver import Run, Workers
from dfkt.study.queue import Queue
from dfkt.study.recorder import QueueSearcher
from dfkt.study.watch import GONE_FOR, Growing, Watch


class Stage:
    """A watch over a queue on a cluster of made-up machines and a made-up clock."""

    def __init__(self, folder: Path, demand: Demand) -> None:
        self.time, self.machines, self.ended = 0.0, [{"CPU": 1.0}], list[Any]()
        self.said: list[str] = []
        played = Played(folder, toy())
        self.queue = Queue(played.queue.studies, log=self.said.append)
        self.capacity = Capacity(Workers(gpus=0), demand, lambda: self.machines, lambda: self.time)
        self.watch = Watch(self.queue, self.capacity, lambda: self.time, self.ended.append)

    def step(self, seconds: float) -> None:
        """Let time pass, then let Tune call."""
        self.time += seconds
        self.watch.on_step_end(0, [])


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., Stage]:
    return lambda **demand: Stage(tmp_path, Demand(**demand))


class Handing(QueueSearcher):
    """Hands out without end."""

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return something."""
        return {"run": trial_id}


def test_runs_at_once_follow_the_cluster_as_it_grows_and_shrinks(stage: Callable[..., Stage]) -> None:
    at = stage()
    searcher, begun = Growing(Handing(at.queue), at.capacity), list[str]()

    def hand_out() -> int:
        while searcher.suggest(name := f"run {len(begun)}") is not None:
            begun.append(name)
        return len(begun)

    assert hand_out() == 1
    at.machines.append({"CPU": 2.0})
    assert hand_out() == 1  # what the cluster has is not read at every question
    at.time += 3
    assert hand_out() == 3
    at.machines.pop()
    at.time += 3
    for name in begun:
        searcher.on_trial_complete(name)
    assert hand_out() == 4
    pickle.dumps(searcher)  # Tune does


def test_runs_that_were_asked_for_wait_for_machines(stage: Callable[..., Stage]) -> None:
    at = stage(at_once=5)
    searcher = Growing(Handing(at.queue), at.capacity)
    assert sum(searcher.suggest(f"run {k}") is not None for k in range(9)) == 5
    at.machines.clear()
    at.time += 3
    assert at.capacity.wanted == 5


def running(run: Run, name: str, actor: Any = "process") -> Any:
    return SimpleNamespace(trial_id=name, config={"run": run}, temporary_state=SimpleNamespace(ray_actor=actor))


def test_a_run_without_a_report_for_too_long_is_ended_once(stage: Callable[..., Stage], runs: list[Run]) -> None:
    at = stage(silence=1)
    quiet, busy, over = (running(runs[k], f"{k}", f"process {k}") for k in range(3))
    for trial in (quiet, busy, over):
        at.watch.on_trial_start(0, [], trial)
    at.step(40)
    at.watch.on_trial_result(0, [], busy, {})
    at.watch.on_trial_complete(0, [], over)
    at.step(30)
    assert at.ended == ["process 0"]
    assert at.said == ["dfkt-trial-00000: no report for 1 min (--silence); its process is ended"]
    at.step(20)
    assert at.ended == ["process 0"]  # it has not begun again
    at.watch.on_trial_start(0, [], quiet)
    at.watch.on_trial_recover(0, [], busy)
    at.step(61)
    assert at.ended == ["process 0"] * 2


def test_silence_can_be_allowed(stage: Callable[..., Stage], runs: list[Run]) -> None:
    at = stage(silence=0)
    at.watch.on_trial_start(0, [], running(runs[0], "a"))
    at.step(1e6)
    assert at.ended == []


def test_lost_machines_are_waited_for_and_the_study_ends_with_a_reason(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "autoscaler_says", lambda: "gpu: no capacity")
    at = stage(wait=2)
    at.machines.clear()
    at.step(3)
    assert at.said == []  # a machine may be back at once
    at.step(GONE_FOR)
    assert at.said == ["no machines are left that hold a run: waiting up to 2 min for others (--wait)"]
    at.machines.append({"CPU": 1.0})
    at.step(3)
    assert at.said[1:] == ["the cluster holds runs again"]
    at.machines.clear()
    for _ in range(13):
        at.step(GONE_FOR)
    assert isinstance(at.queue.broken, RunError)
    assert str(at.queue.broken).startswith(
        "the cluster has held no run for 2 min (the autoscaler says: gpu: no capacity); what was finished is kept"
    )
    pickle.dumps(at.watch)
