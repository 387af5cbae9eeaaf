"""Write the tables of docs/results.md, and its plots, from the figures in docs/evidence.

    python docs/build_results.py            rewrite the page's blocks and docs/figures/*.svg
    python docs/build_results.py --check    exit 1 if a block is not what the evidence gives; plots are not looked at

A block stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, each on a line of its own; the rest of the page
is never touched. NAME is ``about PLACE``, ``accuracy PLACE``, ``ablations PLACE``, ``speed PLACE``, or ``columns``: what
these tables' columns mean. PLACE is FOLDER/SETTING, of docs/evidence/FOLDER as ``dfkt.analysis.figures.save_figures`` leaves
it. Ablations stand in a table of their own and in no plot.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfkt.analysis import about as a
from dfkt.analysis import figures as f
from dfkt.analysis import statistics as s
from dfkt.analysis import tables as t
from dfkt.errors import InputError

DOCS = Path(__file__).parent
Evidence = dict[str, f.Figures]
"""The figures that hold a setting, by FOLDER/SETTING."""

_MARKER = re.compile(r"<!-- (begin|end) (.*?) -->")
_COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D1F")
_OURS = "#D55E00"
_DASHES = ("-", "--", ":")
_LEVEL: dict[str, Any] = {"color": "#555555", "linestyle": (0, (6, 4)), "linewidth": 1}


def load_evidence(folder: Path) -> Evidence:
    """Read all saved figures below a folder."""
    evidence: Evidence = {}
    for path in sorted(folder.glob("*/about.json")):
        figures = f.load_figures(path.parent)
        evidence |= {f"{path.parent.name}/{setting}": figures for setting in figures.about["settings"]}
    return evidence


def block(name: str, evidence: Evidence) -> str:
    """Return what stands between the markers of a name."""
    kind, _, place = name.partition(" ")
    if kind == "columns" and not place:
        return t.column_notes(t.COLUMN_NOTES)
    kinds = {"about": _about, "accuracy": _accuracy, "ablations": _ablations, "speed": _speed}
    if kind not in kinds or place not in evidence:
        known = f"columns, or one of {', '.join(kinds)} with one of {', '.join(evidence) or '(none found)'}"
        raise InputError(f"A marker must name {known}, but got {name!r}.")
    return kinds[kind](evidence[place], place.partition("/")[2])


def rebuild(page: str, evidence: Evidence) -> str:
    """Return the page with every block written anew."""
    parts, place, open_name = [], 0, None
    for marker in _MARKER.finditer(page):
        kind, name = marker.groups()
        if (kind == "begin") != (open_name is None) or (kind == "end" and name != open_name):
            raise InputError(f"Markers must pair up, but <!-- {kind} {name} --> follows {open_name or 'no begin'!r}.")
        if kind == "begin":
            parts.append(page[place : marker.end()] + "\n" + block(name, evidence) + "\n")
        place, open_name = (marker.end(), name) if kind == "begin" else (marker.start(), None)
    if open_name is not None:
        raise InputError(f"Markers must pair up, but <!-- begin {open_name} --> has no end.")
    return "".join([*parts, page[place:]])


def plot_curves(figures: f.Figures, setting: str) -> Figure:
    """Plot ``val`` accuracy over steps: per arm the mean over seeds, in a band from the lowest to the highest."""
    curves = f.complete_curves(figures, setting)
    arms = a.main_arms(f.setting_about(figures, setting))
    figure, axes = _axes(f"{setting}: val accuracy", 7.5)
    for arm in arms:
        rows = curves[(curves.arm == arm) & curves.val_accuracy.notna()]
        if len(rows):
            seeds = 100 * rows.groupby("step").val_accuracy.agg(["mean", "min", "max"])
            steps, (colour, dash) = seeds.index.to_numpy(dtype=float), _look(arms, arm)
            width = 2.2 if arm == a.OURS else 1.3
            axes.plot(steps, seeds["mean"].to_numpy(), color=colour, linestyle=dash, linewidth=width, label=arm)
            axes.fill_between(steps, seeds["min"].to_numpy(), seeds["max"].to_numpy(), color=colour, alpha=0.12, lw=0)
    level = s.scratch_level(figures, setting)
    if not math.isnan(level):
        axes.axhline(100 * level, label="where scratch ends", **_LEVEL)
    axes.set(xlabel="steps, flow and hint stages counted in", ylabel="val accuracy, %")
    _legend(axes)
    return figure


def plot_accuracy(figures: f.Figures, setting: str) -> Figure:
    """Plot ``test`` accuracy: a dot per seed, a bar at the mean, a dashed line at the teacher's."""
    runs, about = f.complete_runs(figures, setting), f.setting_about(figures, setting)
    shown = [arm for arm in a.main_arms(about) if (runs.arm == arm).any()]
    figure, axes = _axes(f"{setting}: test accuracy", 6.5)
    for place, arm in enumerate(shown):
        colour, _ = _look(a.main_arms(about), arm)
        values = 100 * runs[runs.arm == arm].sort_values("seed").test_accuracy.to_numpy()
        offsets = [place + 0.08 * (k - (len(values) - 1) / 2) for k in range(len(values))]
        axes.plot(values, offsets, "o", color=colour, markersize=4.5, alpha=0.8)
        axes.plot([values.mean()] * 2, [place - 0.35, place + 0.35], color=colour, linewidth=2.2)
    teacher = about.get("teacher", {}).get("test_accuracy")
    if teacher is not None:
        axes.axvline(100 * teacher, label="teacher", **_LEVEL)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %")
    _legend(axes)
    return figure


