"""What the rows of a study's tables say: a run's parameters and settings, and which trials were the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from dfkt.errors import StudyError


def trial_params(row: pd.Series[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's parameters, as Python values, without those that its method or a condition leaves out."""
    params = {
        str(name).removeprefix("param_"): value
        for name, value in row.items()
        if str(name).startswith("param_") and not pd.isna(value)
    }
    return {name: value.item() if hasattr(value, "item") else value for name, value in params.items()}


def row_settings(row: pd.Series[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's method with all its settings, as JSON values.

    Raises:
        StudyError: If the row has none, or they are no JSON object.
    """
    text = row["settings"]
    try:
        settings = None if pd.isna(text) else json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise StudyError(f"The settings of run {row['number']} must be a JSON object, but got {text!r}.")
    return settings


def best_trials(trials: pd.DataFrame, count: int, confirmations: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the complete trials with the highest last ``val`` accuracy; earlier ones first where equal.

    A trial that was confirmed by another seed counts by the mean of both, and stands before those that were not: the best
    of many looks better than it is. The other seed's accuracy is the column ``again``, null without one.

    Args:
        trials: Of one arm, or of several with a column ``arm``.
        count: At most so many.
        confirmations: Runs with another seed, by the trial's number, and ``arm`` likewise.
    """
    found = trials[trials.state == "COMPLETE"].dropna(subset="last_val_accuracy")
    again: dict[Any, float] = {}
    keys = [name for name in ("arm", "number") if name in trials]
    if confirmations is not None and len(confirmations):
        done = confirmations[confirmations.state == "COMPLETE"]
        again = dict(zip(done[keys].itertuples(index=False, name=None), done.last_val_accuracy, strict=True))
    known = [again.get(key, math.nan) for key in found[keys].itertuples(index=False, name=None)]
    found = found.assign(again=pd.Series(known, found.index, dtype="float64"))
    value = (found.last_val_accuracy + found.again.fillna(found.last_val_accuracy)) / 2
    ranked = found.assign(confirmed=found.again.notna(), value=value)
    ranked = ranked.sort_values(["confirmed", "value", "number"], ascending=[False, False, True])
    return ranked.drop(columns=["confirmed", "value"]).head(count)
