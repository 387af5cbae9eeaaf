"""What the documents claim is what the package prints, has and does."""

import ast
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from conftest import load_script

from dfkt.analysis import pages, tables
from dfkt.config import NetworkConfig
from dfkt.methods.dfkt import Dfkt, StageOrder
from dfkt.methods.patterns import FAMILIES
from dfkt.methods.registry import METHODS
from dfkt.methods.scratch import Scratch
from dfkt.students.keep import keep_student
from dfkt.study.config import ABLATIONS
from dfkt.training.run import Job, run_job

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


OWN = NetworkConfig(name="small_runs:usual_norms")


@pytest.mark.parametrize("student", [None, OWN], ids=["resnet8", "own network"])
def test_the_guides_lines_load_any_student_that_a_run_left(run_config, placement, tmp_path, monkeypatch, student):
    (code,) = re.findall(r"\*\*Using a student.*?```python\n(.*?)```", (ROOT / "docs/guide.md").read_text(), re.DOTALL)
    (folder,) = re.findall(r'load_student\("(.*)"\)', code)
    config = replace(run_config, method=Scratch(), student=student or run_config.student)
    config = replace(config, train=replace(config.train, epochs=1))
    run_job(Job(config, placement, str(tmp_path / folder), None, test=True, keep=keep_student), lambda payload: None)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)

    assert found["logits"].shape == (16, 10)
    assert set(found["names"]) <= set("0123456789")


def glossary() -> dict[str, str]:
    """Return what the glossary says, by term; an entry may explain several."""
    text = (ROOT / "docs" / "glossary.md").read_text()
    entries = re.findall(r"^- \*\*(.+?)\*\*: (.+)$", text, re.MULTILINE)
    return {term.strip(): said for terms, said in entries for term in terms.split(" · ")}


def column_titles() -> set[str]:
    """Return the names of the cells that tables are made of, as they stand in the code."""
    found: set[str] = set()
    for module in (tables, pages):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith(("_cells", "_trial", "trials_text")):
                keys = (key for inner in ast.walk(node) if isinstance(inner, ast.Dict) for key in inner.keys)
                found |= {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return found


def test_the_glossary_is_in_alphabetical_order_and_explains_every_term_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    entries = re.findall(r"^- \*\*(.+?)\*\*", text, re.MULTILINE)
    assert entries == sorted(entries, key=str.casefold)
    terms = [term.strip() for entry in entries for term in entry.split(" · ")]
    assert len(terms) == len(set(terms))
    assert len(entries) == len(re.findall(r"^- ", text, re.MULTILINE))


def test_every_title_of_a_column_is_in_the_glossary() -> None:
    titles = column_titles()
    assert {
        "test %",
        "gap closed",
        "device s",
        "less",
        "of scratch's steps",
        "training s",
        "settings",
        "trials",
    } <= titles
    titles |= {
        "best",
        *tables.COLUMN_NOTES,
        *tables.SEARCH_NOTES,
        *tables.COST_NOTES,
        *pages.STATE_WORDS.values(),
    }  # `best` is `trial` where arms share a table
    assert titles - glossary().keys() == set()


def test_every_word_of_a_method_in_a_trials_table_is_in_the_glossary() -> None:
    whole = Dfkt(pattern="sliding-2", order="local", freeze_below=True, rounds=2, weight=0.9)
    words = set(re.findall(r"[a-zA-Z][a-z-]*", re.sub(r"sliding-2", "", whole.describe())))
    assert words == {"local", "frozen", "x", "flow", "at", "task", "kd", "T"}
    wanted = {*FAMILIES, *get_args(StageOrder), *METHODS, *ABLATIONS, "frozen", "x1", "flow 0.33 at 0.1", "task at 0.1"}
    wanted |= {"kd 0.90 at T=4.0", "dense-3", "sliding-2"}
    assert wanted - glossary().keys() == set()


def test_the_readme_and_the_guide_lead_to_the_glossary() -> None:
    assert all("docs/glossary.md" in (ROOT / page).read_text() for page in ("README.md", "docs/guide.md"))
