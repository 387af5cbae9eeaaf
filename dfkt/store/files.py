"""Files in a folder that is local or remote; knows nothing about what the files hold.

Everything here is small enough to be read and written whole, so there is one way to write: a file is replaced
as a whole, and a reader sees the old bytes or the new ones, never a part of either. Locally that is a hidden
file in the same folder, then a rename; on object stores a PUT is atomic by itself. On a remote file system that
is no object store (``hdfs://``) a reader may meet a file that is being written. What fails and may pass by itself is tried
again for a while (:mod:`dfkt.store.remote`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import fs

from dfkt.errors import StudyError, one_line
from dfkt.store.lock import LEASE, leased, locked, tidied
from dfkt.store.remote import check_place, patient, remedy


class Storage:
    """A folder, local or remote.

    Objects are picklable; the connection to a remote folder is opened on first use, in each process anew.

    Args:
        path: A local path (``~`` is the home folder), or a URI that ``pyarrow.fs.FileSystem.from_uri`` takes:
            ``s3://bucket/folder``, ``gs://…``, ``file:///…``. Options behind ``?`` hold for sub-folders too.

    Raises:
        StudyError: If the path is empty, or looks like a URI but is none, or one without a bucket.

    Attributes:
        path: The absolute local path (also of a ``file://`` URI), or the URI as given.
        is_local: Whether the folder is on a mounted file system.

    Example:
        >>> Storage("s3://bucket/studies?region=eu-west-1").sub("digits", "trials")
        Storage('s3://bucket/studies/digits/trials?region=eu-west-1')
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = os.fspath(path)
        check_place(text)
        if text.startswith("file://"):
            text = _from_uri(text)[1]
        self.is_local = "://" not in text
        self.path = os.path.abspath(os.path.expanduser(text)) if self.is_local else text
        self._remote: tuple[Any, str] | None = None

    def __repr__(self) -> str:
        return f"Storage({self.path!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_remote": None}

    def sub(self, *names: str) -> Storage:
        """Return the folder below this one; it need not exist."""
        if self.is_local:
            return Storage(os.path.join(self.path, *names))
        head, mark, options = self.path.partition("?")
        return Storage("/".join([head.rstrip("/"), *names]) + mark + options)

    def split(self) -> tuple[Storage, str]:
        """Return the folder that this one lies in, and its name there.

        Example:
            >>> Storage("s3://bucket/studies/digits?region=eu-west-1").split()
            (Storage('s3://bucket/studies?region=eu-west-1'), 'digits')
        """
        head, mark, options = (self.path, "", "") if self.is_local else self.path.partition("?")
        above, _, name = head.rstrip("/").rpartition("/")
        return Storage((above or "/") + mark + options), name

    @patient
    def read(self, name: str) -> bytes | None:
        """Return the file's bytes, or ``None`` when there is no such file."""
        try:
            if self.is_local:
                with open(os.path.join(self.path, name), "rb") as file:
                    return file.read()
            system, path = self._locate(name)
            with system.open_input_file(path) as stream:
                return bytes(stream.read())
        except (FileNotFoundError, NotADirectoryError):
            return None

    @patient
    def write(self, name: str, data: bytes) -> None:
        """Replace the file as a whole, or create it; missing folders are created."""
        if self.is_local:
            self._replace(name, data)
            return
        system, path = self._locate(name)
        try:
            _put(system, path, data)
        except FileNotFoundError:  # object stores know no folders; the others want them first
            system.create_dir(path.rpartition("/")[0], recursive=True)
            _put(system, path, data)

    @patient
    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""
        if self.is_local:
            return os.path.isfile(os.path.join(self.path, name))
        system, path = self._locate(name)
        return bool(system.get_file_info(path).type == fs.FileType.File)

    @patient
    def modified(self, name: str) -> float | None:
        """Return when the file was last written, in seconds by the clock of the store; ``None`` when there is no such file."""
        if self.is_local:
            path = os.path.join(self.path, name)
            return os.stat(path).st_mtime if os.path.isfile(path) else None
        system, path = self._locate(name)
        written = system.get_file_info(path).mtime
        return None if written is None else float(written.timestamp())

    def names(self) -> list[str]:
        """Return the sorted names of the files directly inside, hidden ones left out; none if there is no folder."""
        return sorted(name for name, kind in self._scan() if kind == "file" and not name.startswith("."))

    def folders(self) -> list[str]:
        """Return the sorted names of the folders directly inside, hidden ones left out; none if there is no folder."""
        return sorted(name for name, kind in self._scan() if kind == "folder" and not name.startswith("."))

    def entries(self) -> list[str]:
        """Return the sorted names of all that lies directly inside, hidden or not; none if there is no folder."""
        return sorted(name for name, _ in self._scan())

    @patient
    def delete(self, name: str) -> None:
        """Delete the file; no error when there is none."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if self.is_local:
                os.unlink(os.path.join(self.path, name))
            else:
                system, path = self._locate(name)
                system.delete_file(path)

    @patient
    def delete_all(self) -> None:
        """Delete the folder with everything in it; no error when there is none.

        For folders that a study made itself. Its own folder may hold what is not its own:
        :func:`dfkt.store.study_store.clear` is for that.
        """
        with contextlib.suppress(FileNotFoundError):
            if self.is_local:
                shutil.rmtree(self.path)
            else:
                system, path = self._locate()
                system.delete_dir(path)

    def check_folder(self) -> None:
        """Refuse a place that holds something else than a folder, or a link that leads nowhere. Nothing is written.

        Raises:
            StudyError: If so.
        """
        if self.is_local and os.path.lexists(self.path) and not os.path.isdir(self.path):
            found = "a link that leads nowhere" if not os.path.exists(self.path) else "a file"
            raise StudyError(f"A study needs a folder, but {self.path} is {found}. Move it away, or take another name.")

    def check_writable(self) -> None:
        """Write and delete a probe file; the folder is created if it is missing.

        Raises:
            StudyError: If that fails, with the path, the reason and a remedy.
        """
        with writable(self):
            self.delete(self.probe())

    def probe(self) -> str:
        """Write a file that holds its own new name, and return that; who asked for it deletes it."""
        name = f".probe-{uuid.uuid4().hex}"  # `is_leftover` knows the pattern
        self.write(name, name.encode())
        return name

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process while the context lasts; it is created if it is missing.

        A folder in which nothing was written meanwhile is left as it was (:mod:`dfkt.store.lock`). A remote folder's lock is
        kept by a heartbeat, and is free 3 minutes after the last one.

        Raises:
            StudyError: If another process (or another context of this one) holds the folder, or it is not writable.
        """
        if self.is_local:
            with tidied(self.path):
                self.check_writable()
                with locked(self.path):
                    yield
        else:
            self.check_writable()
            with leased(self):
                yield

    @patient
    def _scan(self) -> list[tuple[str, str]]:
        """Return name and kind, ``file``, ``folder`` or ``other``, of all that lies directly inside."""
        if self.is_local:
            try:
                with os.scandir(self.path) as entries:
                    return [(entry.name, _kind(entry.is_file(), entry.is_dir())) for entry in entries]
            except (FileNotFoundError, NotADirectoryError):
                return []
        system, path = self._locate()
        infos = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        types = fs.FileType
        return [(info.base_name, _kind(info.type == types.File, info.type == types.Directory)) for info in infos]

    def _replace(self, name: str, data: bytes) -> None:
        os.makedirs(self.path, exist_ok=True)
        hidden = os.path.join(self.path, f".{name}.{uuid.uuid4().hex}.tmp")  # `is_leftover` knows the pattern
        try:
            with open(hidden, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
            os.replace(hidden, os.path.join(self.path, name))
        except BaseException as error:
            if isinstance(error, OSError) and error.errno:
                error.filename = error.filename or self.path  # a write does not say where
            with contextlib.suppress(OSError):
                os.unlink(hidden)
            raise

    def _locate(self, name: str = "") -> tuple[Any, str]:
        if self._remote is None:
            self._remote = _from_uri(self.path)
        system, folder = self._remote
        return system, f"{folder.rstrip('/')}/{name}".rstrip("/")


def is_leftover(name: str) -> bool:
    """Return whether a file of this name is one that a killed process left here: half a write, a probe, or a lease."""
    return re.fullmatch(rf"\..+\.[0-9a-f]{{32}}\.tmp|\.probe-[0-9a-f]{{32}}|{LEASE.pattern}", name) is not None


def _kind(is_file: bool, is_folder: bool) -> str:
    return "file" if is_file else "folder" if is_folder else "other"


def _put(system: Any, path: str, data: bytes) -> None:
    with system.open_output_stream(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def readable(storage: Storage) -> Iterator[None]:
    """Turn what reading a folder raises into one line.

    Raises:
        StudyError: If the folder cannot be read, with the reason.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        cure = "" if storage.is_local else f" {remedy(error)}."
        said = f"A study's folder must be readable, but {storage.path} is not: {one_line(error)}."
        raise StudyError(f"{said}{cure}") from error


@contextlib.contextmanager
def writable(storage: Storage) -> Iterator[None]:
    """Turn what writing to a folder raises into one line.

    Raises:
        StudyError: If the folder cannot be written, with the path, the reason and a remedy.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        cure = "Check its permissions and free space" if storage.is_local else remedy(error)
        raise StudyError(
            f"A study folder must be writable, but {storage.path} is not: {one_line(error)}. "
            f"{cure}, or choose another folder."
        ) from error


def _from_uri(uri: str) -> tuple[Any, str]:
    """Return file system and path of a URI; tests put their own here."""
    try:
        system, path = fs.FileSystem.from_uri(uri)
    except (OSError, pa.ArrowException) as error:
        raise StudyError(
            f"A study folder is a local path or a URI that pyarrow knows, but got {uri!r}: {one_line(error)}."
        ) from error
    return system, str(path)
