"""What is wrong with a cluster's machines, and what to do about it: drawn from what they said, without asking anything."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dfkt.study.host import RAY_FOLDER, SHARED_MEMORY, Data, Hardware, Health
from dfkt.study.machines import Unanswered

JOB_FOLDER = "runtime_resources/working_dir_files"
"""Part of the path of every job's working folder."""
APART, TOO_FAR_APART = 5.0, 900.0
"""Seconds between two clocks that are told, and that fail: S3 refuses requests signed so long ago. (A remote folder's lock bears
any difference: its ages are by the store's own clock.)"""
LITTLE_DISK, TOO_LITTLE_DISK = 10 * 2**30, 2**30
"""Bytes free that are told, and that fail."""
FULL_DISK = 0.95
"""From here on Ray puts nothing more on a disk."""
LITTLE_MEMORY, TOO_LITTLE_MEMORY = 2**30, 2**26
"""Bytes of shared memory: 64 MiB are what a container gets that is not given more."""
UNEXPECTED = 2
"""Ray's reason for a node's death that is none of: it was told to end, it was idle, it was taken back with a warning."""
NAMED = 3
"""Machines that are named of many."""
MARK = re.compile(r"CHANGE-ME-[A-Z]+")


@dataclass(frozen=True)
class Finding:
    """Something that a study would stumble over, or may.

    Attributes:
        fails: Whether it would fail.
        what: A sentence without its full stop.
        where: The machine, or the file and line.
        remedy: What to do, likewise; empty if that is said with it.
    """

    fails: bool
    what: str
    where: str
    remedy: str

    def describe(self) -> str:
        """Return it as a line."""
        told = f"{'fails' if self.fails else 'warning'}: {self.where}: {self.what}."
        return f"{told} {self.remedy}." if self.remedy else told


@dataclass(frozen=True)
class Machine:
    """A machine, and what it said.

    Attributes:
        address: Where the cluster knows it.
        said: Itself, or why not.
        gpus: GPUs that Ray counts there; ``None`` where there is no cluster.
        apart: Seconds that its clock differs at least from the one of who asks.
        unseen: It wrote to the results, and who asks cannot read that.
    """

    address: str
    said: Health | Unanswered
    gpus: float | None = None
    apart: float = 0.0
    unseen: bool = False
    where: str = field(init=False)

    def __post_init__(self) -> None:
        name = self.said.name if isinstance(self.said, Health) else ""
        object.__setattr__(self, "where", " ".join(filter(None, (name, f"({self.address})" if self.address else ""))))


