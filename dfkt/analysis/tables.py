"""How figures look: tables as text and Markdown, and the page that a finished study prints.

Functions of studies, :class:`dfkt.analysis.figures.Figures` and the frames of :mod:`dfkt.analysis.statistics`. Accuracies come
as shares and are shown in percent, differences of them in points. What is null becomes an empty cell.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from dfkt.analysis import about as words
from dfkt.analysis.figures import (
    ABOUT_FILE,
    Figures,
    Place,
    complete_runs,
    load_figures,
    read_studies,
    setting_about,
    study_figures,
    to_storage,
)
from dfkt.analysis.statistics import SCRATCH, accuracy_table, scratch_level, speed_table
from dfkt.errors import InputError
from dfkt.methods.base import Method
from dfkt.store.rows import best_trials, row_settings, trial_params
from dfkt.store.study_store import Study

COLUMN_NOTES = {
    "test %": "mean ± standard deviation over seeds of the last epoch's accuracy; val % likewise",
    "gap closed": "gain over scratch, as a share of what the teacher is ahead of scratch, if that is a point or more",
    "ahead by": "mean of the named arm less the row's over the same seeds, with an interval by Student's t; all intervals of "
    "a table hold at once in 95 % of such tables (Bonferroni)",
    "p": "of no difference, corrected for the number of arms by Holm's procedure, which is a little less cautious: an interval "
    "may hold zero where p is below 0.05. Both cover the seeds, not the choice of settings by one search",
    "steps": "until the mean val accuracy over seeds, smoothed to rise (isotonic regression), crosses what scratch's ends with; "
    "linear between epochs, flow and hint stages counted in, never if not within the run",
    "of scratch's steps": "over scratch's own, with a 95 % bootstrap interval over seeds that draws scratch and the level along, "
    "not corrected for the number of arms",
}
"""What the columns mean that do not say it themselves; ``ahead by`` stands behind an arm's name."""
STATE_WORDS = {"COMPLETE": "complete", "PRUNED": "stopped early", "FAIL": "failed", "RUNNING": "unfinished"}
"""How readers are told the state of a trial."""
_NEVER = "never"


def folder_page(folder: Place, best: int = 5) -> str:
    """Return the pages of all studies in a folder, or of saved figures, as :func:`study_page` does.

    Raises:
        StudyError: If the folder holds neither, or a file is damaged.
    """
    storage = to_storage(folder)
    if storage.exists(ABOUT_FILE) and not storage.exists("study.json"):
        return study_page(load_figures(storage), best)
    studies = read_studies(storage)
    return "\n\n\n".join(_study_page(setting, study, best) for setting, study in studies.items())


def study_page(source: Study | Figures, best: int = 5) -> str:
    """Return all that a finished study has to say: trials, teacher, student, final runs, what is missing, speed.

    Args:
        source: A study, or saved figures, which give a page per setting.
        best: How many of the best trials are shown where one arm is searched; where several are, each shows its best.
    """
    if isinstance(source, Study):
        return _study_page(source.name, source, best)
    trials = source.trials
    pages = (_page(source, setting, trials[trials.setting == setting], best) for setting in source.about["settings"])
    return "\n\n\n".join(pages)


def trials_text(trials: pd.DataFrame, searched: Sequence[str], best: int = 5) -> str:
    """Return the count of trials by state, and the best ones: ``best`` of a single searched arm, or one of each."""
    if not searched:
        return "no arm was searched"
    by_arm = {arm: trials[trials.arm == arm] for arm in searched}
    if len(searched) == 1:
        rows = by_arm[searched[0]]
        count, found = f"{searched[0]}: {len(rows)} trials: {count_states(rows)}", best_trials(rows, best)
        return "\n".join([count, *([text_table(pd.DataFrame(map(_trial, _records(found))))] if len(found) else [])])
    cells = []
    for arm, rows in by_arm.items():
        first = {"arm": arm, "trials": f"{len(rows)}: {count_states(rows)}" if len(rows) else "0"}
        cells.append(first | next(map(_trial, _records(best_trials(rows, 1))), {}))
    table = pd.DataFrame(cells).rename(columns={"trial": "best"}).fillna("")
    return text_table(table)


def count_states(trials: pd.DataFrame) -> str:
    """Return how many trials ended how."""
    states = trials.state.value_counts()
    return ", ".join(f"{states[s]} {word}" for s, word in STATE_WORDS.items() if s in states) or "no trials yet"


def describe_settings(row: Mapping[str, Any]) -> str:
    """Return a trial's searched settings in a phrase: its method's own, or name and value where that is not at hand."""
    settings: dict[str, Any] = {}
    try:
        settings = row_settings(row)
        if "name" in settings:
            return Method.from_json(settings).describe()
    except InputError:  # a user's class that is not at hand, or a setting that has gone
        pass
    shown = trial_params(row) or {name: value for name, value in settings.items() if name != "name"}
    return ", ".join(f"{name} {_plain(value)}" for name, value in shown.items())


def accuracy_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return an accuracy table as texts; columns of which nothing is known are left out."""
    ahead, rows = f"{next(iter(table.against), '')} ahead by", []
    for row in table.to_dict("records"):
        cells = {"arm": row["arm"], "seeds": str(row["seeds"]), "test %": _spread(row["test_mean"], row["test_std"])}
        cells |= {"over scratch": _points(row["gain"]), "gap closed": _number(100 * row["gap_share"], ".0f", " %")}
        cells |= {ahead: _difference(row), "p": _p(row["p"]), "val %": _spread(row["val_mean"], row["val_std"])}
        rows.append(
            cells | {"device s": _number(row["device_seconds"], ".1f"), "epochs": _number(row["epochs"], ".3g")}
        )
    cells_table = pd.DataFrame(rows)
    return cells_table[[name for name in cells_table if (cells_table[name] != "").any()]]


def speed_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return a speed table as texts."""
    rows = []
    for row in table.to_dict("records"):
        cells = {"arm": row["arm"], "val % at the end": percent(row["end"]), "steps": _number(row["steps"], ".0f")}
        ratio = _number(row["step_ratio"], ".2f") + _interval(row["low"], row["high"], ".2f")
        rows.append(
            cells
            | {
                "training s": "" if row["seconds"] == math.inf else _number(row["seconds"], ".1f"),
                "of scratch's steps": ratio,
            }
        )
    return pd.DataFrame(rows)


