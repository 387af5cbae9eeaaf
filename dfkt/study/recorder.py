"""What Tune tells while it runs -> rows of the trial store, and the lines that a user reads."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray import tune

from dfkt.config import StudyConfig, config_key
from dfkt.store.study_store import StudyStore
from dfkt.study.search import METRIC
from dfkt.methods.space import describe_params, resolve
from dfkt.training.loop import Record
from dfkt.training.run import Payload

Log = Callable[[str], None]


class Recorder(tune.Callback):
    """Writes every trial into the store as it starts and as it ends, and prints a line for each that ended.

    Args:
        store: The study's store.
        config: The study.
        journal: Optuna's journal; sent along to a remote study's folder.
        log: Receives a line per trial.
    """

    def __init__(self, store: StudyStore, config: StudyConfig, journal: Path, log: Log) -> None:
        self.store, self.config, self.journal, self.log = store, config, journal, log
        rows = store.trial_rows()
        self.rows = {row["number"]: row for row in rows if row["state"] == "RUNNING"}
        self.done = len(rows) - len(self.rows)
        self.records: dict[int, dict[int, Record]] = {}
        self.payloads: dict[int, Payload] = {}
        self.line = ProgressLine()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the row of a running trial; a restart adds an attempt."""
        params = dict(trial.config)
        number = params.pop("number")
        run = resolve(params, self.config.base)
        old = self.rows.get(number, {"attempts": 0, "started": now()})
        row: dict[str, Any] = {"number": number, "state": "RUNNING", "method": run.method, "seed": run.train.seed}
        row |= {f"param_{name}": value for name, value in params.items()}
        row |= {"key": config_key(run), "attempts": old["attempts"] + 1, "started": old["started"]}
        self.rows[number] = row
        self.store.save_trial(row)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Payload, **info: Any) -> None:
        """Keep what a trial reports until it ends."""
        number = trial.config["number"]
        kept = self.records.setdefault(number, {})
        kept |= {record["index"]: record for record in result.get("records", ())}
        self.payloads[number] = result
        if kept:
            self.line.show(f"{self.done}/{self.config.trials} trials; trial {number}", kept[max(kept)])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the row of a trial that ran to its end, failed by itself, or was stopped by the scheduler."""
        payload = self.payloads.get(trial.config["number"], {})
        failure = payload.get("failure")
        state = "FAIL" if failure else "COMPLETE" if payload.get("complete") else "PRUNED"
        self._finish(trial.config, state, failure)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the row of a trial whose process raised, or died too often."""
        error = trial.get_pickled_error() or trial.get_error()
        self._finish(trial.config, "FAIL", last_line(str(error)))

    def _finish(self, params: dict[str, Any], state: str, error: str | None) -> None:
        number = params["number"]
        sampled = {name: value for name, value in params.items() if name != "number"}
        records = list(self.records.pop(number, {}).values())
        row = self.rows.pop(number) | summarise(records, self.payloads.pop(number, {}))
        row |= {"state": state, "error": error, "ended": now()}
        self.store.save_trial(row, records)
        self.store.storage.sub("runs", f"trial-{number:05d}").delete_all()
        if not self.store.storage.is_local:
            self.store.storage.write("optuna.journal", self.journal.read_bytes())
        self.done += 1
        self.line.clear()
        self.log(f"[{self.done}/{self.config.trials}] {_trial_line(row, sampled)}")


class ProgressLine:
    """One line on a terminal that is written over and over; silent elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()

    def show(self, what: str, record: Record) -> None:
        """Show how far a run is."""
        if self.live:
            names = {
                "flow": f"round {record['round']} stage {record['stage']}",
                "hint": f"hint stage {record['stage']}",
            }
            place = names.get(record["phase"], "task stage")
            text = f"{what}: epoch {record['epoch']:.1f}, {place}, loss {record['loss']:.3f}"
            sys.stderr.write(f"\r\x1b[K{text[:110]}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Wipe the line, so that a lasting one can be printed."""
        if self.live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def summarise(records: Sequence[Record], payload: Payload) -> dict[str, Any]:
    """Return a row's measurements from a run's records and its last report; what was not measured is absent."""
    names = ("wall_seconds", "device_seconds", "peak_memory_bytes", "workers")
    summary = {name: payload[name] for name in names if name in payload}
    if records:
        last = records[-1]
        summary |= {"epochs": last["epoch"], "steps": last["step"], "images": last["images"]}
    judged = [record for record in records if record.get(METRIC) is not None]
    if judged:
        best = max(judged, key=lambda r: r[METRIC] if math.isfinite(r[METRIC]) else -1.0)
        summary |= {"last_val_accuracy": judged[-1][METRIC]}
        summary |= {"best_val_accuracy": best[METRIC], "best_epoch": best["epoch"]}
    return summary


def last_line(text: str) -> str:
    """Return the last line of an error's text: what happened, without the way there."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "the trial's process ended without a message"


def now() -> datetime:
    """Return the present in UTC."""
    return datetime.now(UTC)


def _trial_line(row: dict[str, Any], params: dict[str, Any]) -> str:
    accuracy, seconds = row.get("last_val_accuracy"), row.get("wall_seconds")
    outcome = f"val {100 * accuracy:.2f} %" if accuracy is not None else "no val accuracy"
    if row["state"] == "PRUNED":
        outcome += f", stopped at epoch {row.get('epochs') or 0:.1f}"
    if row["state"] == "FAIL":
        return f"trial {row['number']:>3}: failed: {row['error']}"
    return f"trial {row['number']:>3}: {outcome}, {seconds or 0:.0f} s  {describe_params(params)}"
