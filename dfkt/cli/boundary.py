"""Where the program meets the shell: what it prints, how it ends, and how errors, signals and lost streams look outside.

Exit codes: 0 done, 1 something failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM. What was not foreseen is one line with the
exception's name and place; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from dfkt.errors import DfktError, InputError, clipped, is_full, one_line, storage_error

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
LIBRARIES = r"(torch|torchvision|ray|optuna|pyarrow|pandas|numpy|PIL)(\.|$)"
"""Whose warnings are not for the user."""
LONGEST = 1200
"""Characters of an error's line: its end says what to do."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; every command has ``--debug``."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the switches, and where they are listed."""
        shown = " ".join(clipped(message).encode(errors="backslashreplace").decode().split())
        self.exit(EXIT_INPUT, f"error: {shown} ({self.prog} --help lists the switches)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print as all other lines are: in some Pythons argparse itself raises where nobody reads."""
        if message:
            _write(file or sys.stderr, message)


class _Ending:
    """What is known of how the process ends."""

    terminated = False
    lost: OSError | None = None


def guarded(action: Callable[[], int], argv: Sequence[str] | None = None) -> int:
    """Call an action; return the exit code that a shell expects, and say in one line what went wrong.

    Args:
        action: Returns an exit code.
        argv: What the command was given, ``sys.argv`` by default; only ``--debug`` is looked for.

    Raises:
        SystemExit: As argparse does, for help and for wrong switches.
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    _open_streams()
    _Ending.terminated, _Ending.lost = False, None
    parsed = True
    with warnings.catch_warnings(), _terminable():
        if not debug:
            warnings.filterwarnings("ignore", module=LIBRARIES)
        try:
            code = action()
        except SystemExit as ending:  # of argparse: help, the version, or a wrong switch
            code, parsed = int(ending.code or 0), False
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            code = _told(error)
        finally:
            for stream in (sys.stdout, sys.stderr):
                _write(stream, "")
    if code == EXIT_INTERRUPTED and _Ending.terminated:
        code = EXIT_TERMINATED
    if _Ending.lost is not None:
        _write(sys.stderr, f"failed: lines could not be written: {_Ending.lost.strerror}\n")
        code = code or EXIT_FAILED
    if not parsed:
        sys.exit(code)
    return code


def say(line: str) -> None:
    """Print a line at once; the work goes on when nobody can read it any more."""
    _write(sys.stdout, f"{line}\n")


def _told(error: BaseException) -> int:
    """Say what ended a command; return its exit code."""
    if isinstance(error, KeyboardInterrupt):
        _write(sys.stderr, "interrupted; what was finished is kept, and the same command goes on from there\n")
        return EXIT_INTERRUPTED
    if is_full(error):
        error = storage_error(error, ".")
    known = {InputError: ("error", EXIT_INPUT), DfktError: ("failed", EXIT_FAILED)}
    for kind, (word, code) in known.items():
        if isinstance(error, kind):
            _write(sys.stderr, f"{word}: {_shortened(' '.join(str(error).splitlines()))}\n")
            return code
    place = traceback.extract_tb(error.__traceback__)[-1]
    at = f"{Path(place.filename).name}:{place.lineno}"
    _write(sys.stderr, f"failed: not foreseen: {one_line(error)} ({at}); --debug shows the traceback\n")
    return EXIT_FAILED


def _shortened(text: str) -> str:
    """Return a text without its middle, if it is longer than any that was meant to be read."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C while the context lasts, also where a shell without job control ignores Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: Any) -> None:
        _Ending.terminated = True
        handler = signal.getsignal(signal.SIGINT)  # Tune has its own while it runs
        if callable(handler):
            handler(signal.SIGINT, frame)
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open_streams() -> None:
    """Open what a shell has closed (``2>&-``) on nothing: else the next file that is opened gets its lines."""
    for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _write(stream: TextIO, text: str) -> None:
    """Write to a stream; what cannot be written goes nowhere from then on."""
    try:
        stream.write(text.encode(stream.encoding or "utf-8", "backslashreplace").decode(stream.encoding or "utf-8"))
        stream.flush()
    except OSError as error:
        if error.errno != errno.EPIPE:  # a reader that has gone (`… | head`) had enough
            _Ending.lost = error
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