def column_notes(columns: Iterable[str]) -> str:
    """Return what those of some columns mean that do not say it themselves, as lines of at most 118 characters."""
    known = {"ahead by" if column.endswith(" ahead by") else column for column in columns}
    notes = [f"{name}: {note}." for name, note in COLUMN_NOTES.items() if name in known]
    return textwrap.fill(" ".join(notes), 118)


def text_table(frame: pd.DataFrame) -> str:
    """Return a frame of texts with aligned columns."""
    rows = [list(map(str, frame.columns)), *frame.to_numpy().tolist()]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def markdown_table(frame: pd.DataFrame) -> str:
    """Return any frame as a Markdown table; null is an empty cell.

    Example:
        >>> print(markdown_table(pd.DataFrame({"arm": ["kd"], "steps": [12]})))
        | arm | steps |
        |---|---|
        | kd | 12 |
    """
    rows = [["" if pd.isna(cell) else str(cell) for cell in row] for row in frame.astype(object).to_numpy()]
    lines = [[str(name) for name in frame.columns], *rows]
    texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([texts[0], "|---" * len(frame.columns) + "|", *texts[1:]])


def percent(share: float) -> str:
    """Return a share as a percentage with two decimals; null is empty."""
    return _number(100 * share, ".2f")


def _study_page(setting: str, study: Study, best: int) -> str:
    return _page(study_figures({setting: study}), setting, study.trials, best)


def _page(figures: Figures, setting: str, trials: pd.DataFrame, best: int) -> str:
    about, runs = setting_about(figures, setting), figures.runs[figures.runs.setting == setting]
    lines = [f"{setting}: {words.describe_data(about)}", "", trials_text(trials, about["searched"], best), ""]
    if about["teacher"].get("val_accuracy") is not None:
        lines.append(f"teacher {words.describe_teacher(about)}")
    lines.append(f"student {words.describe_network(about['student'])}; {words.describe_budget(about)}")
    if reference := words.reference_arms(about):
        lines.append(f"at reference settings, not searched: {', '.join(reference)}")
    lines += words.setting_notes(about, runs)
    tables = _final_tables(figures, setting)
    if not tables:
        return "\n".join([*lines, "", "no final run is complete" if len(runs) else "no final runs yet"])
    lines += [f"\n{title}\n{text_table(cells)}" for title, cells in tables.items()]
    return "\n".join([*lines, "", column_notes(str(name) for cells in tables.values() for name in cells)])


def _final_tables(figures: Figures, setting: str) -> dict[str, pd.DataFrame]:
    """Return by title the tables of the final runs: main arms, ablations by their parent, speed over several seeds."""
    about, runs = setting_about(figures, setting), complete_runs(figures, setting)
    arms = words.main_arms(about)
    tables = {"final runs:": accuracy_table(figures, setting, arms)}
    for parent, changed in words.ablations_of(about).items():
        if runs.arm.isin(changed).any():
            tables[f"{parent} with one change:"] = accuracy_table(figures, setting, [parent, *changed], parent)
    cells = {title: accuracy_cells(table) for title, table in tables.items() if len(table)}
    speed = speed_table(figures, setting, arms)
    if len(speed) > 1 and (runs.arm == SCRATCH).sum() > 1:
        level = percent(scratch_level(figures, setting))
        cells[f"until val accuracy reaches {level} %, what scratch ends with:"] = speed_cells(speed)
    return cells


def _records(frame: pd.DataFrame) -> list[dict[Any, Any]]:
    return frame.to_dict("records")


def _trial(row: Mapping[Any, Any]) -> dict[str, str]:
    """Return a trial's cells; figures that were saved have fewer."""
    shown = {"trial": str(row["number"]), "val %": percent(row["last_val_accuracy"])}
    if "best_val_accuracy" in row:
        shown |= {"best %": percent(row["best_val_accuracy"]), "epochs": _number(row["epochs"], ".1f")}
    return shown | {"device s": _number(row["device_seconds"], ".1f"), "settings": describe_settings(row)}


def _number(value: Any, form: str, unit: str = "") -> str:
    if pd.isna(value):
        return ""
    return _NEVER if value == math.inf else f"{value:{form}}{unit}"


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _points(share: Any) -> str:
    return _number(100 * share, "+.2f")


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else _number(value, ".3f")


def _spread(mean: float, deviation: float) -> str:
    return percent(mean) + ("" if pd.isna(deviation) else f" ± {percent(deviation)}")


def _interval(low: float, high: float, form: str) -> str:
    return "" if pd.isna(low) else f" [{_number(low, form)}, {_number(high, form)}]"


def _difference(row: Mapping[Any, Any]) -> str:
    """Return ``+1.23 [+0.40, +2.06]``; fewer pairs than the arm has seeds are said so."""
    text = _points(row["difference"])
    text += _interval(100 * row["low"], 100 * row["high"], "+.2f")
    return text + (f" ({row['pairs']} seeds)" if text and row["pairs"] < row["seeds"] else "")
