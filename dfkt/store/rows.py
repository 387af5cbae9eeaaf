"""A study's tables as text, and its trials as configurations, from what :mod:`dfkt.store.study_store` reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from dfkt.config import RunConfig, from_dict
from dfkt.errors import StudyError
from dfkt.store.study_store import Study
from dfkt.methods.space import describe_params, resolve


def trial_params(row: pd.Series[Any] | dict[str, Any]) -> dict[str, Any]:
    """Return a trial's parameters without those that a condition left out."""
    params = {
        str(n).removeprefix("param_"): v for n, v in row.items() if str(n).startswith("param_") and not pd.isna(v)
    }
    return {name: v.item() if hasattr(v, "item") else v for name, v in params.items()}


def best_trials(trials: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return the complete trials with the highest last ``val`` accuracy; earlier ones first where equal."""
    complete = trials[trials.state == "COMPLETE"].dropna(subset="last_val_accuracy")
    return complete.sort_values(["last_val_accuracy", "number"], ascending=[False, True]).head(count)


def trial_config(study: Study, number: int | None = None) -> RunConfig:
    """Return the configuration of a trial, by default the best one's.

    Raises:
        StudyError: If there is no such trial, or none is complete.
    """
    rows = best_trials(study.trials, 1) if number is None else study.trials[study.trials.number == number]
    if rows.empty:
        what = "complete trial" if number is None else f"trial {number}"
        raise StudyError(f"Study {study.name} has no {what}.")
    return resolve(trial_params(rows.iloc[0]), from_dict(RunConfig, study.meta["config"]["base"]))


def trials_table(study: Study, count: int = 5) -> str:
    """Return the best trials, a line each, under a line that counts all."""
    states = study.trials.state.value_counts()
    counts = ", ".join(f"{states[s]} {w}" for s, w in _STATE_WORDS.items() if s in states) or "no trials yet"
    rows = [("trial", "val %", "best %", "epochs", "seconds", "settings")]
    for _, row in best_trials(study.trials, count).iterrows():
        values = (percent(row.last_val_accuracy), percent(row.best_val_accuracy), f"{row.epochs:.1f}")
        rows.append((str(row.number), *values, f"{row.wall_seconds:.0f}", describe_params(trial_params(row))))
    return f"{len(study.trials)} trials: {counts}\n" + align(rows)


def finals_table(study: Study) -> str:
    """Return the methods side by side: mean and standard deviation over seeds, test accuracy last opened."""
    finals = study.finals
    if "present_finals" in study.meta:  # runs of an earlier winner stay in the store, and out of the table
        finals = finals[finals.number.isin(study.meta["present_finals"])]
    done = finals[finals.state == "COMPLETE"]
    failed = int((finals.state == "FAIL").sum())
    if done.empty:
        return f"no final run is complete, {failed} failed" if failed else "no final runs yet"
    ours = study.meta["config"]["base"]["method"]
    scratch = done[done.method == "scratch"].test_accuracy.mean()
    rows = [("method", "seeds", "test %", "over scratch", "val %", "device s", "epochs")]
    for method in sorted(done.method.unique(), key=lambda m: (m == ours, done[done.method == m].number.min())):
        runs = done[done.method == method]
        gain = runs.test_accuracy.mean() - scratch
        rows.append(
            (
                method,
                str(len(runs)),
                _spread(runs.test_accuracy),
                "" if method == "scratch" or math.isnan(gain) else f"{100 * gain:+.2f}",
                _spread(runs.last_val_accuracy),
                f"{runs.device_seconds.mean():.1f}",
                f"{runs.epochs.mean():g}",
            )
        )
    note = f"\n{failed} final runs failed and are not in the table." if failed else ""
    return align(rows) + note


def study_report(study: Study, count: int = 5) -> str:
    """Return all that a finished study has to say, where to look further last."""
    teacher = study.meta.get("teacher")
    lines = [trials_table(study, count), ""]
    if teacher:
        test = f", test {percent(teacher['test_accuracy'])} %" if "test_accuracy" in teacher else ""
        lines.append(f"teacher {teacher['network']}: val {percent(teacher['val_accuracy'])} %{test}")
    student = study.meta["config"]["base"]["student"]
    width = f" at {student['width']:g} of its width" if student.get("width", 1) != 1 else ""
    lines += [f"student {student['name']}{width}, mean ± standard deviation over seeds:", finals_table(study)]
    if not study.finals.empty and len(study.trials):
        lines += [FINALS_NOTE.format(method=study.meta["config"]["base"]["method"])]
    return "\n".join(lines)


FINALS_NOTE = (
    "{method} is the best trial by val; other methods stand at their reference settings, with the same number of epochs.\n"
    "Only {method} was searched here."
)
_STATE_WORDS = {"COMPLETE": "complete", "PRUNED": "stopped early", "FAIL": "failed", "RUNNING": "unfinished"}


def percent(share: float) -> str:
    """Return a share as a percentage with two decimals."""
    return f"{100 * share:.2f}"


def _spread(shares: pd.Series[float]) -> str:
    spread = f" ± {100 * shares.std():.2f}" if len(shares) > 1 else ""
    return percent(shares.mean()) + spread


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines with aligned columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    texts = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(texts)
