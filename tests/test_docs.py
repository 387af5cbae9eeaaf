"""What the documents claim is what the package prints, has and does."""

import re
from pathlib import Path
from types import ModuleType

import pytest
from conftest import load_script

ROOT = Path(__file__).parents[1]
EVIDENCE = sorted(path.parent for path in (ROOT / "docs" / "evidence").glob("*/about.json"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def build_results() -> ModuleType:
    return load_script(ROOT / "docs" / "build_results.py")


def test_the_results_page_holds_what_the_evidence_says(build_results: ModuleType) -> None:
    assert build_results.main(["--check"]) == 0


def test_every_setting_of_the_evidence_is_on_the_page(build_results: ModuleType) -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    for place, figures in build_results.load_evidence(ROOT / "docs" / "evidence").items():
        ablated = figures.about["settings"][place.partition("/")[2]]["ablations"]
        for kind in ("about", "accuracy", "speed", *(["ablations"] if ablated else [])):
            assert f"<!-- begin {kind} {place} -->" in page
        assert (ROOT / "docs" / "figures" / f"{place.replace('/', '-')}-curves.svg").exists()


def test_there_is_evidence():
    assert EVIDENCE


@pytest.mark.parametrize("folder", EVIDENCE, ids=lambda path: path.name)
def test_the_evidence_is_small_and_names_no_machines_folders(folder):
    files = [path for path in folder.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 500_000
    assert not re.search(r"/(?:home|root|tmp|work|mnt)/", (folder / "about.json").read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    names = re.findall(r"\b(?:studies|benchmarks|notebooks|docs|tests)/[\w/]+\.(?:py|md|ipynb)\b", text)
    wanted = [name for name in names if name != "studies/NAME.py"]
    assert not [name for name in wanted if not (ROOT / name).exists()]


def test_no_page_has_a_gap_left_open():
    assert not [
        page.name
        for page in PAGES
        if re.search(r"STUDY_OUTPUT|BENCH_|TODO|FIXME|SUMMARY$|TEXT$", page.read_text(), re.MULTILINE)
    ]
