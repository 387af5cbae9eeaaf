"""One process at a time in a local folder; what is refused there leaves neither a lock nor a folder behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import PurePath

from dfkt.errors import StudyError, one_line

LOCK_FILE = ".lock"
MOST_OF_HOLDER = 100
"""Characters that are quoted of a lock: its file may be another program's."""


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
