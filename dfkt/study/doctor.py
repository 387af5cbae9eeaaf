"""Ask all machines of a cluster what a study would stumble over: at length by a command, in short before a study."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import yaml

from dfkt.config import Placement
from dfkt.errors import ConfigError, StudyError
from dfkt.store.files import Storage, writable
from dfkt.store.lock import tidied
from dfkt.study.capacity import GROWTH_FILE
from dfkt.study.cluster import Log, cluster, find_address
from dfkt.study.config import StudyConfig
from dfkt.study.findings import Finding, Machine, find_all, find_missing, find_path_faults, merged
from dfkt.study.host import SEEN_WITHIN, Health, Question, clock, examine, forget, read_soon
from dfkt.study.machines import Unanswered, ask, living

SECONDS = 60.0
"""Until a machine must have answered; the first question starts a process there."""
Node = Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        findings: What fails before what is told.
        asked: Machines that were asked, this one counted in.
    """

    findings: list[Finding]
    asked: int


def look(results: str, data: str | None, *, data_root: str | None, address: str | None) -> Report:
    """Ask all machines of a cluster, or this one alone where there is none; no Ray is started.

    Args:
        results: Folder that holds studies, local or remote.
        data: An image set's name, or a folder; ``None`` leaves it out.
        data_root: Where torchvision's sets are kept; ``None`` is the usual place.
        address: As for :func:`dfkt.study.cluster.cluster`.

    Raises:
        InputError: If no cluster answers, or the results' path is none.
    """
    folder = Storage(results)
    sets = () if data is None else ((data, data_root or Placement().data_root),)
    with contextlib.ExitStack() as held:
        if find_address(address) is not None:
            held.enter_context(cluster(address))
        own, others = living()
        there = [own, *others] if own else []
        nodes, addresses = list(filter(_holds_runs, there)), tuple(node["NodeManagerAddress"] for node in there)
        machines, like, findings = _ask_all(nodes, Question(folder.path, "", sets, addresses))
        if own not in nodes:
            machines.insert(0, Machine(own["NodeManagerAddress"], like, 0.0) if own else Machine("", like))
        found = [*find_path_faults(folder.path), *findings, *find_all(machines, like, folder.path)]
        if own is not None:
            found += find_missing(_described(), ray.nodes(), addresses)
    return Report(merged(found), len(machines))


def check_machines(configs: Sequence[StudyConfig], folder: Storage, placement: Placement, log: Log) -> None:
    """Refuse a cluster on which a study would fail: other versions, results or images that a machine does not see.

    Args:
        configs: The studies of a queue.
        folder: The results of one of them.
        placement: Where torchvision's sets lie.
        log: Receives a line for what is only told.

    Raises:
        ConfigError: If something fails, with the first such finding.
    """
    findings = [*find_path_faults(folder.path)]
    if nodes := others():
        findings = merged([*findings, *look_at(nodes, configs, folder, placement)])
    for finding in findings:
        if finding.fails:
            more_lines = sum(other.fails for other in findings) - 1
            rest = f" {more_lines} more: `python -m dfkt doctor` lists them." if more_lines else ""
            raise ConfigError(f"{finding.describe().partition(': ')[2]}{rest}")
        log(finding.describe())


def others() -> list[Node]:
    """Return the machines beside this one that hold runs, as Ray describes them."""
    return list(filter(_holds_runs, living()[1]))


def look_at(
    nodes: Sequence[Node],
    configs: Sequence[StudyConfig],
    folder: Storage,
    placement: Placement,
    seconds: float = SECONDS,
) -> list[Finding]:
    """Ask some machines, in short, what studies would stumble over there.

    Args:
        nodes: As Ray describes them.
        configs: The studies of a queue.
        folder: The results of one of them.
        placement: Where torchvision's sets lie.
        seconds: Until a machine must have answered.
    """
    data = tuple(dict.fromkeys((config.data.name, placement.data_root) for config in configs))
    machines, like, findings = _ask_all(nodes, Question(folder.path, "", data), seconds)
    return merged([*findings, *find_all(machines, like, folder.path)])


