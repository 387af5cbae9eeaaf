"""How many runs a cluster holds, may come to hold, and is asked to hold; and how long a study waits for machines.

Runs beyond what the cluster holds wait as placement groups, and those are the demand by which an autoscaler adds machines. What
the cluster has is read anew all the time, so machines that join later are used, and lost ones are no longer counted on.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from dfkt.config import check_rule, is_finite
from dfkt.errors import ConfigError, RunError, one_line
from dfkt.study.cluster import Log
from dfkt.study.driver import Workers
from dfkt.study.machines import nodes

GROWTH_FILE = Path("~/ray_bootstrap_config.yaml")
"""Where ``ray up`` leaves the cluster's description on its head."""
READ_AGAIN = 2.0
"""Seconds for which the number of machines is taken as it was."""
STEP = 5.0
Machines = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Demand:
    """What a study asks of a cluster.

    Args:
        at_once: Runs at a time; ``None``: as many as the cluster may grow to hold, else as it holds.
        wait: Minutes that a study waits for machines that hold a run, at its beginning and when they were lost.
        silence: Minutes without a report after which a run's process counts as hanging, and is ended; 0: it never does.
    """

    at_once: int | None = None
    wait: float = 15.0
    silence: float = 60.0

    def __post_init__(self) -> None:
        check_rule(self.at_once is None or self.at_once >= 1, "runs at once >= 1", at_once=self.at_once)
        check_rule(is_finite(self.wait) and self.wait >= 0, "minutes of waiting >= 0", wait=self.wait)
        check_rule(is_finite(self.silence) and self.silence >= 0, "minutes of silence >= 0", silence=self.silence)


class Capacity:
    """How many runs fit on a cluster, as it is now.

    Args:
        workers: What a run spans.
        demand: What is asked for.
        read: Returns the resources of every machine.
        clock: Returns seconds.
    """

    def __init__(
        self,
        workers: Workers,
        demand: Demand,
        read: Callable[[], Machines] = nodes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workers, self.demand, self.clock = workers, demand, clock
        self._read, self._at, self._groups = read, -READ_AGAIN, 0
        self._may_hold = count_groups(workers, may_come())

    @property
    def holds(self) -> int:
        """Runs that the living machines hold at once."""
        if self.clock() - self._at >= READ_AGAIN:
            self._groups, self._at = count_groups(self.workers, self._read()), self.clock()
        return self._groups

    @property
    def wanted(self) -> int:
        """Runs that shall be there at once, those that wait for a machine counted in."""
        return self.demand.at_once or max(self.holds, self._may_hold, 1)


def fit_workers(wanted: Workers, demand: Demand | None = None, log: Log = print) -> Workers:
    """Return what one run spans, checked against the cluster; GPUs left open are one per worker where there are any.

    A cluster that may grow is waited for.

    Raises:
        ConfigError: If the machines of the cluster cannot hold such a run, or a GPU would be shared within one.
        RunError: If no machine came in time.
    """
    demand = demand or Demand()
    machines, coming = nodes(), may_come()
    gpus = (
        wanted.gpus if wanted.gpus is not None else float(any(node.get("GPU", 0) >= 1 for node in (*machines, *coming)))
    )
    workers = replace(wanted, gpus=gpus)
    if workers.most > 1 and gpus % 1:
        raise ConfigError(f"`gpus_per_worker` must be whole for several workers per run, but got {gpus:g}.")
    if count_groups(workers, machines):
        return workers
    if not count_groups(workers, coming) and demand.at_once is None:
        raise ConfigError(
            f"{_takes(workers, machines)}. Ask for fewer workers, or for less per worker"
            f"{'' if coming else '; --at-once N waits for machines that are still to come'}."
        )
    await_machines(workers, demand.wait * 60, log)
    return workers


def await_machines(workers: Workers, seconds: float, log: Log = print) -> None:
    """Ask the cluster for what a run takes, and wait until it is there.

    Raises:
        RunError: If it does not come in time, with what the autoscaler says of that.
    """
    log(f"{_takes(workers, nodes())}: waiting up to {seconds / 60:g} min for machines (--wait)")
    began = time.monotonic()
    with asked_for(workers, [workers.count]) as (group,):
        while not group.wait(timeout_seconds=min(STEP, max(seconds, 0.1))):
            if time.monotonic() - began >= seconds:
                raise RunError(_none_came(workers, seconds))
    log(f"they came after {time.monotonic() - began:.0f} s")


@contextlib.contextmanager
def asked_for(workers: Workers, counts: Sequence[int], name: str = "") -> Iterator[list[PlacementGroup]]:
    """Ask the cluster for so many workers together, while the context lasts; an autoscaler sees what is not there yet.

    Args:
        workers: What one of them takes.
        counts: A placement group for each.
        name: By which :func:`withdraw` finds them: those of a process that was killed outlive it.
    """
    groups = [
        placement_group([workers.resources] * count, strategy=workers.strategy, name=f"{name} +{k}" if name else "")
        for k, count in enumerate(counts)
    ]
    try:
        yield groups
    finally:
        for group in groups:
            with contextlib.suppress(Exception):  # the cluster may have gone meanwhile
                remove_placement_group(group)


def withdraw(name: str) -> None:
    """Take back what was asked for under a name, by whichever process."""
    for key, row in placement_group_table().items():
        if row["name"].startswith(f"{name} +") and row["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(key))))


def _none_came(workers: Workers, seconds: float) -> str:
    says = autoscaler_says()
    return (
        f"no machines for a run came within {seconds / 60:g} min. {_takes(workers, nodes())}. "
        f"{f'The autoscaler says: {says}' if says else 'No autoscaler said why'}"
    )


def _takes(workers: Workers, machines: Machines) -> str:
    """Say what a run takes, and what there is."""
    each = " and ".join(f"{amount:g} {name}" for name, amount in workers.resources.items())
    have = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in workers.resources) for node in machines)
    many = f"{workers.count} worker{'s' * (workers.count > 1)}"
    return f"A run takes {many} of {each}, each on one machine, but the cluster has {have or 'none'}"