def svg(figure: Figure) -> str:
    """Return a plot as SVG; equal plots give equal texts."""
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "dfkt", "svg.fonttype": "none"}):
        figure.savefig(sink, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()) + "\n"


def main(arguments: Sequence[str] | None = None, docs: Path = DOCS) -> int:
    """Rewrite or check the page; return the exit code: 0 good, 1 out of date, 2 cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    check = parser.parse_args(arguments).check
    page = docs / "results.md"
    old = page.read_text(encoding="utf-8")
    try:
        evidence = load_evidence(docs / "evidence")
        new = rebuild(old, evidence)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if check:
        if new != old:
            print(f"{page} is not what the evidence gives; run python docs/build_results.py", file=sys.stderr)
        return int(new != old)
    page.write_text(new, encoding="utf-8")
    (docs / "figures").mkdir(exist_ok=True)
    for place, figures in evidence.items():
        for name, plot in (("curves", plot_curves), ("accuracy", plot_accuracy)):
            path = docs / "figures" / f"{place.replace('/', '-')}-{name}.svg"
            path.write_text(svg(plot(figures, place.partition("/")[2])), encoding="utf-8")
    return 0


def _about(figures: f.Figures, setting: str) -> str:
    about = f.setting_about(figures, setting)
    lines = [f"{a.describe_setting(setting, about)}; {a.describe_origin(about)}."]
    return "\n".join([*lines, "", "```", *a.commands(about), "```"])


def _accuracy(figures: f.Figures, setting: str) -> str:
    runs, about = figures.runs[figures.runs.setting == setting], f.setting_about(figures, setting)
    table = s.accuracy_table(figures, setting, a.main_arms(about), a.OURS)
    return "\n\n".join([t.markdown_table(t.accuracy_cells(table)), *a.setting_notes(about, runs)])


def _ablations(figures: f.Figures, setting: str) -> str:
    groups = a.ablations_of(f.setting_about(figures, setting)).items()
    tables = (s.accuracy_table(figures, setting, [parent, *changed], parent) for parent, changed in groups)
    return "\n\n".join(t.markdown_table(t.accuracy_cells(table)) for table in tables)


def _speed(figures: f.Figures, setting: str) -> str:
    table = s.speed_table(figures, setting, a.main_arms(f.setting_about(figures, setting)))
    if table.empty:
        return "Scratch has no complete run, so there is no level to reach."
    level, cells = t.percent(s.scratch_level(figures, setting)), t.markdown_table(t.speed_cells(table))
    return f"Until val accuracy reaches {level} %, what scratch ends with:\n\n{cells}"


def _axes(title: str, width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 4.2))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _look(arms: Sequence[str], arm: str) -> tuple[str, str]:
    if arm == a.OURS:
        return _OURS, "-"
    turn, place = divmod([name for name in arms if name != a.OURS].index(arm), len(_COLOURS))
    return _COLOURS[place], _DASHES[turn % len(_DASHES)]


if __name__ == "__main__":
    sys.exit(main())