def _holds_runs(node: Node) -> bool:
    """Whether a study puts anything there; its own process alone needs neither."""
    return bool(node["Resources"].get("CPU") or node["Resources"].get("GPU"))


def _ask_all(
    nodes: Sequence[Node], question: Question, seconds: float = SECONDS
) -> tuple[list[Machine], Health, list[Finding]]:
    """Ask machines, and this process.

    Returns:
        The machines, what this process says, and what is wrong with the results as this process sees them.
    """
    folder, findings = Storage(question.results or ""), list[Finding]()
    with contextlib.ExitStack() as held:
        try:
            question = replace(question, probe=held.enter_context(_probe(folder)))
        except StudyError as error:
            findings.append(Finding(True, str(error).rstrip("."), "this machine", ""))
            question = replace(question, results=None)
        like = examine(question)
        if like.left:
            folder.delete(like.left)
        answers = ask(nodes, examine, question, timeout=seconds)
        seen = _read_back(folder, nodes, answers)
    apart = _compare_clocks(nodes, answers) if question.addresses is not None else [0.0] * len(nodes)
    machines = [
        Machine(node["NodeManagerAddress"], answer, node["Resources"].get("GPU", 0.0), off, not back)
        for node, answer, off, back in zip(nodes, answers, apart, seen, strict=True)
    ]
    return machines, like, findings


@contextlib.contextmanager
def _probe(folder: Storage) -> Iterator[str]:
    """Leave a file in a folder while the context lasts; the folder goes with it if it was made for that.

    Raises:
        StudyError: If it cannot be written.
    """
    with tidied(folder.path) if folder.is_local else contextlib.nullcontext():
        with writable(folder):
            name = folder.probe()
        try:
            yield name
        finally:
            with writable(folder):
                folder.delete(name)


def _read_back(folder: Storage, nodes: Sequence[Node], answers: Sequence[Any]) -> list[bool]:
    """Return of each machine whether what it left is seen here; delete that."""
    began, seen = time.monotonic(), []
    for node, answer in zip(nodes, answers, strict=True):
        left = answer.left if isinstance(answer, Health) else ""
        seen.append(not left or read_soon(folder, left, SEEN_WITHIN - (time.monotonic() - began)))
        if left:
            folder.delete(left)
        if not seen[-1]:
            ask([node], forget, folder.path, left, timeout=SECONDS)
    return seen


def _compare_clocks(nodes: Sequence[Node], answers: Sequence[Any], read: Callable[[], float] = clock) -> list[float]:
    """Return by how many seconds the clock of each machine differs at least from this one's; 0 of those that are silent."""
    apart = [0.0] * len(nodes)
    known = [k for k, answer in enumerate(answers) if not isinstance(answer, Unanswered)]
    for _ in range(2):  # the second time no process needs to be started for it
        began = read()
        said = ask([nodes[k] for k in known], clock, timeout=SEEN_WITHIN)
        ended = read()
        for k, then in zip(known, said, strict=True):
            apart[k] = max(apart[k], 0.0 if isinstance(then, Unanswered) else between(began, then, ended))
    return apart


def between(began: float, said: float, ended: float) -> float:
    """Return by how many seconds a clock differs at least that was read within two readings of another.

    Example:
        >>> between(100.0, 101.0, 102.0), between(100.0, 93.0, 102.0), between(100.0, 109.0, 102.0)
        (0.0, 7.0, 7.0)
    """
    return max(0.0, began - said, said - ended)


def _described() -> Any:
    """Return the cluster's description as ``ray up`` left it on this head; ``None`` where it did not."""
    try:
        return yaml.safe_load(GROWTH_FILE.expanduser().read_text())
    except (OSError, yaml.YAMLError, ValueError):
        return None
