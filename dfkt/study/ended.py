"""What is left of a run that ended: its row's measurements, and a phrase for the user."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from dfkt.methods.base import Method
from dfkt.study.search import METRIC
from dfkt.training.loop import Record
from dfkt.training.run import Payload


def summarise(records: Sequence[Record], payload: Payload) -> dict[str, Any]:
    """Return a row's measurements from a run's records and its last report; what was not measured is absent."""
    names = ("wall_seconds", "device_seconds", "peak_memory_bytes", "workers")
    summary = {name: payload[name] for name in names if name in payload}
    if records:
        last = records[-1]
        summary |= {"epochs": last["epoch"], "steps": last["step"], "images": last["images"]}
        summary |= {"kept_share": _kept_share(records)}
    judged = [record for record in records if record.get(METRIC) is not None]
    if judged:
        best = max(judged, key=lambda r: r[METRIC] if math.isfinite(r[METRIC]) else -1.0)
        summary |= {"last_val_accuracy": judged[-1][METRIC]}
        summary |= {"best_val_accuracy": best[METRIC], "best_epoch": best["epoch"]}
    return summary


def _kept_share(records: Sequence[Record]) -> float:
    """Return the steps to which the teacher's answers were kept ones, over all steps."""
    kept, before = 0.0, 0
    for record in records:
        if "kept_share" in record:  # a rung within an epoch has none
            kept, before = kept + record["kept_share"] * (record["step"] - before), record["step"]
    return kept / records[-1]["step"]


def outcome(row: Mapping[str, Any], method: Method, *, final: bool) -> str:
    """Return how a run ended, in one phrase."""
    if row["error"]:
        return f"failed: {row['error']}"
    seconds = f"{row.get('wall_seconds') or 0:.0f} s"
    if final:
        return f"test {100 * row['test_accuracy']:.2f} %, {seconds}"
    accuracy = row.get("last_val_accuracy")
    text = f"val {100 * accuracy:.2f} %" if accuracy is not None else "no val accuracy"
    if row["state"] == "PRUNED":
        text += f", stopped at epoch {row.get('epochs') or 0:.1f}"
    return f"{text}, {seconds}  {method.describe()}"


def now() -> datetime:
    """Return the present in UTC."""
    return datetime.now(UTC)
