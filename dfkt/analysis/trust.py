"""How far a search can be trusted: what its ``val`` split can tell apart, and how well rungs told how trials would end."""

from __future__ import annotations

import math

import pandas as pd

LEAST_PAIRS = 4
"""A rank correlation of fewer trials says nothing."""


def rung_table(trials: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Return what happened at every rung: a row per arm and rung.

    ``arm``, ``rung`` (share of the task stage); ``passed``: trials that were looked at there; ``stopped``: those that ended
    there; ``complete``: those that ran to their end; ``rank``: of the latter, Spearman's rank correlation between
    ``rung_accuracy`` there and ``val_accuracy`` at the end, null for fewer than 4.

    Args:
        trials: A study's trials.
        epochs: Their epoch records.
    """
    ends = trials[["arm", "number", "state", "last_val_accuracy"]]
    looked = epochs.dropna(subset=["rung", "rung_accuracy"]).merge(ends, on=["arm", "number"])
    last = looked.groupby(["arm", "number"]).rung.transform("max")
    rows = []
    for (arm, rung), found in looked.groupby(["arm", "rung"], sort=True):
        whole = found[found.state == "COMPLETE"]
        stopped = int(((found.state == "PRUNED") & (found.rung == last[found.index])).sum())
        rows.append({"arm": arm, "rung": rung, "passed": len(found), "stopped": stopped, "complete": len(whole)})
        rows[-1]["rank"] = rank_correlation(whole.rung_accuracy, whole.last_val_accuracy)
    return pd.DataFrame(rows, columns=["arm", "rung", "passed", "stopped", "complete", "rank"])


def rank_correlation(first: pd.Series[float], second: pd.Series[float]) -> float:
    """Return Spearman's rank correlation, NaN for fewer than 4 pairs or where one of both does not vary.

    Example:
        >>> rank_correlation(pd.Series([1.0, 2.0, 3.0, 4.0]), pd.Series([5.0, 6.0, 8.0, 7.0]))
        0.8
    """
    if len(first) < LEAST_PAIRS or first.nunique() < 2 or second.nunique() < 2:
        return math.nan
    return round(float(first.rank().corr(second.rank())), 9)


def val_error(accuracy: float, images: int) -> float:
    """Return the standard error of an accuracy over so many images, as a share.

    Example:
        >>> round(val_error(0.5, 300), 3)
        0.029
    """
    return math.sqrt(accuracy * (1 - accuracy) / images)
