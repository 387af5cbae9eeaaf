"""Figures of finished studies, drawn by plotly from the frames of :mod:`dfkt.analysis.figures` and of a study.

A figure has no title: its caption stands beside it. plotly is optional, and imported where a figure is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from dfkt.analysis.about import OURS, main_arms
from dfkt.analysis.estimates import mean_interval
from dfkt.analysis.figures import Figures, complete_curves, complete_runs, setting_about
from dfkt.analysis.statistics import scratch_level
from dfkt.students.cost import Cost

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

OUR_COLOUR = "#D55E00"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D1F", "#000000")
DASHES = (None, "dash", "dot")
GREY = "#555555"
STATE_COLOURS = {"COMPLETE": "#0072B2", "PRUNED": "#E69F00", "FAIL": "#B00020", "RUNNING": "#999999"}
ROW = 34
"""Pixels of height for an arm that has a row of its own."""


def blank(height: int = 320) -> Figure:
    """Return a figure without traces in the look that all have; the page lists its traces by name, so it has no legend."""
    from plotly.graph_objects import Figure, Layout

    axis = {"gridcolor": "#e6e6e6", "zeroline": False, "fixedrange": True, "linecolor": "#999999"}
    base = Layout(
        template="none",
        height=height,
        margin={"l": 50, "r": 14, "t": 10, "b": 46},
        font={"family": "system-ui, DejaVu Sans, sans-serif", "size": 12, "color": "#1a1a1a"},
        xaxis=axis,
        yaxis=axis | {"automargin": True},
        dragmode=False,
        hoverlabel={"font": {"size": 12}},
    )
    return Figure(layout=base)


def colour(arms: Sequence[str], arm: str) -> tuple[str, str | None]:
    """Return an arm's colour and dash, the same in all figures of a study."""
    if arm == OURS:
        return OUR_COLOUR, DASHES[0]
    turn, place = divmod([name for name in arms if name != OURS].index(arm), len(COLOURS))
    return COLOURS[place], DASHES[turn % len(DASHES)]


def finals_chart(figures: Figures, setting: str) -> Figure | None:
    """Draw the test accuracy of every final run, and by arm their mean with its 95 % interval by Student's t."""
    about, runs = setting_about(figures, setting), complete_runs(figures, setting).dropna(subset="test_accuracy")
    arms = [arm for arm in about["arms"] if (runs.arm == arm).any()]
    if not arms:
        return None
    teacher = about["teacher"].get("test_accuracy")
    figure = blank(76 + ROW * len(arms))
    for arm in arms:
        shade, values = colour(about["arms"], arm)[0], 100 * runs[runs.arm == arm].sort_values("seed").test_accuracy
        mean, low, _ = mean_interval(values)
        bar = None if math.isnan(low) else {"type": "data", "array": [mean - low], "thickness": 2, "width": 6}
        look = {"y": [arm], "mode": "markers", "marker": {"color": shade, "size": 10, "symbol": "diamond"}}
        figure.add_scatter(x=[mean], error_x=bar, name=arm, showlegend=False, hovertemplate="mean %{x:.2f} %", **look)
        dots = {"color": shade, "size": 7, "opacity": 0.6}
        figure.add_scatter(x=values, y=[arm] * len(values), mode="markers", marker=dots, name=arm, showlegend=False)
    for name, symbol in (
        ("a seed", "circle"),
        ("mean, 95 % interval", "diamond"),
    ):  # in grey they stand for those of all arms
        marker = {"symbol": symbol, "color": GREY}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=name)
    if teacher is not None:
        line = {"color": GREY, "dash": "dash", "width": 1.5}
        ends = [arms[0], arms[-1]] if len(arms) > 1 else [arms[0]]
        figure.add_scatter(x=[100 * teacher] * len(ends), y=ends, mode="lines+markers", line=line, name="teacher")
        figure.data[-1].marker = {"symbol": "line-ns", "size": 16, "line": {"width": 1.5, "color": GREY}}
    seen = [*(100 * runs.test_accuracy), *([] if teacher is None else [100 * teacher])]
    room = 0.5 * (max(seen) - min(seen)) + 0.2
    figure.update_xaxes(title="test accuracy, %", range=[min(seen) - room, max(seen) + room])
    return figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=arms)


