"""Break a cluster of two hosts while a study runs on it, and measure what that costs: a row of a Markdown table each.

``PYTHONPATH=tests python tests/cluster/faults.py --seed 1 alone:worker:task group:cut-30:flow …``

A fault is ``RUNS:WHAT:WHEN``, or ``all`` of them. RUNS: ``alone``, two runs of one worker, one on each host; ``group``, a run of
two workers, one on each host; ``elastic``, a run of one or two. WHAT is broken on the second host, or on the head:
:data:`FAULTS`. WHEN: in a ``flow`` stage, in the ``task`` stage, or while a ``checkpoint`` is written.

Ray is started anew for every fault, by ``ray start``. The shared folder does not go through the network that is cut: a host
without a network still writes there, as to a remote store that it reaches though its cluster does not reach it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from cluster.laboratory import Laboratory, LaboratoryError, end, wait_for, why_impossible
from cluster.own_hosts import PROFILE, OwnHosts, folder_of, study_command

from dfkt.store.files import Storage
from dfkt.store.study_store import read_study
from dfkt.training.state import STATE_FILE, load_state

RUNS = {
    "alone": ("--seeds 2", 2, 300),
    "group": ("--seeds 1 --workers-per-run 2", 1, 60),
    "elastic": ("--seeds 1 --workers-per-run 1..2 --placement spread", 1, 60),
}
"""Switches, how many runs a study then has, and their epochs: half a minute's or more."""
FAULTS = ("worker", "driver", "controller", "raylet", "cut-30", "cut", "gcs")
MOMENTS = ("flow", "task", "checkpoint")
TITLES = {
    "alone": {"worker": "ray::ImplicitFunc"},
    "group": {"worker": "ray::RayTrainWorker", "driver": "ray::ImplicitFunc", "controller": "ray::TrainController"},
}
"""How Ray names the processes of a run."""
CUT_SECONDS = 30.0
LEAST, MOST = 4, 12
"""Between which epochs of its stage a run is broken."""
SWITCHES = "--method dfkt --set share=0.5 rounds=1 --epochs {epochs} --keep-targets 0 --wait 1"
HEADER = (
    "| runs | broken | when | work went on after | epochs done again | runs lost | exit code | lines seen, of them traceback |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass
class Place:
    """Where a run stood when its checkpoint was read, and when that was."""

    at: float
    attempt: int
    record: int
    epoch: float
    phase: str


@dataclass
class Watched:
    """The checkpoints of a study's runs, read as they are written, until it is told to end.

    Args:
        folder: The study's.
    """

    folder: Path
    places: dict[str, list[Place]] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Read until the end; a file that cannot be read is one too many."""
        seen: dict[Path, int] = {}
        while not self.over.wait(0.05):
            for file in self.folder.glob(f"students/*/{STATE_FILE}"):
                try:
                    changed = file.stat().st_mtime_ns
                    if seen.get(file) == changed:
                        continue
                    seen[file], state = changed, load_state(Storage(file.parent))
                except OSError:  # the run ended
                    continue
                if state is not None:
                    self._note(file.parent.name, state)

    def _note(self, run: str, state: dict[str, Any]) -> None:
        last = state["history"][-1]
        place = Place(time.monotonic(), state["clock"]["attempts"], last["index"], last["epoch"], last["phase"])
        self.places.setdefault(run, []).append(place)


@dataclass(frozen=True)
class Fault:
    """What is broken, and when.

    Args:
        runs: What spans a run, as in :data:`RUNS`.
        what: One of :data:`FAULTS`.
        when: One of :data:`MOMENTS`.
    """

    runs: str
    what: str
    when: str

    @classmethod
    def read(cls, text: str) -> Fault:
        """Return the fault that a text such as ``alone:worker:task`` stands for."""
        parts = text.split(":")
        known = (RUNS, FAULTS, MOMENTS)
        if len(parts) != 3 or not all(part in names for part, names in zip(parts, known, strict=True)):
            raise argparse.ArgumentTypeError(f"a fault is RUNS:WHAT:WHEN, but got {text!r}")
        found = cls(*parts)
        if found.what in ("driver", "controller") and found.runs == "alone":
            raise argparse.ArgumentTypeError(f"a run of one worker has no {found.what}, but got {text!r}")
        return found

    @classmethod
    def all(cls) -> Iterator[Fault]:
        """Yield all faults that there are."""
        for runs in RUNS:
            for what in FAULTS:
                if runs != "alone" or what not in ("driver", "controller"):
                    yield from (cls(runs, what, when) for when in MOMENTS)

    def titles(self) -> dict[str, str]:
        """Return the titles of a run's processes, by role."""
        return TITLES["alone" if self.runs == "alone" else "group"]


class Broken:
    """One fault, from the start of its study to the study's end.

    Args:
        cluster: Where it happens; Ray runs on all hosts.
        fault: What is broken.
        name: The study's.
        epoch: Of its stage, in which a run is broken.
    """

    def __init__(self, cluster: OwnHosts, fault: Fault, name: str, epoch: float) -> None:
        self.cluster, self.fault, self.epoch = cluster, fault, epoch
        switches, self.count, self.epochs = RUNS[fault.runs]
        self.command = study_command(cluster.lab, name, SWITCHES.format(epochs=self.epochs), switches)
        self.folder, self.output = folder_of(cluster.lab, name), cluster.lab.folder / f"{name}.txt"
        self.watched, self.second = Watched(self.folder), cluster.others[0]
        self.mended_at = float("inf")

    def row(self, seconds: float) -> str:
        """Return the row that the fault makes of the table; a study that does not end in so many seconds is ended."""
        looking = threading.Thread(target=self.watched.look, daemon=True)
        study = self.cluster.head.start_command(self.command, self.output)
        looking.start()
        try:
            wait_for(lambda: self._is_due(study), 240, f"epoch {self.epoch:.1f} of the {self.fault.when} stage")
            victims = self._victims()
            if self.fault.when == "checkpoint":
                self._await_writing(victims)
            at = time.monotonic()
            self._break(victims)
            code = self._await_end(study, at + seconds)
        finally:
            end(study)
        said = self.output.read_text(errors="replace")
        if code != "0":
            self._go_on(seconds)
        self.watched.over.set()
        looking.join()
        return self._row(at, code, said)

    def _is_due(self, study: subprocess.Popen[bytes]) -> bool:
        if study.poll() is not None:
            raise LaboratoryError(f"the study ended before it was broken:\n{self.output.read_text()}")
        stood = [places[-1] for places in self.watched.places.values()]
        if self.fault.when == "flow":
            due = [place for place in stood if place.phase == "flow" and place.epoch >= self.epoch]
        else:
            due = [place for place in stood if place.epoch >= self.epochs / 2 + self.epoch]
        return len(due) == self.count

    def _victims(self) -> list[psutil.Process]:
        """Return the processes that are killed: none, where the network is cut."""
        found: list[psutil.Process] = []
        if self.fault.what.startswith("cut"):
            return found
        if self.fault.what == "gcs":
            found = self.cluster.head.find("gcs_server")
        elif self.fault.what == "raylet":
            found = self.second.find("/raylet/raylet")
        elif self.fault.what == "worker":
            found = self.second.find(self.fault.titles()["worker"])
        else:  # it may be on either host
            found = [
                one
                for host in self.cluster.lab.hosts.values()
                for one in host.find(self.fault.titles()[self.fault.what])
            ]
        if not found:
            raise LaboratoryError(f"there is no {self.fault.what} to kill")
        return found

    def _await_writing(self, victims: Sequence[psutil.Process]) -> None:
        """Wait until a checkpoint is being written: it gets its name when it is whole.

        Where the process that is killed writes checkpoints of its own, one of those.
        """
        own = self.fault.runs == "alone" and self.fault.what == "worker"
        until = time.monotonic() + 60
        while not any(map(holds_checkpoint, victims) if own else self.folder.glob(f"students/*/.{STATE_FILE}.*.tmp")):
            if time.monotonic() > until:
                raise LaboratoryError("no checkpoint was being written within 60 s")

    def _break(self, victims: Sequence[psutil.Process]) -> None:
        for process in victims:
            process.kill()
        if not victims:
            self.cluster.lab.cut(self.second)
        if self.fault.what == "cut-30":
            self.mended_at = time.monotonic() + CUT_SECONDS

    def _await_end(self, study: subprocess.Popen[bytes], until: float) -> str:
        """Return the study's exit code; the network is mended when its time has come."""
        while (code := study.poll()) is None and time.monotonic() < until:
            if time.monotonic() > self.mended_at:
                self.cluster.lab.mend(self.second)
                self.mended_at = float("inf")
            time.sleep(0.1)
        return "none: ended by hand" if code is None else str(code)

    def _go_on(self, seconds: float) -> None:
        """Give the same command again, on a cluster that is whole."""
        self.cluster.stop()
        self.cluster.start()
        again = self.cluster.head.start_command(self.command, self.output.with_suffix(".again.txt"))
        try:
            again.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"the same command does not end either within {seconds:g} s", file=sys.stderr)
        finally:
            end(again)

    def _row(self, at: float, code: str, said: str) -> str:
        went_on, again = self._cost(at)
        ended = read_study(str(self.folder)).finals
        lost = self.count - sum(ended.state == "COMPLETE")
        lines, traces = len(said.splitlines()), said.count("Traceback (most recent call last)")
        told = (went_on, again, lost, code, f"{lines}, {traces}")
        return f"| {self.fault.runs} | {self.fault.what} | {self.fault.when} | {' | '.join(map(str, told))} |"

    def _cost(self, at: float) -> tuple[str, str]:
        """Return seconds until the first checkpoint of a new attempt, and records that were made again."""
        for places in self.watched.places.values():
            before = [place for place in places if place.at <= at]
            later = [place for place in places if before and place.attempt > before[-1].attempt]
            if later:
                made = max(place.record for place in places if place.attempt == before[-1].attempt)
                return f"{later[0].at - at:.0f} s", str(max(made + 1 - later[0].record, 0))
        return "no run began again", "0"


