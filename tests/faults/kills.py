"""Kill a small study at random instants, go on with it, and see that nothing is lost: until that was done often enough.

    cd tests && python -m faults.kills --seed 1 --count 100

A study of digits with three arms (a search, confirmations, final runs) is begun; at a random instant one of the following is
killed by SIGKILL, and the study gone on with by the same command or by ``resume``, until it has come to its end. Then the next
one is begun. What is killed: ``main`` (the command's own process), ``everything`` (it and all of Ray at once), ``worker`` (a
process that trains; the study goes on by itself), ``raylet`` and ``gcs`` (the two daemons of Ray).

After each kill every file must be readable and what was finished be as it was; when a study has ended each run must be there
once with all its epochs, none of those done again that a checkpoint had, all measurements equal to those of runs that
nothing happened to, and no process left. A line per kill, then a table; exit code 1 if anything was otherwise.

Where namespaces are allowed (root, Linux) all of it happens in a PID and mount namespace of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.command import PARTS, Command, alone_on_the_machine
from faults.small import FOREIGN_LINES, SmallStudy

if __name__ == "__main__":  # it begins this program anew, so before what takes seconds to import
    alone_on_the_machine()

from faults.checks import Run, Seen, Undisturbed, checkpoints, faults_at_end, faults_of_files, faults_since, look
from psutil import NoSuchProcess, Process

CHANCES = {"main": 35, "everything": 25, "worker": 25, "raylet": 8, "gcs": 7}
WHILE_STARTING = 0.25
"""Share of the kills that come before a command has begun a run."""
SHORTER, LONGER = 0.7, 1.1
"""By which the seconds for the others change after a command that ended before its kill, and after one that did not."""
CONNECTED = "Ray's dashboard: "
"""A line of a command whose Ray has started; before it, Ray's C++ part ends a process whose Ray dies, without a word."""
RESUMED = 0.5
"""Share of the studies that go on by ``resume``, not by the command that began them."""
ENDS_WITHIN, GONE_WITHIN = 300.0, 60.0
"""Seconds: for a command to begin its runs, or to end when all was done or a part of Ray lost; for its processes to go."""
NOT_STARTED, TRIES = "failed: could not start Ray on this machine", 3
"""A busy machine, not a fault of a study: the same command is given again."""


@dataclass(frozen=True)
class Plan:
    """What is killed and when; all of a script's kills are drawn before the first one, so that a seed says them.

    Attributes:
        kind: What is killed.
        early: While the command starts, not when it has begun a run.
        share: How much of the seconds within which it may come are over then.
        resumed: Whether ``resume`` goes on with the study, not the command that began it.
    """

    kind: str
    early: bool
    share: float
    resumed: bool

    @classmethod
    def draw(cls, rng: random.Random, kinds: Sequence[str]) -> Plan:
        """Return a random one."""
        (kind,) = rng.choices(kinds, [CHANCES[kind] for kind in kinds])
        return cls(kind, rng.random() < WHILE_STARTING and kind != "worker", rng.random(), rng.random() < RESUMED)


@dataclass
class Kill:
    """One kill and what came of it.

    Attributes:
        kind: What was killed.
        study: In which study, counted from 1.
        age: Seconds since its command was given.
        working: Seconds since it began a run; ``None`` before.
        before: The tables, just before.
        going: Runs that its command had begun, or begun again, and that had not ended.
        at: The clock, when.
        left: Seconds until no process was there any more; ``None`` where the study went on.
        went_on: Seconds until a run was begun, or begun again; ``None`` if the next kill came before.
        again: Of those that were going on, the runs that were taken up again: of each at most the epoch that it was in.
    """

    kind: str
    study: int
    age: float
    working: float | None
    before: Seen
    going: list[Run]
    at: float
    left: float | None = None
    went_on: float | None = None
    again: int = 0

    def follow(self, seen: Seen) -> None:
        """Note how far work has gone on."""
        again = [run for run in self.going if seen.attempts(run) > self.before.attempts(run)]
        if self.kind == "worker":  # other runs may begin meanwhile; its own may have ended just before it was killed
            went_on = bool(again) or not set(self.going) & set(seen.running)
        else:
            went_on = any(seen.attempts(run) > self.before.attempts(run) for run in seen.rows)
        self.again = len(again)
        if went_on and self.went_on is None:
            self.went_on = time.monotonic() - self.at

    def __str__(self) -> str:
        when = "while it started" if self.working is None else f"{self.working:.1f} s after its first run began"
        gone = "" if self.left is None else f"processes gone after {self.left:.1f} s, "
        went_on = (
            "killed again before work went on" if self.went_on is None else f"work went on after {self.went_on:.1f} s"
        )
        done, going = len(self.before.finished), len(self.going)
        return (
            f"study {self.study}: {self.kind} killed {self.age:.1f} s old, {when}; {done} runs done, {going} going on; "
            f"{gone}{went_on}, {self.again} taken up again"
        )


