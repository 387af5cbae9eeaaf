"""The machines of a Ray cluster: what they have, and what they say when they are asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dfkt.errors import clipped, one_line


def nodes() -> list[dict[str, float]]:
    """Return the resources of every living machine of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@dataclass(frozen=True)
class Unanswered:
    """Why a machine did not say what it was asked.

    Args:
        reason: On one line.
        gone: Whether it has left the cluster, as machines do; else something is wrong with it.
    """

    reason: str
    gone: bool = False


def living() -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return this machine, as Ray describes it, and the cluster's others that are alive; none where there is no cluster."""
    if not ray.is_initialized():  # else the next line would start one
        return None, []
    here, alive = ray.get_runtime_context().get_node_id(), [node for node in ray.nodes() if node["Alive"]]
    own = next((node for node in alive if node["NodeID"] == here), None)
    return own, [node for node in alive if node["NodeID"] != here]


def ask(machines: Sequence[Mapping[str, Any]], call: Callable[..., Any], *given: Any, timeout: float) -> list[Any]:
    """Call a function on machines of the cluster, all at once; return what each said, or :class:`Unanswered`.

    Args:
        machines: As :func:`living` returns them.
        call: The function, of a module that each machine has.
        given: Its arguments.
        timeout: Seconds.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(call)
    places = [NodeAffinitySchedulingStrategy(machine["NodeID"], soft=False) for machine in machines]
    calls = [task.options(scheduling_strategy=place).remote(*given) for place in places]
    done = ray.wait(calls, num_returns=len(calls), timeout=timeout)[0] if calls else []
    return [_answer(one) if one in done else Unanswered(f"no answer within {timeout:g} s") for one in calls]


def _answer(call: Any) -> Any:
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause or error
        lines = str(cause).strip().splitlines()  # of a module that is missing there, Ray quotes the traceback
        return Unanswered(clipped(lines[-1].strip()) if len(lines) > 1 else one_line(cause))
    except ray.exceptions.RayError as error:
        return Unanswered(one_line(error), gone=True)


def on_other_nodes(call: Callable[..., Any], *given: Any, timeout: float) -> list[Any]:
    """Call a function on every other machine of the cluster; return what each said, ``None`` of one that did not answer in time.

    Args:
        call: As for :func:`ask`.
        given: As for :func:`ask`.
        timeout: Seconds.
    """
    answers = ask(living()[1], call, *given, timeout=timeout)
    return [None if isinstance(answer, Unanswered) else answer for answer in answers]