def cost_charts(
    figures: Figures, setting: str, costs: Sequence[Cost], spent: pd.DataFrame | None = None
) -> dict[str, Figure]:
    """Draw test accuracy against what a network costs, by what it is: its parameters, an image's time, device seconds.

    Teacher and arms are points; an arm is the mean of its final runs. A teacher's training is not among the arms' device
    seconds: it is a point of its own, or a line where its time is not known.

    Args:
        figures: What was measured.
        setting: Which setting.
        costs: Of teacher and student, perhaps with latencies.
        spent: Device seconds by arm, as :func:`dfkt.analysis.verdict.device_seconds` gives them.
    """
    about, runs = setting_about(figures, setting), complete_runs(figures, setting).dropna(subset="test_accuracy")
    tests = {arm: 100 * runs.test_accuracy[runs.arm == arm].mean() for arm in main_arms(about)}
    tests = {arm: test for arm, test in tests.items() if not math.isnan(test)}
    known = {cost.name.partition(" ")[0]: cost for cost in costs}
    student, teacher = known.get("student"), about["teacher"].get("test_accuracy")
    if not tests:
        return {}
    taught = None if teacher is None else 100 * teacher
    found: dict[str, Figure] = {}
    if student is not None and student.parameters:
        size = known["teacher"].parameters if "teacher" in known else None
        places = dict.fromkeys(tests, float(student.parameters))
        found["parameters"] = _against(about["arms"], tests, places, "parameters", taught, size)
    for batch, each in ({} if student is None else student.latencies).items():
        theirs = known["teacher"].latencies.get(batch) if "teacher" in known else None
        of = None if theirs is None else theirs.median
        places, what = dict.fromkeys(tests, each.median), f"milliseconds an image, batch {batch}"
        found[what] = _against(about["arms"], tests, places, what, taught, of)
    if spent is not None:
        places = {arm: float(spent[arm].sum()) for arm in tests if arm in spent}
        what = "device seconds of search and final runs"
        found[what] = _against(about["arms"], tests, places, what, taught, about["teacher"].get("seconds"))
    return found


def _against(
    arms: Sequence[str],
    tests: Mapping[str, float],
    places: Mapping[str, float],
    what: str,
    teacher: float | None,
    of: float | None = None,
) -> Figure:
    """Draw accuracies at places, the teacher at its own or as a line."""
    figure = blank(280)
    for arm, place in places.items():
        marker = {"color": colour(arms, arm)[0], "size": 11, "opacity": 0.85}
        figure.add_scatter(x=[place], y=[tests[arm]], mode="markers", marker=marker, name=arm)
    if teacher is not None and of is not None:
        marker = {"color": GREY, "size": 14, "symbol": "star"}
        figure.add_scatter(x=[of], y=[teacher], mode="markers", marker=marker, name="teacher")
    elif teacher is not None:
        line = {"color": GREY, "dash": "dash", "width": 1.5}
        ends = [0.8 * min(places.values()), 1.25 * max(places.values())]
        figure.add_scatter(x=ends, y=[teacher] * 2, mode="lines", line=line, name="teacher (its training not counted)")
    every = [place for place in [*places.values(), of] if place]
    shown = [math.log10(0.7 * min(every)), math.log10(1.4 * max(every))] if every else None
    figure.update_xaxes(title=what, type="log", range=shown, **_ticks(shown))
    return figure.update_yaxes(title="test accuracy, %")


