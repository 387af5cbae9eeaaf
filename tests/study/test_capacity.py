"""How many runs a cluster holds, and how its machines are waited for."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml

from dfkt.errors import ConfigError, RunError
from dfkt.study import capacity as capacity_module
from dfkt.study.capacity import GROWTH_FILE, Capacity, Demand, autoscaler_says, count_groups, fit_workers, may_come
from dfkt.study.driver import Workers

Nodes = list[dict[str, float]]
HEAD = {"CPU": 8.0}
KINDS = {
    "head": {"resources": {"CPU": 8}, "max_workers": 0},
    "spot": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 4},
    "demand": {"resources": {"CPU": 8, "GPU": 2}, "max_workers": 4},
}


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """The machines that the cluster says it has; a dead one beside them."""
    machines: Nodes = [{"CPU": 8.0, "GPU": 2.0}]
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in machines] + [dead])
    return machines


def test_gpus_are_taken_where_there_are_any(has: Nodes) -> None:
    assert fit_workers(Workers()).gpus == 1
    has[0]["GPU"] = 0
    assert fit_workers(Workers()).resources == {"CPU": 1}
    has.append({"CPU": 1.0, "GPU": 1.0})
    assert fit_workers(Workers()).resources == {"CPU": 1, "GPU": 1}


def test_what_was_asked_for_is_not_changed(has: Nodes) -> None:
    for wanted in (Workers(2, 3, 0), Workers(1, 1, 0.25), Workers(2, 1, 1)):
        assert fit_workers(wanted) == wanted


@pytest.mark.parametrize(
    ("workers", "machines", "groups"),
    [
        (Workers(1, 1, 1), [{"CPU": 8, "GPU": 2}], 2),
        (Workers(1, 1, 0.25), [{"CPU": 8, "GPU": 2}], 8),
        (Workers(1, 1, 0.1), [{"CPU": 64, "GPU": 3}], 30),  # 3 / 0.1 is a little less than 30
        (Workers(2, 2, 0), [{"CPU": 8}], 2),
        (Workers(2), [{"CPU": 3}, {"CPU": 3}], 3),  # the workers of a run may sit on different machines
        (Workers(1, 2), [{"CPU": 3}, {"CPU": 3}], 2),  # but each on one
        (Workers(2, 2), [{"CPU": 3}, {"CPU": 3}], 1),
        (Workers(3, 2), [{"CPU": 3}, {"CPU": 3}], 0),
        (Workers(1, 16), [{"CPU": 8}, {"CPU": 8}], 0),
        (Workers(1, 4, 1), [{"CPU": 8}, {"CPU": 2, "GPU": 4}], 0),  # CPUs here and GPUs there make no worker
        (Workers(1), [], 0),
    ],
)
def test_as_many_runs_fit_as_there_are_whole_workers_on_the_machines(
    workers: Workers, machines: Nodes, groups: int
) -> None:
    assert count_groups(workers, machines) == groups


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (Workers(3, 1, 1), "A run takes 3 workers of 1 CPU and 1 GPU, each on one machine, but .* 8 CPU, 2 GPU"),
        (Workers(9, 1, 0), "A run takes 9 workers of 1 CPU, each on one machine, but the cluster has 8 CPU"),
        (Workers(2, 1, 0.5), "`gpus_per_worker` must be whole for several workers per run, but got 0.5"),
    ],
)
def test_more_than_the_cluster_has_is_refused(has: Nodes, workers: Workers, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_workers(workers)


def test_a_worker_that_fits_on_no_machine_is_refused_with_what_each_has(has: Nodes) -> None:
    has[:] = [{"CPU": 8.0}, {"CPU": 8.0}]
    with pytest.raises(ConfigError, match="1 worker of 16 CPU, each on one machine, but the cluster has 8 CPU; 8 CPU"):
        fit_workers(Workers(1, 16))
    has.clear()
    with pytest.raises(ConfigError, match="but the cluster has none"):
        fit_workers(Workers())


def grows(**changes: Any) -> None:
    """Write the file that ``ray up`` leaves on a head."""
    told = {"head_node_type": "head", "max_workers": 5, "available_node_types": KINDS} | changes
    GROWTH_FILE.expanduser().write_text(yaml.safe_dump(told))


def test_what_a_cluster_may_grow_to_is_read_from_its_description() -> None:
    assert may_come() == []
    grows()
    gpus = [node["GPU"] for node in may_come()]
    assert gpus == [2, 2, 2, 2, 1]  # no more than its `max_workers`, which both kinds share
    grows(max_workers=99)
    assert len(may_come()) == 8
    for wrong in ({"available_node_types": None}, {"available_node_types": {"a": None}}, {"max_workers": "many"}):
        grows(**wrong)
        assert may_come() == []
    GROWTH_FILE.expanduser().write_text("{")
    assert may_come() == []


def test_a_run_that_may_have_more_workers_counts_at_its_full_size_or_once() -> None:
    elastic = Workers(2, up_to=4)
    assert [count_groups(elastic, [{"CPU": 1.0}] * n) for n in (1, 2, 3, 4, 7, 8)] == [0, 1, 1, 1, 1, 2]


def test_as_many_runs_as_the_cluster_may_grow_to_are_wanted_or_as_many_as_were_asked_for() -> None:
    machines, clock = [HEAD], [0.0]
    make = lambda demand: Capacity(Workers(gpus=1), demand, lambda: machines, lambda: clock[0])  # noqa: E731
    assert (make(Demand()).holds, make(Demand()).wanted) == (0, 1)
    grows()
    assert make(Demand()).wanted == 9
    assert make(Demand(at_once=3)).wanted == 3
    found = make(Demand())
    assert found.holds == 0
    machines += [{"CPU": 99.0, "GPU": 12.0}]
    assert (found.holds, found.wanted) == (0, 9)  # it was read just now
    clock[0] += 2
    assert (found.holds, found.wanted) == (12, 12)


@pytest.mark.parametrize("wrong", [{"at_once": 0}, {"wait": -1}, {"silence": float("nan")}])
def test_impossible_demands_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"must hold, but got {next(iter(wrong))}="):
        Demand(**wrong)


class Group:
    """A placement group that is there after some looks."""

    def __init__(self, looks: float) -> None:
        self.left = looks

    def wait(self, timeout_seconds: float) -> bool:
        """Look."""
        self.left -= 1
        return self.left <= 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the cluster is asked for, and what it says."""
    found = SimpleNamespace(bundles=[], removed=[], group=Group(3))

    def ask(bundles: Any, strategy: str, name: str) -> Group:
        found.bundles.append((bundles, strategy))
        group: Group = found.group
        return group

    monkeypatch.setattr(capacity_module, "placement_group", ask)
    monkeypatch.setattr(capacity_module, "remove_placement_group", found.removed.append)
    return found


