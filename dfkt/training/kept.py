"""Files of what a teacher said to an epoch's batches, in the order of the steps: a reader maps one and takes row after row.

A file is whole or not there: it is written under another name and renamed at the end. Its head is one line of JSON, padded; then
one row per step, the same tensors in each; then a CRC-32 of every row. A file whose length, head or row is not as it should
be is deleted and not trusted. One process writes a file at a time; whoever else comes to that epoch computes it.

Files lie on a host's own disk, under a budget of bytes over all studies of that host. Those that were not read for the
longest time make room, but never files of the same set: every run reads an epoch after the other, so each file that made room
would be missed by the next run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1
HEAD = 4096
"""Bytes before the first row."""
SUFFIX = ".targets"
SHARE = 0.25
"""Of a disk's free space, what is kept already counted as free: the budget where none is given."""
RESERVE = 2**30
"""Bytes that stay free whatever the budget."""
Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class KeptSet:
    """The files of one set: what one teacher says to the batches of one seed, by epoch.

    Args:
        root: Folder of all sets of this host; the budget is theirs together.
        folder: The set's, below.
        budget: Bytes; ``None`` takes a quarter of what is free.
    """

    root: Path
    folder: Path
    budget: int | None = None

    def read(self, name: str, steps: int, entries: Sequence[str]) -> KeptFile | None:
        """Open a file, or return ``None``, if there is none; one that is damaged is deleted.

        Args:
            name: Of the file, such as ``flow-00003``.
            steps: Rows that it must have.
            entries: Names of the tensors in a row.
        """
        path = self.folder / f"{name}{SUFFIX}"
        try:
            file = KeptFile.open(path, steps, entries)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
            _delete(path)
            return None
        return file

    def write(self, name: str, steps: int) -> Writer | None:
        """Return a writer of a file, or ``None`` where another process writes it, or the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return Writer.begin(self, self.folder / f"{name}{SUFFIX}", steps)
        except OSError:
            return None

    def make_room(self, size: int) -> bool:
        """Delete files of other sets, those first that were not read for the longest time; say whether ``size`` bytes fit now."""
        sizes = {path: path.stat() for path in self.root.rglob(f"*{SUFFIX}")}
        kept = sum(stat.st_size for stat in sizes.values())
        free = shutil.disk_usage(self.root).free
        budget = int(SHARE * (free + kept)) if self.budget is None else self.budget
        over = max(kept + size - budget, size + RESERVE - free)
        others = sorted((stat.st_mtime, path) for path, stat in sizes.items() if path.parent != self.folder)
        if over > sum(sizes[path].st_size for _, path in others):
            return False
        for _, path in others:
            if over <= 0:
                break
            _delete(path)
            over -= sizes[path].st_size
        return over <= 0


@dataclass(frozen=True, eq=False)
class KeptFile:
    """A file that is whole, mapped into memory."""

    path: Path
    mapped: Tensor
    entries: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    sums: Any

    @classmethod
    def open(cls, path: Path, steps: int, names: Sequence[str]) -> KeptFile:
        """Map a file.

        Raises:
            OSError: If it cannot be read.
            ValueError, LookupError, TypeError: If it is not what it should be.
        """
        with path.open("rb") as file:
            head = json.loads(file.read(HEAD))
            size = os.fstat(file.fileno()).st_size
        entries = tuple((str(n), tuple(map(int, shape)), getattr(torch, kind)) for n, shape, kind in head["entries"])
        row = row_bytes(entries)
        if (
            (head["format"], head["steps"]) != (FORMAT, steps)
            or [n for n, *_ in entries] != list(names)
            or size != HEAD + steps * (row + 4)
        ):
            raise ValueError(f"{path} is not whole.")
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return cls(path, mapped, entries, mapped[size - 4 * steps :].numpy().view("<u4"))

    def row(self, step: int) -> dict[str, Tensor] | None:
        """Return a step's tensors, on the CPU, as views of the file; ``None``, if they are damaged: the file is deleted then."""
        size = row_bytes(self.entries)
        raw = self.mapped[HEAD + step * size : HEAD + (step + 1) * size]
        if zlib.crc32(raw.numpy().data) != int(self.sums[step]):
            _delete(self.path)
            return None
        found, at = {}, 0
        for name, shape, kind in self.entries:
            length = _bytes(shape, kind)
            found[name] = raw[at : at + length].view(kind).view(shape)
            at += length
        return found


class Writer:
    """One file on its way; rows come in the order of the steps. A disk that is full ends it without a word."""

    def __init__(self, kept: KeptSet, path: Path, steps: int, file: IO[bytes]) -> None:
        self.kept, self.path, self.steps, self.file = kept, path, steps, file
        self.sums: list[int] = []

    @classmethod
    def begin(cls, kept: KeptSet, path: Path, steps: int) -> Writer | None:
        """Take the file's other name; ``None`` if a living process has it. What a dead one left is written over."""
        part = path.with_suffix(".part")
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino == part.stat().st_ino:  # it was not renamed since it was opened
                file.truncate()
                return cls(kept, path, steps, file)
        file.close()
        return None

    @property
    def part(self) -> Path:
        """The name under which it is written."""
        return self.path.with_suffix(".part")

    def add(self, rows: Rows) -> bool:
        """Write a step's tensors, which lie on the CPU; the last step makes the file whole. Says whether it goes on."""
        try:
            if not self.sums and not self._begin(rows):
                self.abandon()
                return False
            data = [tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data for tensor in rows.values()]
            total = 0
            for part in data:
                total = zlib.crc32(part, total)
                self.file.write(part)
            self.sums.append(total)
            if len(self.sums) == self.steps:
                self._end()
        except OSError:
            self.abandon()
            return False
        return not self.file.closed

    def abandon(self) -> None:
        """Delete what was written."""
        if not self.file.closed:
            _delete(self.part)
            with contextlib.suppress(OSError):
                self.file.close()

    def _begin(self, rows: Rows) -> bool:
        entries = [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in rows.items()]
        head = json.dumps({"format": FORMAT, "steps": self.steps, "entries": entries}).encode()
        size = sum(tensor.nbytes for tensor in rows.values())
        if len(head) > HEAD or not self.kept.make_room(HEAD + self.steps * (size + 4)):
            return False
        self.file.write(head.ljust(HEAD))
        return True

    def _end(self) -> None:
        self.file.write(np.array(self.sums, "<u4").tobytes())
        self.file.flush()
        os.replace(self.part, self.path)
        self.file.close()


def row_bytes(entries: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> int:
    """Return the bytes of one row."""
    return sum(_bytes(shape, kind) for _, shape, kind in entries)


def _bytes(shape: Sequence[int], kind: torch.dtype) -> int:
    return int(np.prod(shape)) * kind.itemsize


def delete_kept(folder: Path) -> None:
    """Delete the sets below a folder, and nothing that is not such a file."""
    for path in (*folder.rglob(f"*{SUFFIX}"), *folder.rglob("*.part")):
        _delete(path)
    for path in sorted(folder.rglob("*"), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