def find_all(machines: Sequence[Machine], like: Health, results: str | None) -> list[Finding]:
    """Return what is wrong, what fails before what is told.

    Args:
        machines: All that were asked.
        like: What who asks says of itself: the others' versions and data are compared with its.
        results: The folder that holds studies.
    """
    several = len(machines) > 1
    return merged(found for machine in machines for found in _of_machine(machine, like, results, several))


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings, one for all machines of which the same is said, and what fails before what is told.

    Example:
        >>> merged(Finding(True, "it rains", town, "Wait") for town in "abcde")[0].where
        'a, b, c and 2 more'
    """
    places: dict[Finding, list[str]] = {}
    for finding in findings:
        named = places.setdefault(replace(finding, where=""), [])
        if finding.where not in named:
            named.append(finding.where)
    found = [replace(finding, where=_listed(named)) for finding, named in places.items()]
    return sorted(found, key=lambda finding: not finding.fails)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _of_machine(machine: Machine, like: Health, results: str | None, several: bool) -> Iterator[Finding]:
    said, where = machine.said, machine.where
    if isinstance(said, Unanswered):
        if said.gone:
            yield Finding(
                False,
                f"left the cluster while it was asked ({said.reason})",
                where,
                "Look at it if it was not meant to go",
            )
        else:
            remedy = (
                "Its Python, Ray and dfkt must be those of the others; set it up again, or take it out (`ray stop`)"
            )
            yield Finding(True, f"cannot be asked ({said.reason})", where, remedy)
        return
    if differing := list(find_versions(said, like, where)):
        yield from differing
        if any(finding.fails for finding in differing):  # what it says may mean something else there
            return
    yield from _of_storage(machine, said, results)
    for name, data in said.data.items():
        yield from find_data_faults(name, data, like.data.get(name), where)
    if machine.apart >= APART:
        remedy = "Set the clocks by one source (chrony or systemd-timesyncd)"
        yield Finding(
            machine.apart >= TOO_FAR_APART, f"its clock is {machine.apart:.0f} s from this machine's", where, remedy
        )
    if said.hardware is not None:
        yield from find_hardware_faults(said.hardware, machine.gpus, where)
        if several:
            yield from find_name_faults(said.hardware, where)


def find_versions(said: Health, like: Health, where: str) -> Iterator[Finding]:
    """Find what is of another version than here; builds of torch, and Python's last number, may differ."""
    for name, version in said.versions.items():
        ours, theirs = like.versions.get(name) or "none", version or "none"
        if ours == theirs or (name == "torch" and ours.partition("+")[0] == theirs.partition("+")[0]):
            continue
        near = name == "python" and ours.split(".")[:2] == theirs.split(".")[:2]
        remedy = f"Install {name} {ours} there, and pin it where machines are set up (`setup_commands`)"
        yield Finding(not near, f"{name} is {theirs}, here it is {ours}", where, remedy)
    if said.code != like.code and said.versions.get("dfkt") == like.versions.get("dfkt"):
        remedy = "Start it by `ray job submit --working-dir .`, which takes this copy everywhere, or run `ray up` again"
        yield Finding(True, "dfkt's files differ from those here", where, remedy)


def find_path_faults(results: str) -> Iterator[Finding]:
    """Find whether the results would go with the job that writes them."""
    if JOB_FOLDER in results:
        what = f"results in {results} are deleted when the job ends, with its working folder"
        yield Finding(True, what, "--results", "Give a folder from its root that all machines share, or a bucket")


def _of_storage(machine: Machine, said: Health, results: str | None) -> Iterator[Finding]:
    if said.storage:
        yield Finding(True, said.storage.rstrip("."), machine.where, "")
    elif not said.sees or machine.unseen:
        what = f"{results} is another folder there: what is written on one machine cannot be read on the other"
        yield Finding(
            True,
            what,
            machine.where,
            "Mount one folder at this path on all machines, or give a bucket (--results s3://…)",
        )


def find_data_faults(name: str, data: Data, ours: Data | None, where: str) -> Iterator[Finding]:
    """Find what is wrong with an image set on a machine; ``ours`` is the set here."""
    mount = "Mount the folder there, or copy it to the same path"
    if data.fault:
        yield Finding(True, f"images in {name} cannot be read ({data.fault})", where, mount)
    elif ours is not None and not ours.fault and data.classes != ours.classes:
        one = min(set(data.classes) ^ set(ours.classes))
        holder = "there" if one in data.classes else "here"
        yield Finding(True, f"{name} holds other sub-folders than here: {one} only {holder}", where, mount)
    elif not data.there:
        remedy = "It needs a way to the internet for that, or a copy in --data-root"
        yield Finding(False, f"{name} is not there yet; the first run downloads it", where, remedy)


