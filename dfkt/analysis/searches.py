"""What Optuna knows of a study's searches, read from a copy of its journal, and Optuna's own plots of them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from dfkt.analysis.charts import blank
from dfkt.analysis.pages import STATE_WORDS
from dfkt.errors import StudyError, one_line
from dfkt.store.files import Storage, readable
from dfkt.study.search import JOURNAL, Lines, silence_optuna

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_TRIALS = 400
"""That a plot shows: the best half, and of the others an even share; more make a page slow."""
MOST_PARAMS = 8
"""That slices and parallel coordinates show: the most important ones."""
FEW = 30
"""Complete trials below which importances are a hint at most."""
TARGET = "val accuracy"


@dataclass(frozen=True)
class SearchPlot:
    """One of Optuna's plots, or why there is none."""

    title: str
    figure: Figure | None
    text: str
    """Its caption, or the reason."""
    least: int = 0
    """Pixels of width that it needs."""


def read_searches(storage: Storage) -> dict[str, optuna.Study]:
    """Return the searches of a study by arm, as its journal has them now; it is only read, at once, into memory.

    A last line that a running study has not finished is left out.

    Raises:
        StudyError: If there is no journal, or it is damaged.
    """
    with readable(storage):
        data = storage.read(JOURNAL)
    if data is None:
        raise StudyError(f"Optuna's plots need {JOURNAL}, but {storage.path} has none.")
    silence_optuna()
    try:
        journal = JournalStorage(Lines(data[: data.rfind(b"\n") + 1]))
        return {
            name: optuna.load_study(study_name=name, storage=journal) for name in optuna.get_all_study_names(journal)
        }
    except Exception as error:  # whatever Optuna stumbles over
        raise StudyError(f"{JOURNAL} in {storage.path} is damaged: {one_line(error)}.") from error


def search_plots(search: optuna.Study) -> list[SearchPlot]:
    """Return Optuna's plots of an arm's search; in the place of one that cannot be drawn, the reason."""
    import optuna.visualization as drawn

    thin = _thinned(search)
    complete, count = thin.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)), len(thin.trials)
    shown = "" if count == len(search.trials) else f" {count} of {len(search.trials)} trials are shown."
    none = None if any(trial.params for trial in complete) else "no trial that has a parameter is complete"
    equal = none or (None if len({trial.value for trial in complete}) > 1 else "all complete trials are equally good")
    hint = "" if len(complete) >= FEW else f" Only {len(complete)} trials are complete: a hint at most."
    text = "Share of the variance of val accuracy that a parameter explains (fANOVA), of those that every complete trial has."
    importance = _plot("Importance", lambda: _importances(thin), f"{text}{hint}{shown}", reason=equal)
    params = _ranked(complete, importance)
    which = f" The {len(params)} parameters that matter most." if len(params) == MOST_PARAMS else ""
    width = 110 * len(params) + 140

    def slices() -> Figure:
        return _with_few_ticks(drawn.plot_slice(thin, params, target_name=TARGET))

    def lines() -> Figure:
        return drawn.plot_parallel_coordinate(thin, params, target_name=TARGET)

    def times() -> Figure:
        return drawn.plot_timeline(thin).update_layout(height=min(max(140 + 14 * count, 240), 640))

    text = "Val accuracy of complete trials against each parameter; darker ones came later."
    more = "A complete trial is a line, the darker the higher its val accuracy, which is the first axis."
    begun = None if any(trial.datetime_start for trial in thin.trials) else "no trial has begun"
    return [
        importance,
        _plot("Slices", slices, f"{text}{which}{shown}", reason=none, least=width),
        _plot("Parallel coordinates", lines, f"{more}{which}{shown}", reason=none, least=width),
        _plot("Timeline", times, f"When each trial ran, and how it ended.{shown}", reason=begun),
    ]


def space_cells(search: optuna.Study, best: int | None = None) -> pd.DataFrame:
    """Return what was searched as texts: every parameter with its range, how many trials have it, and the winner's value.

    Args:
        search: An arm's.
        best: The winner's number; ``None`` leaves its column out.
    """
    trials = search.get_trials(deepcopy=False)
    kinds: dict[str, BaseDistribution] = {}
    for trial in trials:
        kinds |= {name: kind for name, kind in trial.distributions.items() if name not in kinds}
    rows = []
    for name, kind in kinds.items():
        row = {"parameter": name, "searched": describe_range(kind)}
        row["trials"] = str(sum(name in trial.params for trial in trials))
        if best is not None and best < len(trials):
            row["winner"] = _plain(trials[best].params.get(name, ""))
        rows.append(row)
    return pd.DataFrame(rows)