@dataclass
class Killing:
    """Studies that are killed.

    Args:
        base: A folder for all that is written.
        plans: Of all kills, in their order.
    """

    base: Path
    plans: Sequence[Plan]
    kills: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    studies: int = 0
    starting: float = 15.0
    """Seconds that the latest command took to begin a run."""
    working: float = 10.0
    """Seconds behind that within which a command is killed."""

    @property
    def next(self) -> Plan | None:
        """The next kill; ``None`` when all are done."""
        done = len(self.kills)
        return self.plans[done] if done < len(self.plans) else None

    def run(self) -> None:
        """Kill studies until all kills are done; the last study is still brought to its end."""
        undisturbed = Undisturbed(self.base / "undisturbed")
        while self.next:
            self.studies += 1
            began, before = time.monotonic(), (len(self.kills), len(self.faults))
            study = _Study(self.base / f"study-{self.studies}", self)
            if study.run():
                self.faults += faults_at_end(study.folder, study.kept) + undisturbed.faults(study.folder)
            wrong = self.faults[before[1] :]
            seconds, kills = time.monotonic() - began, len(self.kills) - before[0]
            _say(f"study {self.studies}: at its end after {kills} kills and {seconds:.0f} s, {len(wrong)} faults")
            for fault in wrong:
                _say(f"  FAULT {fault}")
            if not wrong:
                shutil.rmtree(study.folder.parent)

    def table(self) -> str:
        """Return what all kills came to, by what was killed."""
        lines = [
            "| killed | times | before a run began | median (longest) s until work went on | runs taken up again | faults |"
        ]
        lines.append("|---|---|---|---|---|---|")
        for kind in CHANCES:
            kills = [kill for kill in self.kills if kill.kind == kind]
            seconds = [kill.went_on for kill in kills if kill.went_on is not None]
            shown = f"{statistics.median(seconds):.0f} ({max(seconds):.0f})" if seconds else ""
            early = sum(kill.working is None for kill in kills)
            lines.append(f"| {kind} | {len(kills)} | {early} | {shown} | {sum(kill.again for kill in kills)} |  |")
        lines.append(f"| all | {len(self.kills)} | | | | {len(self.faults)} |")
        return "\n".join(lines)