def count_groups(workers: Workers, machines: Machines) -> int:
    """Return how many runs of such workers the machines hold at once; a worker fits on one machine or not at all.

    Runs that may span more workers than they must are counted at their full size, or as one.

    Example:
        >>> count_groups(Workers(count=2), [{"CPU": 3.0}, {"CPU": 3.0}])
        3
        >>> count_groups(Workers(count=1, cpus=2), [{"CPU": 3.0}, {"CPU": 3.0}])
        2
        >>> count_groups(Workers(count=2, up_to=8), [{"CPU": 3.0}, {"CPU": 3.0}])
        1
    """
    slots = sum(
        min(int(node.get(name, 0) / each + 1e-9) for name, each in workers.resources.items()) for node in machines
    )
    return max(slots // workers.most, int(slots >= workers.count))


def may_come() -> list[dict[str, float]]:
    """Return the resources of every machine that ``ray up``'s autoscaler may add or has added; none where nobody says.

    The file lies on the cluster's head. No more machines are listed than its ``max_workers``, the largest first.
    """
    try:
        found = yaml.safe_load(GROWTH_FILE.expanduser().read_text())
        kinds = [kind for name, kind in found["available_node_types"].items() if name != found["head_node_type"]]
        machines = [dict(kind.get("resources") or {}) for kind in kinds for _ in range(int(kind.get("max_workers", 0)))]
        machines.sort(key=lambda resources: (-resources.get("GPU", 0), -resources.get("CPU", 0)))
        return machines[: int(found.get("max_workers", len(machines)))]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return []


def autoscaler_says() -> str:
    """Return why machines did not come, as the autoscaler reports it, on one line; empty where it reports nothing."""
    found: list[str] = []
    for ask in (_failed_launches, _unavailable, _broken):
        with contextlib.suppress(Exception):  # what Ray keeps of this differs from version to version
            found += ask()
    return "; ".join(dict.fromkeys(found))


def _failed_launches() -> list[str]:
    """Autoscaler v2: the launches that failed."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status: Any = get_cluster_status(ray.get_runtime_context().gcs_address)
    return [f"{launch.ray_node_type_name}: {one_line(Exception(launch.details))}" for launch in status.failed_launches]


def _unavailable() -> list[str]:
    """Autoscaler v1: node types that could not be had."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS))["autoscaler_report"]
    kinds = report["node_availability_summary"]["node_availabilities"]
    why = {kind: record.get("unavailable_node_information") for kind, record in kinds.items()}
    return [f"{kind}: {told['category']} {told['description']}".strip() for kind, told in why.items() if told]


def _broken() -> list[str]:
    """Either: the error by which it ended."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_ERROR
    from ray.experimental.internal_kv import _internal_kv_get

    lines = _internal_kv_get(DEBUG_AUTOSCALING_ERROR).decode().strip().splitlines()
    return [f"it ended by {lines[-1]}"]
