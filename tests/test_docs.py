"""What the documents claim is what the package prints, has and does."""

import re
from pathlib import Path

import pytest

from dfkt.report import study_report
from dfkt.results import read_study

ROOT = Path(__file__).parents[1]
EVIDENCE = sorted(path.parent for path in (ROOT / "docs" / "evidence").glob("*/study.json"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("folder", EVIDENCE, ids=lambda path: path.name)
def test_the_results_page_holds_what_the_stored_study_says(folder):
    assert study_report(read_study(folder)) in (ROOT / "docs" / "results.md").read_text()


def test_there_is_evidence():
    assert EVIDENCE


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    names = re.findall(r"\b(?:studies|benchmarks|notebooks|docs|tests)/[\w/]+\.(?:py|md|ipynb)\b", text)
    wanted = [name for name in names if name != "studies/NAME.py"]
    assert not [name for name in wanted if not (ROOT / name).exists()]


def test_no_page_has_a_gap_left_open():
    assert not [page.name for page in PAGES if re.search(r"STUDY_OUTPUT|BENCH_|TODO|FIXME", page.read_text())]
