"""What one host of a cluster says of itself. Nothing here asks Ray, so that it is the same with and without a cluster."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import dfkt
from dfkt.config import KNOWN_SETS
from dfkt.errors import StudyError, one_line
from dfkt.store.files import Storage, readable, writable
from dfkt.store.origin import package_version

PACKAGES = ("python", "torch", "ray", "dfkt")
DOWNLOADED = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "mnist": "MNIST/raw",
    "svhn": "train_32x32.mat",
}
"""What torchvision leaves of a set in its folder."""
SEEN_WITHIN = 5.0
"""Seconds that a file may take until another host of a shared folder sees it."""
DRIVER = Path("/proc/driver/nvidia/gpus")
"""NVIDIA's driver lists what is built in here, also within a container that was not given it."""
SHARED_MEMORY = "/dev/shm"
RAY_FOLDER = "/tmp/ray"


@dataclass(frozen=True)
class Question:
    """What a host is asked.

    Attributes:
        results: The folder that holds studies; ``None`` leaves it out.
        probe: Name of a file that who asks has left there.
        data: Image sets, each with the folder of torchvision's sets.
        addresses: Those of all hosts; ``None`` leaves out what only :class:`Hardware` holds.
    """

    results: str | None = None
    probe: str = ""
    data: tuple[tuple[str, str], ...] = ()
    addresses: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Hardware:
    """What a host has.

    Attributes:
        gpus: GPUs that torch sees.
        gpu_fault: What torch says against GPUs, if anything.
        built_in: GPUs that NVIDIA's driver has.
        resolves: The address that the host's own name leads to; empty if to none.
        interface: The network interface of the address that the cluster knows the host by; empty if none has it.
        disks: By folder, bytes free and in all.
        memory: Bytes free and in all of shared memory.
    """

    gpus: int
    gpu_fault: str
    built_in: int
    resolves: str
    interface: str
    disks: dict[str, tuple[int, int]]
    memory: tuple[int, int] | None


@dataclass(frozen=True)
class Data:
    """An image set as a host finds it.

    Attributes:
        fault: Why it cannot be read; empty if it can.
        classes: Sub-folders of a folder of one's own.
        there: Whether it need not be downloaded.
    """

    fault: str = ""
    classes: tuple[str, ...] = ()
    there: bool = True


@dataclass(frozen=True)
class Health:
    """What a host says of itself.

    Attributes:
        name: Its own.
        versions: Of what must be the same on all hosts.
        code: Hash of this package's files.
        sees: Whether it read what who asks has left in the results.
        storage: What it has against them, on a line.
        left: Name of the file that it left there in its turn.
        data: By image set, what tells its folder from another host's, or why it cannot be read.
        hardware: Where that was asked for.
    """

    name: str
    versions: dict[str, str | None]
    code: str
    sees: bool
    storage: str
    left: str
    data: dict[str, Data]
    hardware: Hardware | None


def interface_of(address: str) -> str:
    """Return the network interface that has an address; empty where none has."""
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(one.address == address for one in addresses)), "")


def examine(question: Question) -> Health:
    """Return what this host says; a file of its own may stay in the results, for who asks to read and delete."""
    sees, refusal, left = _try_storage(question)
    return Health(
        name=socket.gethostname(),
        versions={name: package_version(name) for name in PACKAGES},
        code=_hash_code(Path(dfkt.__file__).parent),
        sees=sees,
        storage=refusal,
        left=left,
        data={name: find_data(name, root) for name, root in question.data},
        hardware=None if question.addresses is None else _hardware(question.addresses),
    )


def clock() -> float:
    """Return the time by this host's clock, in seconds."""
    return time.time()


def forget(results: str, probe: str) -> None:
    """Delete a probe that this host left where who asked does not see it."""
    Storage(results).delete(probe)


def _try_storage(question: Question) -> tuple[bool, str, str]:
    """Return whether the asker's file was read, what failed, and the name of a file left in its turn."""
    if question.results is None:
        return True, "", ""
    storage = Storage(question.results)
    try:
        with readable(storage):
            sees = read_soon(storage, question.probe)
        if not sees:  # whatever lies there is another folder: nothing is written to it
            return False, "", ""
        with writable(storage):
            return True, "", storage.probe()
    except StudyError as error:
        return True, str(error), ""


def read_soon(storage: Storage, probe: str, seconds: float = SEEN_WITHIN) -> bool:
    """Whether a probe can be read, at once or a little later."""
    began = time.monotonic()
    while storage.read(probe) != probe.encode():
        if time.monotonic() - began >= seconds:
            return False
        time.sleep(0.1)
    return True


def find_data(name: str, root: str) -> Data:
    """Return what this host sees of an image set; no image is opened but the first of a folder.

    Args:
        name: One of :data:`dfkt.config.KNOWN_SETS`, or a folder.
        root: Where torchvision's sets are kept.
    """
    if name in KNOWN_SETS:
        return Data(there=name == "digits" or (Path(os.path.expanduser(root)) / DOWNLOADED[name]).exists())
    folder = Path(os.path.expanduser(name))
    try:
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        for path in folder.joinpath(classes[0]).rglob("*") if classes else ():
            if path.is_file():
                path.open("rb").close()
                break
    except OSError as error:
        return Data(fault=one_line(error))
    return Data(classes=tuple(classes))


def _hash_code(package: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _hardware(addresses: Sequence[str]) -> Hardware:
    gpus, fault = _gpus()
    return Hardware(
        gpus=gpus,
        gpu_fault=fault,
        built_in=len(list(DRIVER.iterdir())) if DRIVER.is_dir() else 0,
        resolves=_resolved(socket.gethostname()),
        interface=next(filter(None, map(interface_of, addresses)), ""),
        disks={folder: _space(folder) for folder in (RAY_FOLDER, "~/.cache/dfkt")},
        memory=_space(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None,
    )


def _gpus() -> tuple[int, str]:
    """Return how many GPUs torch can use, and what it says against them: of a driver that is too old it warns."""
    import torch  # seconds, which versions alone do not need

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return gpus, " ".join(one_line(warning.message) for warning in told if isinstance(warning.message, Warning))


def _resolved(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _space(folder: str) -> tuple[int, int]:
    """Return bytes free and in all where a folder lies, or would lie."""
    path = Path(os.path.expanduser(folder)).absolute()
    space = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists()))
    return space.free, space.total