def find_hardware_faults(host: Hardware, counted: float | None, where: str) -> Iterator[Finding]:
    """Find GPUs that cannot be used, and what is short.

    Args:
        host: What the machine says.
        counted: GPUs that Ray counts there; ``None`` where there is no cluster.
        where: The machine.
    """
    because = f" ({host.gpu_fault})" if host.gpu_fault else ""
    remedy = "A driver that fits torch's CUDA (`nvidia-smi` shows it), and for a container --gpus=all"
    if host.gpus < (counted or 0):
        yield Finding(True, f"Ray counts {counted:g} GPUs, torch can use {host.gpus}{because}", where, remedy)
    elif not host.gpus and (host.built_in or because):
        yield Finding(False, f"{host.built_in or 'its'} GPUs are not used, torch sees none{because}", where, remedy)
    elif counted is not None and host.gpus > counted:
        what = f"torch can use {host.gpus} GPUs, Ray counts {counted:g}"
        yield Finding(False, what, where, "Start Ray there with --num-gpus, if runs shall use them")
    yield from _short(host, where)


def find_name_faults(host: Hardware, where: str) -> Iterator[Finding]:
    """Find a host whose own name leads nowhere, and say by what a run's workers reach each other then."""
    if host.resolves and not host.resolves.startswith("127."):
        return
    remedy = "Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that reaches the others, before the study"
    if host.interface:
        remedy = f"Nothing to do: runs on several workers use the interface {host.interface}"
    leads = f"leads to {host.resolves}" if host.resolves else "leads to no address"
    yield Finding(False, f"the host's own name {leads}", where, remedy)


def _short(host: Hardware, where: str) -> Iterator[Finding]:
    for folder, (free, total) in host.disks.items():
        ray_stops = folder == RAY_FOLDER and free < (1 - FULL_DISK) * total
        if free < LITTLE_DISK or ray_stops:
            what = f"{_shown(free)} of {_shown(total)} free for {folder}"
            yield Finding(free < TOO_LITTLE_DISK, what, where, "Free some, or give it a larger disk")
    if host.memory is not None and (host.memory[1] < LITTLE_MEMORY or host.memory[0] < TOO_LITTLE_MEMORY):
        free, total = host.memory
        what = f"{_shown(free)} of {_shown(total)} free in {SHARED_MEMORY}, which Ray and NCCL use"
        yield Finding(False, what, where, "Give a container more (--shm-size=8gb), or free what is left there")


def _shown(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def find_missing(described: Any, nodes: Sequence[Mapping[str, Any]], addresses: Sequence[str]) -> Iterator[Finding]:
    """Find machines that should be there and are not.

    Args:
        described: The cluster's description as ``ray up`` left it, or ``None``.
        nodes: All that Ray knows, dead ones included.
        addresses: Those of the living.
    """
    provider = described.get("provider", {}) if isinstance(described, dict) else {}
    hosts = [provider.get("head_ip"), *(provider.get("worker_ips") or ())] if isinstance(provider, dict) else []
    remedy = "`ray monitor` of the cluster's file shows why; `ray up` again brings it"
    for host in filter(None, hosts):
        if _is_address(host) and host not in addresses:
            yield Finding(False, "is in the cluster's file, but is no part of the cluster", str(host), remedy)
    for node in nodes:
        address = node["NodeManagerAddress"]
        if node.get("DeathReason") == UNEXPECTED and address not in {*addresses, *hosts}:
            why = f" ({node['DeathReasonMessage']})" if node.get("DeathReasonMessage") else ""
            yield Finding(
                False, f"was lost{why}", address, "Look at it; if it will not come back, nothing is to be done"
            )


def _is_address(text: Any) -> bool:
    return re.fullmatch(r"[\d.]+|[\da-fA-F:]+", str(text)) is not None


def find_marks(name: str, text: str) -> list[Finding]:
    """Return what a cluster's file leaves to the user and nobody filled in; comments do not count.

    Example:
        >>> [finding.where for finding in find_marks("a.yaml", "region: CHANGE-ME-REGION  # not CHANGE-ME-HERE")]
        ['a.yaml, line 1']
    """
    return [
        Finding(True, f"{mark} is not filled in", f"{name}, line {number}", "docs/cluster.md says with what")
        for number, line in enumerate(text.splitlines(), 1)
        for mark in MARK.findall(re.sub(r"(?:^|\s)#.*", "", line))
    ]
