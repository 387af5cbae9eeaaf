"""The page that a finished study prints: its trials, its final runs side by side, and what the columns mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from dfkt.analysis.statistics import (
    accuracy_table,
    cost_table,
    pair_table,
    scratch_level,
    speed_table,
)
from dfkt.analysis.tables import (
    accuracy_cells,
    column_notes,
    cost_cells,
    number,
    pair_cells,
    percent,
    rung_cells,
    speed_cells,
    text_table,
)
from dfkt.analysis.trust import rung_table
from dfkt.analysis.verdict import verdict
from dfkt.errors import InputError
from dfkt.methods.base import Method
from dfkt.store.files import Storage
from dfkt.store.rows import best_trials, row_settings, trial_params
from dfkt.store.study_store import Study

MOST, EACH = 5, 1
"""Best trials that are shown of a single searched arm, and of each where there are several."""
STATE_WORDS = {"COMPLETE": "complete", "PRUNED": "stopped early", "FAIL": "failed", "RUNNING": "unfinished"}
"""How readers are told the state of a trial."""


def folder_page(folder: Place, best: int | None = None) -> str:
    """Return the pages of all studies in a folder, or of saved figures, as :func:`study_page` does.

    Raises:
        StudyError: If the folder holds neither, or a file is damaged.
    """
    storage = to_storage(folder)
    if storage.exists(ABOUT_FILE) and not storage.exists("study.json"):
        return study_page(load_figures(storage), best)
    studies, one = read_studies(storage), storage.exists("study.json")
    places = {name: storage if one else storage.sub(name) for name in studies}
    return "\n\n\n".join(_study_page(name, study, best, places[name]) for name, study in studies.items())


def study_page(source: Study | Figures, best: int | None = None, place: Storage | None = None) -> str:
    """Return all that a finished study has to say: trials, teacher, student, final runs, what is missing, speed.

    Args:
        source: A study, or saved figures, which give a page per setting.
        best: How many of a searched arm's best trials are shown; ``None``: 5, or 1 of each where several are searched.
        place: The study's folder, for the place of its best student.
    """
    if isinstance(source, Study):
        return _study_page(source.name, source, best, place)
    pages = []
    for setting, about in source.about["settings"].items():
        trials = source.trials[source.trials.setting == setting]
        pages.append(_page(source, setting, trials, trials_text(trials, about["searched"], best), pd.DataFrame()))
    return "\n\n\n".join(pages)


def trials_text(
    trials: pd.DataFrame, searched: Sequence[str], best: int | None = None, confirmations: pd.DataFrame | None = None
) -> str:
    """Return the count of trials by state, and the best ones, of every searched arm; confirmed ones first."""
    if not searched:
        return "no arm was searched"
    by_arm = {arm: trials[trials.arm == arm] for arm in searched}
    shown = trials_cells(trials, searched, best or (MOST if len(searched) == 1 else EACH), confirmations)
    if len(searched) == 1:
        ((arm, listed),) = shown.items()
        line = f"{arm}: {len(by_arm[arm])} trials: {count_states(by_arm[arm])}"
        return f"{line}\n{text_table(pd.DataFrame(listed))}" if listed else line
    lines = []
    for arm, rows in by_arm.items():
        first = {"arm": arm, "trials": f"{len(rows)}: {count_states(rows)}" if len(rows) else "0"}
        lines += [(first if k == 0 else {}) | cells for k, cells in enumerate(shown[arm] or [{}])]
    return text_table(pd.DataFrame(lines).rename(columns={"trial": "best"}).fillna(""))


def trials_cells(
    trials: pd.DataFrame, searched: Sequence[str], count: int, confirmations: pd.DataFrame | None = None
) -> dict[str, list[dict[str, str]]]:
    """Return by searched arm its best trials as texts, confirmed ones first."""
    again = {arm: None if confirmations is None else confirmations[confirmations.arm == arm] for arm in searched}
    found = {arm: best_trials(trials[trials.arm == arm], count, again[arm]).to_dict("records") for arm in searched}
    lost = {arm: set() if rows is None else set(rows.number[rows.state == "FAIL"]) for arm, rows in again.items()}
    confirmed = any(lost.values()) or any(pd.notna(row["again"]) for rows in found.values() for row in rows)
    return {arm: [_trial(row, confirmed, row["number"] in lost[arm]) for row in rows] for arm, rows in found.items()}


def count_states(trials: pd.DataFrame) -> str:
    """Return how many trials ended how."""
    states = trials.state.value_counts()
    return ", ".join(f"{states[s]} {word}" for s, word in STATE_WORDS.items() if s in states) or "no trials yet"


def describe_settings(row: pd.Series[Any] | Mapping[str, Any]) -> str:
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


def _study_page(setting: str, study: Study, best: int | None, place: Storage | None) -> str:
    figures = study_figures({setting: study})
    text = trials_text(study.trials, setting_about(figures, setting)["searched"], best, study.confirmations)
    rungs = rung_cells(rung_table(study.trials, study.epochs))
    return _page(figures, setting, study.trials, text, rungs, place)


def _page(
    figures: Figures,
    setting: str,
    trials: pd.DataFrame,
    searched: str,
    rungs: pd.DataFrame,
    place: Storage | None = None,
) -> str:
    about, runs = setting_about(figures, setting), figures.runs[figures.runs.setting == setting]
    lines = [f"{setting}: {words.describe_data(about)}", "", searched, ""]
    if len(rungs):
        lines += [f"early stopping:\n{text_table(rungs)}", ""]
    lines += words.search_notes(about, trials)
    if about["teacher"].get("val_accuracy") is not None:
        lines.append(f"teacher {words.describe_teacher(about)}")
    lines.append(f"student {words.describe_network(about['student'])}; {words.describe_budget(about)}")
    if reference := words.reference_arms(about):
        lines.append(f"at reference settings, not searched: {', '.join(reference)}")
    lines += words.setting_notes(about, runs)
    tables = final_tables(figures, setting)
    if not tables:
        return "\n".join([*lines, "", "no final run is complete" if len(runs) else "no final runs yet"])
    lines += [f"\n{title}\n{text_table(cells)}" for title, cells in tables.items()]
    names = [str(name) for cells in (*tables.values(), rungs) for name in cells]
    notes = column_notes([*names, *(["again %"] if "again %" in searched else [])])
    return "\n".join([*lines, "", notes, *verdict(figures, setting, place)])


def final_tables(figures: Figures, setting: str) -> dict[str, pd.DataFrame]:
    """Return by title the tables of the final runs: main arms, ablations by their parent, speed over several seeds, costs."""
    about, runs = setting_about(figures, setting), complete_runs(figures, setting)
    arms = words.main_arms(about)
    tables = {"final runs:": accuracy_table(figures, setting, arms)}
    for parent, changed in words.ablations_of(about).items():
        if runs.arm.isin(changed).any():
            tables[f"{parent} with one change:"] = accuracy_table(figures, setting, [parent, *changed], parent)
    cells = {title: accuracy_cells(table) for title, table in tables.items() if len(table)}
    pairs = pair_table(figures, setting, arms)
    if len(pairs) > 1 and pairs.p.notna().any():
        cells["any two arms:"] = pair_cells(pairs)
    speed = speed_table(figures, setting, arms)
    if len(speed) > 1 and (runs.arm == words.SCRATCH).sum() > 1:
        level = percent(scratch_level(figures, setting))
        cells[f"until val accuracy reaches {level} %, what scratch ends with:"] = speed_cells(speed)
    if cells and (costs := cost_table(figures, setting)):
        cells["what they cost:"] = cost_cells(costs)
    return cells


def _trial(row: Mapping[Any, Any], confirmed: bool, lost: bool) -> dict[str, str]:
    """Return a trial's cells; figures that were saved have fewer. One whose confirmation was lost says so."""
    shown = {"trial": str(row["number"]), "val %": percent(row["last_val_accuracy"])}
    shown |= {"again %": "failed" if lost else percent(row["again"])} if confirmed else {}
    if "best_val_accuracy" in row:
        shown |= {"best %": percent(row["best_val_accuracy"]), "epochs": number(row["epochs"], ".1f")}
    return shown | {"device s": number(row["device_seconds"], ".1f"), "settings": describe_settings(row)}


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