def describe_range(kind: BaseDistribution) -> str:
    """Return what a parameter may be.

    Example:
        >>> describe_range(FloatDistribution(0.01, 1, log=True)), describe_range(CategoricalDistribution([True, False]))
        ('0.01 to 1, logarithmic', 'True, False')
    """
    if isinstance(kind, CategoricalDistribution):
        return ", ".join(map(str, kind.choices))
    assert isinstance(kind, (FloatDistribution, IntDistribution))
    whole = " (whole)" if isinstance(kind, IntDistribution) else ""
    return f"{kind.low:g} to {kind.high:g}{whole}{', logarithmic' if kind.log else ''}"


def _plot(
    title: str, draw: Callable[[], Figure], caption: str, *, reason: str | None = None, least: int = 0
) -> SearchPlot:
    """Return a plot, or why there is none: the reason if there is one, else what its drawing raises."""
    if reason is None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna calls some of its plots experimental
                return SearchPlot(title, _dressed(draw()), caption, least)
        except Exception as error:  # whatever Optuna or plotly stumbles over; the page goes on
            reason = f"Optuna could not draw it: {one_line(error)}"
    return SearchPlot(title, None, f"Not drawn: {reason}.")


def _importances(search: optuna.Study) -> Figure:
    """Return the importances, without the titles that their caption has: names of parameters need the room."""
    from optuna.visualization import plot_param_importances

    figure = plot_param_importances(search, FanovaImportanceEvaluator(seed=0), target_name=TARGET)
    figure.update_yaxes(title=None).update_traces(showlegend=False)
    return figure.update_layout(height=120 + 24 * len(figure.data[0].y))


def _ranked(complete: Sequence[FrozenTrial], importance: SearchPlot) -> list[str]:
    """Return the parameters that are shown: the most important ones, then those that most complete trials have."""
    known = [] if importance.figure is None else [str(name) for name in reversed(importance.figure.data[0].y)]
    counts = Counter(name for trial in complete for name in trial.params if name not in known)
    return [*known, *(name for name, _ in counts.most_common())][:MOST_PARAMS]


def _thinned(search: optuna.Study) -> optuna.Study:
    """Return a search in memory with at most :data:`MOST_TRIALS` trials: the best ones, and an even share of the others."""
    trials = search.get_trials(deepcopy=False)
    if len(trials) > MOST_TRIALS:
        order = sorted(trials, key=lambda trial: -1.0 if trial.value is None else trial.value, reverse=True)
        half = MOST_TRIALS // 2
        rest = order[half:]
        kept = [*order[:half], *(rest[k * len(rest) // half] for k in range(half))]
        trials = sorted(kept, key=lambda trial: trial.number)
    thin = optuna.create_study(direction="maximize")
    thin.add_trials(trials)
    return thin


def _dressed(figure: Figure) -> Figure:
    """Give one of Optuna's figures the look of the others and our words, without its title, as wide as there is room."""
    look = blank(figure.layout.height or 360).layout
    names = ("template", "height", "font", "dragmode", "hoverlabel")
    figure.update_layout({name: look[name] for name in names} | {"title": None, "width": None})
    figure.update_layout(margin={"l": 60, "r": 50, "t": 24, "b": 50})
    for trace in figure.data:
        trace.name = STATE_WORDS.get(trace.name, trace.name)
    figure.update_xaxes(fixedrange=True, tickfont_size=11)
    return figure.update_yaxes(fixedrange=True, automargin=True)


def _with_few_ticks(figure: Figure) -> Figure:
    """Give slices, which stand close, two or three ticks each: the ends of what was tried where it is drawn by logarithm."""
    for trace in figure.data:
        name = (trace.xaxis or "x").replace("x", "xaxis")
        if figure.layout[name].type == "log":
            ends = sorted({min(trace.x), max(trace.x)})
            figure.layout[name].update(tickvals=ends, ticktext=[f"{end:.2g}" for end in ends])
    return figure.update_xaxes(nticks=3, tickangle=0)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
