"""A report says what there is to say, and goes on where something is missing or damaged."""

import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made import Arm, trial, write_journal, write_study

from dfkt.analysis.report import Part, report
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore, read_study

pytestmark = pytest.mark.slow
NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
DATA = {"title": "Blobs", "train": 90, "val": 10, "classes": 10, "channels": 1, "image_size": [8, 8]}
FLOW = (("flow", None), ("task", 0.7), ("task", 0.9), ("task", 0.9))
TRIALS = [("COMPLETE", 0.5), ("COMPLETE", 0.7), ("PRUNED", 0.1)]
SCRATCH = Arm("scratch", {1: 0.80, 2: 0.82}, present=[0, 1])
OURS = Arm("dfkt", {1: 0.84, 2: 0.88}, FLOW, TRIALS, planned=3, present=[0, 1])
COUNTS = {
    "teacher": {"parameters": 366_000, "macs": 9, "bytes": 9},
    "student": {"parameters": 75_000, "macs": 9, "bytes": 9},
}
WHOLE = (
    "Final runs",
    "Accuracy against cost",
    "Learning curves by stage",
    "What was searched",
    "Overlap patterns",
    "Failures",
    "What it was run on",
)


class _Outline(HTMLParser):
    """Finds titles, and whether every tag that opens closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3"):
            self.titles.append(data)


def write(folder: Path, *arms: Arm, journal: bool = True, **meta: Any) -> StudyStore:
    store = write_study(folder, arms, **{"data": DATA, "cost": COUNTS, **meta})
    if journal:
        write_journal(folder, "dfkt", [0.5, 0.7, None])
    return store


def page(*folders: Path, fault: str = "") -> str:
    parts = [Part(folder.name, Storage(folder), read_study(folder)) for folder in folders]
    parts += [Part("broken", Storage("broken"), fault=fault)] if fault else []
    return body(report(parts, NOW, "0.1.0"))


def body(text: str) -> str:
    """Return a page without plotly; its tags are checked."""
    found = text.partition("<noscript>")[0].partition("</head>")[2]
    outline = _Outline()
    outline.feed(found)
    assert outline.open == ["body"]
    return found


def titles(text: str) -> list[str]:
    outline = _Outline()
    outline.feed(text)
    return outline.titles


def words(text: str) -> str:
    return " ".join(re.sub(r"<script.*?</script>|<svg.*?</svg>|<[^>]+>", " ", text, flags=re.DOTALL).split())


def test_a_study_that_is_over_has_all_parts_and_figures(tmp_path: Path) -> None:
    write(tmp_path / "s", SCRATCH, OURS)
    text = page(tmp_path / "s")
    assert titles(text) == ["Verdict", *WHOLE]
    assert text.count('class="chart"') == 1 + 2 + 1 + 1 + 2 + 4  # finals, costs, seconds, curves, stages, Optuna's
    assert text.count('<svg class="arcs"') == 2
    assert "No difference shown: dfkt, the best by val, has 86.00 % on test" in words(text)
    assert "2 complete, 1 stopped early" in text
    assert "python studies/some.py --name &#x27;two words&#x27;" in text
    assert "None: no run failed." in text


def test_a_study_that_has_only_begun_says_how_far_it_is(tmp_path: Path) -> None:
    write(tmp_path / "s", Arm("scratch"), Arm("dfkt", planned=3), journal=False)
    text = page(tmp_path / "s")
    assert titles(text)[:3] == ["Verdict", "How far it is", "Final runs"]
    assert '<progress max="16" value="0">' in text
    said = words(text)
    assert "No verdict yet: no final run is complete." in said
    assert "There are no final runs yet." in said
    assert "No run has come to its end yet." in said
    assert "Optuna's plots need optuna.journal" in said.replace("&#x27;", "'")
    assert 'class="chart"' not in text


def test_a_running_study_has_a_verdict_so_far(tmp_path: Path) -> None:
    write(tmp_path / "s", replace(SCRATCH, present=[0, 1, 2]), OURS)
    text = words(page(tmp_path / "s"))
    assert "So far: No difference shown: dfkt" in text
    assert "7 of 8 runs done, 0 begun" in text  # a third seed of scratch is missing


def test_a_study_whose_runs_all_failed_says_why_and_draws_none(tmp_path: Path) -> None:
    store = write(
        tmp_path / "s", Arm("scratch", {1: None, 2: None}, present=[0, 1]), Arm("dfkt", planned=2), journal=False
    )
    for number in (0, 1):
        store.save("trial", "dfkt", trial(number, "dfkt", "FAIL", None) | {"error": "ValueError: <b>no</b>"})
    text = page(tmp_path / "s")
    said = words(text)
    assert "4 runs failed." in said
    assert "ValueError: &lt;b&gt;no&lt;/b&gt;" in text
    assert "dfkt trial 0, 1" in said
    assert "scratch final run 1, 2 The loss became nan" in said
    assert "No final run is complete." in said


def test_a_damaged_journal_is_said_in_its_place_and_the_page_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "s", SCRATCH, OURS)
    (tmp_path / "s" / "optuna.journal").write_bytes(b"nonsense\n")
    text = page(tmp_path / "s")
    assert "optuna.journal in" in text
    assert "is damaged: " in text
    assert titles(text) == ["Verdict", *WHOLE]
    assert text.count('class="chart"') == 7
    assert "Its best trials" in text


def test_a_journal_without_an_arm_says_so(tmp_path: Path) -> None:
    write(tmp_path / "s", SCRATCH, OURS, replace(OURS, name="other", method="dfkt"))
    assert "Optuna&#x27;s journal knows nothing of it." in page(tmp_path / "s")


def test_a_study_of_one_arm_that_was_not_searched_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "s", SCRATCH, journal=False)
    text = page(tmp_path / "s")
    said = words(text)
    assert "Nothing stands beside scratch, which has 81.00 % on test over 2 seeds" in said
    assert "No arm was searched." in said
    assert "No run whose pattern could be drawn has come to its end." in said


def test_a_search_without_final_runs_shows_its_best_trials_curve(tmp_path: Path) -> None:
    store = write(tmp_path / "s", replace(OURS, tests={}, trials=(), present=None))
    records = [
        {"index": k, "epoch": k + 1.0, "phase": "task", "step": k + 1, "loss": 0.5, "val_accuracy": 0.4}
        for k in range(2)
    ]
    store.save("trial", "dfkt", trial(0, "dfkt", "COMPLETE", 0.5), records)
    text = page(tmp_path / "s")
    assert "dfkt, trial 0: dense cumulative x1" in text
    assert '<svg class="arcs"' in text


@pytest.mark.parametrize("state", ["COMPLETE", "PRUNED"])
def test_trials_of_one_kind_make_a_page(tmp_path: Path, state: str) -> None:
    write(tmp_path / "s", replace(OURS, trials=[(state, 0.5)] * 3))
    said = words(page(tmp_path / "s"))
    assert f"3 trials: 3 {'complete' if state == 'COMPLETE' else 'stopped early'}" in said


def test_a_class_that_is_not_at_hand_is_said_and_the_others_are_drawn(tmp_path: Path) -> None:
    store = write(tmp_path / "s", SCRATCH, OURS)
    store.save("trial", "dfkt", trial(1, "dfkt", "COMPLETE", 0.9) | {"settings": '{"name": "gone.module:Own"}'})
    text = page(tmp_path / "s")
    assert "gone.module:Own" in text
    assert text.count('<svg class="arcs"') == 1


def test_a_student_that_cannot_be_built_leaves_only_the_patterns_out(tmp_path: Path) -> None:
    write(tmp_path / "s", SCRATCH, OURS, data={"title": "Blobs", "train": 90, "val": 10})
    text = page(tmp_path / "s")
    assert "They cannot be drawn: The student&#x27;s taps are not known" in text
    assert text.count('class="chart"') == 11


def test_several_studies_stand_at_a_glance_and_a_broken_one_says_so(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, SCRATCH, OURS, name=name)
    text = page(tmp_path / "one", tmp_path / "two", fault="study.json in broken is damaged: <it>")
    found = titles(text)
    assert found[0] == "All at a glance"
    assert [title for title in found if title not in WHOLE][1:] == ["one", "two", "broken"]
    assert text.count("study.json in broken is damaged: &lt;it&gt;") == 2
    assert "scratch 81.00 81.00 dfkt 86.00 * 86.00 *" in words(text)
    assert re.findall(r'href="(.*?)"', text) == ["#study-1", "#study-2", "#study-3"]


def test_words_of_a_study_are_no_tags(tmp_path: Path) -> None:
    session = {"started": "2026-11-22T15:00:36+00:00", "versions": {}, "commit": None, "dirty": None, "hardware": None}
    write(
        tmp_path / "s",
        SCRATCH,
        OURS,
        data={**DATA, "title": "<img src=x>"},
        sessions=[{**session, "command": ["a.py", "<script>x</script>"]}],
    )
    text = page(tmp_path / "s")
    assert "<img" not in text
    assert "<script>x" not in text
    assert "&lt;img src=x&gt;" in text
