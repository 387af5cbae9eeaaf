"""One process at a time in a folder; what is refused there leaves neither a lock nor a folder behind.

A local folder is locked by the kernel (:func:`locked`), a remote one by a lease (:func:`leased`): pyarrow knows no PUT on
condition that a file is missing, but listings of today's object stores show every PUT that has been answered. So whoever
wants a folder writes a lease of its own and then looks for others: of two that come together, the one that wrote later sees
the other's. Both may then be refused; never do both go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, Protocol

import pyarrow as pa

from dfkt.errors import StudyError, one_line, tell

LOCK_FILE = ".lock"
MOST_OF_HOLDER = 100
"""Characters that are quoted of a lock: its file may be another program's."""
LEASE = re.compile(r"\.lease-[0-9a-f]{32}")
"""Name of a remote folder's lock; one file for each that wants it."""
BEAT = 20.0
"""Seconds between two writings of a lease."""
STALE = 180.0
"""Seconds after the last writing, by the store's clock, at which a lease is its holder's no more."""


class _Folder(Protocol):
    path: str

    def read(self, name: str) -> bytes | None: ...
    def write(self, name: str, data: bytes) -> None: ...
    def exists(self, name: str) -> bool: ...
    def modified(self, name: str) -> float | None: ...
    def delete(self, name: str) -> None: ...
    def entries(self) -> list[str]: ...


@contextlib.contextmanager
def tidied(folder: str) -> Iterator[None]:
    """Delete at the end those folders that are empty and were missing before: the folder, and those above it."""
    missing = [path for path in (PurePath(folder), *PurePath(folder).parents) if not os.path.lexists(path)]
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                os.rmdir(path)


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold a folder for this process while the context lasts.

    The kernel frees the lock when the process dies, however it dies. It is taken on the file ``.lock``, which stays beside
    what was written meanwhile, and goes if it was made here and nothing was.

    Raises:
        StudyError: If another process (or another context of this one) holds the folder, or it cannot be locked.
    """
    path = os.path.join(folder, LOCK_FILE)
    handle, new = _hold(folder, path)
    try:
        _note_holder(folder, handle)
        yield
    finally:
        with contextlib.suppress(OSError):
            if new and os.listdir(folder) == [LOCK_FILE]:
                os.unlink(path)
        os.close(handle)


def _hold(folder: str, path: str) -> tuple[int, bool]:
    """Return the handle of the lock's file, which this process holds, and whether the file was made here."""
    while True:
        new = not os.path.lexists(path)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            remedy = f"Its {LOCK_FILE} must be a file that you may write: delete it if no study runs there, or"
            raise _unlockable(folder, error, remedy) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):  # else its holder deleted it before we locked it: begin again
                if os.path.samestat(os.fstat(handle), os.lstat(path)):
                    return handle, new
        except BlockingIOError:
            holder = " ".join(os.pread(handle, MOST_OF_HOLDER, 0).decode(errors="replace").split())
            os.close(handle)
            raise StudyError(
                f"The study folder {folder} is in use by {holder or 'another process'}. "
                "Wait for its end, or give the study another name."
            ) from None
        except OSError as error:
            os.close(handle)
            raise _unlockable(folder, error, "Its file system may know no locks:") from error
        os.close(handle)


