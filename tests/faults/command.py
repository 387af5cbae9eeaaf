"""A command with all processes that come of it, so that any of them can be killed, and none but them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
ADOPTS_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER of Linux
LOOKS_EVERY = 0.25
"""Seconds."""
PARTS = {
    "worker": r"ray::.*train",  # an actor of Tune in which a run is being trained
    "raylet": r"\S*/raylet/raylet( |$)",
    "gcs": r"\S*/gcs_server( |$)",
    "agent": r"ray::(Dashboard|RuntimeEnv)Agent",  # of a raylet: they try for a minute to tell a dead GCS of its death
}
"""By name, how the command line of a part of Ray begins."""


NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
RAYS_FOLDER = Path("/tmp/ray")
INSIDE = "DFKT_FAULTS_IN_NAMESPACES"


def alone_on_the_machine() -> None:
    """Go on as the first process of a PID and a mount namespace, with a ``/tmp/ray`` of its own, where this user may.

    Elsewhere this process stays where it is, and its processes are told apart from others by their descent alone.
    """
    if INSIDE not in os.environ and _namespaces_allowed():
        os.environ[INSIDE] = "1"
        os.execvp("unshare", [*NAMESPACES, *sys.orig_argv])
    if in_namespaces():
        RAYS_FOLDER.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(RAYS_FOLDER)], check=True)
    ctypes.CDLL(None).prctl(ADOPTS_ORPHANS, 1, 0, 0, 0)


def in_namespaces() -> bool:
    """Whether this process is alone, and may mount what it likes."""
    return INSIDE in os.environ


def _namespaces_allowed() -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode == 0
    return False


class Command:
    """``python -m dfkt …`` in a session of its own, its lines in a file.

    Args:
        arguments: Behind ``dfkt``.
        log: Receives its lines, behind those that are there.
        home: Its home folder.
    """

    def __init__(self, arguments: Sequence[str], log: Path, home: Path) -> None:
        self.log, self._skipped = log, log.stat().st_size if log.exists() else 0
        home.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment.pop("RAY_ADDRESS", None)
        self.began = time.monotonic()
        with log.open("ab") as lines:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dfkt", *arguments],
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=lines,
                stderr=lines,
                start_new_session=True,
            )

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.began

    @property
    def code(self) -> int | None:
        """Its exit code, ``None`` while it runs."""
        return self.process.poll()

    @property
    def text(self) -> str:
        """What it has printed so far."""
        with self.log.open("rb") as lines:
            lines.seek(self._skipped)
            return lines.read().decode(errors="replace")

    def says(self, pattern: str) -> bool:
        """Whether a line of it begins with a pattern."""
        return re.search(f"^{pattern}", self.text, re.MULTILINE) is not None

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until something holds; return whether it came to hold before the command's end and within some seconds."""
        limit = time.monotonic() + seconds
        while self.code is None and time.monotonic() < limit:
            if until():
                return True
            time.sleep(LOOKS_EVERY)
        return False

    def all(self) -> list[psutil.Process]:
        """Return its living processes, Ray's daemons and those whose parent is gone counted in."""
        alive = []
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    alive.append(child)
                elif child.pid != self.process.pid and child.ppid() == os.getpid():
                    os.waitpid(child.pid, os.WNOHANG)  # an orphan that was adopted
        return alive

    def find(self, part: str) -> list[psutil.Process]:
        """Return its living processes that are one of Ray's parts (:data:`PARTS`)."""
        return [process for process in self.all() if re.match(PARTS[part], _line(process))]

    def end(self) -> None:
        """Kill all its processes, until there is none; what its Ray wrote into a folder of its own goes too."""
        while found := self.all():
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self.process.wait()
        for session in RAYS_FOLDER.glob("session_*") if in_namespaces() else ():
            shutil.rmtree(session, ignore_errors=True)

    def left_after(self, seconds: float, but: str = "$") -> list[str]:
        """Wait until its processes have gone; return what was left of them after some seconds.

        Args:
            seconds: To wait at most.
            but: How command lines begin that do not count.
        """
        limit = time.monotonic() + seconds
        while left := [line for line in map(_line, self.all()) if line and not re.match(but, line)]:
            if time.monotonic() >= limit:
                break
            time.sleep(LOOKS_EVERY)
        return [line[:80] for line in left]


def _line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