class _Study:
    """One study on its way to its end.

    Args:
        place: A folder for it, its teacher and its lines.
        killing: Whose study it is.
    """

    def __init__(self, place: Path, killing: Killing) -> None:
        self.small, self.killing = SmallStudy(place), killing
        self.folder = self.small.folder
        self.kept: dict[str, list[dict[str, Any]]] = {}
        self.latest: Kill | None = None
        self.begun: float | None = None
        self.found = Seen({}, {})
        """The tables when the latest command was given."""
        self.ended_by_us = False

    def run(self) -> bool:
        """Give the command until the study is at its end, and kill on the way; return whether it came to its end."""
        tries = TRIES
        while tries:
            command = self._command()
            while command.code is None and (plan := self.killing.next):
                self._kill(command, plan)
            self._wait(command, 3 * ENDS_WITHIN)
            if self.ended_by_us:
                continue
            self._gone(command)
            if command.code == 0:
                self._close(over=True)
                return True
            (last,) = command.text.strip().splitlines()[-1:] or [""]
            _say(f"study {self.killing.studies}: the command ended with {command.code}: {last}")
            tries = tries - 1 if last.startswith(NOT_STARTED) else 0
        self._fault("the command ended, or had to be ended, though nothing was killed")
        return False

    def _command(self) -> Command:
        self.begun, self.ended_by_us, self.found = None, False, self._look()
        plan = self.killing.next
        resumed = (plan is None or plan.resumed) and (self.folder / "study.json").exists()
        return self.small.resume() if resumed else self.small.begin()

    def _wait(self, command: Command, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Wait until something holds, or the command ends; look meanwhile how far work has gone on."""

        def looked() -> bool:
            seen = self._look()
            if self.begun is None and any(seen.attempts(run) > self.found.attempts(run) for run in seen.running):
                self.begun, self.killing.starting = time.monotonic(), command.age
            return until()

        command.wait(seconds, looked)

    def _look(self) -> Seen:
        seen = look(self.folder)
        if self.latest is not None:
            self.latest.follow(seen)
        return seen

    def _kill(self, command: Command, plan: Plan) -> None:
        """Wait for a random instant and kill, if the command has not ended by then."""
        kind, victims = plan.kind, list[Process]()
        if not plan.early:
            self._wait(command, ENDS_WITHIN, lambda: self.begun is not None)
        self._wait(command, plan.share * (self.killing.starting if plan.early else self.killing.working))
        if kind in PARTS:
            self._wait(command, ENDS_WITHIN, lambda: bool(command.find(kind)))
            victims = command.find(kind)
        before = self._look()
        if command.code is None and (victims or kind not in PARTS):
            self._close()
            now = time.monotonic()
            working = None if self.begun is None else now - self.begun
            going = [run for run in before.running if before.attempts(run) > self.found.attempts(run)]
            self.latest = Kill(kind, self.killing.studies, command.age, working, before, going, now)
            self.killing.kills.append(self.latest)
            self.killing.working *= LONGER
            self._strike(command, kind, victims)
            self._check(command)
        elif command.code is not None:
            self.killing.working *= SHORTER

    def _strike(self, command: Command, kind: str, victims: list[Process]) -> None:
        """Kill; wait for what must come of it."""
        assert self.latest is not None
        if kind == "everything":
            command.end()
        elif kind == "main":
            command.process.kill()
        else:
            with contextlib.suppress(NoSuchProcess):
                victims[0].kill()
        if kind == "worker":  # else the next kill could be taken for this one
            self._wait(command, ENDS_WITHIN, lambda: self.latest is not None and self.latest.went_on is not None)
        else:
            command.wait(ENDS_WITHIN)
            if command.code is None:
                self._fault(f"the command has not ended {ENDS_WITHIN:.0f} s later")
            self._gone(command)
            self.latest.left = time.monotonic() - self.latest.at
            self.ended_by_us = True
        told = command.code == 0 or (command.code == 1 and command.says("failed: "))
        if kind in ("raylet", "gcs") and command.says(CONNECTED) and not told:
            self._fault(f"exit code {command.code}, and no line that says why: {command.text[-300:]!r}")

    def _gone(self, command: Command) -> None:
        """See that no process is left."""
        for left in command.left_after(GONE_WITHIN, but=PARTS["agent"]):
            self._fault(f"left behind for {GONE_WITHIN:.0f} s: {left}")
        command.end()

    def _check(self, command: Command) -> None:
        """See that a kill has damaged nothing."""
        assert self.latest is not None
        told = sum(line.startswith("[") for line in self.small.log.read_text(errors="replace").splitlines())
        after = look(self.folder)
        found = faults_of_files(self.folder) + faults_since(self.latest.before, after)
        if told > len(after.finished):
            found.append(f"{told} runs were told to be finished, but {len(after.finished)} are")
        if unwanted := re.search(FOREIGN_LINES, command.text):
            found.append(f"lines that are not for the user: {command.text[unwanted.start() :][:1000]!r}")
        for fault in found:
            self._fault(fault)
        for key, records in checkpoints(self.folder).items():
            self.kept[key] = max(self.kept.get(key, []), records, key=len)

    def _close(self, *, over: bool = False) -> None:
        """Say what came of the latest kill; after the last one there may have been nothing left to do."""
        if (kill := self.latest) is not None:
            self._look()
            if over and kill.went_on is None:
                kill.went_on = time.monotonic() - kill.at
            _say(f"kill {len(self.killing.kills)} of {len(self.killing.plans)}, {kill}")
        self.latest = None

    def _fault(self, text: str) -> None:
        kill = "" if self.latest is None else f", kill {len(self.killing.kills)} ({self.latest.kind})"
        self.killing.faults.append(f"study {self.killing.studies}{kill}: {text}")


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    """Kill as often as asked for; return 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of what is killed and when (default: 1)")
    parser.add_argument("--count", type=int, default=100, help="kills (default: 100)")
    parser.add_argument("--only", nargs="+", choices=CHANCES, default=[*CHANCES], help="kill nothing else")
    parser.add_argument(
        "--folder", type=Path, help="for all that is written; what is wrong stays there (default: a new one)"
    )
    given = parser.parse_args()
    base = (given.folder or Path(tempfile.mkdtemp(prefix="kills-"))).resolve()
    began = time.monotonic()
    rng = random.Random(given.seed)
    killing = Killing(base, [Plan.draw(rng, given.only) for _ in range(given.count)])
    killing.run()
    _say(f"\n{killing.table()}\n")
    _say(f"{len(killing.kills)} kills of {killing.studies} studies in {(time.monotonic() - began) / 60:.0f} min")
    _say(f"{len(killing.faults)} faults" + "".join(f"\n{fault}" for fault in killing.faults))
    return 1 if killing.faults else 0


if __name__ == "__main__":
    sys.exit(main())
