"""What Tune tells while it runs -> rows of the study store, what Optuna is told, and the lines that a user reads."""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from dfkt.config import to_dict
from dfkt.errors import RunError
from dfkt.store.files import Storage
from dfkt.study.driver import Run
from dfkt.study.ended import now, outcome, summarise
from dfkt.study.failures import DIED, LOST, keep, told_by
from dfkt.study.queue import Arm, Queue
from dfkt.study.search import CLOCK, JUDGED, METRIC, noted
from dfkt.study.status import Status
from dfkt.training.loop import Record
from dfkt.training.progress import Progress, run_bar
from dfkt.training.run import Payload
from dfkt.training.state import STATE_FILE

Log = Callable[[str], None]
AGAIN = "it starts again from its last checkpoint"
ALIKE = 5
"""A study whose first so many runs, or a tenth of those on their way, fail with one and the same error ends."""


def ending(call: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what a method raises as its queue's end, after which it does nothing: Tune would take it for its run's failure."""

    @functools.wraps(call)
    def guarded(self: Any, *args: Any, **given: Any) -> Any:
        if self.queue.broken is None:
            try:
                return call(self, *args, **given)
            except Exception as error:
                self.queue.broken = error
        return None

    return guarded


class Ending(tune.Stopper):
    """Tune's stopper: ends all runs, as they are, once a queue is broken."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def __call__(self, trial_id: str, result: Payload) -> bool:
        """End no single run."""
        return False

    def stop_all(self) -> bool:
        """Whether all runs end."""
        return self.queue.broken is not None


class QueueSearcher(Searcher):
    """Tune's searcher: hands out what the queue says is next."""

    def __init__(self, queue: Queue) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.queue = queue

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next run; ``None`` while none can begin, ``FINISHED`` when none ever will."""
        run = self._next()
        if run is not None:
            return {"run": run}
        return str(Searcher.FINISHED) if self.queue.over or self.queue.broken else None

    @ending
    def _next(self) -> Run | None:
        return self.queue.next()

    def on_trial_complete(self, trial_id: str, result: Payload | None = None, error: bool = False) -> None:
        """Do nothing: the recorder is told, and tells Optuna."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out: Tune pickles its searcher."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study's folder is what a later run reads."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, likewise."""


class Recorder(tune.Callback):
    """Writes every run into its study's store as it starts and as it ends, and prints a line for each that ended.

    Args:
        queue: Whose runs they are.
        log: Receives the lines.
        clock: Returns seconds; the progress line follows it.
    """

    def __init__(self, queue: Queue, log: Log, clock: Callable[[], float] = time.monotonic) -> None:
        self.queue, self.log, self.clock = queue, log, clock
        self.rows: dict[Any, dict[str, Any]] = {}
        self.records: dict[Any, dict[int, Record]] = {}
        self.payloads: dict[Any, Payload] = {}
        self.status, self.progress = Status(queue, clock), Progress(clock)
        self.latest: dict[Any, tuple[Run, Record]] = {}
        self.errors: set[str | None] = set()
        self.deaths: Counter[Any] = Counter()
        queue.log = self.say

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out: Tune pickles its callbacks."""
        return {}

    @ending
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the row of a running run; a restart adds an attempt."""
        self._begin(trial.config["run"])

    def _begin(self, run: Run) -> None:
        config = run.job.config
        interrupted = self.queue.arm_of(run).interrupted.pop((run.kind, run.number), None)
        old = self.rows.get(run.id) or interrupted or {"attempts": 0, "started": now()}
        row: dict[str, Any] = {"number": run.number, "state": "RUNNING", "method": config.method.name}
        row |= {"seed": config.train.seed, "key": config.key, "settings": json.dumps(to_dict(config.method))}
        row |= {f"param_{name}": value for name, value in run.params.items()}
        row |= {"attempts": old["attempts"] + 1, "started": old["started"]}
        self.rows[run.id] = row
        self._save(run, row, ())
        self.status.begin(run)

    @ending
    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Payload, **info: Any) -> None:
        """Keep what a run reports until it ends."""
        run: Run = trial.config["run"]
        made = {record["index"]: record for record in result.get("records", ())}
        if 0 in made:  # begun again: all that its checkpoint had, which may be less than was reported before
            self.records[run.id] = {}
        kept = self.records.setdefault(run.id, {})
        kept |= made
        self.payloads[run.id] = self.payloads.get(run.id, {}) | result
        search = self.queue.arm_of(run).search
        accuracy = result.get(JUDGED, result.get(METRIC))
        if accuracy is not None and search is not None and run.kind == "trial":
            search.report(run.number, accuracy, result[CLOCK])
        if kept:
            self.latest[run.id] = run, kept[max(kept)]
            self._show()

    @ending
    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Show how far everything is; Tune calls this several times a second."""
        self._show()

    @ending
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the row of a run that came to its end, failed by itself, or was stopped by the scheduler."""
        run: Run = trial.config["run"]
        payload = self.payloads.get(run.id, {})
        if "traceback" in payload:
            self._give_up(run, payload["failure"], payload["traceback"])
        elif "failure" in payload:
            self._end(run, "FAIL", payload["failure"] or "it could not go on, and did not say why")
        elif run.kind != "trial" and not payload.get("complete"):
            self._give_up(run, "it ended before its last report", "")
        else:
            self._end(run, "COMPLETE" if payload.get("complete") else "PRUNED", None)

    @ending
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the row of a run whose process raised, or died too often; a final run stays to be done.

        Tune also gives a run up, whatever it was told, that takes over the process of another one just as that dies.
        """
        run: Run = trial.config["run"]
        error, details = told_by(trial, run.study)
        self.deaths[run.id] += 1
        if error in (DIED, LOST) and self.deaths[run.id] <= self.queue.arm_of(run).study.config.max_failures:
            self.queue.hand_back(run)
            self.say(f"{self._name(run)}: {error}; {AGAIN}")
        else:
            self._give_up(run, error, details)

    @ending
    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a run starts again."""
        run: Run = trial.config["run"]
        self.deaths[run.id] += 1
        self.say(f"{self._name(run)}: {told_by(trial, run.study)[0]}; {AGAIN}")

    def _give_up(self, run: Run, error: str, details: str) -> None:
        """End a run whose code raised, or whose process died too often; a final run stays to be done."""
        if run.id not in self.rows:  # its process did not get as far as to start
            self._begin(run)
        if run.final:
            self.queue.arm_of(run).lost += 1
        storage = self.queue.arm_of(run).study.store.storage
        self._end(run, "RUNNING" if run.final else "FAIL", error, keep(storage, self._name(run), details or error))

    def _end(self, run: Run, state: str, error: str | None, file: str | None = None) -> None:
        arm = self.queue.arm_of(run)
        records = list(self.records.pop(run.id, {}).values())
        payload = self.payloads.pop(run.id, {})
        row = self.rows.pop(run.id) | summarise(records, payload)
        row |= {"state": state, "error": error, "ended": now()}
        if run.final:
            row |= {name: payload[name] for name in ("test_accuracy", "test_loss") if name in payload}
        self._save(run, row, records)
        if state != "RUNNING":
            self._clean_up(run, complete=state == "COMPLETE")
        if run.kind == "trial" and arm.search is not None:
            arm.search.tell(run.number, state, row.get("last_val_accuracy"), noted(row))
            arm.study.open_journal().publish(last=not arm.trials_left and arm.running <= {run.id})
        arm.running.discard(run.id)
        self.status.end(run, row)
        self.latest.pop(run.id, None)
        what = f"[{self.status.done}/{self.queue.total}] {self._name(run)}"
        told = outcome(row, run.job.config.method, final=run.final)
        self.say(f"{what}: {told}{f'; more in {file}' if file else ''}")
        self._end_where_all_fail(error)

    def _end_where_all_fail(self, error: str | None) -> None:
        """End the study if the first runs of this session failed alike: the others would too.

        Of many at once those that fail end first, so a handful of them says nothing of the others.
        """
        self.errors.add(error)
        done = self.status.done
        if error and self.errors == {error} and done >= max(ALIKE, len(self.rows) // 10) and not self.queue.over:
            raise RunError(
                f"the first {done} runs failed alike ({error}); mend that, then the same command with --retry-failed goes on"
            )

    def say(self, text: str) -> None:
        """Print a lasting line in place of the bars that show how far everything is."""
        self.progress.clear()
        self.log(text)

    def _show(self) -> None:
        if self.progress.due:
            runs = (
                run_bar(self._name(run), record, run.job.config.train.epochs) for run, record in self.latest.values()
            )
            self.progress.show(self.status.bar, list(runs))

    def close(self) -> None:
        """Wipe the bars: nothing goes on any more."""
        self.progress.close()

    def _save(self, run: Run, row: Mapping[str, Any], records: Sequence[Record]) -> None:
        store = self.queue.arm_of(run).study.store
        store.save(run.kind, run.arm, row, records)

    @staticmethod
    def _clean_up(run: Run, *, complete: bool) -> None:
        """Delete a finished run's checkpoint; the student of a final run that was completed stays."""
        if complete and run.final:
            Storage(run.job.storage).delete(STATE_FILE)
        else:  # with an earlier winner's student, which this run would have replaced
            Storage(run.job.storage).delete_all()

    def _name(self, run: Run) -> str:
        arm: Arm = self.queue.arm_of(run)
        study = f"{arm.study.config.name} " if len(self.queue.studies) > 1 else ""
        again = " again" if run.kind == "confirmation" else ""
        return f"{study}{run.arm} {f'seed {run.job.config.train.seed}' if run.final else f'trial {run.number}{again}'}"
