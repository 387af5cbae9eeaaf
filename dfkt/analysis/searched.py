"""The parts of a report that tell of searches: trials, parameters, Optuna's plots, and overlap patterns as arcs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
import pandas as pd

from dfkt.analysis.about import About, search_notes
from dfkt.analysis.arcs import Network, arcs, student_network, weighed_pairs
from dfkt.analysis.html import drawing, folded, grid, notes, paragraph, plot, section, table
from dfkt.analysis.pages import count_states, describe_settings, trials_cells
from dfkt.analysis.searches import read_searches, search_plots, space_cells
from dfkt.analysis.tables import column_notes, percent, rung_cells
from dfkt.analysis.trust import rung_table
from dfkt.errors import InputError, clipped
from dfkt.store.files import Storage
from dfkt.store.rows import best_trials
from dfkt.store.study_store import Study

TRIALS = 5
"""Best trials of a searched arm that are listed."""
PATTERNS = 3
"""Those whose overlap patterns are drawn."""
MOST_CAPTION = 160
"""Characters."""
ABOUT_ARCS = (
    "Taps of the student, the lowest on the left, and an arc for each flow pair; its colour is its span, its width its weight "
    "beside the others of its pattern."
)


def searched(study: Study, storage: Storage, about: About) -> Iterator[str]:
    """Yield what was searched: of every searched arm its best trials, early stopping, parameters and Optuna's plots.

    Args:
        study: As it was read.
        storage: Its folder, which has Optuna's journal.
        about: What is said of it.
    """
    if not about["searched"]:
        yield paragraph("No arm was searched.")
        return
    searches: Mapping[str, optuna.Study] = {}
    try:
        searches = read_searches(storage)
    except InputError as error:
        yield paragraph(f"{error} So Optuna's plots and the ranges that were searched are missing here.", "fault")
    yield notes(search_notes(about, study.trials))
    cells = trials_cells(study.trials, about["searched"], TRIALS, study.confirmations)
    rungs, last = rung_table(study.trials, study.epochs), about["searched"][-1]
    for arm in about["searched"]:
        mine, best = study.trials[study.trials.arm == arm], study.meta.get("arms", {}).get(arm, {}).get("best") or {}
        parts = [*_trials(cells[arm], rungs[rungs.arm == arm])]
        if arm in searches:
            parts += _optuna(searches[arm], best.get("trial"))
        elif searches:
            parts.append(paragraph("Optuna's journal knows nothing of it.", "fault"))
        yield folded(f"{arm}: {len(mine)} trials: {count_states(mine)}", *parts, opened=arm == last)


def patterns(study: Study, arms: Sequence[str]) -> Iterator[str]:
    """Yield the overlap patterns as arcs: of searched arms those of the best trials, of the others those of a final run."""
    rows = list(_rows(study, arms))
    if not rows:
        yield paragraph("No run whose pattern could be drawn has come to its end.")
        return
    try:
        network = student_network(study.meta)
    except InputError as error:
        yield paragraph(f"They cannot be drawn: {error}", "fault")
        return
    shown = list(_drawn(rows, network, study.meta["config"]["train"]["epochs"]))
    yield paragraph(ABOUT_ARCS, "note") + grid(shown) if shown else paragraph("No method here passes on flow.")


def _trials(cells: Sequence[Mapping[str, str]], rungs: pd.DataFrame) -> Iterator[str]:
    if cells:
        frame = pd.DataFrame(cells)
        yield section("Its best trials", table(frame), notes([column_notes(map(str, frame))]), level=4)
    if len(rungs):
        frame = rung_cells(rungs).drop(columns="arm")
        yield section("Early stopping", table(frame), notes([column_notes(map(str, frame))]), level=4)


def _optuna(search: optuna.Study, best: int | None) -> Iterator[str]:
    if len(space := space_cells(search, best)):
        yield section("Its parameters", table(space), level=4)
    for each in search_plots(search):
        shown = paragraph(each.text) if each.figure is None else plot(each.figure, each.text, least=each.least)
        yield section(each.title, shown, level=4)


def _rows(study: Study, arms: Sequence[str]) -> Iterator[tuple[str, pd.Series[Any]]]:
    """Yield a title and a row of what is drawn."""
    for arm in arms:
        mine = study.trials[study.trials.arm == arm]
        best = best_trials(mine, PATTERNS, study.confirmations[study.confirmations.arm == arm])
        for place, (_, row) in enumerate(best.iterrows()):
            first = f"{arm}, trial {row.number}{' (best)' if not place else ''}"
            yield f"{first}: val {percent(row.last_val_accuracy)} %; {describe_settings(row)}", row
        finals = study.finals[(study.finals.arm == arm) & study.finals.settings.notna()]
        if best.empty and len(finals):
            yield f"{arm}: {describe_settings(finals.iloc[0])}", finals.iloc[0]


def _drawn(rows: Sequence[tuple[str, pd.Series[Any]]], network: Network, epochs: float) -> Iterator[str]:
    for title, row in rows:
        try:
            pairs = weighed_pairs(row, network, epochs)
        except InputError as error:  # a user's class that is not at hand
            yield drawing("", f"{clipped(title, MOST_CAPTION)}: {error}")
            continue
        if pairs:
            yield drawing(arcs(pairs, network.names), clipped(title, MOST_CAPTION))
