"""A folder that one process at a time fills."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from dfkt.store.lock import tidied


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold a lock in a folder, which is made if missing; where that ends in an error, neither stays behind.

    Args:
        folder: The folder; what lies in it besides is left alone.
        name: The lock's file name.

    Raises:
        OSError: If the folder cannot be written.
    """
    with tidied(str(folder)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _file_lock(folder / name):
                yield
        except Exception:
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire()
    except NotImplementedError as error:  # a file system without locks
        raise OSError(f"files cannot be locked there: {error}") from error
    try:
        yield
    finally:
        lock.release()
