"""How the frames of :mod:`dfkt.analysis.statistics` look as text and as Markdown.

Accuracies come as shares and are shown in percent, differences of them in points. What is null becomes an empty cell.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from dfkt.students.cost import Cost, scaled

COLUMN_NOTES = {
    "test %": "mean ± standard deviation over seeds of the last epoch's accuracy; val % likewise",
    "gap closed": "gain over scratch, as a share of what the teacher is ahead of scratch, if that is a point or more",
    "ahead by": "mean of the named arm less the row's over the same seeds, with an interval by Student's t; all intervals of "
    "a table hold at once in 95 % of such tables (Bonferroni)",
    "p": "of no difference, corrected for the number of arms by Holm's procedure, which is a little less cautious: an interval "
    "may hold zero where p is below 0.05. Both cover the seeds, not the choice of settings by one search",
    "less": "points of test accuracy by which the row's arm is ahead of the column's, * where p is below 0.05, ** below 0.01, "
    "corrected for the number of pairs by Holm's procedure",
    "steps": "until the mean val accuracy over seeds, smoothed to rise (isotonic regression), crosses what scratch's ends with; "
    "linear between epochs, flow and hint stages counted in, never if not within the run",
    "of scratch's steps": "over scratch's own, with a 95 % bootstrap interval over seeds that draws scratch and the level along, "
    "not corrected for the number of arms",
}
"""What the columns mean that do not say it themselves; ``ahead by`` stands behind an arm's name."""
SEARCH_NOTES = {
    "again %": "val accuracy of the same settings with another seed: the winner is chosen by the mean of both, "
    "among those that have one",
    "rung": "share of a trial's task stage at which it was held against the others of its arm",
    "rank": "Spearman's rank correlation between val at the rung, of an average of the weights, and at the end, over the trials "
    "that ran to their end. Those are the better ones, and those that are never stopped; over all it is usually higher",
}
"""The same of a search's tables."""
COST_NOTES = {"MACs": "multiply-accumulates of one image's forward pass: convolutions, matrix products and attention"}
"""The same of what networks cost."""
_NEVER = "never"


def accuracy_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return an accuracy table as texts; columns of which nothing is known are left out."""
    ahead, rows = f"{next(iter(table.against), '')} ahead by", []
    for row in table.to_dict("records"):
        cells = {"arm": row["arm"], "seeds": str(row["seeds"]), "test %": _spread(row["test_mean"], row["test_std"])}
        cells |= {"over scratch": _points(row["gain"]), "gap closed": number(100 * row["gap_share"], ".0f", " %")}
        cells |= {ahead: _difference(row), "p": _p(row["p"]), "val %": _spread(row["val_mean"], row["val_std"])}
        rows.append(cells | {"device s": number(row["device_seconds"], ".1f"), "epochs": number(row["epochs"], ".3g")})
    cells_table = pd.DataFrame(rows)
    return cells_table[[name for name in cells_table if (cells_table[name] != "").any()]]


def pair_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return differences between any two arms as a triangle of texts: the row's arm less the column's."""
    firsts, seconds = list(dict.fromkeys(table["first"])), list(dict.fromkeys(table["second"]))
    known = {(row["first"], row["second"]): row for row in table.to_dict("records")}
    rows = []
    for first in firsts:
        found = ((second, known.get((first, second))) for second in seconds)
        cells = {second: "" if row is None else _points(row["difference"]) + _stars(row["p"]) for second, row in found}
        rows.append({"less": first} | cells)
    return pd.DataFrame(rows)


def speed_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return a speed table as texts."""
    rows = []
    for row in table.to_dict("records"):
        cells = {"arm": row["arm"], "val % at the end": percent(row["end"]), "steps": number(row["steps"], ".0f")}
        ratio = number(row["step_ratio"], ".2f") + _interval(row["low"], row["high"], ".2f")
        rows.append(
            cells
            | {
                "training s": "" if row["seconds"] == math.inf else number(row["seconds"], ".1f"),
                "of scratch's steps": ratio,
            }
        )
    return pd.DataFrame(rows)


def rung_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return a rung table as texts."""
    rows = [
        {"arm": row["arm"], "rung": f"{row['rung']:.3g}", "trials there": str(row["passed"])}
        | {"stopped": str(row["stopped"]), "ran through": str(row["complete"]), "rank": number(row["rank"], ".2f")}
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows)


def cost_cells(costs: Sequence[Cost]) -> pd.DataFrame:
    """Return what networks cost as texts; columns of which nothing is known are left out."""
    rows = []
    for cost in costs:
        cells = {"network": cost.name, "parameters": _count(cost.parameters), "MACs": _count(cost.macs)}
        cells["MiB"] = "" if cost.size is None else f"{cost.size / 2**20:.3g}"
        for batch, each in cost.latencies.items():
            cells[f"ms an image, batch {batch}"] = f"{each.median:.3g} [{each.low:.3g}, {each.high:.3g}]"
        rows.append(cells | {"test %": "" if cost.test_accuracy is None else percent(cost.test_accuracy)})
    table = pd.DataFrame(rows).fillna("")
    return table[[name for name in table if (table[name] != "").any()]]


def column_notes(columns: Iterable[str]) -> str:
    """Return what those of some columns mean that do not say it themselves, as lines of at most 118 characters."""
    known = {"ahead by" if column.endswith(" ahead by") else column for column in columns}
    notes = [f"{name}: {note}." for name, note in (COLUMN_NOTES | SEARCH_NOTES | COST_NOTES).items() if name in known]
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
    return number(100 * share, ".2f")


def number(value: Any, form: str, unit: str = "") -> str:
    """Return a formatted number; null is empty, infinite is never."""
    if pd.isna(value):
        return ""
    return _NEVER if value == math.inf else f"{value:{form}}{unit}"


def _count(value: int | None) -> str:
    return "" if value is None else scaled(value)


def _points(share: Any) -> str:
    return number(100 * share, "+.2f")


def _stars(p: float) -> str:
    return "*" * ((p < 0.05) + (p < 0.01))


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else number(value, ".3f")


def _spread(mean: float, deviation: float) -> str:
    return percent(mean) + ("" if pd.isna(deviation) else f" ± {percent(deviation)}")


def _interval(low: float, high: float, form: str) -> str:
    return "" if pd.isna(low) else f" [{number(low, form)}, {number(high, form)}]"


def _difference(row: Mapping[Any, Any]) -> str:
    """Return ``+1.23 [+0.40, +2.06]``; fewer pairs than the arm has seeds are said so."""
    text = _points(row["difference"])
    text += _interval(100 * row["low"], 100 * row["high"], "+.2f")
    return text + (f" ({row['pairs']} seeds)" if text and row["pairs"] < row["seeds"] else "")
