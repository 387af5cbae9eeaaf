"""Single faults on one machine: each is done to a small study, which must lose nothing by it and come to its end.

    cd tests && python -m faults.single --only terminated-in-search hanging

A line per fault: what was done, how the command ended, how many seconds it took; exit code 1 if anything was lost, changed,
done twice, left behind, or printed that is not for the user. Where namespaces are allowed (root, Linux), all of it happens
in a PID and mount namespace of its own; some faults need them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from faults.command import Command, alone_on_the_machine, in_namespaces
from faults.small import BEGINS, FOREIGN_LINES, SmallStudy

if __name__ == "__main__":  # it begins this program anew, so before what takes seconds to import
    alone_on_the_machine()

from faults.checks import Seen, Undisturbed, faults_at_end, faults_of_files, faults_since, look

WITHIN = 300.0
"""Seconds for a command to come to a place, or to its end."""
FINISHED_IN = {"trial": 1, "final": 7}
"""Runs that have ended before a fault, by the kind of run in whose time it falls."""
FORGOTTEN_AFTER = 180.0
"""Seconds in which Ray's agents notice that nothing of their Ray is there any more."""


class Faulted:
    """A study, and what is found wrong with it.

    Args:
        place: A folder for all of it.
        undisturbed: Knows what its runs measure without a fault.
    """

    def __init__(self, place: Path, undisturbed: Undisturbed) -> None:
        self.study, self.undisturbed, self.wrong = SmallStudy(place), undisturbed, list[str]()
        self.said: list[str] = []

    def begun(self, *more: str, finished: int = 1) -> tuple[Command, Seen]:
        """Return the command in the midst of its runs, of which some have ended, and the tables then."""
        command, folder = self.study.begin(*more), self.study.folder
        there = command.wait(WITHIN, lambda: command.says(BEGINS) and self._amid(look(folder), finished))
        self.check(there, f"not in the midst of its runs: {command.text[-500:]!r}")
        return command, look(folder)

    @staticmethod
    def _amid(seen: Seen, finished: int) -> bool:
        return len(seen.finished) >= finished and bool(seen.running)

    def ended(self, command: Command, code: int, before: Seen, *, words: str = "") -> None:
        """See how a command ended, that nothing was lost, and that no process is left."""
        command.wait(WITHIN)
        self.check(command.code == code, f"exit code {command.code}, not {code}: {command.text[-500:]!r}")
        self.check(re.search(words, command.text) is not None, f"it did not say {words!r}: {command.text[-500:]!r}")
        foreign = re.search(FOREIGN_LINES, command.text)
        self.check(
            foreign is None, f"lines that are not for the user: {command.text[foreign.start() if foreign else 0 :]!r}"
        )
        left = command.left_after(30)
        self.check(not left, f"left behind: {left}")
        command.end()
        self.wrong += faults_of_files(self.study.folder) + faults_since(before, look(self.study.folder))

    def goes_on(self) -> None:
        """Go on with the study, to its end."""
        before = look(self.study.folder)
        self.ended(self.study.resume(), 0, before)
        self.completed()

    def completed(self) -> None:
        """See that a study that has ended lacks nothing."""
        self.wrong += faults_at_end(self.study.folder, {})
        self.wrong += self.undisturbed.faults(self.study.folder)

    def check(self, holds: bool, otherwise: str) -> None:
        """Note what is wrong, if something does not hold."""
        if not holds:
            self.wrong.append(otherwise)

    def measured(self, what: str, since: float) -> None:
        """Note how long something took."""
        self.said.append(f"{what} after {time.monotonic() - since:.1f} s")


def started_twice(it: Faulted) -> None:
    """The second command is refused on one line, and the first goes on as if there had been none."""
    command, lock = it.study.begin(), it.study.folder / ".lock"
    command.wait(WITHIN, lambda: lock.exists() and bool(lock.read_text()))
    since = time.monotonic()
    second = it.study.begin(log=it.study.place / "second.txt")
    second.wait(WITHIN)
    it.measured("the second was refused", since)
    it.check(
        (command.code, second.code) == (None, 2), f"the first ended with {command.code}, the second with {second.code}"
    )
    told = f"error: The study folder {it.study.folder} is in use by process "
    it.check(second.text.startswith(told) and second.text.count("\n") == 1, f"the second said {second.text!r}")
    it.ended(command, 0, look(it.study.folder))
    it.completed()


