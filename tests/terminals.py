"""A real terminal for tests."""

import contextlib
import os
import select
import sys
import termios
from collections.abc import Callable, Iterator

import pytest


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[Callable[[], str]]:
    """Make ``stderr`` a terminal of some columns; yields what returns all that was written to it since the last call."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    with open(slave, "w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        yield lambda: b"".join(_pieces(master)).decode()
    os.close(master)


def _pieces(master: int) -> Iterator[bytes]:
    """Read until nothing more comes: the kernel hands on what was written a little later, and in pieces."""
    while select.select([master], [], [], 0.5)[0]:
        yield os.read(master, 10_000)