def test_a_study_on_a_head_without_gpus_waits_for_its_first_machine(has: Nodes, asked: SimpleNamespace) -> None:
    has[:] = [HEAD]
    grows()
    said: list[str] = []
    workers = fit_workers(Workers(2, spread=True), Demand(), said.append)
    assert workers.gpus == 1
    assert asked.bundles == [([{"CPU": 1, "GPU": 1}] * 2, "SPREAD")]
    assert asked.removed == [asked.group]
    assert said[0].startswith(
        "A run takes 2 workers of 1 CPU and 1 GPU, each on one machine, but the cluster has 8 CPU, 0 GPU"
    )
    assert said[0].endswith("waiting up to 15 min for machines (--wait)")
    assert said[1].startswith("they came after 0 s")


def test_a_cluster_of_which_nobody_says_that_it_grows_is_waited_for_when_runs_were_asked_for(
    has: Nodes, asked: SimpleNamespace
) -> None:
    has[:] = [HEAD]
    with pytest.raises(ConfigError, match="--at-once N waits for machines that are still to come"):
        fit_workers(Workers(gpus=1))
    assert fit_workers(Workers(gpus=1), Demand(at_once=2), print) == Workers(gpus=1)
    assert len(asked.removed) == 1


def test_what_never_comes_ends_the_study_with_what_the_autoscaler_says(
    has: Nodes, asked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    has[:] = [HEAD]
    grows()
    asked.group = Group(1e9)
    monkeypatch.setattr(capacity_module, "autoscaler_says", lambda: "spot: quota exceeded")
    with pytest.raises(RunError, match=r"came within 0 min\. A run takes .*: spot: quota exceeded"):
        fit_workers(Workers(), Demand(wait=0), print)
    assert asked.removed == [asked.group]


def test_the_autoscaler_is_asked_in_all_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {
        "__autoscaling_status": b'{"autoscaler_report": {"node_availability_summary": {"node_availabilities": {"gpu":'
        b' {"unavailable_node_information": {"category": "Quota", "description": "of 4 vCPUs"}}, "cpu": {}}}}}',
        "__autoscaling_error": b"The autoscaler failed:\nTraceback\nKeyError: 'file_mounts'\n",
    }
    failed = SimpleNamespace(failed_launches=[SimpleNamespace(ray_node_type_name="gpu", details="no capacity")])
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", kept.get)
    monkeypatch.setattr("ray.autoscaler.v2.sdk.get_cluster_status", lambda address: failed)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="here"))
    says = autoscaler_says()
    assert says.startswith("gpu: ")
    assert "no capacity" in says
    assert says.endswith("; gpu: Quota of 4 vCPUs; it ended by KeyError: 'file_mounts'")
    kept.clear()
    failed.failed_launches.clear()
    assert autoscaler_says() == ""
