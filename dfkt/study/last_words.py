"""A line for a process that Ray ends without a word.

Ray's C++ part ends its process at once (``_exit(1)``) when something is asked of a raylet that is gone. Nothing in that process
can say so any more; a second one, this file, waits at a pipe until the first has ended.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

OVER = "over"


@contextlib.contextmanager
def last_words(line: str) -> Iterator[Callable[[str], None]]:
    """Say a line, on stderr, if this process ends in here because the raylet of this machine is gone.

    A process that is killed is not spoken for: its raylet ends later than it.

    Args:
        line: To be said.

    Yields:
        What is to be told of the raylet's socket.
    """
    # A session of its own: Ctrl-C and what ends all processes of a job are this process's to answer.
    second = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, line], stdin=subprocess.PIPE, text=True, start_new_session=True
    )

    def tell(text: str) -> None:
        assert second.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it was killed
            second.stdin.write(f"{text}\n")
            second.stdin.flush()

    try:
        yield tell
    finally:
        tell(OVER)
        with contextlib.suppress(OSError):
            second.communicate()


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as asking:
        try:
            asking.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def _wait(line: str) -> None:
    told = []
    for text in sys.stdin:  # until all who could write have ended, or it is over: a child of theirs may live on
        told.append(text.rstrip("\n"))
        if told[-1] == OVER:
            return
    if told and not _listens(told[0]):
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    _wait(sys.argv[1])
