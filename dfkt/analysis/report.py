"""The page that says what studies gained: verdict, final runs, costs, curves, searches, patterns, failures, origin.

What cannot be drawn or read is said in its place, and the page goes on. Nothing is written, and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

import pandas as pd

from dfkt.analysis import about as words
from dfkt.analysis import html
from dfkt.analysis.charts import accuracy_curves, cost_charts, finals_chart, spent_chart, stage_chart
from dfkt.analysis.figures import Figures, complete_runs, setting_about, study_figures
from dfkt.analysis.html import grid, notes, paragraph, plot, section, table
from dfkt.analysis.pages import STATE_WORDS, describe_settings, final_tables
from dfkt.analysis.progress import Progress, progress
from dfkt.analysis.searched import patterns, searched
from dfkt.analysis.statistics import accuracy_table, cost_table
from dfkt.analysis.tables import column_notes, cost_cells, percent
from dfkt.analysis.verdict import device_seconds, sentence, student_place
from dfkt.errors import clipped
from dfkt.store.files import Storage
from dfkt.store.rows import best_trials
from dfkt.store.study_store import Study
from dfkt.students.cost import Cost

MOST_ERRORS = 20


@dataclass(frozen=True, eq=False)
class Part:
    """What the page says of one study.

    Attributes:
        title: What the page calls it.
        storage: Its folder.
        study: As it was read; ``None`` if it could not be.
        fault: Why it could not.
        costs: Of teacher and student with latencies; empty where no time was measured.
        timing: On what time was measured, or why it was not.
    """

    title: str
    storage: Storage
    study: Study | None = None
    fault: str = ""
    costs: Sequence[Cost] = ()
    timing: str = ""


def report(parts: Sequence[Part], now: datetime, version: str) -> str:
    """Return the page, one HTML file.

    Args:
        parts: The studies, each a part of the page.
        now: The present, with a time zone.
        version: Of this program.

    Raises:
        ConfigError: If plotly is missing.
    """
    html.check_plotly()
    title = parts[0].title if len(parts) == 1 else f"{len(parts)} studies: {', '.join(part.title for part in parts)}"
    made = f"Written by dfkt {version} on {now:%Y-%m-%d %H:%M} UTC. Words: docs/glossary.md."
    body = [f"<h1>{html.escape(clipped(title, 200))}</h1>", paragraph(made, "note")]
    several = [_Written(part, now) for part in parts]
    if len(parts) > 1:
        body.append(_overview(several))
    body += [one.whole(f"study-{k}", alone=len(parts) == 1) for k, one in enumerate(several, 1)]
    return html.page(clipped(title, 80), "".join(body), version)


def _overview(several: Sequence[_Written]) -> str:
    """Return what all studies say at a glance: a verdict each, and the test accuracy of every arm in every one."""
    links = "".join(f'<a href="#study-{k}">{html.escape(one.part.title)}</a> ' for k, one in enumerate(several, 1))
    said = "".join(paragraph(f"{one.part.title}: {one.verdict}") for one in several)
    columns: dict[str, dict[str, str]] = {}
    for one in several:
        if one.part.study is not None:
            rows = accuracy_table(one.figures, one.setting, words.main_arms(one.about)).to_dict("records")
            columns[one.part.title] = {
                row["arm"]: percent(row["test_mean"]) + (" *" if row["arm"] == row["against"] else "") for row in rows
            }
    arms = list(dict.fromkeys(arm for column in columns.values() for arm in column))
    cells = pd.DataFrame({"test %": arms} | {name: [c.get(arm, "") for arm in arms] for name, c in columns.items()})
    shown = (table(cells), notes(["* the best by val of its study; means over seeds"])) if arms else ()
    return section("All at a glance", f"<nav>{links}</nav>", said, *shown, level=2)


@dataclass(frozen=True, eq=False)
class _Written:
    """A part of the page as it is being written."""

    part: Part
    now: datetime

    @cached_property
    def study(self) -> Study:
        """The study; only where it could be read."""
        assert self.part.study is not None
        return self.part.study

    @property
    def setting(self) -> str:
        """What its figures call it."""
        return self.study.name

    @cached_property
    def figures(self) -> Figures:
        """What it measured."""
        return study_figures({self.setting: self.study})

    @cached_property
    def about(self) -> words.About:
        """What is said of it."""
        return setting_about(self.figures, self.setting)

    @cached_property
    def costs(self) -> Sequence[Cost]:
        """What its networks cost, with latencies where they were measured."""
        return self.part.costs or cost_table(self.figures, self.setting)

    @cached_property
    def progress(self) -> Progress:
        """How far it is."""
        return progress(self.study, self.now)

    @property
    def verdict(self) -> str:
        """Who is ahead, in a sentence; or why that cannot be told."""
        if self.part.study is None:
            return self.part.fault
        said = sentence(self.figures, self.setting, self.costs, device_seconds(self.study))
        ended = self.progress.over or self.figures.runs.empty
        return said if ended else f"So far: {said}"

    def whole(self, name: str, *, alone: bool) -> str:
        """Return all of it."""
        title = "Verdict" if alone else self.part.title
        if self.part.study is None:
            return section(title, paragraph(self.part.fault, "fault"), level=2, name=name)
        return section(title, *self._parts(), level=2, name=name)

    def _parts(self) -> Iterator[str]:
        yield paragraph(self.verdict, "verdict")
        if place := student_place(self.figures, self.setting, self.part.storage):
            yield paragraph(f"Its student that is best by val: {place}")
        if not self.progress.over:
            bar = f'<progress max="{self.progress.total}" value="{self.progress.done}"></progress>'
            yield section("How far it is", bar, paragraph(self.progress.describe()))
        yield section("Final runs", *self._finals())
        yield section("Accuracy against cost", *self._cost())
        yield section("Learning curves by stage", *self._curves())
        yield section("What was searched", *searched(self.study, self.part.storage, self.about))
        yield section("Overlap patterns", *patterns(self.study, self.about["arms"]))
        yield section("Failures", *self._failures())
        yield section("What it was run on", *self._origin())

    def _finals(self) -> Iterator[str]:
        tables = final_tables(self.figures, self.setting)
        figure = finals_chart(self.figures, self.setting)
        if figure is None:
            runs = self.figures.runs
            yield paragraph("No final run is complete." if len(runs) else "There are no final runs yet.")
        else:
            caption = "Test accuracy by arm. A bar that reaches the edge goes on beyond it."
            yield plot(figure, caption)
        names: list[str] = []
        for title, cells in tables.items():
            if not title.startswith("what they cost"):
                names += map(str, cells)
                yield f"<h4>{html.escape(title.removesuffix(':'))}</h4>{table(cells)}"
        runs = self.figures.runs
        yield notes([*words.setting_notes(self.about, runs), *([column_notes(names)] if names else [])])

    def _cost(self) -> Iterator[str]:
        spent = device_seconds(self.study)
        charts = cost_charts(self.figures, self.setting, self.costs, spent)
        yield grid(plot(figure, f"Test accuracy against {what}.") for what, figure in charts.items())
        if self.costs:
            cells = cost_cells(self.costs)
            yield table(cells) + notes([text for text in (self.part.timing, column_notes(["MACs"])) if text])
        tables = {
            "trials": self.study.trials,
            "confirmations": self.study.confirmations,
            "final runs": self.study.finals,
        }
        if (figure := spent_chart(tables, self.about["arms"], STATE_WORDS)) is not None:
            yield plot(figure, "Where device seconds went, without the teacher's training.")

    def _curves(self) -> Iterator[str]:
        if (figure := accuracy_curves(self.figures, self.setting)) is not None:
            yield plot(
                figure, "Val accuracy of the final runs: mean over seeds, in a band from the lowest to the highest."
            )
        shown = []
        for title, records in self._stage_runs():
            shown.append(plot(stage_chart(records), title))
        if shown:
            text = "One run of each arm. Stages before the task stage are shaded, the darker the higher their upper tap; their "
            yield paragraph(f"{text}losses sum over other terms, so only their slopes can be compared.", "note") + grid(
                shown
            )
        if figure is None and not shown:
            yield paragraph("No run has come to its end yet.")

    def _stage_runs(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield a title and the epoch records of one run of each arm: its first final run, else its best trial."""
        done, study = complete_runs(self.figures, self.setting), self.study
        for arm in self.about["arms"]:
            finals = study.finals[(study.finals.arm == arm) & (study.finals.state == "COMPLETE")]
            finals = finals[finals.seed.isin(done.seed[done.arm == arm])].sort_values("seed")
            best = best_trials(study.trials[study.trials.arm == arm], 1)
            rows, epochs, kind = (finals, study.final_epochs, "seed") if len(finals) else (best, study.epochs, "number")
            if len(rows):
                row = rows.iloc[0]
                records = epochs[(epochs.arm == arm) & (epochs.number == row.number)]
                what = f"{arm}, {'seed' if kind == 'seed' else 'trial'} {row[kind]}: {describe_settings(row)}"
                if len(records):
                    yield clipped(what, 160), records

    def _failures(self) -> Iterator[str]:
        tables = {"trial": self.study.trials, "confirmation": self.study.confirmations, "final run": self.study.finals}
        lost = pd.concat([rows.assign(kind=kind) for kind, rows in tables.items()])
        lost = lost[(lost.state == "FAIL") | lost.error.notna()]
        if lost.empty:
            yield paragraph("None: no run failed.")
            return
        rows = []
        for (arm, kind, error), found in lost.assign(error=lost.error.fillna("")).groupby(
            ["arm", "kind", "error"], sort=False
        ):
            name = "seed" if kind == "final run" else "number"
            rows.append(
                {"arm": arm, "what": kind, "which": clipped(", ".join(map(str, found[name])), 60), "error": error}
            )
        yield paragraph(f"{len(lost)} runs failed. Tracebacks: errors.txt in the study's folder.")
        yield table(pd.DataFrame(rows[:MOST_ERRORS]))
        if len(rows) > MOST_ERRORS:
            yield paragraph(f"{len(rows) - MOST_ERRORS} more errors are not shown.", "note")

    def _origin(self) -> Iterator[str]:
        about = self.about
        lines = [f"Images: {words.describe_data(about)}.", f"Teacher: {words.describe_teacher(about)}."]
        lines.append(f"Student: {words.describe_network(about['student'])}; {words.describe_budget(about)}.")
        if reference := words.reference_arms(about):
            lines.append(f"At reference settings, not searched: {', '.join(reference)}.")
        lines += [f"{words.describe_origin(about)}.", f"Folder: {self.part.storage.path}"]
        yield "".join(map(paragraph, lines))
        if given := words.commands(about):
            yield f"<pre>{html.escape(chr(10).join(given))}</pre>"
