"""How far a study is, as its folder says: runs done, runs begun, and when the rest may be over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pandas as pd

from dfkt.store.study_store import Study

ENDED = ("COMPLETE", "PRUNED", "FAIL")
SILENT = 120.0
"""Seconds, and three times the longest run, after which nothing new may mean that nothing runs."""


@dataclass(frozen=True)
class Progress:
    """How far a study is.

    Attributes:
        done: Runs that have ended.
        total: Those, and what is still to come as far as it is known: which trials are confirmed is known after the search.
        begun: Runs that have begun and not ended.
        epochs: Trained so far, by runs that have ended.
        most_epochs: What all runs together train if no trial is stopped early.
        quiet: Seconds since anything was written; null where nothing was.
        silent: Whether that is so long that nothing may run any more.
        left: Seconds until all may be done, at the pace so far; ``None`` while nothing tells.
    """

    done: int
    total: int
    begun: int
    epochs: float
    most_epochs: float
    quiet: float
    silent: bool
    left: float | None

    @property
    def over(self) -> bool:
        """Whether nothing is left to do, and nothing runs."""
        return self.done >= self.total and not self.begun

    def describe(self) -> str:
        """Return it in a sentence."""
        text = f"{self.done} of {self.total} runs done, {self.begun} begun; {self.epochs:.0f} epochs trained"
        text += f" of {self.most_epochs:.0f} at most" if self.most_epochs else ""
        if pd.isna(self.quiet):
            return f"{text}; nothing has ended yet"
        text += f"; the last news is {duration(self.quiet)} old"
        if self.silent:
            return f"{text}: if nothing runs any more, python -m dfkt resume goes on with it"
        return text if self.left is None else f"{text}; about {duration(self.left)} left"


def progress(study: Study, now: datetime) -> Progress:
    """Return how far a study is.

    Args:
        study: As its folder says.
        now: The present, with a time zone.
    """
    config, states = study.meta["config"], study.meta.get("arms", {})
    ended = {kind: rows[rows.state.isin(ENDED)] for kind, rows in _tables(study).items()}
    begun = pd.concat([rows[rows.state == "RUNNING"] for rows in _tables(study).values()])
    begun = begun[begun.ended.isna()]  # a final run that was given up has ended, and is still to be done
    rest, most, done = {"trial": 0, "whole": 0}, 0.0, 0
    asked = study.meta["sessions"][-1].get("arms") if study.meta.get("sessions") else None
    for arm in (arm for arm in config["arms"] if asked is None or arm["name"] in asked):
        mine = {kind: rows[rows.arm == arm["name"]] for kind, rows in ended.items()}
        left = _left(arm, config, states.get(arm["name"], {}), mine)
        here = sum(map(len, mine.values()))
        rest = {kind: rest[kind] + left[kind] for kind in rest}
        done += here
        most += (here + sum(left.values())) * float(arm["epochs"] or config["train"]["epochs"])
    took = {kind: _seconds(rows) for kind, rows in ended.items()}
    every = pd.concat([*took.values()])
    news = pd.concat([rows[name] for rows in _tables(study).values() for name in ("started", "ended")]).max()
    quiet = float("nan") if pd.isna(news) else max((now - news).total_seconds(), 0.0)
    silent = quiet > SILENT + 3 * (every.max() if len(every) else 0.0)
    usual = {"trial": took["trial"].mean(), "whole": pd.concat([took["confirmation"], took["final"]]).mean()}
    return Progress(
        done=done,
        total=done + sum(rest.values()),
        begun=len(begun),
        epochs=float(sum(rows.epochs.sum() for rows in ended.values())),
        most_epochs=most,
        quiet=quiet,
        silent=silent,
        left=_seconds_left(rest, usual, begun, now),
    )


def duration(seconds: float) -> str:
    """Return a length of time in a unit that suits it.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2 h 30 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _tables(study: Study) -> dict[str, pd.DataFrame]:
    return {"trial": study.trials, "confirmation": study.confirmations, "final": study.finals}


def _left(
    arm: Mapping[str, Any], config: Mapping[str, Any], known: Mapping[str, Any], ended: Mapping[str, pd.DataFrame]
) -> dict[str, int]:
    """Return how many trials, and how many other runs, of an arm are still to be done."""
    trials = max(arm["trials"] - len(ended["trial"]), 0)
    if known.get("skipped"):
        return {"trial": trials, "whole": 0}
    best = int((ended["trial"].state == "COMPLETE").sum()) + trials
    wanted = min(config.get("confirm", 0), best) if best > 1 else 0
    listed = known.get("present")
    planned = config.get("seeds", 0) if listed is None else len(listed)
    done = ended["final"] if listed is None else ended["final"][ended["final"].number.isin(listed)]
    confirmations = 0 if listed is not None else max(wanted - len(ended["confirmation"]), 0)
    return {"trial": trials, "whole": confirmations + max(planned - len(done), 0)}


def _seconds(rows: pd.DataFrame) -> pd.Series[float]:
    """Return how long the runs took that came to an end at their first attempt."""
    good = rows[(rows.state != "FAIL") & (rows.attempts.fillna(1) == 1)]
    return (good.ended - good.started).dt.total_seconds().dropna()


def _seconds_left(
    rest: Mapping[str, int], usual: Mapping[str, float], begun: pd.DataFrame, now: datetime
) -> float | None:
    """Return the seconds until all is done, as many runs at a time as have begun; ``None`` where none has, or none has ended."""
    known = [mean for mean in usual.values() if not pd.isna(mean)]
    if not known or not len(begun):
        return None
    work = sum(count * (known[0] if pd.isna(usual[kind]) else usual[kind]) for kind, count in rest.items())
    spent = (now - begun.started).dt.total_seconds().clip(0, max(known)).sum()
    return float(max(work - spent, 0.0) / len(begun))