def holds_checkpoint(process: psutil.Process) -> bool:
    """Whether a process is writing a checkpoint."""
    with contextlib.suppress(OSError):
        return any(f".{STATE_FILE}." in os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir())
    return False


def main() -> int:
    """Print a row for every fault that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="+", type=lambda text: None if text == "all" else Fault.read(text))
    parser.add_argument("--seed", type=int, default=1, help="says in which epoch a run is broken")
    parser.add_argument("--seconds", type=float, default=300.0, help="in which a study must end after its fault")
    parser.add_argument("--keep", type=Path, help="a new folder in which everything that was written is kept")
    a = parser.parse_args()
    if why := why_impossible():
        print(why, file=sys.stderr)
        return 1
    faults = [fault for given in a.faults for fault in ([given] if given else Fault.all())]
    draws = random.Random(a.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = a.keep or Path(folder) / "laboratory"
        place.mkdir()
        with Laboratory(place.absolute(), profile=f"{PROFILE}\nexport PATH={Path(sys.prefix) / 'bin'}:$PATH") as lab:
            cluster = OwnHosts(lab)
            print("\n".join(HEADER), flush=True)
            for number, fault in enumerate(faults):
                epoch = draws.uniform(LEAST, MOST)
                try:
                    cluster.start()
                    print(Broken(cluster, fault, f"fault{number}", epoch).row(a.seconds), flush=True)
                except LaboratoryError as error:
                    print(f"{fault} was not measured: {error}", file=sys.stderr)
                cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
