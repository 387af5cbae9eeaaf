"""The script that writes the tables and plots of docs/results.md."""

import re
from pathlib import Path
from types import ModuleType

import pytest
from conftest import load_script
from made import Arm, write_study

from dfkt.analysis.figures import Figures, read_figures, save_figures

SCRIPT = Path(__file__).parents[2] / "docs" / "build_results.py"
ARMS = (
    Arm("scratch", {1: 0.80, 2: 0.81}),
    Arm("fsp", {1: 0.78, 2: None}, (("task", 0.1), ("task", 0.2))),
    Arm("dfkt", {1: 0.84, 2: 0.88}, (("flow", None), ("task", 0.7), ("task", 0.9), ("task", 0.9))),
    Arm("dfkt-joint", {1: 0.75, 2: 0.74}, parent="dfkt"),
)
NAMES = ("about first/blobs", "accuracy first/blobs", "ablations first/blobs", "speed first/blobs", "columns")
PAGE = (
    "# Results\n\n"
    + "\nbetween\n".join(f"<!-- begin {name} -->\nFORMER\n<!-- end {name} -->" for name in NAMES)
    + "\nend\n"
)


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, ARMS)
    return read_figures(folder)


@pytest.fixture
def docs(blobs: Figures, tmp_path: Path) -> Path:
    """A docs folder with a study's figures as evidence."""
    save_figures(blobs, tmp_path / "docs" / "evidence" / "first")
    (tmp_path / "docs" / "results.md").write_text(PAGE)
    return tmp_path / "docs"


def test_blocks_are_replaced_and_the_rest_stays(build: ModuleType, docs: Path) -> None:
    assert build.main(["--check"], docs) == 1
    assert build.main([], docs) == 0
    text = (docs / "results.md").read_text()

    assert "FORMER" not in text
    assert text.startswith("# Results\n\n<!-- begin about first/blobs -->\nblobs: Blobs, 90 train")
    assert "commit 8e626c2555d8; 2 cores of AMD EPYC, 24 GiB, no GPU; python 3.11.7, torch 2.15.0" in text
    assert "```\npython studies/some.py --name 'two words'\n```\n<!-- end about first/blobs -->\nbetween\n" in text
    assert "| dfkt | 2 | 86.00 ± 2.83 | +5.50 | 58 % |  |" in text
    assert "| fsp | 20.00 | never |  | never |" in text
    assert text.endswith("\n<!-- end columns -->\nend\n")
    assert build.main(["--check"], docs) == 0
    assert build.rebuild(text, build.load_evidence(docs / "evidence")) == text


def test_a_changed_number_is_found(build: ModuleType, docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = docs / "results.md"
    page.write_text(build.rebuild(PAGE, build.load_evidence(docs / "evidence")))
    assert build.main(["--check"], docs) == 0
    page.write_text(page.read_text().replace("86.00", "86.10"))

    assert build.main(["--check"], docs) == 1
    assert "86.10" in page.read_text()
    assert "not what the evidence gives" in capsys.readouterr().err


def test_plots_are_written_and_equal_ones_are_equal_files(build: ModuleType, docs: Path, blobs: Figures) -> None:
    build.main([], docs)
    first = {path.name: path.read_text() for path in (docs / "figures").iterdir()}

    assert sorted(first) == ["first-blobs-accuracy.svg", "first-blobs-curves.svg"]
    assert first["first-blobs-curves.svg"] == build.svg(build.plot_curves(blobs, "blobs"))
    assert "where scratch ends" in first["first-blobs-curves.svg"]
    assert "dc:date" not in first["first-blobs-curves.svg"]
    assert "joint" not in "".join(first.values())


def test_a_study_without_scratch_has_blocks_and_plots_too(build: ModuleType, tmp_path: Path) -> None:
    write_study(tmp_path, [Arm("kd", {1: 0.8})], teacher={})
    partial = read_figures(tmp_path)

    assert "no level to reach" in build.block("speed p/blobs", {"p/blobs": partial})
    assert "| kd | 1 | 80.00 |" in build.block("accuracy p/blobs", {"p/blobs": partial})
    assert all("</svg>" in build.svg(plot(partial, "blobs")) for plot in (build.plot_curves, build.plot_accuracy))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- begin acuracy a/b -->\n<!-- end acuracy a/b -->", "A marker must name .* but got 'acuracy a/b'"),
        ("<!-- begin speed blobs -->\n<!-- end speed blobs -->", "with one of first/blobs, but got 'speed blobs'"),
        ("<!-- begin columns -->\n", "<!-- begin columns --> has no end"),
        ("<!-- end columns -->\n", "must pair up"),
        ("<!-- begin columns -->\n<!-- end speed blobs -->", "must pair up"),
    ],
)
def test_markers_that_cannot_be_filled_are_an_error(
    build: ModuleType, docs: Path, capsys: pytest.CaptureFixture[str], page: str, message: str
) -> None:
    (docs / "results.md").write_text(page)

    assert build.main([], docs) == 2
    assert re.search(message, capsys.readouterr().err)
    assert (docs / "results.md").read_text() == page


def test_two_folders_may_have_the_same_setting(build: ModuleType, docs: Path, blobs: Figures) -> None:
    save_figures(blobs, docs / "evidence" / "second")
    evidence = build.load_evidence(docs / "evidence")

    assert sorted(evidence) == ["first/blobs", "second/blobs"]
    assert build.block("speed first/blobs", evidence) == build.block("speed second/blobs", evidence)


def test_ablations_stand_in_a_table_of_their_own(build: ModuleType, blobs: Figures) -> None:
    tables = {kind: build.block(f"{kind} p/blobs", {"p/blobs": blobs}) for kind in ("accuracy", "ablations", "speed")}
    rows = {kind: re.findall(r"^\| ([a-z-]+) \|", text, re.MULTILINE)[1:] for kind, text in tables.items()}

    assert rows == {
        "accuracy": ["scratch", "fsp", "dfkt"],
        "ablations": ["dfkt", "dfkt-joint"],
        "speed": ["scratch", "fsp", "dfkt"],
    }