def _note_holder(folder: str, handle: int) -> None:
    """Write down who holds the lock, for others to tell."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except OSError as error:
        raise _unlockable(folder, error, "Free some space there, or") from error


def _unlockable(folder: str, error: OSError, remedy: str) -> StudyError:
    return StudyError(f"The study folder {folder} cannot be locked: {one_line(error)}. {remedy} choose another folder.")


@contextlib.contextmanager
def leased(folder: _Folder) -> Iterator[None]:
    """Hold a remote folder for this process while the context lasts, by a file that is written again every 20 s.

    A lease that was not for 180 s is taken over, and told on ``stderr``; one whose process was of this machine and is gone,
    at once. A holder that finds that its lease was taken over (its machine slept, or was cut off from the store for so long)
    ends as by SIGTERM; until it finds that, at most 20 s after it woke, it may still write. The lock holds between processes
    of this program only, and only where listings show every PUT that was answered (S3, GCS, Azure, HDFS; MinIO and Ceph).

    Raises:
        StudyError: If another process (or another context of this one) holds the folder, or it cannot be written.
    """
    name = f".lease-{uuid.uuid4().hex}"
    holder = {"holder": f"process {os.getpid()} on {socket.gethostname()}", **_whose(os.getpid())}
    data = json.dumps(holder).encode()
    over = threading.Event()
    heart = threading.Thread(target=_beat, args=(folder, name, data, over), daemon=True)
    try:
        try:
            folder.write(name, data)
            _check_free(folder, name)
        except (OSError, pa.ArrowException) as error:
            raise StudyError(f"The study folder {folder.path} cannot be locked: {one_line(error)}.") from error
        heart.start()
        yield
    finally:
        over.set()
        if heart.ident is not None:
            heart.join(BEAT)
        with contextlib.suppress(OSError, pa.ArrowException):  # it will be stale
            folder.delete(name)


def _check_free(folder: _Folder, own: str) -> None:
    """Refuse a folder in which another lease is alive; delete those that are not.

    Raises:
        StudyError: If there is one.
    """
    for name in _others(folder, own):
        written, now, data = folder.modified(name), folder.modified(own), folder.read(name)
        if data is None:  # its holder has just gone
            continue
        found = _read_lease(data)
        said = str(found.get("holder", "another process"))[:MOST_OF_HOLDER]
        age = 0.0 if written is None or now is None else max(now - written, 0.0)
        if age < STALE and not _is_dead(found):
            raise StudyError(
                f"The study folder {folder.path} is in use by {said}, which wrote there {age:.0f} s ago. Wait for its end, or "
                f"give the study another name; if it is dead, the folder is free {max(STALE - age, 1):.0f} s from now."
            )
        tell(f"the lock of {folder.path} is taken over from {said}, which is gone or silent for {age:.0f} s")
        folder.delete(name)


def _beat(folder: _Folder, name: str, data: bytes, over: threading.Event) -> None:
    """Write a lease again and again, until it is over; end this process if another one has taken it."""
    last = time.time()  # which goes on while a machine sleeps
    while not over.wait(BEAT):
        try:
            lost = not folder.exists(name)
            if not lost and not over.is_set():
                folder.write(name, data)
                lost = time.time() - last > STALE / 2 and bool(_others(folder, name))
        except (OSError, pa.ArrowException):  # the store is away: whatever else is written there says so
            continue
        if lost and not over.is_set():
            tell(f"failed: the lock of {folder.path} was taken over by another process; this one ends")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        last = time.time()


def _others(folder: _Folder, own: str) -> list[str]:
    return [name for name in folder.entries() if LEASE.fullmatch(name) and name != own]


def _read_lease(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:  # a file system without atomic writes
        return {}
    return found if isinstance(found, dict) else {}


def _whose(process: int) -> dict[str, Any]:
    """Return what tells a process of this machine from any other, now or later; empty where the kernel does not say."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.stat("/proc/self/ns/pid").st_ino  # containers count their processes each for itself
    except OSError:
        return {}
    return {"machine": f"{boot}-{space}", "process": process, "born": fields[19], "alive": fields[0] not in "ZX"}


def _is_dead(lease: dict[str, Any]) -> bool:
    """Whether a lease's process was one of this machine and is no more."""
    here, process = _whose(os.getpid()).get("machine"), lease.get("process")
    if here is None or lease.get("machine") != here or not isinstance(process, int):
        return False
    found = _whose(process)
    return not found.get("alive") or found["born"] != lease.get("born")
