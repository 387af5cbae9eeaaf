"""What the rows of a study's tables say: a run's parameters and settings, and which trials were the best."""

from __future__ import annotations

import json
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


def best_trials(trials: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return the complete trials with the highest last ``val`` accuracy; earlier ones first where equal.

    Args:
        trials: The trials of one arm; another arm's trial may have the same number.
        count: At most so many.
    """
    complete = trials[trials.state == "COMPLETE"].dropna(subset="last_val_accuracy")
    return complete.sort_values(["last_val_accuracy", "number"], ascending=[False, True]).head(count)
