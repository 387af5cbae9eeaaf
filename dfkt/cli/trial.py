"""A trial of a study, to be trained again: ``FOLDER[:ARM][:NUMBER]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from dfkt.cli.options import updated
from dfkt.config import from_dict
from dfkt.errors import StudyError
from dfkt.store.files import Storage, readable
from dfkt.store.rows import best_trials, row_settings
from dfkt.store.study_store import read_study
from dfkt.training.config import RunConfig


@dataclass(frozen=True)
class Trial:
    """A trial of a study, to be trained again.

    Attributes:
        config: Its run.
        study: Its study's folder, where its teacher lies.
        placement: What was noted of where things lay and how many threads it had; nothing in studies of earlier versions.
    """

    config: RunConfig
    study: Storage
    placement: Mapping[str, Any]


def find_trial(text: str) -> Trial:
    """Return a study's trial, named ``FOLDER[:ARM][:NUMBER]``; by default the best one.

    Raises:
        StudyError: If there is no such study, arm or trial, or none is complete.
    """
    folder, arm, number = split_trial(text)
    storage = Storage(folder)
    with readable(storage):
        study = read_study(storage, "config")
    arms = {entry["name"]: entry for entry in study.meta["config"]["arms"]}
    if arm not in (None, *arms):
        raise StudyError(f"Study {study.name} has the arms {', '.join(arms)}, but {text!r} names {arm}.")
    trials = study.trials if arm is None else study.trials[study.trials.arm == arm]
    rows = best_trials(trials, 1, study.confirmations) if number is None else trials[trials.number == number]
    if rows.empty:
        what, of = "complete trial" if number is None else f"trial {number}", "" if arm is None else f" of arm {arm}"
        counts = study.trials.arm.value_counts()
        have = ", ".join(f"{counts.get(name, 0)} of {name}" for name in arms)
        raise StudyError(f"Study {study.name} has no {what}{of}. Its trials are {have}.")
    if len(rows) > 1:
        raise StudyError(
            f"Study {study.name} has a trial {number} in {', '.join(rows.arm)}. Name it FOLDER:ARM:NUMBER."
        )
    row = rows.iloc[0]
    if row.arm not in arms:
        raise StudyError(f"Study {study.name} has the arms {', '.join(arms)}, but trial {row.number} is of {row.arm}.")
    shared = {name: study.meta["config"][name] for name in ("data", "teacher", "student", "train")}
    config = from_dict(RunConfig, shared | {"method": row_settings(row)})
    config = replace(config, train=updated(config.train, epochs=arms[row.arm]["epochs"]))
    return Trial(config, storage, _placement_of(study.meta.get("sessions", []), row.started))


def _placement_of(sessions: Sequence[Mapping[str, Any]], started: Any) -> Mapping[str, Any]:
    """Return the placement that the session noted in which a trial started: the last one that began before it."""
    begun = [session for session in sessions if "started" in session]
    before = [session for session in begun if pd.isna(started) or pd.Timestamp(session["started"]) <= started]
    noted: Mapping[str, Any] = before[-1].get("placement", {}) if before else {}
    return noted


def split_trial(text: str) -> tuple[str, str | None, int | None]:
    """Return folder, arm and number of ``FOLDER[:ARM][:NUMBER]``; the folder may be a URI."""
    arm = number = None
    folder, _, tail = text.rpartition(":")
    if folder and tail.isascii() and tail.isdecimal() and len(tail) < 10:
        text, number = folder, int(tail)
    if ":" in text.rpartition("/")[2] and not Storage(text).exists("study.json"):
        text, _, arm = text.rpartition(":")
    return text, arm, number