def terminated(it: Faulted, *, kind: str = "trial", group: bool = False) -> None:
    """SIGTERM, to the command alone or to its whole process group, is treated like Ctrl-C."""
    command, before = it.begun(finished=FINISHED_IN[kind])
    it.check(any(run[0] == kind for run in before.running), f"no {kind} is going on")
    since = time.monotonic()
    if group:
        os.killpg(command.process.pid, signal.SIGTERM)
    else:
        command.process.terminate()
    it.ended(command, 143, before, words="(?m)^interrupted; what was finished is kept")
    it.measured("all its processes were gone", since)
    it.goes_on()


def hanging(it: Faulted) -> None:
    """A worker that is stopped, not dead, is ended when it has been silent for too long, and its run taken up again."""
    command, before = it.begun("--silence", "0.5")
    command.wait(WITHIN, lambda: bool(command.find("worker")))
    (worker, *_) = command.find("worker")
    since = time.monotonic()
    worker.send_signal(signal.SIGSTOP)
    said = command.wait(WITHIN, lambda: command.says(r"\S+: no report for 0.5 min \(--silence\); its process is ended"))
    it.measured("its silence was noticed", since)
    it.check(said, "nobody noticed that it hangs")
    it.check(
        command.wait(WITHIN, lambda: command.says(".*it starts again from its last checkpoint")), "not begun again"
    )
    it.measured("its run was taken up again", since)
    it.ended(command, 0, before)
    it.completed()


def read_only(it: Faulted) -> None:
    """A storage that is read-only for a while ends the study on one line; the same command goes on when it is writable."""
    command, before = it.begun()
    folders = [path for path in it.study.folder.iterdir() if path.is_dir() and path.name != "ray"]
    since = time.monotonic()
    for folder in folders:  # not the study's folder itself: its lock is open for writing
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    it.ended(
        command, 1, before, words="(?m)^failed: storage read-only: .*; make it writable, then the same command goes on$"
    )
    it.measured("it had ended", since)
    for folder in folders:
        subprocess.run(["umount", folder], check=True)
    it.goes_on()


def orphaned(it: Faulted) -> None:
    """When the command was killed all of its Ray goes by itself, its agents last."""
    command, before = it.begun()
    since = time.monotonic()
    command.process.kill()
    left = command.left_after(FORGOTTEN_AFTER)
    it.measured("the last process was gone", since)
    it.check(not left, f"left behind: {left}")
    it.ended(command, -signal.SIGKILL, before)
    it.goes_on()


FAULTS: dict[str, Callable[[Faulted], None]] = {
    "started-twice": started_twice,
    "terminated-in-search": terminated,
    "terminated-in-finals": lambda it: terminated(it, kind="final"),
    "terminated-as-group": lambda it: terminated(it, group=True),
    "hanging": hanging,
    "read-only": read_only,
    "orphaned": orphaned,
}
NEED_NAMESPACES = ("read-only",)


def main() -> int:
    """Do each fault that is asked for; return 1 if anything was wrong after one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=[*FAULTS], help="do nothing else")
    parser.add_argument("--folder", type=Path, help="for all that is written (default: a new one)")
    given = parser.parse_args()
    base = (given.folder or Path(tempfile.mkdtemp(prefix="faults-"))).resolve()
    failed, undisturbed = 0, Undisturbed(base / "undisturbed")
    for name in given.only:
        if name in NEED_NAMESPACES and not in_namespaces():
            print(f"{name}: left out, for it needs to mount", flush=True)
            continue
        it = Faulted(base / name, undisturbed)
        FAULTS[name](it)
        failed += bool(it.wrong)
        print(f"{name}: {'; '.join(it.said)}; {len(it.wrong)} faults", *it.wrong, sep="\n  FAULT ", flush=True)
        if not it.wrong:
            shutil.rmtree(it.study.place)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