def accuracy_curves(figures: Figures, setting: str) -> Figure | None:
    """Draw ``val`` accuracy over steps: by arm the mean over seeds, in a band from the lowest to the highest."""
    curves, arms = complete_curves(figures, setting), main_arms(setting_about(figures, setting))
    figure, level = blank(360), scratch_level(figures, setting)
    curves = curves.dropna(subset="val_accuracy")
    for arm in (arm for arm in arms if (curves.arm == arm).any()):
        seeds = 100 * curves[curves.arm == arm].groupby("step").val_accuracy.agg(["mean", "min", "max"])
        steps, (shade, dash) = seeds.index.to_list(), colour(arms, arm)
        around = {"x": steps + steps[::-1], "y": [*seeds["max"], *seeds["min"][::-1]], "fillcolor": shade}
        band = {"fill": "toself", "opacity": 0.13, "mode": "none", "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(**around, **band)
        line = {"color": shade, "dash": dash, "width": 2.4 if arm == OURS else 1.6}
        figure.add_scatter(x=steps, y=seeds["mean"], mode="lines", line=line, name=arm)
    if not figure.data:
        return None
    if not math.isnan(level):
        last, line = curves.step.max(), {"color": GREY, "dash": "longdash", "width": 1}
        figure.add_scatter(x=[0, last], y=[100 * level] * 2, mode="lines", line=line, name="where scratch ends")
    figure.update_xaxes(title="steps, flow and hint stages counted in", rangemode="tozero")
    return figure.update_yaxes(title="val accuracy, %")


def stage_chart(records: pd.DataFrame) -> Figure:
    """Draw a run by stage: the loss of each (left), ``val`` accuracy in the task stage (right).

    Stages before the task stage are shaded, the darker the higher their upper tap; of a run without any, the task loss is
    drawn.

    Args:
        records: Its epoch records, in order.
    """
    figure, early = blank(260), records[records.phase != "task"]
    task, top = records[records.phase == "task"], early.stage.max()
    starts = records.epoch.shift(fill_value=0.0)[early.index]
    place = early[["phase", "round", "stage"]].astype("str").fillna("")
    changes = place.ne(place.shift()).any(axis=1).cumsum()
    loss = {"mode": "lines+markers", "marker": {"size": 4, "color": "#0072B2"}, "line": {"width": 1.5}}
    for k, (_, part) in enumerate(early.groupby(changes)):
        shade = 0.08 if pd.isna(top) or not top else 0.06 + 0.16 * float(part.stage.fillna(0).iloc[0]) / float(top)
        ends = {"x0": starts[part.index].min(), "x1": part.epoch.max()}
        figure.add_vrect(fillcolor="#0072B2", opacity=shade, line_width=0, layer="below", **ends)
        name = f"loss of {' and '.join(dict.fromkeys(early.phase))} stages"
        figure.add_scatter(x=part.epoch, y=part.loss, name=name, showlegend=k == 0, **loss)
    if early.empty:
        figure.add_scatter(x=task.epoch, y=task.loss, name="loss", **loss)
    shown = {"mode": "lines+markers", "marker": {"size": 4, "color": OUR_COLOUR}, "line": {"width": 1.5}}
    figure.add_scatter(x=task.epoch, y=100 * task.val_accuracy, name="val accuracy", yaxis="y2", **shown)
    right = {
        "overlaying": "y",
        "side": "right",
        "range": [0, 101],
        "tickmode": "linear",
        "dtick": 25,
        "showgrid": False,
    }
    figure.update_layout(yaxis2={**right, "title": "val accuracy, %", "fixedrange": True}, margin_r=56)
    figure.update_xaxes(title="epochs", rangemode="tozero")
    return figure.update_layout(yaxis={"title": "loss", "rangemode": "tozero", "automargin": False}, margin_l=56)


def spent_chart(tables: Mapping[str, pd.DataFrame], arms: Sequence[str], words: Mapping[str, str]) -> Figure | None:
    """Draw where device seconds went: a bar per arm, of its trials and final runs by how they ended.

    Args:
        tables: Runs by what they are, such as ``trials``.
        arms: In order.
        words: How readers are told the state of a run.
    """
    figure, kinds = blank(76 + ROW * len(arms)), {"final runs": "#000000", "confirmations": "#56B4E9"}
    for kind, rows in tables.items():
        for state in STATE_COLOURS:
            sums = rows[rows.state == state].groupby("arm").device_seconds.sum().reindex(list(arms)).fillna(0.0)
            if sums.sum() > 0:
                shade = kinds.get(kind, STATE_COLOURS[state]) if state == "COMPLETE" else STATE_COLOURS[state]
                label = f"{kind}, {words[state]}"
                figure.add_bar(x=sums, y=list(arms), orientation="h", name=label, marker={"color": shade})
    if not figure.data:
        return None
    figure.update_layout(barmode="stack", bargap=0.4)
    figure.update_xaxes(title="device seconds")
    return figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=list(arms))


def _ticks(ends: Sequence[float] | None) -> dict[str, Any]:
    """Return ticks at 1, 2 and 5 times the powers of ten: few enough for a narrow figure."""
    if ends is None:
        return {}
    steps = (1, 2, 5) if ends[1] - ends[0] < 2 else (1,)
    places = [step * 10.0**power for power in range(math.floor(ends[0]), math.ceil(ends[1]) + 1) for step in steps]
    return {"tickvals": places, "tickformat": "~s" if ends[0] >= 0 else "~g"}
