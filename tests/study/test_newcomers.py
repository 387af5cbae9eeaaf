"""Machines that join while a study runs are looked at once, beside its work."""

import pickle
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from dfkt.study.findings import Finding
from dfkt.study.newcomers import EVERY, Newcomers


class Cluster:
    """Machines that come and go, a clock that is turned, and what is found on a machine."""

    def __init__(self) -> None:
        self.time, self.nodes = 0.0, [{"NodeID": "first"}]
        self.asked: list[list[str]] = []
        self.said: list[str] = []
        self.answered = threading.Event()
        self.answered.set()
        self.newcomers = Newcomers(self.look, self.said.append, lambda: list(self.nodes), lambda: self.time)

    def look(self, nodes: Sequence[Any]) -> list[Finding]:
        """Find one thing on each machine, when it may."""
        self.asked.append([node["NodeID"] for node in nodes])
        assert self.answered.wait(10)
        return [Finding(True, "has torch 1.0", node["NodeID"], "Install the same") for node in nodes]

    def step(self, seconds: float = EVERY) -> None:
        """Let time pass, then let Tune call; wait for whoever asks, if they are to be answered."""
        self.time += seconds
        self.newcomers.on_step_end(0, [])
        for thread in threading.enumerate():
            if self.answered.is_set() and thread.daemon and getattr(thread, "_target", None) == self.newcomers._ask:
                thread.join(10)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_machines_that_were_there_are_not_asked_again(cluster: Cluster) -> None:
    for _ in range(3):
        cluster.step()
    assert cluster.asked == []


def test_a_machine_that_joins_is_asked_once_and_what_is_wrong_is_told(cluster: Cluster) -> None:
    cluster.nodes.append({"NodeID": "second"})
    cluster.step(EVERY - 1)
    assert cluster.asked == []
    cluster.step(1)
    cluster.step(0)
    assert cluster.said == ["a machine that joined: fails: second: has torch 1.0. Install the same."]
    for _ in range(3):
        cluster.step()
    assert cluster.asked == [["second"]]
    assert len(cluster.said) == 1


def test_nothing_waits_for_an_answer(cluster: Cluster) -> None:
    cluster.answered.clear()
    cluster.nodes.append({"NodeID": "slow"})
    cluster.step()
    cluster.nodes.append({"NodeID": "second"})
    cluster.step()
    assert cluster.said == []
    cluster.answered.set()
    cluster.step()
    cluster.step()
    assert sorted(cluster.asked) == [["second"], ["slow"]]
    assert len(cluster.said) == 2


def test_a_cluster_that_has_gone_ends_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> Any:
        raise ConnectionError("no cluster")

    monkeypatch.setattr(cluster.newcomers, "look", gone)
    cluster.nodes.append({"NodeID": "second"})
    cluster.step()
    monkeypatch.setattr(cluster.newcomers, "there", gone)
    cluster.step()
    assert cluster.said == []


def test_tune_may_pickle_it(cluster: Cluster) -> None:
    assert pickle.dumps(cluster.newcomers)
