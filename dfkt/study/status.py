"""How far a queue of runs is, in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dfkt.study.driver import Run
from dfkt.study.queue import Queue
from dfkt.training.progress import Bar


class Status:
    """Counts the runs of a queue and times those that end in this session.

    Args:
        queue: Whose runs they are.
        clock: Returns seconds.

    Attributes:
        done: Runs that ended in this session.
    """

    def __init__(self, queue: Queue, clock: Callable[[], float]) -> None:
        self.queue, self.clock = queue, clock
        self.done = 0
        self._running: dict[Any, tuple[bool, float]] = {}
        self._took = {False: (0, 0.0), True: (0, 0.0)}  # by whether a run is never stopped: how many, their seconds
        self._best: dict[str, tuple[float, str]] = {}
        self._study = queue.studies[0].store.storage.path
        for arm in queue.arms.values():
            store, name = arm.study.store, arm.config.name
            for row in arm.rows():
                self._judge(store.storage.path, name, row)

    def begin(self, run: Run) -> None:
        """Count a run as running; a restart changes nothing."""
        self._running.setdefault(run.id, (run.kind != "trial", self.clock()))

    def end(self, run: Run, row: Mapping[str, Any]) -> None:
        """Count a run as done, with what its row says."""
        whole, begun = self._running.pop(run.id)
        if row["state"] in ("COMPLETE", "PRUNED"):
            count, seconds = self._took[whole]
            self._took[whole] = count + 1, seconds + self.clock() - begun
        self._study = run.study
        self._judge(run.study, run.arm, row)
        self.done += 1

    @property
    def bar(self) -> Bar:
        """Runs done, running now, the best ``val`` accuracy of the study whose run ended last, and the time left."""
        parts = [f"{len(self._running)} running"]
        if self._study in self._best:
            accuracy, arm = self._best[self._study]
            parts.append(f"best val {100 * accuracy:.2f} % ({arm})")
        left = self.seconds_left()
        said = ", ".join(parts if left is None else [*parts, f"about {_duration(left)} left"])
        names = [study.config.name for study in self.queue.studies]
        name = names[0] if len(names) == 1 else f"{len(names)} studies"
        return Bar(name, self.done, self.queue.total, "runs done", said)

    def seconds_left(self) -> float | None:
        """Estimate the seconds until the queue is over, from runs that ended in this session; ``None`` before one has."""
        if not any(count for count, _ in self._took.values()):
            return None
        now, arms = self.clock(), self.queue.arms.values()
        usual = {whole: self._usual(whole) for whole in (False, True)}
        running = [max(usual[whole] - (now - begun), 0.0) for whole, begun in self._running.values()]
        trials = sum(arm.trials_left for arm in arms)
        others = sum(arm.count for arm in arms) - trials
        waiting = trials * usual[False] + others * usual[True]
        waiting += sum(usual[id[2] != "trial"] for arm in arms for id in arm.running if id not in self._running)
        return max([(waiting + sum(running)) / max(len(running), 1), *running])

    def _usual(self, whole: bool) -> float:
        """Return the mean seconds of a trial, or of a run that is never stopped; those of the other kind until one has ended."""
        count, seconds = self._took[whole] if self._took[whole][0] else self._took[not whole]
        return seconds / count

    def _judge(self, study: str, arm: str, row: Mapping[str, Any]) -> None:
        accuracy = row.get("last_val_accuracy")
        if row["state"] == "COMPLETE" and accuracy is not None and accuracy > self._best.get(study, (-1.0, ""))[0]:
            self._best[study] = (accuracy, arm if len(self.queue.studies) == 1 else f"{study.rpartition('/')[2]} {arm}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds, -1), 10):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
