"""Failed runs that shall be tried again: unfinished ones, from then on."""

from __future__ import annotations

from typing import Any, get_args

from dfkt.store.study_store import StudyStore
from dfkt.study.config import StudyConfig
from dfkt.study.driver import Kind
from dfkt.study.search import JOURNAL


def failed_runs(store: StudyStore, config: StudyConfig) -> list[tuple[Kind, str, dict[str, Any]]]:
    """Return kind, arm and row of the failed runs of a study's arms."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    return [
        (kind, arm.name, row)
        for arm in config.arms
        for kind in kinds
        for row in store.rows(kind, arm.name)
        if row["state"] == "FAIL"
    ]


def retry_failed(store: StudyStore, config: StudyConfig) -> int:
    """Make the failed runs of a study unfinished, with number, parameters and attempts; return how many there were.

    Optuna cannot be told that a trial that failed goes on: its journal is deleted, and made again from the store.
    """
    runs = failed_runs(store, config)
    if any(kind == "trial" for kind, _, _ in runs):
        store.storage.delete(JOURNAL)
    for kind, arm, row in runs:
        store.save(kind, arm, row | {"state": "RUNNING"})
    return len(runs)
