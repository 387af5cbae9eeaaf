"""A real terminal for tests."""

import contextlib
import os
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
        yield lambda: os.read(master, 10_000).decode()
    os.close(master)
